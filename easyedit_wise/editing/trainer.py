"""Train one edit into the live shard (WISE, Section 2.3.2 and Algorithm 1).

Nothing here touches the model: training works on a copy of the shard's dW and returns
it, so an edit that fails leaves everything as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hparams import WISEHyperParams
from ..losses import edit_loss, rehearsal_loss, replay_loss, routing_margin_loss, upstream_margin_loss
from ..routing import pool, upstream_activation
from .frozen_prefix import FrozenPrefix
from .requests import TokenBatch


class EditDivergedError(RuntimeError):
    """The loss of an edit became NaN or infinite; nothing of the edit was kept."""


@dataclass(frozen=True)
class ScoredInputs:
    """Prompts as the router sees them at the layer.

    Attributes:
        activations: A(x), shape (B, T, d_in).
        base_output: W_v a, shape (B, T, d_out); only EasyEdit's score needs it.
        token_mask: shape (B, T), True on real prompt tokens.
    """

    activations: Tensor
    token_mask: Tensor
    base_output: Tensor | None = None

    def scores(self, delta_weight: Tensor, hparams: WISEHyperParams) -> Tensor:
        """Delta_act of each sequence, shape (B,)."""
        product = F.linear(self.activations.to(delta_weight.dtype), delta_weight)
        return pooled_scores(product, self.base_output, self.token_mask, hparams)


def pooled_scores(
    product: Tensor, base_output: Tensor | None, token_mask: Tensor, hparams: WISEHyperParams
) -> Tensor:
    """Delta_act of each sequence from dW a, shape (B, T, d_out) -> (B,)."""
    if hparams.score_activation is None or base_output is None:
        token_scores = _safe_norm(product)
    else:
        base = base_output.to(product.dtype)
        token_scores = upstream_activation(base, base + product, hparams.score_activation)
    return pool(token_scores, token_mask, hparams.pooling)


def _safe_norm(product: Tensor) -> Tensor:
    # The norm's gradient at exactly zero is undefined (a fresh shard is zero): keep it finite.
    return (product.square().sum(dim=-1) + 1e-12).sqrt()


@dataclass
class EditTask:
    """Everything one edit trains on, recorded once.

    Attributes:
        prefix: the recorded batch of contexts.
        batch: its tokens.
        irrelevant: x_i of Eq. 5.
        past: x_m of Appendix B.3, edits that other memories hold, or None.
        earlier: A(x) of the shard's earlier edits, shape (N, d_in), or None.
    """

    prefix: FrozenPrefix
    batch: TokenBatch
    irrelevant: list[ScoredInputs]
    past: list[ScoredInputs] = field(default_factory=list)
    earlier: Tensor | None = None


@dataclass(frozen=True)
class EditOutcome:
    """What training one edit gave.

    Attributes:
        delta_weight: the shard's new dW, shape (d_out, d_in).
        losses: the total loss of every iteration.
        edit_losses: L_edit of every iteration.
        edit_scores: Delta_act(x_e) of each context at the last iteration.
    """

    delta_weight: Tensor
    losses: list[float]
    edit_losses: list[float]
    edit_scores: list[float]


def train_edit(
    delta_weight: Tensor,
    mask: Tensor,
    task: EditTask,
    hparams: WISEHyperParams,
    label: str = "this edit",
    on_iteration: Callable[[int, float], None] | None = None,
) -> EditOutcome:
    """Eq. 7: W' <- W' - eta (M o g) until the edit holds; nothing outside the mask moves, ever.

    Args:
        delta_weight: dW of the live shard, shape (d_out, d_in); not written to.
        mask: M, bool, same shape.
        task: the recorded edit.
        hparams: settings.
        label: what an error calls the edit.
        on_iteration: called with the iteration and its loss.

    Raises:
        EditDivergedError: the loss became NaN or infinite.
    """
    reference = delta_weight.detach()
    trained = reference.clone().requires_grad_(True)
    optimizer = _optimizer(trained, hparams)
    base_output, activations = task.prefix.layer_output, task.prefix.layer_input.to(trained.dtype)
    positions, targets, is_first = target_positions(task.batch, hparams)
    losses: list[float] = []
    edit_losses: list[float] = []
    scores = trained.new_zeros(0)
    for iteration in range(hparams.n_iter):
        product = F.linear(activations, trained)
        logits = task.prefix.replay(base_output + product.to(base_output.dtype), positions)
        loss_edit = edit_loss(logits, targets, positions[0], is_first, hparams.first_token_weight)
        scores = pooled_scores(product, base_output, task.batch.prompt_mask, hparams)
        loss = loss_edit + _memory_losses(trained, reference, scores, task, hparams)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise EditDivergedError(
                f"the loss of {label} became {value} in iteration {iteration + 1} of {hparams.n_iter}: the edit was "
                f"taken back and earlier edits are as they were. Lower edit_lr (now {hparams.edit_lr})."
            )
        losses.append(value)
        edit_losses.append(float(loss_edit.detach()))
        if on_iteration is not None:
            on_iteration(iteration, value)
        if _settled(losses, hparams):
            break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if trained.grad is not None:
            trained.grad.mul_(mask)
        optimizer.step()
        if hparams.norm_constraint is not None:
            with torch.no_grad():
                trained.clamp_(-hparams.norm_constraint, hparams.norm_constraint)
    return EditOutcome(trained.detach(), losses, edit_losses, scores.detach().tolist())


def target_positions(
    batch: TokenBatch, hparams: WISEHyperParams
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Where the supervised tokens are predicted.

    Returns:
        ((rows, columns), targets, is_first), each of shape (N,): the logits at (row, column) predict
        the target; ``is_first`` marks the first supervised token of each sequence.
    """
    supervised = batch.target_mask
    if hparams.objective_optimization == "prompt_and_label":
        supervised = supervised | batch.prompt_mask
    # The first real token of a sequence has nothing before it that could predict it.
    predicted = supervised[:, 1:] & batch.attention_mask[:, :-1].bool()
    rows, columns = predicted.nonzero(as_tuple=True)
    is_target = batch.target_mask[:, 1:][rows, columns]
    first_target = is_target & ~batch.target_mask[rows, columns]
    return (rows, columns), batch.input_ids[rows, columns + 1], first_target


