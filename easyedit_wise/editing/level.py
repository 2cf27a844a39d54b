"""How loudly a memory answers: the largest multiple of its dW that its edits bear.

Delta_act and epsilon scale with dW, so a memory's level decides nothing about what it answers to, only how far its
answer goes. The more, the better another wording is answered, which gets only a share of what the edit's own prompt
gets. But what is said at each of several target tokens adds up, and too loud an answer says one token again and again.
Where that begins is different from memory to memory, so each is asked for its own edits. Not in the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hparams import WISEHyperParams
from .consolidated import keep_to_norm_constraint
from .open_shard import WATCHED
from .recorder import PromptRecorder
from .requests import EditRequest
from .task import RecordedContexts, target_positions
from .task_maker import STEP_SHARE

LEVELS = (0.5, 0.65, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0)
# An edit's loss counts up to here, in nats a token: one that is lost at every level has no say.
_LOST = 1.0
# What the edits may lose for a louder answer, in the mean, in nats a token.
_SLACK = 0.001
# `context_tokens` where the settings have no limit.
_CONTEXT_TOKENS = 1024


def loudest_bearable(losses: Tensor, levels: Sequence[float]) -> float:
    """The largest level at which the edits' mean loss is within .001 nats of its minimum over the levels.

    Args:
        losses: mean of -log p over the target's tokens, shape (L, E); each counts up to 1 nat.
        levels: L of them, ascending.

    Raises:
        ValueError: there is no level, or no edit.
    """
    if not losses.numel():
        raise ValueError(f"losses have the shape {tuple(losses.shape)}: give at least one level and one edit.")
    return levels[int(nearly_best(losses, _LOST, _SLACK).max())]


def nearly_best(losses: Tensor, lost: float, slack: float) -> Tensor:
    """Which rows have a mean loss within some nats of the least one, by index, ascending.

    Args:
        losses: shape (L, E), not empty.
        lost: what one of them counts at most, and where it is no number.
        slack: so many nats.
    """
    mean = losses.nan_to_num(nan=lost).clamp(max=lost).mean(dim=1)
    return (mean <= mean.min() + slack).nonzero()


@torch.no_grad()
def write_level(answers: Sequence[RecordedContexts], delta_weight: Tensor, hparams: WISEHyperParams) -> None:
    """Multiply dW, shape (d_out, d_in), in place by :func:`bearable_level`, entries clamped to ``norm_constraint``.

    Args:
        answers: see :func:`recorded_answers`.
        delta_weight: as solved.
        hparams: settings.
    """
    delta_weight.mul_(bearable_level(answers, delta_weight, hparams, hparams.level_limit))
    keep_to_norm_constraint(delta_weight, hparams)


@torch.no_grad()
def level_losses(
    contexts: RecordedContexts, delta_weight: Tensor, levels: Sequence[float], hparams: WISEHyperParams
) -> Tensor:
    """Mean of -log p of each edit's supervised tokens, by its plain prompt, with each multiple of dW, shape (L, E).

    Args:
        contexts: one row an edit, recorded.
        delta_weight: dW, shape (d_out, d_in).
        levels: L multiples.
        hparams: settings.
    """
    product = F.linear(contexts.activations.to(delta_weight), delta_weight)
    positions, targets, _ = target_positions(contexts.batch, hparams)
    rows = positions[0]
    counts = torch.bincount(rows, minlength=len(contexts.batch.input_ids)).clamp(min=1)
    losses = []
    for level in levels:
        each = F.cross_entropy(contexts.logits(level * product, positions).float(), targets, reduction="none")
        losses.append(each.new_zeros(len(counts)).index_add_(0, rows, each) / counts)
    return torch.stack(losses)


def answer_losses(
    answers: Sequence[RecordedContexts], delta_weight: Tensor, levels: Sequence[float], hparams: WISEHyperParams
) -> Tensor:
    """:func:`level_losses` of all of a memory's edits, shape (L, E).

    Args:
        answers: see :func:`recorded_answers`.
        delta_weight: dW, shape (d_out, d_in).
        levels: L multiples of it.
        hparams: settings.
    """
    return torch.cat([level_losses(some, delta_weight, levels, hparams) for some in answers], dim=1)


def bearable_level(
    answers: Sequence[RecordedContexts], delta_weight: Tensor, hparams: WISEHyperParams, limit: float
) -> float:
    """What dW is to be multiplied by, of :data:`LEVELS` up to ``limit``: see :func:`loudest_bearable`.

    Args:
        answers: see :func:`recorded_answers`.
        delta_weight: dW as solved, shape (d_out, d_in).
        hparams: settings.
        limit: the largest level.
    """
    levels = [level for level in LEVELS if level <= limit]
    return loudest_bearable(answer_losses(answers, delta_weight, levels, hparams), levels)


def recorded_answers(recorder: PromptRecorder, requests: Sequence[EditRequest]) -> list[RecordedContexts]:
    """A memory's edits, recorded anew from their texts, so that nothing has to be kept for it; of very many the latest.

    Args:
        recorder: records them at the layer.
        requests: the memory's edits, and what else it shall answer.

    Returns:
        Their plain prompts with the targets, some at a time.
    """
    return [
        recorder.contexts([[request.prompt] for request in some], some)
        for some in _within(recorder, requests[-WATCHED:])
    ]


def _within(recorder: PromptRecorder, requests: Sequence[EditRequest]) -> Iterator[list[EditRequest]]:
    """Some at a time, as many tokens as an iteration of training has: the logits of long targets take much memory."""
    budget = (recorder.hparams.context_tokens or _CONTEXT_TOKENS) // STEP_SHARE
    some: list[EditRequest] = []
    longest = 0
    for request in requests:
        length = len(recorder.pair(request)[0])
        if some and (len(some) + 1) * max(longest, length) > budget:
            yield some
            some, longest = [], 0
        some.append(request)
        longest = max(longest, length)
    yield some
