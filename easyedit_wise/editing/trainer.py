"""Train one edit into the live shard (WISE, Section 2.3.2 and Algorithm 1).

Nothing here touches the model: training works on a copy of the shard's dW and returns
it, so an edit that fails leaves everything as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

    def __len__(self) -> int:
        return self.activations.shape[0]

    def select(self, rows: Tensor) -> ScoredInputs:
        """Some of the prompts, by index."""
        base = None if self.base_output is None else self.base_output[rows]
        return ScoredInputs(self.activations[rows], self.token_mask[rows], base)

    @staticmethod
    def stack(inputs: Sequence[ScoredInputs]) -> ScoredInputs:
        """All prompts as one batch, padded on the left, so that they are scored in one product.

        Raises:
            ValueError: there are none.
        """
        if not inputs:
            raise ValueError("there are no prompts to score.")
        length = max(one.activations.shape[1] for one in inputs)

        def padded(values: Tensor) -> Tensor:
            missing = length - values.shape[1]
            return F.pad(values, (0, 0) * (values.dim() - 2) + (missing, 0)) if missing else values

        bases = [one.base_output for one in inputs if one.base_output is not None]
        return ScoredInputs(
            torch.cat([padded(one.activations) for one in inputs]),
            torch.cat([padded(one.token_mask) for one in inputs]),
            torch.cat([padded(base) for base in bases]) if len(bases) == len(inputs) else None,
        )

    def scores(self, delta_weight: Tensor, hparams: WISEHyperParams) -> Tensor:
        """Delta_act of each sequence, shape (B,)."""
        product = F.linear(self.activations.to(delta_weight), delta_weight)
        return pooled_scores(product, self.base_output, self.token_mask.to(product.device), hparams)


def pooled_scores(product: Tensor, base_output: Tensor | None, token_mask: Tensor, hparams: WISEHyperParams) -> Tensor:
    """Delta_act of each sequence from dW a, shape (B, T, d_out) -> (B,)."""
    if hparams.score_activation is None or base_output is None:
        token_scores = _safe_norm(product)
    else:
        base = base_output.to(product)
        token_scores = upstream_activation(base, base + product, hparams.score_activation)
    return pool(token_scores, token_mask, hparams.pooling)


def _safe_norm(product: Tensor) -> Tensor:
    # The norm's gradient at exactly zero is undefined (a fresh shard is zero): keep it finite.
    return (product.square().sum(dim=-1) + 1e-12).sqrt()


@dataclass(frozen=True)
class RecordedContexts:
    """Some contexts of one edit, the plain prompt first: their tokens, and what precedes the side memory."""

    batch: TokenBatch
    prefix: FrozenPrefix


@dataclass
class EditTask:
    """Everything one edit trains on, recorded once.

    Attributes:
        contexts: the contexts in groups; the iterations take turns through them.
        irrelevant: x_i of Eq. 5.
        past: x_m of Appendix B.3, edits that other memories hold, or None.
        earlier: A(x) of the shard's earlier edits, shape (N, d_in), or None.
    """

    contexts: list[RecordedContexts]
    irrelevant: ScoredInputs
    past: ScoredInputs | None = None
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
    supervised = [target_positions(recorded.batch, hparams) for recorded in task.contexts]
    losses: list[float] = []
    edit_losses: list[float] = []
    scores = trained.new_zeros(0)
    for iteration in range(hparams.n_iter):
        group = iteration % len(task.contexts)
        recorded, (positions, targets, is_first) = task.contexts[group], supervised[group]
        base_output = recorded.prefix.layer_output
        product = F.linear(recorded.prefix.layer_input.to(trained.dtype), trained)
        logits = recorded.prefix.replay(base_output + product.to(base_output.dtype), positions)
        loss_edit = edit_loss(logits, targets, positions[0], is_first, hparams.first_token_weight)
        scores, others = in_and_out_of_scope(product, base_output, recorded.batch, hparams)
        loss = loss_edit + _memory_losses(trained, reference, scores, others, task, hparams)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise EditDivergedError(_diverged(label, value, iteration + 1, hparams))
        losses.append(value)
        edit_losses.append(float(loss_edit.detach()))
        if on_iteration is not None:
            on_iteration(iteration, value)
        if _settled(losses, len(task.contexts), hparams):
            break
        # The gradient of dW alone: a base model that happens to be trainable gets none.
        (gradient,) = torch.autograd.grad(loss, [trained])
        trained.grad = gradient.mul_(mask)
        optimizer.step()
        with torch.no_grad():
            if hparams.norm_constraint is not None:
                trained.clamp_(-hparams.norm_constraint, hparams.norm_constraint)
            # Weight decay and the clamp act everywhere; outside the mask they must not.
            trained.copy_(torch.where(mask, trained, reference))
    if not torch.isfinite(trained).all():  # the last step has no loss of its own that would show it
        raise EditDivergedError(_diverged(label, float("nan"), len(losses), hparams))
    return EditOutcome(trained.detach(), losses, edit_losses, scores.detach().tolist())


def target_positions(batch: TokenBatch, hparams: WISEHyperParams) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
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


def in_and_out_of_scope(
    product: Tensor, base_output: Tensor | None, batch: TokenBatch, hparams: WISEHyperParams
) -> tuple[Tensor, Tensor]:
    """Which tokens of an edit's own contexts shall activate the memory, and which shall not.

    With ``subject_routing`` and a known subject, its tokens shall and the prompt's other tokens shall
    not, so that the memory answers wherever the subject is mentioned, however the question is put, and
    not to the same question about another one. (EasyEdit does so for requests whose irrelevant prompt
    is part of the prompt.) Otherwise the whole prompt shall.

    Returns:
        (Delta_act(x_e) of each context, shape (B,); what counts as irrelevant, shape (B,) or (0,)).
    """
    subject = batch.subject_mask if hparams.subject_routing else None
    if subject is None:
        return pooled_scores(product, base_output, batch.prompt_mask, hparams), product.new_zeros(0)
    return (
        pooled_scores(product, base_output, subject, hparams),
        pooled_scores(product, base_output, batch.prompt_mask & ~subject, hparams),
    )


def _memory_losses(
    trained: Tensor,
    reference: Tensor,
    edit_scores: Tensor,
    other_scores: Tensor,
    task: EditTask,
    hparams: WISEHyperParams,
) -> Tensor:
    """L_a (Eq. 5), plus L_replay (Appendix B.3) and rehearsal where they are on."""
    margin = upstream_margin_loss if hparams.margin_over_violated else routing_margin_loss
    irrelevant_scores = torch.cat([task.irrelevant.scores(trained, hparams), other_scores])
    loss = margin(edit_scores, irrelevant_scores, hparams.alpha, hparams.beta, hparams.gamma)
    if task.past is not None:
        loss = loss + replay_loss(task.past.scores(trained, hparams), hparams.alpha)
    if task.earlier is not None and hparams.rehearsal > 0:
        loss = loss + hparams.rehearsal * rehearsal_loss(trained, reference, task.earlier.to(trained.dtype))
    return loss


def _diverged(label: str, value: float, iteration: int, hparams: WISEHyperParams) -> str:
    return (
        f"the loss of {label} became {value} in iteration {iteration} of {hparams.n_iter}: the edit was taken back and "
        f"earlier edits are as they were. Lower edit_lr (now {hparams.edit_lr})."
    )


def _optimizer(parameter: Tensor, hparams: WISEHyperParams) -> torch.optim.Optimizer:
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[hparams.optimizer]
    return kind([parameter], lr=hparams.edit_lr, weight_decay=hparams.weight_decay)


def _settled(losses: list[float], n_groups: int, hparams: WISEHyperParams) -> bool:
    """EasyEdit's early stop, over one turn through the groups: the loss is small and has stopped to change."""
    last = losses[-n_groups:]
    return (
        len(losses) > n_groups
        and max(last) <= hparams.early_stop_loss
        and abs(losses[-1] - losses[-1 - n_groups]) <= hparams.early_stop_change
    )
