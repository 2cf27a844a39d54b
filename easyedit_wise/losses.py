"""The losses of an edit (WISE, Section 2.3). Pure functions of tensors.

L = L_edit + L_a [+ L_replay] [+ c L_rehearsal], all but the last as in the paper.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def edit_loss(
    logits: Tensor,
    targets: Tensor,
    sequence_ids: Tensor,
    is_first: Tensor,
    first_token_weight: float = 1.0,
    n_sequences: int | None = None,
    n_silent: int = 0,
) -> Tensor:
    """-log P_{W_v'}(y_e | x_e): mean over each sequence's target tokens, then over the sequences.

    Args:
        logits: shape (N, V), the predictions at the N target positions of the whole batch.
        targets: shape (N,), the target token at each of them.
        sequence_ids: shape (N,), which of the B sequences (numbered 0 .. B-1) a position belongs to; one
            without a position does not count.
        is_first: shape (N,), True at the first target token of a sequence.
        first_token_weight: weight of the first target token relative to the others. It decides
            whether generation starts to say the new fact; 1.0 is the paper's plain mean.
        n_sequences: B, where it is known: reading it off ``sequence_ids`` makes the host wait for the device.
        n_silent: positions of loss 0 that count in each sequence's mean, too. EasyEdit's code has one, the last token
            before the target, so a target of one token has half its loss.

    Returns:
        A scalar.
    """
    token_loss = F.cross_entropy(logits.float(), targets, reduction="none")
    weight = 1.0 + (first_token_weight - 1.0) * is_first
    if n_sequences is None:
        n_sequences = int(sequence_ids.max()) + 1 if sequence_ids.numel() else 0
    total = token_loss.new_zeros(n_sequences).index_add(0, sequence_ids, token_loss * weight)
    norm = token_loss.new_zeros(n_sequences).index_add(0, sequence_ids, weight)
    counted = norm > 0  # a context whose target left no position to predict it from says nothing
    return (total / (norm + n_silent).where(counted, 1.0)).sum() / counted.sum()


def routing_margin_loss(
    edit_scores: Tensor, irrelevant_scores: Tensor, alpha: float, beta: float, gamma: float
) -> Tensor:
    """Eq. 5: L_a = max(0, D(x_i) - alpha) + max(0, beta - D(x_e)) + max(0, gamma - (D(x_e) - D(x_i))).

    Each term is averaged over its samples, the third over all pairs (x_e, x_i).

    Args:
        edit_scores: Delta_act(x_e), shape (E,).
        irrelevant_scores: Delta_act(x_i), shape (I,).
        alpha: what irrelevant prompts must stay below.
        beta: what edits must exceed.
        gamma: by how much an edit must exceed an irrelevant prompt.

    Returns:
        A scalar.
    """
    irrelevant = F.relu(irrelevant_scores - alpha).mean()
    edits = F.relu(beta - edit_scores).mean()
    gap = F.relu(gamma - (edit_scores[:, None] - irrelevant_scores[None, :])).mean()
    return irrelevant + edits + gap


def upstream_margin_loss(
    edit_scores: Tensor, irrelevant_scores: Tensor, alpha: float, beta: float, gamma: float
) -> Tensor:
    """EasyEdit's variant of Eq. 5: every term is averaged over its *violated* samples only.

    A single violation then pulls as hard as all of them together. Shapes as in :func:`routing_margin_loss`.
    """

    def mean_of_violated(hinge: Tensor) -> Tensor:
        # Counted, not selected: how many are violated must not be known on the host.
        return F.relu(hinge).sum() / (hinge > 0).sum().clamp(min=1)

    gap = gamma - (edit_scores[None, :] - irrelevant_scores[:, None])
    return (
        mean_of_violated(irrelevant_scores - alpha)
        + mean_of_violated(beta - edit_scores)
        + mean_of_violated(gap.flatten())
    )


def replay_loss(past_scores: Tensor, alpha: float) -> Tensor:
    """Appendix B.3: max(0, Delta_act(x_m) - alpha), averaged over edits x_m that live in other memories.

    It keeps the memory in training quiet on what other memories answer (WISE-Retrieve).

    Args:
        past_scores: Delta_act(x_m) under the memory in training, shape (P,).
        alpha: what they must stay below.

    Returns:
        A scalar.
    """
    return F.relu(past_scores - alpha).mean()


def rehearsal_loss(product: Tensor, reference: Tensor, n_tokens: int) -> Tensor:
    """How much this edit disturbs earlier ones: mean over their tokens of || (dW - dW_0) a ||_2^2.

    Not in the paper: it keeps what the shard's earlier edits learned, at the price of one small
    product per iteration and no forward pass (docs/experiments.md has what it is worth). With A the earlier
    edits' activations it is || (dW - dW_0) A^T ||_F^2 / N, so any matrix B with B^T B = A^T A serves for A.

    Args:
        product: dW b of each row b, dW the memory in training, shape (R, d_out).
        reference: dW_0 b, the same memory before this edit, shape (R, d_out).
        n_tokens: N, the tokens that the R rows stand for.

    Returns:
        A scalar.
    """
    return (product - reference).square().sum() / n_tokens
