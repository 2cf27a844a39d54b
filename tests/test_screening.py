"""Screening: sketches, bounds, which exact scores are needed, and that the choice is the exact one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor

from easyedit_wise import screening
from easyedit_wise.routing import (
    MAIN_MEMORY,
    POOLINGS,
    choose_memory,
    pool,
    relative_activation,
    routing_activation,
)
from easyedit_wise.screening import (
    FAILURE,
    SKETCH_ROWS,
    least_share,
    n_directions,
    next_to_score,
    random_projection,
    score_bounds,
    sketch,
)
from easyedit_wise.tuner.config import WiseConfig
from easyedit_wise.tuner.memory import MERGED, MemoryState, SideMemory
from easyedit_wise.tuner.router import Candidate, _Prefill, decide
from easyedit_wise.tuner.sketches import SketchCache

INF = math.inf


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- sketches -------------------------------------------------------------------------------------


def test_sketch_by_hand() -> None:
    # (1 2; 0 1) (1 0; 3 4) = (7 8; 3 4)
    made = sketch(tensor([[1.0, 0.0], [3.0, 4.0]]), tensor([[1.0, 2.0], [0.0, 1.0]]))
    assert made.tolist() == [[7.0, 8.0], [3.0, 4.0]]


def test_a_half_precision_memory_is_sketched_in_fp32() -> None:
    assert sketch(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(4, 2)).dtype == torch.float32


def test_a_projection_keeps_norms_and_the_global_generator() -> None:
    state = torch.get_rng_state()
    projection = random_projection(5, seeded(0), rows=40_000)
    assert torch.equal(torch.get_rng_state(), state)
    vector = tensor([3.0, 0.0, -4.0, 0.0, 12.0])
    assert float((projection @ vector).norm()) == pytest.approx(13.0, rel=0.02)
    assert torch.equal(random_projection(7, seeded(1)), random_projection(7, seeded(1)))
    assert random_projection(7, seeded(1)).shape == (SKETCH_ROWS, 7)


# -- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [1e-2, 1e-4, FAILURE])
def test_least_share_is_the_quantile_of_a_chi_square_variable(failure: float) -> None:
    degrees = tensor([32.0, 64.0, 300.0], dtype=torch.float64)
    share = least_share(degrees, failure)
    reached = torch.special.gammainc(degrees / 2, share**2 * degrees / 2)  # the distribution function at share^2 k
    assert (reached <= 1.02 * failure).all()
    assert (reached >= 0.6 * failure).all()


def test_few_degrees_promise_nothing() -> None:
    assert least_share(tensor([1.0, 2.0])).tolist() == [0.0, 0.0]


def test_a_sketch_falls_below_its_share_as_rarely_as_it_says() -> None:
    vector = torch.randn(20, generator=seeded(0))
    projections = torch.randn(40_000, SKETCH_ROWS, 20, generator=seeded(1)) / math.sqrt(SKETCH_ROWS)
    kept = (projections @ vector).norm(dim=-1) / vector.norm()
    below = kept < least_share(tensor(float(SKETCH_ROWS)), 1e-2)
    assert 0.008 < float(below.float().mean()) < 0.012


def test_n_directions_by_hand() -> None:
    parallel = tensor([[1.0, 0.0], [5.0, 0.0], [-2.0, 0.0]])
    orthogonal = torch.eye(3)
    # Shares 3/4 and 1/4: 1 / (9/16 + 1/16) = 1.6.
    uneven = tensor([[0.0, 3.0], [1.0, 0.0]])
    # cos^2 = 1/2 between two of the same length: 1 / (2/4 + 2/4 * 1/2) = 4/3.
    oblique = tensor([[1.0, 0.0], [1.0, 1.0]]) / tensor([[1.0], [math.sqrt(2)]])
    for tokens, expected in [(parallel, 1.0), (orthogonal, 3.0), (uneven, 1.6), (oblique, 4 / 3)]:
        assert n_directions(tokens[None, None]).item() == pytest.approx(expected, rel=1e-5)


def test_n_directions_leaves_padding_out() -> None:
    tokens = tensor([[[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]])
    assert n_directions(tokens, tensor([[1, 1, 0]])).item() == pytest.approx(2.0)
    assert n_directions(tokens, tensor([[0, 1, 0]])).item() == pytest.approx(1.0)


@pytest.mark.parametrize("n_tokens", [2, 9])
def test_n_directions_is_the_double_sum(n_tokens: int) -> None:
    """With fewer tokens than rows and with more."""
    sketched = torch.randn(3, 2, n_tokens, 4, generator=seeded(2))
    share = sketched.norm(dim=-1) / sketched.norm(dim=-1).sum(dim=-1, keepdim=True)
    cosine = F.cosine_similarity(sketched[:, :, :, None], sketched[:, :, None], dim=-1)
    expected = 1 / (share[..., None] * share[:, :, None] * cosine**2).sum(dim=(-1, -2))
    torch.testing.assert_close(n_directions(sketched), expected)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_score_bounds_of_a_sketch_that_loses_nothing(pooling: str) -> None:
    """With S = dW the estimate is the score itself, and the bound lies above it by the share alone."""
    activations = torch.randn(3, 5, 6, generator=seeded(3))
    memories = torch.randn(4, 64, 6, generator=seeded(4))
    mask = tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    estimate, upper = score_bounds(activations, memories, mask, pooling)
    for index, delta_weight in enumerate(memories):
        expected = pool(routing_activation(activations, delta_weight), mask, pooling)
        torch.testing.assert_close(estimate[:, index], expected)
    assert upper[2].tolist() == [0.0] * 4  # a row without tokens scores 0 for certain
    share = float(least_share(tensor(64.0)))
    if pooling == "mean":
        assert (upper[:2] < estimate[:2] / share).all()
        assert (upper[:2] > estimate[:2]).all()
    else:
        torch.testing.assert_close(upper[:2], estimate[:2] / share)


def test_bounds_of_long_batches_are_those_of_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    activations = torch.randn(5, 4, 6, generator=seeded(3))
    sketches, mask = torch.randn(3, 32, 6, generator=seeded(4)), torch.rand(5, 4, generator=seeded(5)) < 0.7
    whole = score_bounds(activations, sketches, mask)
    for block in (1, 8):  # smaller than a row, and two rows
        monkeypatch.setattr(screening, "_BLOCK", block)
        for one, other in zip(score_bounds(activations, sketches, mask), whole, strict=True):
            torch.testing.assert_close(one, other)


def test_what_is_not_a_number_rules_nothing_out() -> None:
    sketches = torch.zeros(3, 32, 2)
    sketches[0], sketches[1, 5, 1] = 1.0, torch.nan
    estimate, upper = score_bounds(torch.ones(1, 2, 2), sketches)
    assert torch.isnan(estimate[0, 1])
    assert upper[0, 1] == INF
    assert estimate[0, 2] == upper[0, 2] == 0  # a memory that is still empty
    assert next_to_score(upper, tensor([100.0, 100.0, 0.0]), estimate, torch.zeros(1, 3).bool()).tolist() == [1]


# -- what is needed -------------------------------------------------------------------------------


def test_next_to_score_by_hand() -> None:
    epsilon = tensor([5.0, 5.0, 1.0])
    upper = tensor([[4.0, 5.0, 1.0], [6.0, 7.0, 2.0], [6.0, 9.0, 2.0], [6.0, 7.0, 6.5], [INF, 9.0, 9.0]])
    scores = tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 5.5, 0.0], [0.0, 5.0, 6.2], [0.0, 0.0, 0.0]])
    known = tensor([[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 0]]).bool()
    # 0: no bound exceeds its threshold. 1: the most promising first. 2: memory 1 has 5.5, memory 0 may have 6.
    # 3: memory 2 has 6.2, more than memory 0 can have. 4: an unknown bound comes first.
    assert next_to_score(upper, epsilon, scores, known).tolist() == [-1, 1, 0, -1, 0]


def test_a_rival_that_may_draw_level_is_needed() -> None:
    """The lower index wins a tie, so it has to be known."""
    known = tensor([[False, True]])
    assert next_to_score(tensor([[4.0, 9.0]]), tensor([1.0, 1.0]), tensor([[0.0, 4.0]]), known).tolist() == [0]
    assert next_to_score(tensor([[3.9, 9.0]]), tensor([1.0, 1.0]), tensor([[0.0, 4.0]]), known).tolist() == [-1]


def test_one_that_may_come_near_enough_to_be_preferred_is_needed() -> None:
    known, scores = tensor([[False, True]]), tensor([[0.0, 4.0]])
    for upper, needed in ((3.0, 0), (2.9, -1)):
        bounds = tensor([[upper, 9.0]])
        assert next_to_score(bounds, tensor([1.0, 1.0]), scores, known, newest_within=0.75).tolist() == [needed]


def test_what_may_recognise_the_query_is_needed_and_nothing_else_once_one_does() -> None:
    epsilon, recognised = tensor([1.0, 1.0, 1.0]), tensor([5.0, 4.0, 4.0])
    cases = [
        ([4.9, 3.9, 3.9], [0.0, 4.0, 0.0], [0, 1, 0], -1),  # memory 1 does, the others cannot
        ([5.0, 3.9, 3.9], [0.0, 4.0, 0.0], [0, 1, 0], 0),  # memory 0 may, and what it sustains may be more
        ([4.9, 3.9, 4.0], [0.0, 4.0, 0.0], [0, 1, 0], 2),  # memory 2 may
        ([2.9, 9.0, 2.9], [0.0, 3.9, 0.0], [0, 1, 0], -1),  # none does or may, and all are far from the most active
        ([2.95, 9.0, 2.0], [0.0, 3.9, 0.0], [0, 1, 0], 0),  # memory 0 may come near it
        ([4.9, 9.0, 2.0], [0.0, 9.0, 0.0], [0, 1, 0], -1),
        ([2.0, 2.0, 2.0], [0.0, 0.0, 0.0], [0, 0, 0], 0),
        ([INF, 9.0, 0.5], [0.0, 5.0, 0.0], [0, 1, 0], 0),
    ]
    for upper, scores, known, needed in cases:
        given_ = (tensor([upper]), epsilon, tensor([scores]), tensor([known]).bool())
        assert next_to_score(*given_, newest_within=0.75, recognised=recognised).tolist() == [needed], upper


@given(st.integers(0, 10_000), st.integers(2, 6), st.sampled_from(["no", "near", "recognised", "sustained"]))
@settings(max_examples=200, deadline=None)
def test_what_is_not_needed_does_not_change_the_choice(seed: int, n: int, rule: str) -> None:
    """Scores of a few levels, so that there are ties: the choice is the one that all exact scores would give."""
    generator = seeded(seed)
    scores = torch.randint(0, 6, (4, n), generator=generator) / 2
    upper = scores + torch.randint(0, 3, (4, n), generator=generator) / 2
    epsilon, known = torch.randint(0, 4, (n,), generator=generator) / 2, torch.zeros(4, n, dtype=torch.bool)
    recognised = torch.randint(1, 6, (n,), generator=generator) / 2
    sustained = torch.rand(4, n, generator=generator)
    within = None if rule == "no" else 0.75
    rules = (within, recognised if rule in ("recognised", "sustained") else None)
    for _ in range(n + 1):
        rows = next_to_score(upper, epsilon, scores.masked_fill(~known, 9.0), known, *rules)
        for row, index in enumerate(rows.tolist()):
            if index != MAIN_MEMORY:
                known[row, index] = True
    assert set(rows.tolist()) == {MAIN_MEMORY}
    rules += (sustained if rule == "sustained" else None,)
    seen = choose_memory(scores.masked_fill(~known, -INF), epsilon, *rules)
    assert torch.equal(seen, choose_memory(scores, epsilon, *rules))


def test_a_known_score_below_its_threshold_rules_out_nobody() -> None:
    known = tensor([[False, True]])
    assert next_to_score(tensor([[2.0, 9.0]]), tensor([1.0, 5.0]), tensor([[0.0, 4.0]]), known).tolist() == [0]


# -- the decision is the exact one ------------------------------------------------------------------

KINDS = ("dense", "low rank", "sparse", "copy", "scaled", "close", "zero")
D_IN, D_OUT = 24, 80


def memory_of(kind: str, generator: torch.Generator, earlier: list[Tensor]) -> Tensor:
    dense = torch.randn(D_OUT, D_IN, generator=generator)
    if kind == "low rank":
        return torch.randn(D_OUT, 1, generator=generator) @ torch.randn(1, D_IN, generator=generator)
    if kind == "sparse":
        return dense * (torch.rand(D_OUT, D_IN, generator=generator) < 0.05)
    if kind == "zero":
        return torch.zeros(D_OUT, D_IN)
    if kind == "dense" or not earlier:
        return dense
    return {"copy": earlier[-1].clone(), "scaled": 1.5 * earlier[0], "close": earlier[-1] + 1e-3 * dense}[kind]


def candidates_of(
    deltas: list[Tensor],
    epsilons: list[float],
    pooling: str = "mean",
    weakest: list[float] | None = None,
    **config: Any,
) -> list[Candidate]:
    settings_ = WiseConfig(target_modules=["x"], pooling=pooling, **config)
    own = zip(deltas, epsilons, weakest or [INF] * len(deltas), strict=True)
    states = [MemoryState(MERGED, dw, None, epsilon, 1, weakest_edit) for dw, epsilon, weakest_edit in own]
    return [Candidate(f"default/{index}", SideMemory(state), settings_) for index, state in enumerate(states)]


NEAR = st.lists(st.sampled_from([0.3, 0.7, 0.98, 0.9999, 1.0001, 1.02, 1.5, INF, 0.0, -1.0]), min_size=9, max_size=9)


@given(
    seed=st.integers(0, 10_000),
    kinds=st.lists(st.sampled_from(KINDS), min_size=4, max_size=9),
    near=NEAR,
    weakest_near=NEAR,
    pooling=st.sampled_from(POOLINGS),
    padded=st.booleans(),
    n_tokens=st.sampled_from([1, 3, 40]),
    relative=st.booleans(),
)
@example(0, ["dense", "copy", "copy", "copy"], [0.9] * 9, [INF] * 9, "mean", False, 3, False)
@example(1, ["close"] * 9, [0.98] * 9, [INF] * 9, "mean", True, 3, False)
@example(2, ["zero"] * 5, [0.0] * 9, [0.0] * 9, "max", True, 3, False)
@example(3, ["dense"] * 9, [0.3, 0.7] * 5, [INF] * 9, "max", False, 3, True)
@example(4, ["dense"] * 9, [0.3, 0.7] * 5, [0.98, 1.02, 1.5] * 3, "max", False, 3, True)
@settings(max_examples=200, deadline=None)
def test_the_screened_decision_is_the_exact_one(
    seed: int,
    kinds: list[str],
    near: list[float],
    weakest_near: list[float],
    pooling: str,
    padded: bool,
    n_tokens: int,
    relative: bool,
) -> None:
    generator = seeded(seed)
    deltas: list[Tensor] = []
    for kind in kinds:
        deltas.append(memory_of(kind, generator, deltas))
    x = torch.randn(5, n_tokens, D_IN, generator=generator)
    x = x + 3 * torch.randn(5, 1, D_IN, generator=generator)  # tokens of one row have much in common
    base = torch.randn(5, n_tokens, D_OUT, generator=generator)
    mask = torch.rand(5, n_tokens, generator=generator) < 0.6 if padded else None
    of_tokens = [relative_activation(F.linear(x, dw), x) if relative else routing_activation(x, dw) for dw in deltas]
    scores = torch.stack([pool(tokens, mask, pooling) for tokens in of_tokens], dim=-1)
    # Each threshold lies near the score of one of the rows; absolute where it is not a multiple.
    epsilons, weakest = (
        [
            float(scores[(index + row) % 5, index]) * factor if 0 < factor < INF else factor
            for index, factor in enumerate(factors[: len(kinds)])
        ]
        for row, factors in enumerate((near, weakest_near))
    )
    candidates = candidates_of(deltas, epsilons, pooling, weakest, relative_scores=relative)
    exact, expected = decide(x, base, candidates, F.linear, mask)
    screened, result = decide(x, base, candidates, F.linear, mask, sketches=SketchCache())
    for row in range(5):
        choice, other = int(screened.choice[row]), int(exact.choice[row])
        if choice != other:  # equal memories may differ in the last bit, as the product of other rows is another one
            assert min(choice, other) >= 0
            assert float(exact.scores[row, choice]) == pytest.approx(float(exact.scores[row, other]), rel=1e-5)
        alone = base[row] if choice < 0 else base[row] + F.linear(x[row], deltas[choice])
        torch.testing.assert_close(result[row], alone, rtol=1e-5, atol=1e-4)
        if choice < 0:
            assert torch.equal(result[row], base[row])
        else:
            assert screened.exact is None or screened.exact[row, choice]
    agree = screened.choice == exact.choice
    torch.testing.assert_close(result[agree], expected[agree], rtol=1e-5, atol=1e-4)
    known = torch.ones_like(screened.scores).bool() if screened.exact is None else screened.exact
    torch.testing.assert_close(screened.scores[known], exact.scores[known], rtol=1e-5, atol=1e-5)


def test_a_memory_answers_what_scores_as_on_its_own_edits() -> None:
    """Memory 1 is near enough to be preferred: as it is, too, unless memory 0 alone recognises the query."""
    x, delta = torch.randn(1, 1, D_IN, generator=seeded(1)), torch.randn(D_OUT, D_IN, generator=seeded(2))
    score = float(relative_activation(F.linear(x, delta), x))

    def chosen(weakest: list[float], relative: bool = True) -> int:
        own = candidates_of([delta, 0.9 * delta], [score / 2] * 2, "max", weakest, relative_scores=relative)
        route, _ = decide(x, torch.zeros(1, 1, D_OUT), own, F.linear)
        return int(route.choice)

    assert chosen([INF, INF]) == 1
    assert chosen([score / 0.98, INF]) == 0
    assert chosen([score / 0.96, INF]) == 1
    assert chosen([score, 0.9 * score]) == 1
    assert chosen([score / 0.98, INF], relative=False) == 0  # the most active one, whatever it recognises
    assert chosen([INF, 0.1], relative=False) == 0


@pytest.mark.parametrize(("loud", "chosen"), [(1, 0), (2, 0), (3, 1)])
def test_a_newer_memory_that_is_loud_on_a_few_tokens_only_does_not_answer(loud: int, chosen: int) -> None:
    """Twelve tokens of which memory 0 excites all by 1 and memory 1 some by 1: of eight it needs .7 of them."""
    tokens = torch.eye(6, D_IN).repeat(2, 1)[None]
    few = torch.eye(D_OUT, D_IN) * (torch.arange(D_IN) < loud)
    own = candidates_of([torch.eye(D_OUT, D_IN), few], [0.5] * 2, "max", [1.0] * 2, relative_scores=True)
    route, _ = decide(tokens, torch.zeros(1, 12, D_OUT), own, F.linear)
    assert int(route.choice) == chosen


def test_what_a_memory_sustains_counts_in_the_loudness_of_its_own_edits() -> None:
    """The later memory's epsilon lies nearer to its edits, and they are less loud: both sustain what their own do."""
    x = torch.randn(1, 1, D_IN, generator=seeded(1)).repeat(1, 8, 1)
    delta = torch.randn(D_OUT, D_IN, generator=seeded(2))
    score = float(relative_activation(F.linear(x, delta), x).amax())
    own = candidates_of([2 * delta, delta], [0.8 * score, 0.9 * score], "max", [2 * score, score], relative_scores=True)
    route, _ = decide(x, torch.zeros(1, 8, D_OUT), own, F.linear)
    assert int(route.choice) == 1


