"""Train edits of a consolidated shard by steepest descent in the least-squares problem's own norm.

A gradient step on dW that the quiet side of the problem lets through goes along G K^-1, K = A_u^T A_u + lambda I over
the tokens that shall get nothing: what they have in common is divided out, so an edit ends up in what is its own,
its subject above all. Every such step is a combination of the edit's own tokens,

    dW = sum_t z_t (K^-1 a_t)^T,   hence   dW a_s = sum_t k_st z_t,   k_st = a_s^T K^-1 a_t,

so no matrix of the layer's size is trained: the variables are z, one vector a token, and the products need only the
N x N matrix of k. The step is divided by the largest change that it makes to any token's output, which makes it a share
of the layer's own output whatever the loss, the layer or K are. Not in the paper, whose steps go along G.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hparams import WISEHyperParams
from ..least_squares import NormalEquations
from ..losses import edit_loss
from .loss_record import LossRecord
from .task import EditTask, target_positions
from .trainer import EditDivergedError, EditOutcome, diverged


@dataclass(frozen=True)
class SteepestOutcome:
    """What training gave.

    Attributes:
        outputs: for each group of contexts y_t = dW a_t of its tokens, shape (N_g, d_out).
        losses: L_edit of every iteration and Delta_act of the last one's contexts; without dW, which is not formed.
    """

    outputs: list[Tensor]
    losses: EditOutcome


def kernel(activations: Tensor, quiet: NormalEquations) -> Tensor:
    """k_st = a_s^T K^-1 a_t, shape (N, N), of tokens A(x), shape (N, d_in), over the shard's columns.

    Raises:
        ValueError: nothing is to be quiet.
    """
    own = activations[:, quiet.columns].to(quiet.quiet.dtype)
    return own @ torch.cholesky_solve(own.T, quiet.quiet_factor())


def train_steepest(
    quiet: NormalEquations,
    d_out: int,
    task: EditTask,
    hparams: WISEHyperParams,
    step: float,
    label: str = "this edit",
    on_iteration: Callable[[int, float], None] | None = None,
) -> SteepestOutcome:
    """Minimise L_edit of a task from dW = 0.

    Args:
        quiet: what shall get nothing, the task's own irrelevant prompts among it.
        d_out: components of the layer's output.
        task: the recorded edit, or edits: the loss is then the mean of theirs.
        hparams: settings.
        step: by how much the first iteration may change the output of any one token, in the output's unit.
        label: what an error calls the edit.
        on_iteration: called with the iteration and its loss.

    Raises:
        EditDivergedError: the loss became NaN or infinite.
        ValueError: nothing is to be quiet.
    """
    with torch.no_grad():
        products = kernel(torch.cat([group.activations for group in task.contexts]), quiet)
    tokens = products.split([len(group.activations) for group in task.contexts])
    supervised = [target_positions(group.batch, hparams) for group in task.contexts]
    z = products.new_zeros(len(products), d_out)
    own = z.split([len(rows) for rows in tokens])  # views: one block for each group
    record = LossRecord(
        hparams.n_iter, len(tokens), hparams.early_stop_loss, hparams.early_stop_change, z.device, on_iteration
    )
    scores = z.new_zeros(0)
    try:
        for iteration in range(hparams.n_iter):
            index = iteration % len(tokens)
            group, (positions, targets, is_first) = task.contexts[index], supervised[index]
            product = (tokens[index] @ z).requires_grad_(True)
            logits = group.logits(product, positions)
            n_sequences = len(group.batch.input_ids)
            loss = edit_loss(logits, targets, positions[0], is_first, hparams.first_token_weight, n_sequences)
            (gradient,) = torch.autograd.grad(loss, [product])
            if hparams.unfinished_names:  # what is said there is what follows from the name, and from the target
                gradient = torch.where(group.beside[:, None], 0.0, gradient)
            scores = group.scores(product.detach(), hparams)[0]
            record.add(loss.detach(), loss.detach())
            if record.stopped():
                break
            share = 1 - (1 - hparams.lr_end) * iteration / max(1, hparams.n_iter - 1)
            _descend(own[index], tokens[index], gradient, step * share, record)
        record.finish()
        outputs = [rows @ z for rows in tokens]
        if not all(bool(torch.isfinite(one).all()) for one in outputs):
            raise FloatingPointError(float("nan"))
    except FloatingPointError as error:
        raise EditDivergedError(diverged(label, error.args[0], len(record.losses), hparams)) from None
    return SteepestOutcome(outputs, EditOutcome(None, record.losses, record.edit_losses, scores.tolist()))


@torch.no_grad()
def _descend(own: Tensor, rows: Tensor, gradient: Tensor, step: float, record: LossRecord) -> None:
    """z_t <- z_t - eta g_t for the group's own tokens, so that the largest change of a token's output is ``step``.

    Args:
        own: their z, shape (N_g, d_out), changed in place.
        rows: their rows of the kernel, shape (N_g, N); symmetric, so they are also all tokens' change.
        gradient: of L_edit with respect to their outputs, shape (N_g, d_out).
        step: the largest change.
        record: once it is settled nothing moves.
    """
    largest = (rows.T @ gradient).norm(dim=-1).amax()
    tiny = torch.finfo(gradient.dtype).tiny
    eta = torch.where(record.settled, torch.zeros_like(largest), step / largest.clamp(min=tiny))
    own.sub_(gradient * eta)
