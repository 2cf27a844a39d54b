"""Train edits into the live shard (WISE, Section 2.3.2 and Algorithm 1).

Nothing here touches the model but, if asked to, the shard's own dW.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hparams import WISEHyperParams
from ..losses import edit_loss, rehearsal_loss, replay_loss, routing_margin_loss, upstream_margin_loss
from .loss_record import LossRecord
from .optimizers import optimizer_for
from .subspace import Subspace
from .task import EditTask, target_positions
from .whole_matrix import WholeMatrix


class EditDivergedError(RuntimeError):
    """The loss of an edit became NaN or infinite; nothing of the edit was kept."""


@dataclass(frozen=True)
class EditOutcome:
    """What training gave.

    Attributes:
        delta_weight: the shard's dW, shape (d_out, d_in); of a stream the live one, which its next edits change, or
            None in what :meth:`EditStream.apply` returns.
        losses: the total loss of every iteration; of the whole batch, where edits were trained together.
        edit_losses: L_edit of every iteration, likewise.
        edit_scores: Delta_act(x_e) of each context at the last iteration, edit by edit.
    """

    delta_weight: Tensor | None
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
    record: LossRecord | None = None,
    in_place: bool = False,
) -> EditOutcome:
    """Eq. 7: W' <- W' - eta (M o g) until the edits of the task hold.

    Nothing outside the mask moves, ever, unless the settings say that the whole matrix decays.

    Args:
        delta_weight: dW of the live shard, shape (d_out, d_in).
        mask: M, bool, same shape.
        task: the recorded edit, or edits: the loss is then the mean of theirs.
        hparams: settings.
        label: what an error calls the edit.
        on_iteration: called with the iteration and its loss.
        record: where the losses are kept; None: a new one.
        in_place: write to ``delta_weight`` itself, which saves a matrix; if anything is raised, the caller has to
            put it back. Where the whole matrix decays it is left alone.

    Raises:
        EditDivergedError: the loss became NaN or infinite.
        ValueError: the whole matrix shall decay, but the task does not have it.
    """
    subspace = _trained(delta_weight, mask, task, hparams, in_place)
    record = record or LossRecord(
        hparams.n_iter,
        len(task.contexts),
        hparams.early_stop_loss,
        hparams.early_stop_change,
        subspace.theta.device,
        on_iteration,
        patience=hparams.early_stop_patience,
    )
    try:
        scores = _iterate(subspace, task, hparams, record)
        if not torch.isfinite(subspace.theta).all():  # the last step has no loss of its own that would show it
            raise FloatingPointError(float("nan"))
    except FloatingPointError as error:
        raise EditDivergedError(diverged(label, error.args[0], len(record.losses), hparams)) from None
    return EditOutcome(subspace.matrix, record.losses, record.edit_losses, scores.tolist())


def _trained(
    delta_weight: Tensor, mask: Tensor, task: EditTask, hparams: WISEHyperParams, in_place: bool
) -> Subspace | WholeMatrix:
    """What the optimiser moves: the masked entries, or EasyEdit's whole matrix."""
    if not hparams.decay_whole_matrix:
        return Subspace(delta_weight, mask, in_place)
    if task.base_weight is None:
        raise ValueError("decay_whole_matrix is on, but the task has no base_weight: hand over the layer's own W.")
    return WholeMatrix(delta_weight, mask, task.base_weight)


