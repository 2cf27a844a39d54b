"""Memory routing: which memory answers a query (WISE, Section 2.3.1).

Pure functions of tensors. Notation: a = A(x) is the input of the edited value
matrix, dW = W_v' - W_v the side memory as a difference, B sequences of T tokens,
M side memories. Scores have the unit of the layer's output norm.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

MAIN_MEMORY = -1
POOLINGS = ("mean", "max", "last", "loudest")
# From so many tokens on one of them is loud by chance, so "loudest" asks for two.
_LONG = 32
# The same prompt scores a little differently in another batch. A threshold keeps this share of distance from
# the scores that it is set from, else the edit that gives the minimum would exceed it only by luck.
_ROUNDING = 1e-3
# Of relative scores, what a newer memory needs of the largest. On ZsRE .85 to .7 serve edits and rephrasings alike.
NEWEST_WITHIN = 0.75
# And what it needs of the most that any competing memory sustains over so many tokens (docs/experiments.md).
SUSTAINED_WITHIN = 0.75
_SUSTAINED_TOKENS = 8
# Of the score of its weakest edit, what a memory takes a query for one of its own edits from.
RECOGNISED_FROM = 0.97
# How fast further memories grow stricter: a short stream can do with lax ones (docs/experiments.md).
SPENDING = 0.4
# Memories of which the first may stay as lax as they are.
_FEW_MEMORIES = 10
# In a longer stream the first are as strict as the memory at this share of the further ones.
_SHARE_OF_FURTHER = 0.25


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
        return torch.where(mask.sum(dim=-1) >= _LONG, two.mean(dim=-1), two[..., 0])
    if pooling == "last":
        positions = torch.arange(mask.shape[-1], device=mask.device)
        last = torch.where(mask, positions, torch.zeros_like(positions)).amax(dim=-1, keepdim=True)
        picked = token_scores.gather(-1, last).squeeze(-1)
        return torch.where(mask.any(dim=-1), picked, torch.zeros_like(picked))
    raise ValueError(f"pooling={pooling!r} is not known: choose one of {', '.join(POOLINGS)}.")


def sustained_activation(token_scores: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """The mean of a sequence's eight loudest tokens: a few loud ones do not make it.

    All tokens of a shorter one would count, "The" and "is" among them, and say nothing of whose edit it is: a fact that
    was edited again would keep its former answer. So a shorter one counts as sustained in any memory.

    Args:
        token_scores: shape (..., T), e.g. (B, T).
        token_mask: the same shape, True (or non-zero) where a token is real; None means all are.

    Returns:
        Shape (...), e.g. (B,). Infinite for a sequence of fewer than eight real tokens.
    """
    kept, mask = _real_tokens(token_scores, token_mask)
    loudest = kept.topk(min(_SUSTAINED_TOKENS, kept.shape[-1]), dim=-1).values
    mean = loudest.sum(dim=-1) / _SUSTAINED_TOKENS
    return torch.where(mask.sum(dim=-1) >= _SUSTAINED_TOKENS, mean, torch.full_like(mean, math.inf))


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


def minimum_threshold(edit_scores: Sequence[float], act_ratio: float = 1.0) -> float:
    """The paper's threshold: epsilon = min over the edits of Delta_act(x_e), times EasyEdit's ``act_ratio``.

    The paper has no ratio (1.0); EasyEdit's YAML files have one that is tuned per model. The result lies a
    thousandth lower, so that the weakest edit exceeds it whatever batch it is asked in.

    Raises:
        ValueError: there is no edit score.
    """
    if not len(edit_scores):
        raise ValueError("epsilon is a minimum over the edits' scores, and there is none: edit first.")
    return float(act_ratio) * float(min(edit_scores)) * (1 - _ROUNDING)


def spent_position(position: float, n_earlier: int, spending: float = SPENDING) -> float:
    """Where in its gap the threshold of one more memory lies, so that many memories do not let more prompts fire.

    An unrelated prompt fires if any of the memories lets it, so each further one has to be stricter than the one
    before, as in sequential testing, where every test spends less of what may go wrong in all of them together
    ("alpha spending"). The distance to the edits' side shrinks with the number of memories to a negative power.

    Args:
        position: of the first memory, in [0, 1], see :func:`calibrated_threshold`.
        n_earlier: memories that are there already.
        spending: the power, but for its sign; 0: all are alike.

    Raises:
        ValueError: a negative number of memories.
    """
    if n_earlier < 0:
        raise ValueError(f"n_earlier={n_earlier}: a memory cannot have fewer than no others before it.")
    return 1.0 - (1.0 - position) * (1.0 + n_earlier) ** -spending


def strictness(place: int, n_memories: int) -> int:
    """How many memories stand before one, for :func:`spent_position`, or as if they stood before it.

    The first memory of a hundred lets no fewer unrelated prompts fire than the first of ten. Nobody knows how long a
    stream will be when it begins; so the first ones grow stricter as more follow.

    Args:
        place: how many memories are before it.
        n_memories: how many there are by now.
    """
    return max(place, int(_SHARE_OF_FURTHER * max(0, n_memories - _FEW_MEMORIES)))


def stricter_threshold(
    epsilon: float, weakest_edit: float, was: int, shall_be: int, spending: float = SPENDING
) -> float:
    """A threshold moved towards its edits' side, from the position at one number of memories to that at another.

    Args:
        epsilon: the threshold.
        weakest_edit: the edits' side of its gap. Where epsilon exceeds it, or it is infinite, nothing is changed.
        was: the memories before it, as which epsilon was set, see :func:`strictness`.
        shall_be: at least as many.
        spending: see :func:`spent_position`.
    """
    distance = weakest_edit - epsilon
    if was == shall_be or not 0.0 < distance < math.inf:
        return epsilon
    return weakest_edit - distance * ((1.0 + was) / (1.0 + shall_be)) ** spending


def calibrated_threshold(
    edit_scores: Sequence[float], irrelevant_scores: Sequence[float], position: float = 0.5
) -> float:
    """A threshold nobody tunes: between what irrelevant prompts score and what the edits score.

    With separated scores epsilon = max(irrelevant) + position * (min(edits) - max(irrelevant)).
    Where they overlap, it is the threshold with the fewest errors, each side weighted by its own
    count (the maximum of Youden's J), so one odd prompt does not move it far.

    Args:
        edit_scores: Delta_act(x_e) of the edits' prompts.
        irrelevant_scores: Delta_act(x_i) of irrelevant prompts.
        position: 0 sits on the irrelevant side of the gap, 1 on the edits' side, both with a thousandth to spare.

    Raises:
        ValueError: there is no edit score, or position is outside [0, 1].
    """
    if not 0.0 <= position <= 1.0:
        raise ValueError(f"position={position} is outside [0, 1]: 0 is the irrelevant side of the gap.")
    if not len(edit_scores):
        raise ValueError("epsilon separates edits from irrelevant prompts, and there is no edit: edit first.")
    edits = sorted(float(score) for score in edit_scores)
    irrelevant = sorted(float(score) for score in irrelevant_scores) or [0.0]
    low, high = irrelevant[-1], edits[0]
    if low < high:
        middle = (low + high) / 2
        nearest_low, nearest_high = min(low * (1 + _ROUNDING), middle), max(high * (1 - _ROUNDING), middle)
        return min(max(low + position * (high - low), nearest_low), nearest_high)
    levels = sorted({*edits, *irrelevant})
    candidates = [levels[0] / 2, *((low + high) / 2 for low, high in pairwise(levels))]

    def separation(threshold: float) -> float:
        fired = 1 - bisect_right(edits, threshold) / len(edits)
        false_fires = 1 - bisect_right(irrelevant, threshold) / len(irrelevant)
        return fired - false_fires

    # Ties go to the lower threshold: an edit that does not fire is an edit that was lost.
    return max(candidates, key=lambda threshold: (separation(threshold), -threshold))
