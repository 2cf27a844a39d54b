"""Thresholds against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from easyedit_wise.calibration import (
    calibrated_threshold,
    minimum_threshold,
    spent_position,
    stricter_threshold,
    strictness,
)
from easyedit_wise.routing import MAIN_MEMORY, choose_memory


def distinct(low: int, high: int) -> st.SearchStrategy[list[float]]:
    """Well separated scores: multiples of 1/4."""
    return st.lists(st.integers(low, high).map(lambda n: n / 4), min_size=1, max_size=12)


def test_minimum_threshold_by_hand() -> None:
    # The minimum, a thousandth lower.
    assert minimum_threshold([3.0, 2.0, 7.0]) == pytest.approx(1.998)
    assert minimum_threshold([3.0, 2.0, 7.0], act_ratio=0.85) == pytest.approx(0.85 * 1.998)
    assert minimum_threshold(tensor([4.0, 6.0]).tolist(), act_ratio=0.5) == pytest.approx(1.998)


@pytest.mark.parametrize("rounding", [-1e-4, 0.0, 1e-4])
def test_the_weakest_edit_exceeds_its_own_threshold(rounding: float) -> None:
    """Asked again in another batch, it scores a little more or less."""
    again = tensor([[2.0 * (1 + rounding)], [7.0 * (1 + rounding)]])
    for epsilon in (minimum_threshold([7.0, 2.0]), calibrated_threshold([7.0, 2.0], [1.0], position=1.0)):
        assert choose_memory(again, tensor([epsilon])).tolist() == [0, 0]
    # Nor does the strongest irrelevant prompt at the other end of the gap.
    epsilon = calibrated_threshold([7.0, 4.0], [2.0, 1.0], position=0.0)
    assert choose_memory(again[:1], tensor([epsilon])).tolist() == [MAIN_MEMORY]


def test_thresholds_need_an_edit() -> None:
    with pytest.raises(ValueError, match="edit first"):
        minimum_threshold([])
    with pytest.raises(ValueError, match="edit first"):
        calibrated_threshold([], [1.0])


@pytest.mark.parametrize(("position", "expected"), [(0.0, 2.002), (0.25, 3.0), (0.5, 4.0), (1.0, 5.994)])
def test_calibrated_threshold_of_separated_scores(position: float, expected: float) -> None:
    # The gap goes from 2 (the highest irrelevant score) to 6 (the lowest edit): 2 + position * 4,
    # and a thousandth away from either.
    assert calibrated_threshold([9.0, 6.0, 8.0], [1.0, 2.0, 0.5], position) == pytest.approx(expected)


def test_each_further_memory_is_stricter() -> None:
    # 1 - 0.5 / 32 ** 0.4 = 1 - 0.5 / 4
    assert spent_position(0.5, 0) == 0.5
    assert spent_position(0.5, 31) == pytest.approx(0.875)
    positions = [spent_position(0.2, n) for n in range(1000)]
    assert positions == sorted(positions)
    assert positions[-1] < 1.0
    assert spent_position(1.0, 7) == 1.0
    with pytest.raises(ValueError, match="-1"):
        spent_position(0.5, -1)


def test_among_many_memories_the_first_are_as_strict_as_a_later_one() -> None:
    assert [strictness(place, 10) for place in range(10)] == list(range(10))
    assert strictness(0, 12) == 0
    assert [strictness(place, 22) for place in (0, 3, 4, 5, 21)] == [4, 4, 4, 5, 21]
    assert strictness(0, 0) == 0


def test_a_threshold_grows_stricter_as_if_more_memories_had_been_before_it() -> None:
    # The distance to the weakest edit is 4, and (1 + 0) / (1 + 31) to the power of .4 is a quarter.
    assert stricter_threshold(2.0, 6.0, 0, 31) == pytest.approx(5.0)
    scores, quiet = [6.0, 7.0], [1.0]
    was, shall_be = (calibrated_threshold(scores, quiet, spent_position(0.3, n)) for n in (2, 9))
    assert stricter_threshold(was, 6.0, 2, 9) == pytest.approx(shall_be)
    assert stricter_threshold(stricter_threshold(was, 6.0, 2, 5), 6.0, 5, 9) == pytest.approx(shall_be)


@pytest.mark.parametrize(("epsilon", "weakest"), [(2.0, math.inf), (2.0, 1.0), (2.0, 2.0), (0.0, math.inf)])
def test_a_threshold_stays_where_there_is_no_gap(epsilon: float, weakest: float) -> None:
    assert stricter_threshold(epsilon, weakest, 0, 31) == epsilon


def test_a_threshold_for_as_many_memories_stays_to_the_last_digit() -> None:
    assert stricter_threshold(0.1, 0.7, 3, 3) == 0.1


@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
def test_a_gap_too_small_to_keep_distance_is_halved(position: float) -> None:
    assert calibrated_threshold([10.001], [10.0], position) == pytest.approx(10.0005, abs=1e-9)


def test_calibrated_threshold_without_irrelevant_prompts_starts_at_zero() -> None:
    assert calibrated_threshold([6.0, 4.0], []) == 2.0


def test_calibrated_threshold_of_overlapping_scores() -> None:
    # Edits 3 5 6 7, irrelevant 1 2 4. Candidates and (fired - false fires): 0.5: 1 - 1; 1.5: 1 - 2/3;
    # 2.5: 1 - 1/3 = 0.667; 3.5: 3/4 - 1/3 = 0.417; 4.5: 3/4 - 0 = 0.75; 5.5: 1/2; 6.5: 1/4. The best is 4.5.
    assert calibrated_threshold([3.0, 5.0, 6.0, 7.0], [1.0, 2.0, 4.0]) == 4.5


def test_one_odd_irrelevant_prompt_does_not_move_the_threshold_far() -> None:
    # All 4 edits fire and 1 of 10 irrelevant prompts does (1 - 0.1); above 50 none would fire.
    irrelevant = [1.0] * 9 + [50.0]
    assert calibrated_threshold([10.0, 11.0, 12.0, 13.0], irrelevant) == 5.5  # (1 + 10) / 2


def test_ties_go_to_the_lower_threshold() -> None:
    # Edits 1 3, irrelevant 2: 0.5 gives 1 - 1 = 0, 1.5 gives 1/2 - 1, 2.5 gives 1/2 - 0: 2.5 wins.
    assert calibrated_threshold([1.0, 3.0], [2.0]) == 2.5
    # Edits 1 4, irrelevant 2 3: 0.5 -> 0, 1.5 -> 1/2 - 1, 2.5 -> 1/2 - 1/2, 3.5 -> 1/2.
    assert calibrated_threshold([1.0, 4.0], [2.0, 3.0]) == 3.5
    # Edits 1 3, irrelevant 2 4: 0.5 -> 0, 1.5 -> -1/2, 2.5 -> 0, 3.5 -> -1/2: of 0.5 and 2.5 the lower.
    assert calibrated_threshold([1.0, 3.0], [2.0, 4.0]) == 0.5
    # The same scores on both sides tell nothing: every edit fires.
    assert calibrated_threshold([2.0, 3.0], [2.0, 3.0]) == 1.0
    assert calibrated_threshold([3.0], [3.0]) == 1.5


@pytest.mark.parametrize("position", [-0.1, 1.1, math.nan])
def test_calibrated_threshold_refuses_a_position_outside_the_gap(position: float) -> None:
    with pytest.raises(ValueError, match=r"position=.*outside \[0, 1\]"):
        calibrated_threshold([2.0], [1.0], position)


def firing(scores: list[float], threshold: float) -> float:
    return float((choose_memory(tensor(scores)[:, None], tensor([threshold])) == 0).float().mean())


@given(distinct(41, 80), distinct(0, 40), st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None)
def test_a_threshold_in_the_gap_separates(edits: list[float], irrelevant: list[float], position: float) -> None:
    threshold = calibrated_threshold(edits, irrelevant, position)
    assert firing(edits, threshold) == 1.0
    assert firing(irrelevant, threshold) == 0.0


@given(distinct(1, 30), distinct(1, 30))
@settings(max_examples=80, deadline=None)
def test_no_threshold_separates_better(edits: list[float], irrelevant: list[float]) -> None:
    threshold = calibrated_threshold(edits, irrelevant)
    reached = firing(edits, threshold) - firing(irrelevant, threshold)
    every_threshold = [quarter / 4 + 1 / 8 for quarter in range(32)]
    best = max(firing(edits, one) - firing(irrelevant, one) for one in every_threshold)
    assert reached == pytest.approx(best)
