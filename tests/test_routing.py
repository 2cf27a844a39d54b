"""The router's equations against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from easyedit_wise.routing import (
    MAIN_MEMORY,
    POOLINGS,
    choose_memory,
    pool,
    routing_activation,
    sustained_activation,
    upstream_activation,
)

SCORES = st.floats(min_value=0.0, max_value=100.0, width=32)


# -- Eq. 3 ----------------------------------------------------------------------------------------


def test_routing_activation_by_hand() -> None:
    # dW = [[1, 0], [2, 2]], a = (3, 0): dW a = (3, 6), norm sqrt(45); a = (0, 1): dW a = (0, 2), norm 2.
    delta_weight = tensor([[1.0, 0.0], [2.0, 2.0]])
    activations = tensor([[[3.0, 0.0], [0.0, 1.0]]])
    assert torch.allclose(routing_activation(activations, delta_weight), tensor([[math.sqrt(45), 2.0]]))


def test_routing_activation_takes_any_leading_shape_and_a_rectangular_matrix() -> None:
    # dW = [1, 2, 2], a = (1, 1, 1): 5.
    assert routing_activation(torch.ones(3), tensor([[1.0, 2.0, 2.0]])).item() == 5.0
    assert routing_activation(torch.ones(4, 2, 6, 3), torch.ones(7, 3)).shape == (4, 2, 6)


@given(st.floats(min_value=-8, max_value=8, width=32))
@settings(max_examples=25, deadline=None)
def test_routing_activation_scales_with_the_memory(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(2, 3, 5, generator=generator)
    delta_weight = torch.randn(4, 5, generator=generator)
    scaled = routing_activation(activations, factor * delta_weight)
    assert torch.allclose(scaled, abs(factor) * routing_activation(activations, delta_weight), atol=1e-5)


def test_upstream_activation_by_hand() -> None:
    # relu(side) - relu(base): (1, -2) -> (1, 0); (-3, 4) -> (0, 4); the difference (1, -4) has norm sqrt(17).
    # Eq. 3 would give || (4, -6) || = sqrt(52): the activation does change the score.
    base, side = tensor([[-3.0, 4.0]]), tensor([[1.0, -2.0]])
    assert torch.allclose(upstream_activation(base, side, "relu"), tensor([math.sqrt(17)]))


def test_upstream_activation_with_silu_by_hand() -> None:
    # silu(1) - silu(0) = 1 / (1 + e^-1) = 0.7310586
    assert upstream_activation(tensor([0.0]), tensor([1.0]), "silu").item() == pytest.approx(0.7310586, abs=1e-6)


# -- pooling --------------------------------------------------------------------------------------

TOKENS = tensor([[8.0, 1.0, 3.0, 2.0], [5.0, 5.0, 7.0, 9.0]])
# Row 0 is padded on the left (8 is padding), row 1 on the right (9 is padding).
REAL = tensor([[0, 1, 1, 1], [1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("mean", [2.0, 17 / 3]),  # (1 + 3 + 2) / 3 and (5 + 5 + 7) / 3
        ("max", [3.0, 7.0]),
        ("last", [2.0, 7.0]),
        ("loudest", [3.0, 7.0]),
    ],
)
def test_pool_leaves_padding_out(pooling: str, expected: list[float]) -> None:
    for mask in (REAL, REAL.bool(), REAL.float()):
        assert torch.allclose(pool(TOKENS, mask, pooling), tensor(expected))


@pytest.mark.parametrize(("pooling", "expected"), [("mean", [3.5, 6.5]), ("max", [8.0, 9.0]), ("last", [2.0, 9.0])])
def test_pool_without_a_mask_takes_all_tokens(pooling: str, expected: list[float]) -> None:
    assert torch.allclose(pool(TOKENS, None, pooling), tensor(expected))
    assert torch.allclose(pool(TOKENS, torch.ones_like(TOKENS), pooling), tensor(expected))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_row_of_padding_scores_zero_and_leaves_the_others_alone(pooling: str) -> None:
    pooled = pool(TOKENS, tensor([[0, 0, 0, 0], [1, 1, 1, 1]]), pooling)
    assert pooled[0] == 0
    assert pooled[1] == pool(TOKENS, None, pooling)[1]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_never_counts_even_if_it_is_not_a_number(pooling: str) -> None:
    spoiled = TOKENS.masked_fill(REAL == 0, torch.nan)
    assert torch.equal(pool(spoiled, REAL, pooling), pool(TOKENS, REAL, pooling))


def test_the_mean_stays_a_mean_for_long_prompts() -> None:
    # EasyEdit changes from mean to max above 100 tokens. 149 tokens of 1 and one of 76: mean 225 / 150 = 1.5.
    scores = torch.ones(1, 150)
    scores[0, 40] = 76.0
    assert pool(scores, None, "mean").item() == pytest.approx(1.5)


def test_a_long_prompt_needs_two_loud_tokens_by_hand() -> None:
    # 31 real tokens: the loudest, 9. 32: the mean of 9 and 5. What is padding counts neither way.
    scores = torch.ones(3, 40)
    scores[:, 30], scores[:, 36] = 9.0, 5.0
    real = torch.zeros(3, 40, dtype=torch.bool)
    real[0, 9:], real[1, 8:], real[2, :31] = True, True, True
    assert pool(scores, real, "loudest").tolist() == [9.0, 7.0, 9.0]
    assert pool(scores, None, "loudest").tolist() == [7.0, 7.0, 7.0]
    assert pool(torch.tensor([[2.0]]), None, "loudest").tolist() == [2.0]


def test_pool_names_the_known_poolings() -> None:
    with pytest.raises(ValueError, match=r"'median'.*mean, max, last, loudest"):
        pool(TOKENS, None, "median")


@given(st.lists(SCORES, min_size=1, max_size=6), st.integers(0, 4), st.integers(0, 4), st.sampled_from(POOLINGS))
@settings(max_examples=60, deadline=None)
def test_pool_does_not_depend_on_the_padding(row: list[float], left: int, right: int, pooling: str) -> None:
    alone = pool(tensor([row]), None, pooling)
    padded = tensor([[50.0] * left + row + [50.0] * right])
    mask = tensor([[False] * left + [True] * len(row) + [False] * right])
    assert torch.allclose(pool(padded, mask, pooling), alone, rtol=1e-6, atol=1e-6)


@given(st.lists(SCORES, min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_the_mean_lies_between_the_extremes(row: list[float]) -> None:
    mean = pool(tensor([row]), None, "mean").item()
    assert min(row) - 1e-3 <= mean <= pool(tensor([row]), None, "max").item() + 1e-3


# -- Eq. 6 ----------------------------------------------------------------------------------------


def test_choose_memory_by_hand() -> None:
    scores = tensor(
        [
            [1.0, 2.0],  # only memory 1 is above its own threshold
            [6.0, 2.0],  # both are: memory 0 is more active
            [4.0, 1.0],  # memory 0 is more active, but below its threshold, and so is memory 1
            [4.9, 1.6],  # memory 0 is more active, but only memory 1 is above its own
            [5.0, 1.5],  # at the threshold is not above it
        ]
    )
    assert choose_memory(scores, tensor([5.0, 1.5])).tolist() == [1, 0, MAIN_MEMORY, 1, MAIN_MEMORY]


def test_the_newest_of_those_near_the_most_active_by_hand() -> None:
    """At .75 of 4.0 a newer memory needs 3.0, and its own threshold as well; an older one does not win."""
    scores = tensor([[4.0, 3.0, 1.0], [4.0, 2.9, 1.0], [3.0, 4.0, 2.9], [4.0, 3.5, 3.2], [0.4, 0.5, 0.1]])
    epsilon = tensor([0.5, 0.5, 3.3])
    assert choose_memory(scores, epsilon, 0.75).tolist() == [1, 0, 1, 1, MAIN_MEMORY]
    assert choose_memory(scores, epsilon, 1.0).tolist() == choose_memory(scores, epsilon).tolist()
    assert choose_memory(torch.zeros(2, 0), torch.zeros(0), 0.75).tolist() == [MAIN_MEMORY] * 2


def test_a_memory_that_scores_as_on_its_own_edits_goes_before_a_newer_one_by_hand() -> None:
    epsilon, recognised = tensor([1.0, 1.0, 3.3]), tensor([4.0, 4.0, 3.0])
    scores = tensor(
        [
            [4.0, 3.9, 0.0],  # memory 1 is near enough to be preferred, but only memory 0 scores as on its own edits
            [9.0, 4.0, 0.0],  # both do: the newer one, however much the other says
            [3.9, 3.0, 0.0],  # none does: the newest near the most active
            [3.9, 2.0, 3.2],  # memory 2 would, but is below its threshold: as if it were not there
            [0.5, 0.5, 0.5],
        ]
    )
    assert choose_memory(scores, epsilon, 0.75, recognised).tolist() == [0, 1, 1, 0, MAIN_MEMORY]
    unknown = torch.full((3,), math.inf)  # memories of files that do not say what their edits score
    assert torch.equal(choose_memory(scores, epsilon, 0.75, unknown), choose_memory(scores, epsilon, 0.75))
    assert choose_memory(torch.zeros(2, 0), torch.zeros(0), 0.75, torch.zeros(0)).tolist() == [MAIN_MEMORY] * 2


def test_the_mean_of_eight_loud_tokens_by_hand() -> None:
    scores = torch.zeros(3, 20)
    scores[:, 2], scores[:, 19] = 32.0, 16.0
    real = torch.ones(3, 20, dtype=torch.bool)
    real[1, 7:19] = False  # eight are left
    real[2] = False
    assert sustained_activation(scores, real).tolist() == [6.0, 6.0, math.inf]
    assert sustained_activation(scores).tolist() == [6.0, 6.0, 6.0]
    real[1, 6] = False
    assert sustained_activation(scores, real).tolist() == [6.0, math.inf, math.inf]
    assert sustained_activation(tensor([[1.0, 3.0]])).tolist() == [math.inf]


def test_of_a_long_text_a_quarter_has_to_be_loud() -> None:
    scores = tensor([[9.0] * 8 + [1.0] * 32] * 3)  # 10 of 40 tokens count, 9 of 36, and 8 of 35
    real = torch.arange(40) < tensor([[40], [36], [35]])
    expected = [(72 + 2) / 10, (72 + 1) / 9, 9.0]
    assert sustained_activation(scores, real).tolist() == pytest.approx(expected)
    assert sustained_activation(scores.flip(-1), real.flip(-1)).tolist() == pytest.approx(expected)
    assert sustained_activation(scores).tolist() == pytest.approx([7.4] * 3)


def test_a_text_of_few_tokens_is_the_newest_memorys_that_recognises_it() -> None:
    """Its mean would count every "The" and "is", and a fact that is edited again would keep its former answer."""
    epsilon, recognised = tensor([1.0, 1.0]), tensor([3.9, 3.9])
    tokens = tensor([[[1.0, 3.0, 3.0, 4.0], [0.1, 0.1, 0.1, 4.0]]])
    scores, sustained = tokens.amax(dim=-1), sustained_activation(tokens)
    assert choose_memory(scores, epsilon, 0.75, recognised, sustained).tolist() == [1]
    longer = torch.cat([tokens, tokens], dim=-1)
    assert choose_memory(scores, epsilon, 0.75, recognised, sustained_activation(longer)).tolist() == [0]


def test_a_newer_memory_has_to_be_loud_on_more_than_a_few_tokens_by_hand() -> None:
    """At .75 of what memory 0 sustains, 2.0, a newer one needs 1.5; what does not compete does not count."""
    epsilon, recognised = tensor([1.0, 1.0, 3.3]), tensor([4.0, 4.0, 3.0])
    scores = tensor([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [4.0, 3.0, 9.0], [3.9, 3.0, 0.0], [4.0, 3.9, 0.0]])
    sustained = tensor([[2.0, 1.51, 9.0], [2.0, 1.49, 9.0], [2.0, 9.0, 1.49], [2.0, 1.49, 0.0], [2.0, 9.0, 9.0]])
    assert choose_memory(scores, epsilon, 0.75, recognised, sustained).tolist() == [1, 0, 0, 0, 0]
    assert choose_memory(scores, epsilon, 0.75, recognised).tolist() == [1, 1, 2, 1, 0]
    none = torch.zeros(5, 3)
    assert choose_memory(none, epsilon, 0.75, recognised, sustained).tolist() == [MAIN_MEMORY] * 5


def test_choose_memory_without_memories_stays_in_the_main_memory() -> None:
    choice = choose_memory(torch.zeros(3, 0), torch.zeros(0))
    assert choice.tolist() == [-1, -1, -1]
    assert choice.dtype == torch.long


def test_choose_memory_with_extreme_thresholds() -> None:
    scores = tensor([[3.0, 1e30], [0.0, 0.0]])
    assert choose_memory(scores, tensor([math.inf, math.inf])).tolist() == [-1, -1]
    # Zero is the score of an empty memory: it stays out unless its threshold lies below zero.
    assert choose_memory(scores, tensor([0.0, math.inf])).tolist() == [0, -1]
    assert choose_memory(scores, tensor([-1.0, math.inf])).tolist() == [0, 0]


def test_a_score_that_is_not_a_number_never_routes() -> None:
    assert choose_memory(tensor([[math.nan, 2.0], [math.nan, 0.5]]), tensor([1.0, 1.0])).tolist() == [1, -1]


@given(st.integers(1, 5).flatmap(lambda m: st.lists(st.lists(SCORES, min_size=m, max_size=m), min_size=2, max_size=5)))
@settings(max_examples=60, deadline=None)
def test_choose_memory_is_the_definition(rows: list[list[float]]) -> None:
    scores, epsilon = tensor(rows[:-1]), tensor(rows[-1])
    for row, chosen in zip(scores, choose_memory(scores, epsilon).tolist(), strict=True):
        above = [index for index, score in enumerate(row.tolist()) if score > epsilon[index]]
        if chosen == MAIN_MEMORY:
            assert not above
        else:
            assert chosen in above
            assert row[chosen] == max(row[index] for index in above)