def _memory_losses(
    trained: Tensor, reference: Tensor, edit_scores: Tensor, task: EditTask, hparams: WISEHyperParams
) -> Tensor:
    """L_a (Eq. 5), plus L_replay (Appendix B.3) and rehearsal where they are on."""
    margin = upstream_margin_loss if hparams.margin_over_violated else routing_margin_loss
    irrelevant = torch.cat([inputs.scores(trained, hparams) for inputs in task.irrelevant])
    loss = margin(edit_scores, irrelevant, hparams.alpha, hparams.beta, hparams.gamma)
    if task.past:
        past = torch.cat([inputs.scores(trained, hparams) for inputs in task.past])
        loss = loss + replay_loss(past, hparams.alpha)
    if task.earlier is not None and hparams.rehearsal > 0:
        loss = loss + hparams.rehearsal * rehearsal_loss(trained, reference, task.earlier.to(trained.dtype))
    return loss


def _optimizer(parameter: Tensor, hparams: WISEHyperParams) -> torch.optim.Optimizer:
    if hparams.optimizer == "adam":
        return torch.optim.Adam([parameter], lr=hparams.edit_lr, weight_decay=hparams.weight_decay)
    return torch.optim.SGD([parameter], lr=hparams.edit_lr, weight_decay=hparams.weight_decay)


def _settled(losses: list[float], hparams: WISEHyperParams) -> bool:
    """EasyEdit's early stop: the loss is small and has stopped to change."""
    return (
        len(losses) > 1
        and abs(losses[-1] - losses[-2]) <= hparams.early_stop_change
        and losses[-1] <= hparams.early_stop_loss
    )
