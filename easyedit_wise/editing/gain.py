"""How strongly the edits of one shard speak.

An edit is trained until its own contexts give the target, and no further. In other words it gets only a share of that
dW a, and a shard's threshold has to lie below its weakest edit, while what the strong ones leave in unrelated prompts
lies where it is. So all of them say more than they were trained to, and weak ones up to the shard's median. Training
further would not do: the loss is flat there. Not in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from ..hparams import WISEHyperParams
from ..least_squares import NormalEquations
from .recorded import RecordedEdit, edit_scores

# A weak edit is raised by no more than this: one that the model half knew needs no loud answer.
_LOUDEST = 2.0
# All scores move with each gain, a little: by then they have settled.
_ROUNDS = 2


@dataclass(frozen=True)
class SpokenEdit:
    """An edit of an open shard whose gain is not settled yet.

    Attributes:
        recorded: the edit as the router sees it.
        share: what it adds to the shard's ``NormalEquations.outputs``, shape (d_out, n).
    """

    recorded: RecordedEdit
    share: Tensor


def equalised(gains: Sequence[float], scores: Sequence[float], gain: float) -> list[float]:
    """The gains that would bring the scores up to their median, within [gain, 2 gain].

    Args:
        gains: the present ones.
        scores: Delta_act of each edit's prompt with these.
        gain: of an edit at the median or above.
    """
    level = median(scores)
    return [
        min(max(own * level / score if score > 0 else gain, gain), _LOUDEST * gain)
        for own, score in zip(gains, scores, strict=True)
    ]


@torch.no_grad()
def write_amplified(
    equations: NormalEquations, spoken: Sequence[SpokenEdit], delta_weight: Tensor, hparams: WISEHyperParams
) -> list[float]:
    """Put the solution with the edits' gains into dW.

    Args:
        equations: the shard's problem, with every edit as it was trained.
        spoken: the edits to amplify.
        delta_weight: dW, shape (d_out, d_in), changed in place.
        hparams: settings.

    Returns:
        The gain of each edit.

    Raises:
        torch.linalg.LinAlgError: the problem is not finite.
    """
    factor = equations.factor()
    gains = [hparams.gain] * len(spoken)
    for left in reversed(range(_ROUNDS + 1 if len(spoken) > 1 else 1)):
        louder = equations
        for edit, gain in zip(spoken, gains, strict=True):
            louder = louder.louder(edit.share, gain)
        delta_weight[:, equations.columns] = louder.solution(factor).to(delta_weight)
        if left:
            scores = edit_scores([edit.recorded for edit in spoken], delta_weight, hparams)
            gains = equalised(gains, [one.prompt for one in scores], hparams.gain)
    return gains
