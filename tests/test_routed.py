"""Routing metrics on scores small enough to check by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from easyedit_wise.evaluation.routed import RoutedPrompt, auroc, routing_scores

SCORES = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=8)


def test_auroc_by_hand() -> None:
    assert auroc([3.0, 4.0], [1.0, 2.0]) == 1.0
    assert auroc([1.0], [2.0]) == 0.0
    # Pairs: 3>1, 3>2, 2>1, 2=2.
    assert auroc([3.0, 2.0], [1.0, 2.0]) == (3 + 0.5) / 4
    with pytest.raises(ValueError, match="got 0 and 1"):
        auroc([], [1.0])


@given(SCORES, SCORES)
def test_auroc_is_the_share_of_ordered_pairs(positives: list[float], negatives: list[float]) -> None:
    pairs = [(p > n) + 0.5 * (p == n) for p in positives for n in negatives]
    assert auroc(positives, negatives) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(positives, negatives) + auroc(negatives, positives) == pytest.approx(1.0)


def test_relative_score() -> None:
    assert RoutedPrompt("m", 3.0, 2.0).relative == 1.5
    assert RoutedPrompt("m", 3.0, 0.0).relative == math.inf
    assert RoutedPrompt(None, 0.0, 0.0).relative == 0.0


def test_routing_scores_by_hand() -> None:
    a, b, quiet = RoutedPrompt("a", 4.0, 2.0), RoutedPrompt("b", 30.0, 20.0), RoutedPrompt(None, 1.0, 2.0)
    scores = routing_scores(
        edits=[a, b, quiet, a],
        rephrasings=[[a, quiet], [a], [], [quiet]],
        unrelated=[quiet, b],
        nearby=[a],
        holders=["a", "b", "b", "b"],
    )
    assert scores.edits_fire == 3 / 4
    assert scores.rephrasings_fire == 2 / 4
    assert (scores.unrelated_fire, scores.nearby_fire) == (0.5, 1.0)
    assert scores.edits_right_memory == 2 / 4
    assert scores.rephrasings_right_memory == 1 / 4
    # Relative scores: edits 2, 1.5, .5, 2 against unrelated .5, 1.5.
    assert scores.auroc_edits_unrelated == (1 + 1 + 1 + 0.5 + 0.5 + 0 + 1 + 1) / 8
    assert scores.auroc_edits_nearby == (0.5 + 0 + 0 + 0.5) / 4
    assert scores.n_memories == 2


def test_what_there_is_nothing_of_is_none() -> None:
    scores = routing_scores([RoutedPrompt("a", 2.0, 1.0)], [[]], [], [], None)
    assert scores.edits_fire == 1.0
    assert (scores.rephrasings_fire, scores.unrelated_fire, scores.auroc_edits_nearby) == (None, None, None)
    assert (scores.edits_right_memory, scores.n_memories) == (None, None)
    with pytest.raises(ValueError, match="1 edits, 2 groups of rephrasings and no holders"):
        routing_scores([RoutedPrompt("a", 2.0, 1.0)], [[], []], [], [], None)
