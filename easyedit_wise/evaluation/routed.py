"""How well a router tells edits from everything else: pure functions of scores and choices."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class RoutedPrompt:
    """Where an editor's router sent a prompt.

    Attributes:
        memory: name of the memory that answers; None: the unedited main memory.
        score: of the memory that answers, or of the one nearest to answering.
        epsilon: that memory's threshold.
        exact: False where the score is an estimate.
    """

    memory: str | None
    score: float
    epsilon: float
    exact: bool = True

    @property
    def relative(self) -> float:
        """score / epsilon, which makes scores of several memories comparable; a threshold of 0 gives inf or 0."""
        if self.epsilon > 0.0:
            return self.score / self.epsilon
        return math.inf if self.score > self.epsilon else 0.0


@dataclass(frozen=True)
class RoutingScores:
    """How a stream's prompts were routed, by their prompt alone, as a generation is.

    Attributes:
        edits_fire, rephrasings_fire: share that a side memory answers.
        unrelated_fire, nearby_fire: share that one answers although none should (false fires).
        edits_right_memory, rephrasings_right_memory: share that the memory answers which holds the edit (top 1).
        auroc_*: chance that the first kind's prompt scores above the second kind's; 0.5 is no separation.
        n_memories: different memories that hold edits.
    """

    edits_fire: float
    rephrasings_fire: float | None
    unrelated_fire: float | None
    nearby_fire: float | None
    edits_right_memory: float | None
    rephrasings_right_memory: float | None
    auroc_edits_unrelated: float | None
    auroc_edits_nearby: float | None
    auroc_rephrasings_unrelated: float | None
    auroc_rephrasings_nearby: float | None
    n_memories: int | None


def auroc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Area under the ROC curve: the chance that a positive's score is above a negative's; ties count half.

    Raises:
        ValueError: one of the lists is empty.
    """
    if not positives or not negatives:
        raise ValueError(f"AUROC compares two groups, got {len(positives)} and {len(negatives)} scores.")
    ordered = sorted(negatives)
    below = sum(bisect_left(ordered, score) + bisect_right(ordered, score) for score in positives)
    return below / (2 * len(positives) * len(negatives))


def routing_scores(
    edits: Sequence[RoutedPrompt],
    rephrasings: Sequence[Sequence[RoutedPrompt]],
    unrelated: Sequence[RoutedPrompt],
    nearby: Sequence[RoutedPrompt],
    holders: Sequence[str] | None,
) -> RoutingScores:
    """Summarise the routes of a stream's prompts.

    Args:
        edits: one an edit.
        rephrasings: those of each edit.
        unrelated: routes of prompts that no memory should answer.
        nearby: likewise, of the edits' neighbours.
        holders: the memory that holds each edit; None where that is not known.

    Raises:
        ValueError: no edits, or not as many rephrasings' groups or holders.
    """
    if not edits or len(rephrasings) != len(edits) or (holders is not None and len(holders) != len(edits)):
        raise ValueError(
            f"{len(edits)} edits, {len(rephrasings)} groups of rephrasings and "
            f"{'no' if holders is None else len(holders)} holders do not belong together."
        )
    flat = [route for group in rephrasings for route in group]
    flat_holders = holders and [name for name, group in zip(holders, rephrasings, strict=True) for _ in group]
    return RoutingScores(
        edits_fire=fmean(route.memory is not None for route in edits),
        rephrasings_fire=_fire(flat),
        unrelated_fire=_fire(unrelated),
        nearby_fire=_fire(nearby),
        edits_right_memory=_right(edits, holders),
        rephrasings_right_memory=_right(flat, flat_holders),
        auroc_edits_unrelated=_separation(edits, unrelated),
        auroc_edits_nearby=_separation(edits, nearby),
        auroc_rephrasings_unrelated=_separation(flat, unrelated),
        auroc_rephrasings_nearby=_separation(flat, nearby),
        n_memories=None if holders is None else len(set(holders)),
    )


def _fire(routes: Sequence[RoutedPrompt]) -> float | None:
    return fmean(route.memory is not None for route in routes) if routes else None


def _right(routes: Sequence[RoutedPrompt], holders: Sequence[str] | None) -> float | None:
    if not routes or not holders:
        return None
    return fmean(route.memory == name for route, name in zip(routes, holders, strict=True))


def _separation(positives: Sequence[RoutedPrompt], negatives: Sequence[RoutedPrompt]) -> float | None:
    if not positives or not negatives:
        return None
    return auroc([route.relative for route in positives], [route.relative for route in negatives])
