"""Where a memory's threshold lies, from what its edits and irrelevant prompts score under its dW."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..calibration import (
    SPENDING,
    calibrated_threshold,
    minimum_threshold,
    spent_position,
    stricter_threshold,
    strictness,
)
from ..hparams import WISEHyperParams
from ..tuner.memory import MERGED, MemoryState
from .names import names_known
from .recorded import EditScores, edit_scores
from .recorder import PromptRecorder
from .requests import EditRequest
from .scored import ScoredInputs
from .shards import settings_after

# One text in so many may be about an edit: those of the demo are about France, the Sun and pizza.
_ABOUT_AN_EDIT = 20
# How fast memories that are quiet on unfinished names grow stricter: hardly an unrelated prompt is as loud as an edit.
# One that knows not all of its edits' names is as strict as any.
_SPENDING_OF_QUIET_ONES = 0.2


def threshold(
    scores: Iterable[EditScores],
    neutral: ScoredInputs,
    delta_weight: Tensor,
    hparams: WISEHyperParams,
    n_earlier: int = 0,
    texts: ScoredInputs | None = None,
    names_are_known: bool = False,
) -> float:
    """epsilon of a memory, from what its edits and what irrelevant prompts score under its dW.

    Args:
        scores: of its edits.
        neutral: irrelevant prompts beside the edits' own.
        delta_weight: dW, shape (d_out, d_in).
        hparams: settings.
        n_earlier: memories before it.
        texts: text at large. Of twenty one may be about an edit, so the loudest twentieth does not count.
        names_are_known: whether it could be made quiet on its edits' unfinished names, see :mod:`.names`.

    Raises:
        ValueError: there is no edit.
    """
    scores = list(scores)
    if hparams.act_ratio is not None:
        return minimum_threshold([one.prompt for one in scores], hparams.act_ratio)
    edits = [value for one in scores for value in (one.prompt, one.answered)]
    irrelevant = [one.irrelevant for one in scores if one.irrelevant is not None]
    with torch.no_grad():
        irrelevant += neutral.scores(delta_weight, hparams).tolist()
        if texts is not None:
            irrelevant += sorted(texts.scores(delta_weight, hparams).tolist())[
                : len(texts) - len(texts) // _ABOUT_AN_EDIT
            ]
    is_quiet = names_are_known and settings_after(hparams, n_earlier).unfinished_names
    spending = _SPENDING_OF_QUIET_ONES if is_quiet else SPENDING
    return calibrated_threshold(edits, irrelevant, spent_position(hparams.epsilon_position, n_earlier, spending))


def with_thresholds(
    recorder: PromptRecorder,
    state: MemoryState,
    requests: Sequence[EditRequest],
    scores: Sequence[EditScores],
    n_earlier: int,
) -> MemoryState:
    """A memory with what its scores are compared with.

    Args:
        recorder: records irrelevant prompts at the layer, with the present settings.
        state: the memory.
        requests: its edits.
        scores: of its edits.
        n_earlier: memories before it that stay memories of their own.
    """
    neutral, texts = recorder.unseen()
    known = names_known(recorder.tok, [request.subject for request in requests])
    epsilon = threshold(scores, neutral, state.delta_weight, recorder.hparams, n_earlier, texts, known)
    return state.with_(
        epsilon=epsilon,
        weakest_edit=min(one.prompt for one in scores),
        weakest_answered=min(one.answered for one in scores),
    )


def calibrated(
    recorder: PromptRecorder, state: MemoryState, requests: Sequence[EditRequest], n_earlier: int
) -> MemoryState:
    """:func:`with_thresholds` of a closed memory's edits, scored anew from their texts, some at a time."""
    scores: list[EditScores] = []
    for recorded in recorder.edits(requests):
        scores += edit_scores(recorded, state.delta_weight, recorder.hparams)
    return with_thresholds(recorder, state, requests, scores, n_earlier) if scores else state


def stricter(states: Sequence[MemoryState], n_closed: int, hparams: WISEHyperParams) -> list[MemoryState]:
    """The memories, of which the first grow stricter where further ones were closed (``calibration.strictness``).

    Args:
        states: all memories.
        n_closed: how many of them were closed when their thresholds were set.
        hparams: settings; only a calibrated threshold is moved.
    """
    if hparams.act_ratio is not None or not hparams.retrieve:
        return list(states)
    n_now = sum(state.stage == MERGED for state in states)
    grown: list[MemoryState] = []
    for place, state in enumerate(states):
        was, shall_be = strictness(place, n_closed), strictness(place, n_now)
        weakest = min(state.weakest_edit, state.weakest_answered)
        grown.append(state.with_(epsilon=stricter_threshold(state.epsilon, weakest, was, shall_be)))
    return grown
