"""Memory routing: which memory answers a query (WISE, Section 2.3.1).

Pure functions of tensors. Notation: a = A(x) is the input of the edited value
matrix, dW = W_v' - W_v the side memory as a difference, B sequences of T tokens,
M side memories. Scores have the unit of the layer's output norm.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAIN_MEMORY = -1
POOLINGS = ("mean", "max", "last", "loudest")
# From so many tokens on one of them is loud by chance, so "loudest" asks for two.
LONG_TEXT = 32
# Of relative scores, what a newer memory needs of the largest. On ZsRE .85 to .7 serve edits and rephrasings alike.
NEWEST_WITHIN = 0.75
# And what it needs of the most that any competing memory sustains: over one token in so many, and at least eight
# (docs/experiments.md).
SUSTAINED_WITHIN = 0.75
_SUSTAINED_SHARE = 4
_SUSTAINED_TOKENS = 8
# Of the score of its weakest edit, what a memory takes a query for one of its own edits from.
RECOGNISED_FROM = 0.97


def routing_activation(activations: Tensor, delta_weight: Tensor) -> Tensor:
    """Eq. 3 for every token: Delta_act(x) = || A(x) (W_v' - W_v) ||_2.

    Args:
        activations: A(x), shape (..., d_in).
        delta_weight: dW, shape (d_out, d_in).

    Returns:
        Shape (...): one non-negative score per token.
    """
    return F.linear(activations, delta_weight).norm(dim=-1)


def relative_activation(product: Tensor, activations: Tensor) -> Tensor:
    """Eq. 3 as a gain: || dW a || / || a || for every token, so that no prompt scores high for being loud.

    Args:
        product: dW a, shape (..., d_out).
        activations: a = A(x), shape (..., d_in).

    Returns:
        Shape (...); 0 where a is 0.
    """
    loudness = activations.float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return product.float().norm(dim=-1) / loudness


def upstream_activation(base_output: Tensor, side_output: Tensor, hidden_act: str) -> Tensor:
    """EasyEdit's variant of Eq. 3: || act(W_v' a) - act(W_v a) ||_2 with the model's own activation.

    Args:
        base_output: W_v a, shape (..., d_out).
        side_output: W_v' a, shape (..., d_out).
        hidden_act: a name known to ``transformers.activations.ACT2FN``.

    Returns:
        Shape (...).
    """
    from transformers.activations import ACT2FN

    act = ACT2FN[hidden_act]
    return (act(side_output) - act(base_output)).norm(dim=-1)


def pool(token_scores: Tensor, token_mask: Tensor | None = None, pooling: str = "mean") -> Tensor:
    """One score per sequence from its tokens' scores; padding never counts.

    Args:
        token_scores: shape (..., T), e.g. (B, T).
        token_mask: the same shape, True (or non-zero) where a token is real; None means all are.
        pooling: "mean" (the paper's code), "max", "last" (the last real token), or "loudest": the largest, and from 32
            real tokens on the mean of the two largest.

    Returns:
        Shape (...), e.g. (B,). A sequence without any real token scores 0.

    Raises:
        ValueError: an unknown pooling.
    """
    kept, mask = _real_tokens(token_scores, token_mask)
    if pooling == "mean":
        return kept.sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)
    if pooling == "max":
        return kept.amax(dim=-1)
    if pooling == "loudest":
        two = kept.topk(min(2, kept.shape[-1]), dim=-1).values
        return torch.where(mask.sum(dim=-1) >= LONG_TEXT, two.mean(dim=-1), two[..., 0])
    if pooling == "last":
        positions = torch.arange(mask.shape[-1], device=mask.device)
        last = torch.where(mask, positions, torch.zeros_like(positions)).amax(dim=-1, keepdim=True)
        picked = token_scores.gather(-1, last).squeeze(-1)
        return torch.where(mask.any(dim=-1), picked, torch.zeros_like(picked))
    raise ValueError(f"pooling={pooling!r} is not known: choose one of {', '.join(POOLINGS)}.")


def sustained_activation(token_scores: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """The mean of a sequence's loudest quarter, of eight tokens at least: a few loud ones do not make it.

    All tokens of a shorter one would count, "The" and "is" among them, and say nothing of whose edit it is: a fact that
    was edited again would keep its former answer. So a shorter one counts as sustained in any memory.

    Args:
        token_scores: shape (..., T), e.g. (B, T).
        token_mask: the same shape, True (or non-zero) where a token is real; None means all are.

    Returns:
        Shape (...), e.g. (B,). Infinite for a sequence of fewer than eight real tokens.
    """
    kept, mask = _real_tokens(token_scores, token_mask)
    n_tokens, length = mask.sum(dim=-1), kept.shape[-1]
    if length < _SUSTAINED_TOKENS:
        return torch.full_like(kept.sum(dim=-1), math.inf)
    counted = (n_tokens // _SUSTAINED_SHARE).clamp(min=_SUSTAINED_TOKENS)
    loudest = kept.topk(max(_SUSTAINED_TOKENS, length // _SUSTAINED_SHARE), dim=-1).values
    # Not by a running sum, of which torch has no deterministic one on CUDA.
    first = torch.arange(loudest.shape[-1], device=loudest.device) < counted[..., None]
    mean = torch.where(first, loudest, torch.zeros_like(loudest)).sum(dim=-1) / counted
    return torch.where(n_tokens >= _SUSTAINED_TOKENS, mean, torch.full_like(mean, math.inf))


def _real_tokens(token_scores: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(the scores with 0 at padding, which is neutral since norms are non-negative; where tokens are real, bool)."""
    mask = torch.ones_like(token_scores, dtype=torch.bool) if token_mask is None else token_mask.to(dtype=torch.bool)
    return torch.where(mask, token_scores, torch.zeros_like(token_scores)), mask


def choose_memory(
    scores: Tensor,
    epsilon: Tensor,
    newest_within: float | None = None,
    recognised: Tensor | None = None,
    sustained: Tensor | None = None,
) -> Tensor:
    """Eq. 6 for several memories: the most active one among those above their own threshold.

    A memory is trained to be quiet on the edits of earlier ones, and they know nothing of its own. So where it
    disagrees with an earlier one about an edit of the same fact or subject, it is right as a rule, even if it scores
    less: with ``newest_within`` the last memory is chosen of those that score at least this share of the most active.

    A newer memory that merely has something in common with an earlier one's edit scores less than on an edit of its
    own. So with ``recognised`` the last memory is chosen of those that score as on their own edits; where none does,
    as above. Or it has a few tokens in common, and is loud on these alone: an edit's own memory was trained to say
    something at each of its tokens. So with ``sustained`` it has to come near the most that any of them sustains.

    Args:
        scores: shape (B, M), oldest memory first.
        epsilon: shape (M,), the threshold of each memory.
        newest_within: a share, in (0, 1]; None: the most active one (the paper's).
        recognised: shape (M,), the score from which on a memory takes a query for one of its own edits; infinite
            where that is not known. Only with ``newest_within``.
        sustained: shape (B, M), see :func:`sustained_activation`, as a share of what each memory's weakest edit
            scores; only with ``newest_within``.

    Returns:
        Shape (B,), int64: the index of the chosen side memory, or ``MAIN_MEMORY`` (-1).
    """
    if scores.shape[-1] == 0:
        return torch.full(scores.shape[:-1], MAIN_MEMORY, dtype=torch.long, device=scores.device)
    eligible = torch.where(scores > epsilon, scores, torch.full_like(scores, -math.inf))
    best, choice = eligible.max(dim=-1)
    if newest_within is not None:
        above = eligible > -math.inf
        competing = above & (eligible >= newest_within * best[..., None])
        if recognised is not None:
            own = above & (eligible >= recognised)
            competing = torch.where(own.any(dim=-1, keepdim=True), own, competing)
        if sustained is not None:
            rivals = torch.where(competing, sustained, torch.full_like(sustained, -math.inf))
            competing = competing & (rivals >= SUSTAINED_WITHIN * rivals.amax(dim=-1, keepdim=True))
        choice = newest(competing)
    return torch.where(best == -math.inf, torch.full_like(choice, MAIN_MEMORY), choice)


def newest(candidates: Tensor) -> Tensor:
    """The last memory of each row's candidates.

    Args:
        candidates: bool, shape (B, M), oldest memory first.

    Returns:
        Shape (B,), int64; ``MAIN_MEMORY`` (-1) where there is none.
    """
    places = torch.arange(candidates.shape[-1], device=candidates.device)
    return torch.where(candidates, places, MAIN_MEMORY).amax(dim=-1)
