"""How often a memory's problem is asked for what its edits lack: as often as they need it.

The least-squares solution says less than its edits were trained to, the less the more its shard is to be quiet on.
Asking again for the difference (``feedback`` of :meth:`NormalEquations.solution`) brings an edit nearer to what it was
trained to say, and the solution nearer to one that tells just these tokens from others: other wordings get a smaller
share of it, and unrelated texts a larger one. Most memories say all of their edits when asked once more; those with
long targets may not, and which ones is seen from their edits' own losses. Not in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..hparams import WISEHyperParams
from .consolidated import write_solution
from .level import answer_losses, nearly_best
from .open_shard import OpenShard
from .task import RecordedContexts

# An edit with a larger loss than this lacks something, in nats a token.
_LACKS = 0.1
# An edit's loss counts up to here: one that no solution says is not asked for again and again at the others' cost.
_LOST = 4.0
# What the edits may lose for being asked less often, in the mean, in nats a token.
_SLACK = 0.01


def fewest_needed(losses: Tensor, times: Sequence[int]) -> int:
    """The fewest times after which the edits' mean loss is within .01 nats of its minimum over the times.

    Args:
        losses: mean of -log p over the target's tokens, shape (A, E); each counts up to 4 nats.
        times: A of them, ascending.

    Raises:
        ValueError: there is no time, or no edit.
    """
    if not losses.numel():
        raise ValueError(f"losses have the shape {tuple(losses.shape)}: give at least one time and one edit.")
    return times[int(nearly_best(losses, _LOST, _SLACK).min())]


@torch.no_grad()
def write_what_is_needed(
    shard: OpenShard, delta_weight: Tensor, answers: Sequence[RecordedContexts], hparams: WISEHyperParams
) -> OpenShard:
    """Solve a shard's problem into dW, asking twice as often as long as one of its edits lacks something.

    Args:
        shard: with its problem.
        delta_weight: dW, shape (d_out, d_in), changed in place.
        answers: the shard's edits, see :func:`recorded_answers`.
        hparams: settings; from ``asked_again`` to ``asked_again_limit`` times.

    Returns:
        The shard, as :func:`write_solution` returns it.

    Raises:
        EditDivergedError: a solution is not finite.
        ValueError: the shard has no problem, or one without anything to be quiet on.
    """
    times, losses = [hparams.asked_again], []
    while True:
        written = write_solution(shard, delta_weight, replace(hparams, asked_again=times[-1]))
        if hparams.asked_again_limit <= hparams.asked_again:
            return written
        losses.append(answer_losses(answers, delta_weight, (1.0,), hparams)[0])
        if times[-1] >= hparams.asked_again_limit or not bool((losses[-1] > _LACKS).any()):
            break
        times.append(min(max(1, 2 * times[-1]), hparams.asked_again_limit))
    chosen = fewest_needed(torch.stack(losses), times)
    if chosen == times[-1]:
        return written
    return write_solution(shard, delta_weight, replace(hparams, asked_again=chosen))