def _iterate(subspace: Subspace | WholeMatrix, task: EditTask, hparams: WISEHyperParams, record: LossRecord) -> Tensor:
    """The iterations; Delta_act(x_e) of the last one's contexts."""
    theta = subspace.theta
    optimizer, schedule = optimizer_for(theta, hparams)
    supervised = [target_positions(recorded.batch, hparams) for recorded in task.contexts]
    earlier = _rehearsal_reference(subspace, task, hparams)
    beside = _products_beside(task, theta.dtype)
    scores = theta.new_zeros(0)
    for iteration in range(hparams.n_iter):
        group = iteration % len(task.contexts)
        recorded, (positions, targets, is_first) = task.contexts[group], supervised[group]
        product, *others = subspace.products(recorded.activations, *beside.values())
        given = dict(zip(beside, others, strict=True))
        logits = recorded.logits(product, positions)
        n_sequences, n_silent = len(recorded.batch.input_ids), int(recorded.batch.pads_count)
        loss_edit = edit_loss(
            logits, targets, positions[0], is_first, hparams.first_token_weight, n_sequences, n_silent
        )
        scores, out_of_scope = recorded.scores(product, hparams)
        loss = loss_edit
        irrelevant = task.irrelevant.pooled(given["irrelevant"], hparams)
        loss = loss + routing_loss(scores, irrelevant, out_of_scope, task, hparams)
        if task.past is not None and "past" in given:
            loss = loss + replay_loss(task.past.pooled(given["past"], hparams) / task.unit, hparams.alpha)
        if task.earlier is not None and earlier is not None:
            moved = rehearsal_loss(given["earlier"], earlier, task.earlier.n_tokens) / task.unit**2
            loss = loss + hparams.rehearsal * moved
        record.add(loss, loss_edit)
        if record.stopped():
            break
        # The gradient of dW alone: a base model that happens to be trainable gets none.
        theta.grad = subspace.masked(torch.autograd.grad(loss, [theta])[0])
        _step(optimizer, subspace, hparams, record)
        schedule.step()
        subspace.write()
    record.finish()
    return scores.detach()


def routing_loss(
    edit_scores: Tensor,
    irrelevant_scores: Tensor,
    out_of_scope: Tensor | None,
    task: EditTask,
    hparams: WISEHyperParams,
) -> Tensor:
    """L_a (Eq. 5): the mean over the edits of the margin loss between each edit's contexts and its irrelevant prompts.

    Args:
        edit_scores: Delta_act(x_e) of all contexts, edit by edit, shape (B,).
        irrelevant_scores: Delta_act(x_i) of the task's irrelevant prompts, shape (I,).
        out_of_scope: scores of parts of the contexts that count as irrelevant, shape (B,), or None.
        task: which irrelevant prompt is whose.
        hparams: settings.

    Returns:
        A scalar.
    """
    margin = upstream_margin_loss if hparams.margin_over_violated else routing_margin_loss
    loss = edit_scores.new_zeros(())
    edit_scores, irrelevant_scores = edit_scores / task.unit, irrelevant_scores / task.unit
    out_of_scope = None if out_of_scope is None else out_of_scope / task.unit
    for index, own in enumerate(edit_scores.chunk(task.n_edits)):
        others = irrelevant_scores if task.irrelevant_of is None else irrelevant_scores[task.irrelevant_of[index]]
        if out_of_scope is not None:
            others = torch.cat([others, out_of_scope.chunk(task.n_edits)[index]])
        loss = loss + margin(own, others, hparams.alpha, hparams.beta, hparams.gamma)
    return loss / task.n_edits


def _products_beside(task: EditTask, dtype: torch.dtype) -> dict[str, Tensor]:
    """What dW is applied to in every iteration beside the contexts."""
    inputs = {"irrelevant": task.irrelevant.activations}
    if task.past is not None:
        inputs["past"] = task.past.activations
    if task.earlier is not None:
        inputs["earlier"] = task.earlier.rows
    return {name: values.to(dtype) for name, values in inputs.items()}


@torch.no_grad()
def _rehearsal_reference(subspace: Subspace | WholeMatrix, task: EditTask, hparams: WISEHyperParams) -> Tensor | None:
    """dW_0 b of the shard's earlier edits, shape (R, d_out); None without rehearsal."""
    if task.earlier is None or hparams.rehearsal <= 0:
        return None
    return task.earlier.rows.to(subspace.matrix.dtype) @ subspace.matrix.T


@torch.no_grad()
def _step(
    optimizer: torch.optim.Optimizer,
    subspace: Subspace | WholeMatrix,
    hparams: WISEHyperParams,
    record: LossRecord,
) -> None:
    theta = subspace.theta
    before = theta.clone() if record.reads_late else None
    optimizer.step()
    if hparams.norm_constraint is not None:
        subspace.clamp(hparams.norm_constraint)
    if before is not None:
        theta.copy_(torch.where(record.settled, before, theta))


def diverged(label: str, value: float, iteration: int, hparams: WISEHyperParams) -> str:
    """What an :class:`EditDivergedError` says."""
    return (
        f"the loss of {label} became {value} in iteration {iteration} of {hparams.n_iter}: the edit was taken back and "
        f"earlier edits are as they were. Lower edit_lr (now {hparams.edit_lr})."
    )