def counted(rows: list[int]) -> Any:
    """A product that writes down how many sequences it was taken for."""

    def product(x: Tensor, delta_weight: Tensor) -> Tensor:
        rows.append(x.shape[0])
        return F.linear(x, delta_weight)

    return product


def test_far_memories_cost_no_product() -> None:
    deltas = [torch.randn(D_OUT, D_IN, generator=seeded(seed)) for seed in range(40)]
    x, base = torch.randn(6, 30, D_IN, generator=seeded(99)), torch.zeros(6, 30, D_OUT)
    scores = torch.stack([pool(routing_activation(x, dw)) for dw in deltas], dim=-1)
    far = (2.5 * scores.amax(dim=0)).tolist()
    taken: list[int] = []
    route, result = decide(x, base, candidates_of(deltas, far), counted(taken), sketches=SketchCache())
    assert taken == []
    assert route.choice.tolist() == [-1] * 6
    assert result is base
    assert not route.exact.any()
    # What is reported instead is an estimate, and says so.
    assert route.describe(3)["exact"] is False
    assert route.describe(3)["score"] == pytest.approx(float(scores[3].max()), rel=0.3)

    # Rows 1 and 4 excite memory 7: one product, for these two.
    x[[1, 4]] *= 10
    epsilons = [100 * epsilon for epsilon in far]
    epsilons[7] = far[7]
    route, result = decide(x, base, candidates_of(deltas, epsilons), counted(taken), sketches=SketchCache())
    assert taken == [2]
    assert route.choice.tolist() == [-1, 7, -1, -1, 7, -1]
    assert route.exact.nonzero().tolist() == [[1, 7], [4, 7]]
    assert route.describe(1)["exact"] is True
    assert route.describe(0)["exact"] is False
    torch.testing.assert_close(result[[1, 4]], F.linear(x[[1, 4]], deltas[7]))


