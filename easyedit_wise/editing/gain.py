"""How strongly the edits of one shard speak.

An edit is trained until its own contexts give the target, and no further. In other words it gets only a share of that
dW a, and a shard's threshold has to lie below its weakest edit, while what the strong ones leave in unrelated prompts
lies where it is. So all of them say more than they were trained to, and weak ones up to the shard's median. Training
further would not do: the loss is flat there.

The route is decided by the prompt alone, and of some edits nearly all lies in the target: a text whose first tokens the
model predicted anyway, or a long one. Their answer would be right if only they were asked. So what an edit's prompt
says is raised until it is heard beside what its target says. And since the target's tokens stand in unrelated prompts,
too, all prompts say somewhat more than their targets do (``prompt_gain``).

An edit that is far louder than the others lets in what is only a little like it: where "Ang TV" says what it says at
" TV", every television does. So a prompt says no more than the shard's median, unless it would not be heard beside its
target; before a long target a short one is to be as loud as any token of it. Not in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from ..hparams import WISEHyperParams
from ..least_squares import NormalEquations
from ..routing import LONG_TEXT
from .recorded import EditScores, RecordedEdit, edit_scores

# A weak edit is raised by no more than this: one that the model half knew needs no loud answer.
_LOUDEST = 2.0
# An edit's prompt shall score at least this share of the loudest of its prompt and target.
_HEARD = 0.7
# And a short prompt all of it where the two together are long: some of many tokens are ordinary words, which other
# texts have, too, and a threshold can only lie below the weakest prompt. A long prompt would be raised at full stops.
_SHORT_HEARD_IN_LONG_TEXT = 1.0
# For that, what its prompt says is raised by no more than this, beside the gain of the whole edit.
_LOUDEST_PROMPT = 8.0
# Where a prompt is louder than the others, what it says is lowered to this at least: it is a part of the answer, too.
_QUIETEST_PROMPT = 0.4
# All scores move with each gain, a little: by then they have settled.
_ROUNDS = 2


@dataclass(frozen=True)
class SpokenEdit:
    """An edit of an open shard whose gain is not settled yet.

    Attributes:
        recorded: the edit as the router sees it.
        share: what it adds to the shard's ``NormalEquations.outputs``, shape (d_out, n).
        prompt_share: what its prompt's tokens add, the same shape.
    """

    recorded: RecordedEdit
    share: Tensor
    prompt_share: Tensor


@dataclass(frozen=True)
class Gains:
    """How strongly an edit speaks.

    Attributes:
        edit: all of its tokens, times this.
        prompt: those of its prompt, times this as well.
    """

    edit: float
    prompt: float = 1.0

    def applied(self, equations: NormalEquations, edit: SpokenEdit) -> NormalEquations:
        """The problem in which ``edit``, so far as it was trained, speaks as strongly."""
        louder = equations.louder(edit.share, self.edit)
        return louder if self.prompt == 1.0 else louder.with_more(edit.prompt_share, self.edit * (self.prompt - 1.0))


def equalised(
    gains: Sequence[float], scores: Sequence[float], gain: float, settled: Sequence[float] = ()
) -> list[float]:
    """The gains that would bring the scores up to the shard's median, within [gain, 2 gain].

    Args:
        gains: the present ones.
        scores: Delta_act of each edit's prompt with these.
        gain: of an edit at the median or above.
        settled: Delta_act of edits of the shard whose gain is settled; they count in the median.
    """
    middle = median([*scores, *settled])
    return [
        min(max(own * middle / score if score > 0 else gain, gain), _LOUDEST * gain)
        for own, score in zip(gains, scores, strict=True)
    ]


def heard(
    prompt_gains: Sequence[float],
    scores: Sequence[EditScores],
    shares: Sequence[float],
    most: float = 1.0,
    limit: float = math.inf,
) -> list[float]:
    """The prompts' gains that would let every prompt be heard beside its target, and none be loud without need.

    Args:
        prompt_gains: the present ones.
        scores: of each edit with these.
        shares: the share of the loudest of its prompt and target from which each prompt is heard.
        most: of a prompt that is heard anyway.
        limit: a score that no prompt exceeds without need.

    Returns:
        For each what brings it down to ``limit``, within [.4, most]; or what it needs to be heard, at most 8, if that
        is more.
    """
    gains = []
    for own, one, share in zip(prompt_gains, scores, shares, strict=True):
        if one.prompt <= 0:
            gains.append(most)
            continue
        reach = own / one.prompt
        # Where the prompt is the louder one, it is heard, unless it is so only by having been raised.
        may_need = one.answered > one.prompt or own > most
        needed = min(reach * share * one.answered, _LOUDEST_PROMPT) if may_need else 0.0
        gains.append(max(min(max(reach * limit, _QUIETEST_PROMPT), most), needed))
    return gains


def _heard_share(edit: RecordedEdit) -> float:
    crosses = int(edit.prompt_mask.sum()) < LONG_TEXT <= len(edit.answered.activations)
    return _SHORT_HEARD_IN_LONG_TEXT if crosses else _HEARD


@torch.no_grad()
def write_amplified(
    equations: NormalEquations,
    spoken: Sequence[SpokenEdit],
    delta_weight: Tensor,
    hparams: WISEHyperParams,
    settled: Sequence[RecordedEdit] = (),
) -> list[Gains]:
    """Put the solution with the edits' gains into dW.

    Args:
        equations: the shard's problem, with every edit as it was trained.
        spoken: the edits to amplify.
        delta_weight: dW, shape (d_out, d_in), changed in place.
        hparams: settings.
        settled: other edits of the shard, such as were there when it was loaded, with whatever level they had then.

    Returns:
        The gains of each of ``spoken``.

    Raises:
        torch.linalg.LinAlgError: the problem is not finite.
    """
    factor = equations.factor()
    shares = [_heard_share(edit.recorded) for edit in spoken]
    gains = [Gains(hparams.gain, hparams.prompt_gain)] * len(spoken)
    for left in reversed(range(_ROUNDS + 1 if spoken else 1)):
        louder = equations
        for edit, gain in zip(spoken, gains, strict=True):
            louder = gain.applied(louder, edit)
        delta_weight[:, equations.columns] = louder.solution(factor, hparams.asked_again).to(delta_weight)
        if left:
            scores = edit_scores([edit.recorded for edit in spoken], delta_weight, hparams)
            beside = [one.prompt for one in edit_scores(settled, delta_weight, hparams)]
            middle = median([*(one.prompt for one in scores), *beside])
            prompts = heard([gain.prompt for gain in gains], scores, shares, hparams.prompt_gain, middle)
            # Which scores the prompts will have with that.
            expected = [one.prompt * new / old.prompt for one, new, old in zip(scores, prompts, gains, strict=True)]
            edits = equalised([gain.edit for gain in gains], expected, hparams.gain, beside)
            gains = [Gains(edit, prompt) for edit, prompt in zip(edits, prompts, strict=True)]
    return gains
