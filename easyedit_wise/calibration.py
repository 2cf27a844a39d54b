"""Thresholds: how active a memory has to be to answer (epsilon of WISE, Eq. 6).

Pure functions of scores. The paper's epsilon is the minimum over the edits; a calibrated one lies between what
irrelevant prompts and what the edits score, and the more memories there are, the nearer to the edits.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

# The same prompt scores a little differently in another batch. A threshold keeps this share of distance from
# the scores that it is set from, else the edit that gives the minimum would exceed it only by luck.
_ROUNDING = 1e-3
# How fast further memories grow stricter: a short stream can do with lax ones (docs/experiments.md).
SPENDING = 0.4
# Memories of which the first may stay as lax as they are.
_FEW_MEMORIES = 10
# In a longer stream the first are as strict as the memory at this share of the further ones.
_SHARE_OF_FURTHER = 0.4


def minimum_threshold(edit_scores: Sequence[float], act_ratio: float = 1.0) -> float:
    """The paper's threshold: epsilon = min over the edits of Delta_act(x_e), times EasyEdit's ``act_ratio``.

    The paper has no ratio (1.0); EasyEdit's YAML files have one that is tuned per model. The result lies a
    thousandth lower, so that the weakest edit exceeds it whatever batch it is asked in.

    Raises:
        ValueError: there is no edit score.
    """
    if not len(edit_scores):
        raise ValueError("epsilon is a minimum over the edits' scores, and there is none: edit first.")
    return float(act_ratio) * float(min(edit_scores)) * (1 - _ROUNDING)


def spent_position(position: float, n_earlier: int, spending: float = SPENDING) -> float:
    """Where in its gap the threshold of one more memory lies, so that many memories do not let more prompts fire.

    An unrelated prompt fires if any of the memories lets it, so each further one has to be stricter than the one
    before, as in sequential testing, where every test spends less of what may go wrong in all of them together
    ("alpha spending"). The distance to the edits' side shrinks with the number of memories to a negative power.

    Args:
        position: of the first memory, in [0, 1], see :func:`calibrated_threshold`.
        n_earlier: memories that are there already.
        spending: the power, but for its sign; 0: all are alike.

    Raises:
        ValueError: a negative number of memories.
    """
    if n_earlier < 0:
        raise ValueError(f"n_earlier={n_earlier}: a memory cannot have fewer than no others before it.")
    return 1.0 - (1.0 - position) * (1.0 + n_earlier) ** -spending


def strictness(place: int, n_memories: int) -> int:
    """How many memories stand before one, for :func:`spent_position`, or as if they stood before it.

    The first memory of a hundred lets no fewer unrelated prompts fire than the first of ten. Nobody knows how long a
    stream will be when it begins; so the first ones grow stricter as more follow.

    Args:
        place: how many memories are before it.
        n_memories: how many there are by now.
    """
    return max(place, int(_SHARE_OF_FURTHER * max(0, n_memories - _FEW_MEMORIES)))


def stricter_threshold(epsilon: float, weakest: float, was: int, shall_be: int, spending: float = SPENDING) -> float:
    """A threshold moved towards its edits' side, from the position at one number of memories to that at another.

    Args:
        epsilon: the threshold.
        weakest: the edits' side of its gap. Where epsilon exceeds it, or it is infinite, nothing is changed.
        was: the memories before it, as which epsilon was set, see :func:`strictness`.
        shall_be: at least as many.
        spending: see :func:`spent_position`.
    """
    distance = weakest - epsilon
    if was == shall_be or not 0.0 < distance < math.inf:
        return epsilon
    return weakest - distance * ((1.0 + was) / (1.0 + shall_be)) ** spending


def calibrated_threshold(
    edit_scores: Sequence[float], irrelevant_scores: Sequence[float], position: float = 0.5
) -> float:
    """A threshold nobody tunes: between what irrelevant prompts score and what the edits score.

    With separated scores epsilon = max(irrelevant) + position * (min(edits) - max(irrelevant)).
    Where they overlap, it is the threshold with the fewest errors, each side weighted by its own
    count (the maximum of Youden's J), so one odd prompt does not move it far.

    Args:
        edit_scores: Delta_act(x_e) of the edits' prompts.
        irrelevant_scores: Delta_act(x_i) of irrelevant prompts.
        position: 0 sits on the irrelevant side of the gap, 1 on the edits' side, both with a thousandth to spare.

    Raises:
        ValueError: there is no edit score, or position is outside [0, 1].
    """
    if not 0.0 <= position <= 1.0:
        raise ValueError(f"position={position} is outside [0, 1]: 0 is the irrelevant side of the gap.")
    if not len(edit_scores):
        raise ValueError("epsilon separates edits from irrelevant prompts, and there is no edit: edit first.")
    edits = sorted(float(score) for score in edit_scores)
    irrelevant = sorted(float(score) for score in irrelevant_scores) or [0.0]
    low, high = irrelevant[-1], edits[0]
    if low < high:
        middle = (low + high) / 2
        nearest_low, nearest_high = min(low * (1 + _ROUNDING), middle), max(high * (1 - _ROUNDING), middle)
        return min(max(low + position * (high - low), nearest_low), nearest_high)
    levels = sorted({*edits, *irrelevant})
    candidates = [levels[0] / 2, *((low + high) / 2 for low, high in pairwise(levels))]

    def separation(threshold: float) -> float:
        fired = 1 - bisect_right(edits, threshold) / len(edits)
        false_fires = 1 - bisect_right(irrelevant, threshold) / len(irrelevant)
        return fired - false_fires

    # Ties go to the lower threshold: an edit that does not fire is an edit that was lost.
    return max(candidates, key=lambda threshold: (separation(threshold), -threshold))