def test_a_clear_winner_is_the_only_product() -> None:
    """All are above their thresholds; the others' bounds lie below the winner's score."""
    deltas = [torch.randn(D_OUT, D_IN, generator=seeded(seed)) for seed in range(10)]
    deltas[3] = 5 * deltas[3]
    taken: list[int] = []
    x = torch.randn(4, 30, D_IN, generator=seeded(99))
    candidates = candidates_of(deltas, [0.0] * 10)
    route, _ = decide(x, torch.zeros(4, 30, D_OUT), candidates, counted(taken), sketches=SketchCache())
    assert route.choice.tolist() == [3] * 4
    assert taken == [4]


@pytest.mark.parametrize(
    ("n_memories", "d_out", "config"),
    [(3, D_OUT, {}), (9, 2 * SKETCH_ROWS, {}), (9, D_OUT, {"score_activation": "silu"})],
    ids=["few memories", "a small layer", "EasyEdit's score"],
)
def test_where_screening_does_not_pay_every_score_is_exact(n_memories: int, d_out: int, config: Any) -> None:
    deltas = [torch.randn(d_out, D_IN, generator=seeded(seed)) for seed in range(n_memories)]
    candidates = candidates_of(deltas, [INF] * n_memories, **config)
    x, base, taken = torch.ones(2, 3, D_IN), torch.zeros(2, 3, d_out), []
    route, _ = decide(x, base, candidates, counted(taken), sketches=SketchCache())
    assert route.exact is None
    assert taken == [2] * n_memories


def test_memories_that_pool_differently_are_scored_exactly() -> None:
    deltas = [torch.randn(D_OUT, D_IN, generator=seeded(seed)) for seed in range(6)]
    candidates = candidates_of(deltas[:3], [INF] * 3) + candidates_of(deltas[3:], [INF] * 3, "max")
    route, _ = decide(torch.ones(2, 3, D_IN), torch.zeros(2, 3, D_OUT), candidates, F.linear, sketches=SketchCache())
    assert route.exact is None


def test_memories_that_are_not_numbers_leave_the_others_alone() -> None:
    deltas = [torch.randn(D_OUT, D_IN, generator=seeded(seed)) for seed in range(6)]
    deltas[0][3, 3], deltas[1][5, 5] = torch.nan, INF
    x, base = torch.randn(3, 4, D_IN, generator=seeded(9)), torch.zeros(3, 4, D_OUT)
    candidates = candidates_of(deltas, [0.0] * 6)
    exact, expected = decide(x, base, candidates, F.linear)
    screened, result = decide(x, base, candidates, F.linear, sketches=SketchCache())
    assert screened.choice.tolist() == exact.choice.tolist()
    assert 0 not in screened.choice.tolist()
    torch.testing.assert_close(result, expected, equal_nan=True)


def test_gradients_pass_through_a_screened_decision() -> None:
    deltas = [torch.randn(D_OUT, D_IN, generator=seeded(seed)) for seed in range(6)]
    x = torch.randn(3, 4, D_IN, generator=seeded(9))
    scores = torch.stack([pool(routing_activation(x, dw)) for dw in deltas], dim=-1)
    epsilons = [float(scores[:2].min()) if index == 2 else INF for index in range(6)]
    candidates = candidates_of(deltas, epsilons)
    gradients = []
    for sketches in (None, SketchCache()):
        inputs = x.clone().requires_grad_()
        base = inputs.sum(dim=-1, keepdim=True).expand(-1, -1, D_OUT)
        decide(inputs, base, candidates, F.linear, sketches=sketches)[1].square().sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-2)


def test_a_choice_that_another_had_replaced_gets_its_product_back() -> None:
    """Relative scores 10.2, 10 and 7.6, asked for in another order: 2, newer and within .75, is ruled out by 0."""
    x, base = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    deltas = [tensor([[value]]) for value in (10.2, 10.0, 7.6)]
    prefill = _Prefill(x, base, candidates_of(deltas, [1.0] * 3, relative_scores=True), F.linear, None, None)
    chosen = []
    for index in (1, 2, 0):
        prefill.measure(index)
        chosen.append(int(prefill.choice))
    assert chosen == [1, 2, 1]
    prefill.settle()
    assert float(prefill.result) == 10.0
