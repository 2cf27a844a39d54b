"""Merge operators: cases computed by hand, properties, equality with PEFT, errors."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from easyedit_wise import merging
from easyedit_wise.merging import MERGE_METHODS, MergeMethod, merge
from easyedit_wise.sharding import non_overlapping_masks, random_mask

RANDOM_METHODS = [name for name, row in MERGE_METHODS.items() if row.needs_generator]
FIXED_METHODS = [name for name, row in MERGE_METHODS.items() if not row.needs_generator]
MEANS = ["ties", "ties_weighted", "sign", "magnitude_norm", "slerp"]
SUMS = ["linear", "magnitude", "dare_linear", "dare_ties"]

A = torch.tensor([[4.0, -1.0, 2.0], [0.0, 3.0, -5.0]])
B = torch.tensor([[-6.0, -2.0, 3.0], [1.0, 5.0, -1.0]])
# Density 1/2 keeps 3 of 6 entries: magnitudes 5, 4, 3 of A and 6, 5, 3 of B, hence
#   trim(A) = [[ 4, 0, 0], [0, 3, -5]]      trim(B) = [[-6, 0, 3], [0, 5, 0]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(shape: tuple[int, ...], count: int, seed: int = 0) -> list[Tensor]:
    generator = seeded(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def run(method: str, deltas: list[Tensor], weights: list[float] | None = None, density: float = 0.5) -> Tensor:
    return merge(deltas, method, weights, density, seeded())


class TestByHand:
    @pytest.mark.parametrize(
        ("method", "weights", "expected"),
        [
            # sums of the trimmed: -2, 0, 3 / 0, 8, -5, so -6 wins the first; (3 + 5) / 2 = 4
            ("ties", None, [[-6, 0, 3], [0, 4, -5]]),
            # (1 * 3 + 3 * 5) / 4 = 4.5; entries alone in their mean keep their value
            ("ties", [1, 3], [[-6, 0, 3], [0, 4.5, -5]]),
            # the vote is unweighted: 3 * 4 - 6 > 0 would elect +, 4 - 6 < 0 elects -.  (3 * 3 + 5) / 4 = 3.5
            ("ties", [3, 1], [[-6, 0, 3], [0, 3.5, -5]]),
            # 0.5 * 4 - 0.25 * 6 = 0.5, 0.25 * 3 = 0.75, 0.5 * 3 + 0.25 * 5 = 2.75, -0.5 * 5 = -2.5
            ("magnitude", [0.5, 0.25], [[0.5, 0, 0.75], [0, 2.75, -2.5]]),
            # (4 - 6) / 2 = -1, (3 + 5) / 2 = 4; entries alone are not halved
            ("magnitude_norm", None, [[-1, 0, 3], [0, 4, -5]]),
            # (4 - 18) / 4 = -3.5, (3 + 15) / 4 = 4.5
            ("magnitude_norm", [1, 3], [[-3.5, 0, 3], [0, 4.5, -5]]),
            # nothing trimmed; sums -2, -3, 5 / 1, 8, -6; means over those that agree, 0 of A not counted
            ("sign", None, [[-6, -1.5, 2.5], [1, 4, -3]]),
            # (-1 - 6) / 4, (2 + 9) / 4, 1, (3 + 15) / 4, (-5 - 3) / 4
            ("sign", [1, 3], [[-6, -1.75, 2.75], [1, 4.5, -2]]),
            # 2 - 1.5, -0.5 - 0.5, 1 + 0.75, 0.25, 1.5 + 1.25, -2.5 - 0.25
            ("linear", [0.5, 0.25], [[0.5, -1, 1.75], [0.25, 2.75, -2.75]]),
            # 1 / k each: (4 - 6) / 2, -3 / 2, 5 / 2, 1 / 2, 8 / 2, -6 / 2
            ("linear", None, [[-1, -1.5, 2.5], [0.5, 4, -3]]),
        ],
    )
    def test_operator(self, method: str, weights: list[float] | None, expected: list[list[float]]) -> None:
        assert torch.equal(run(method, [A, B], weights), torch.tensor(expected))

    def test_ties_weighted_elects_on_weighted_sums(self) -> None:
        deltas = [torch.tensor([[3.0, 1.0]]), torch.tensor([[-2.0, 1.0]])]
        assert torch.equal(run("ties", deltas, [0.2, 0.8], density=1.0), torch.tensor([[3.0, 1.0]]))
        assert torch.equal(run("ties_weighted", deltas, [0.2, 0.8], density=1.0), torch.tensor([[-2.0, 1.0]]))

    def test_ties_weighted_keeps_exactly_its_share_of_equal_magnitudes(self) -> None:
        equal = [torch.tensor([[1.0, -1.0, 1.0, 1.0]])]
        assert int(run("ties", equal, density=0.5).count_nonzero()) == 4
        assert int(run("ties_weighted", equal, density=0.5).count_nonzero()) == 2

    def test_dare_ties_at_density_one_is_a_sum_of_what_agrees(self) -> None:
        # Nothing dropped. Signs of A + B: -, -, + / +, +, -
        # 0.25 * -6, -0.5 - 0.5, 1 + 0.75, 0.25 * 1, 1.5 + 1.25, -2.5 - 0.25
        expected = torch.tensor([[-1.5, -1, 1.75], [0.25, 2.75, -2.75]])
        assert torch.equal(run("dare_ties", [A, B], [0.5, 0.25], density=1.0), expected)

    def test_dare_follows_its_equations(self) -> None:
        draws = seeded()
        first, second = (random_mask((6,), 0.5, draws).view(2, 3) for _ in range(2))
        dropped_a, dropped_b = A * first / 0.5, B * second / 0.5  # survivors count double
        assert torch.equal(run("dare_linear", [A, B], [0.5, 0.25]), 0.5 * dropped_a + 0.25 * dropped_b)
        positive = dropped_a + dropped_b >= 0
        agree_a, agree_b = (torch.where((d > 0) == positive, d, 0.0) for d in (dropped_a, dropped_b))
        assert torch.equal(run("dare_ties", [A, B], [0.5, 0.25]), 0.5 * agree_a + 0.25 * agree_b)

    def test_a_tied_vote_elects_plus(self) -> None:
        # 2 - 2 = 0 and -3 + 3 = 0: both elect +
        deltas = [torch.tensor([[2.0, -3.0]]), torch.tensor([[-2.0, 3.0]])]
        assert torch.equal(run("ties", deltas, density=1.0), torch.tensor([[2.0, 3.0]]))

    def test_entries_tied_with_the_smallest_kept_stay(self) -> None:
        # int(0.5 * 4) = 2 entries, the second largest magnitude is 3, and three entries have it
        delta = torch.tensor([3.0, -3.0, 1.0, 3.0])
        assert torch.equal(run("magnitude", [delta], [1.0]), torch.tensor([3.0, -3.0, 0.0, 3.0]))

    def test_fewer_nonzeros_than_density_keeps_are_untouched(self) -> None:
        # int(0.5 * 6) = 3 entries may stay and only two are not zero
        delta = torch.tensor([[0.0, 1e-8, 0.0], [0.0, 0.0, -7.0]])
        assert torch.equal(run("ties", [delta]), delta)

    @pytest.mark.parametrize(
        ("deltas", "weights", "expected"),
        [
            # 90 degrees, t = 2/3: sin(30) / 1 = 1/2 of the first, sin(60) of the second
            (
                [[[3, 0, 0], [0, 0, 0]], [[0, 3, 0], [0, 0, 0]]],
                [1, 2],
                [[1.5, 1.5 * math.sqrt(3), 0], [0, 0, 0]],
            ),
            # 60 degrees, t = 1/2: sin(30) / sin(60) (a + b) is the bisector, at 30 degrees
            (
                [[[1, 0, 0], [0, 0, 0]], [[0.5, math.sqrt(0.75), 0], [0, 0, 0]]],
                [1, 1],
                [[math.sqrt(0.75), 0.5, 0], [0, 0, 0]],
            ),
            # folded: (e1 + e2) / sqrt 2 with weight 2, then t = 1/3 at 90 degrees: sin(60), sin(30)
            (
                [[[1, 0, 0], [0, 0, 0]], [[0, 1, 0], [0, 0, 0]], [[0, 0, 1], [0, 0, 0]]],
                [1, 1, 1],
                [[math.sqrt(3 / 8), math.sqrt(3 / 8), 0.5], [0, 0, 0]],
            ),
            # parallel: 1/4 a + 3/4 (2 a) = 1.75 a
            ([[[4, -8, 0], [0, 0, 0]], [[8, -16, 0], [0, 0, 0]]], [1, 3], [[7, -14, 0], [0, 0, 0]]),
            # opposite: 1/4 a - 3/4 a = -a / 2
            ([[[4, -8, 0], [0, 0, 0]], [[-4, 8, 0], [0, 0, 0]]], [1, 3], [[-2, 4, 0], [0, 0, 0]]),
            # a zero vector has no direction: 1/2 a + 1/2 0
            ([[[4, -8, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]], [1, 1], [[2, -4, 0], [0, 0, 0]]),
        ],
    )
    def test_slerp(self, deltas: list[object], weights: list[float], expected: list[list[float]]) -> None:
        tensors = [torch.tensor(delta, dtype=torch.float32) for delta in deltas]
        torch.testing.assert_close(run("slerp", tensors, weights), torch.tensor(expected).float())

    def test_slerp_keeps_the_norm_and_splits_the_angle(self) -> None:
        a, b = (delta / delta.norm() for delta in normal((8, 9), 2))
        angle = math.acos(float((a * b).sum()))
        merged = run("slerp", [a, b], [3, 1])
        assert float(merged.norm()) == pytest.approx(1.0, abs=1e-5)
        assert math.acos(float((merged * a).sum())) == pytest.approx(angle / 4, abs=1e-3)


class TestAgainstPeft:
    @staticmethod
    def peft_ties(deltas: list[Tensor], density: float) -> Tensor:
        utils = pytest.importorskip("peft.utils.merge_utils")
        result: Tensor = utils.ties(deltas, torch.ones(len(deltas)), density, majority_sign_method="total")
        return result

    @pytest.mark.parametrize("shards", [1, 2, 3, 5])
    @pytest.mark.parametrize("density", [0.01, 0.2, 0.53, 0.9])
    def test_dense(self, shards: int, density: float) -> None:
        deltas = normal((67, 129), shards, seed=shards)
        torch.testing.assert_close(merge(deltas, density=density), self.peft_ties(deltas, density), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("shards", [2, 4])
    @pytest.mark.parametrize("rho", [0.05, 0.2, 0.5, 0.7])
    def test_masked_as_wise_does(self, shards: int, rho: float) -> None:
        # At density 0.53 the shards of rho 0.7 are trimmed and the others are not.
        draws = seeded(7)
        deltas = [delta * random_mask((67, 129), rho, draws) for delta in normal((67, 129), shards)]
        torch.testing.assert_close(merge(deltas), self.peft_ties(deltas, 0.53), rtol=1e-6, atol=0)

    def test_two_shards_bit_for_bit(self) -> None:
        deltas = normal((300, 400), 2)
        assert torch.equal(merge(deltas), self.peft_ties(deltas, 0.53))
        assert torch.equal(merge(deltas, weights=[1.0, 1.0]), self.peft_ties(deltas, 0.53))


# Multiples of 1/8 below 4: sums of a few are exact, so orders of summation can be compared.
ENTRIES = st.integers(-31, 31).map(lambda n: n / 8)
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 5))


@st.composite
def some_deltas(draw: st.DrawFn, max_shards: int = 4) -> list[Tensor]:
    shape = draw(SHAPES)
    size = shape[0] * shape[1]
    rows = st.lists(ENTRIES, min_size=size, max_size=size)
    values = draw(st.lists(rows, min_size=1, max_size=max_shards))
    return [torch.tensor(row).view(shape) for row in values]


# Down to 1/2 only with an entry to spare: int(0.5 * 1) would keep nothing.
DENSITIES = st.sampled_from([0.5, 0.53, 0.8, 1.0])
few = settings(max_examples=40, deadline=None)


def keeps_something(deltas: list[Tensor], density: float) -> float:
    return density if int(density * deltas[0].numel()) else 1.0


class TestProperties:
    @few
    @given(some_deltas(), DENSITIES, st.sampled_from(["ties", "linear", "sign"]), st.randoms())
    def test_order_of_shards_is_immaterial(
        self, deltas: list[Tensor], density: float, method: str, shuffler: random.Random
    ) -> None:
        density = keeps_something(deltas, density)
        weights = [float(i + 1) for i in range(len(deltas))]
        order = list(range(len(deltas)))
        shuffler.shuffle(order)
        shuffled = run(method, [deltas[i] for i in order], [weights[i] for i in order], density)
        torch.testing.assert_close(shuffled, run(method, deltas, weights, density))

    @few
    @given(some_deltas(max_shards=1), st.sampled_from(FIXED_METHODS))
    def test_one_delta_is_returned_as_it_is(self, deltas: list[Tensor], method: str) -> None:
        merged = run(method, deltas, [1.0], density=1.0)
        assert torch.equal(merged, deltas[0])
        assert merged.data_ptr() != deltas[0].data_ptr()

    @few
    @given(SHAPES, st.integers(1, 4), st.integers(0, 99))
    def test_ties_loses_nothing_of_disjoint_shards(self, shape: tuple[int, int], k: int, seed: int) -> None:
        shape = (shape[0] * 4, shape[1])  # room for one entry in each of 4 masks
        masks = non_overlapping_masks(shape, 1 / k, k, seeded(seed))
        deltas = [d * mask for d, mask in zip(normal(shape, k, seed), masks, strict=True)]
        total = torch.stack(deltas).sum(0)
        assert torch.equal(merge(deltas, density=1 / k), total)
        weighted = merge(deltas, weights=[0.1 * (i + 1) for i in range(k)], density=1 / k)
        torch.testing.assert_close(weighted, total)

    @few
    @given(some_deltas(max_shards=1), DENSITIES)
    def test_trimming_keeps_the_largest(self, deltas: list[Tensor], density: float) -> None:
        (delta,) = deltas
        density = keeps_something(deltas, density)
        trimmed = run("magnitude", deltas, [1.0], density)
        kept = trimmed != 0
        assert torch.equal(trimmed[kept], delta[kept])
        keep = int(density * delta.numel())
        assert int(kept.sum()) >= min(keep, int(delta.count_nonzero()))
        if kept.any():
            # what went is strictly smaller, so the extra ones are ties with the smallest kept
            smallest = float(delta[kept].abs().min())
            assert all(float(x) < smallest for x in delta[~kept].abs())
            assert int((delta.abs() > smallest).sum()) < keep or keep == delta.numel()

    @few
    @given(some_deltas(), DENSITIES, st.sampled_from(list(MERGE_METHODS)), st.sampled_from([0.25, 4.0]))
    def test_homogeneous(self, deltas: list[Tensor], density: float, method: str, factor: float) -> None:
        density = keeps_something(deltas, density)
        scaled = run(method, [delta * factor for delta in deltas], None, density)
        torch.testing.assert_close(scaled, run(method, deltas, None, density) * factor)

    @few
    @given(some_deltas(), DENSITIES, st.sampled_from(["linear", "ties", "sign", "magnitude_norm"]))
    def test_means_stay_within_the_shards(self, deltas: list[Tensor], density: float, method: str) -> None:
        merged = run(method, deltas, None, keeps_something(deltas, density))
        assert (merged.abs() <= torch.stack(deltas).abs().amax(0) + 1e-6).all()

    @pytest.mark.parametrize("method", MERGE_METHODS)
    def test_scale_of_the_weights(self, method: str) -> None:
        deltas = normal((5, 7), 3)
        base, doubled = run(method, deltas, [1, 2, 3]), run(method, deltas, [2, 4, 6])
        assert method in MEANS + SUMS
        torch.testing.assert_close(doubled, base if method in MEANS else 2 * base)

    @pytest.mark.parametrize("method", RANDOM_METHODS)
    def test_dare_keeps_the_expectation(self, method: str) -> None:
        # One shard, so dare_ties elects every survivor. An entry is 0 or 2 / 0.25 = 8 with probability
        # 1/4: mean 2, deviation sqrt(3/16) * 8 = 3.46; over 40,000 entries 0.0173, and we allow 5 of it.
        merged = run(method, [torch.full((200, 200), 2.0)], [1.0], density=0.25)
        assert set(merged.unique().tolist()) == {0.0, 8.0}
        assert float(merged.mean()) == pytest.approx(2.0, abs=5 * 0.0173)

    @pytest.mark.parametrize("method", RANDOM_METHODS)
    def test_dare_is_its_seed(self, method: str) -> None:
        deltas = normal((9, 11), 2)
        again = [merge(deltas, method, generator=seeded(seed)) for seed in (1, 1, 2)]
        assert torch.equal(again[0], again[1])
        assert not torch.equal(again[0], again[2])


@pytest.mark.parametrize("method", MERGE_METHODS)
class TestEveryMethod:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_dtype_and_shape_kept_and_inputs_unmodified(self, method: str, dtype: torch.dtype) -> None:
        deltas = [delta.to(dtype) for delta in normal((6, 7), 3)]
        copies = [delta.clone() for delta in deltas]
        merged = run(method, deltas)
        assert merged.dtype == dtype
        assert merged.shape == (6, 7)
        assert all(torch.equal(delta, copy) for delta, copy in zip(deltas, copies, strict=True))
        exact = run(method, [delta.double() for delta in deltas])
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(merged.double(), exact, rtol=2 * unit, atol=2 * unit)

    def test_block_size_changes_nothing(self, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        deltas = normal((6, 7), 3)
        whole = run(method, deltas)
        monkeypatch.setattr(merging, "_BLOCK", 5)
        torch.testing.assert_close(run(method, deltas), whole)

    def test_strided_and_trainable_inputs(self, method: str) -> None:
        deltas = normal((6, 7), 2)
        expected = run(method, deltas)
        strided = [torch.nn.Parameter(delta.t().contiguous()).t() for delta in deltas]
        merged = run(method, strided)
        assert not merged.requires_grad
        assert torch.equal(merged, expected)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_not_finite_goes_through(self, method: str, bad: float) -> None:
        deltas = normal((3, 4), 2)
        deltas[0][1, 2] = bad
        assert not run(method, deltas, density=1.0).isfinite().all()

    def test_empty_and_scalar(self, method: str) -> None:
        assert run(method, [torch.zeros(0, 3)] * 2).shape == (0, 3)
        assert float(run(method, [torch.tensor(2.0)] * 2, density=1.0)) == 2.0

    def test_all_zero(self, method: str) -> None:
        assert not run(method, [torch.zeros(2, 3)] * 2).any()

    def test_global_rngs_untouched(self, method: str) -> None:
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        run(method, normal((4, 5), 2))
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())

    def test_row(self, method: str) -> None:
        row = MERGE_METHODS[method]
        assert row.name == method == row.function.__name__
        assert row.reference_url.startswith("https://")
        assert row.description
        assert row.needs_generator == method.startswith("dare")


class TestPrecision:
    def test_bfloat16_sums_in_float32(self) -> None:
        # bfloat16 has steps of 2 at 256, so 256 + 1 + 1 is 256 when rounded after every addition
        deltas = [torch.tensor([value], dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0)]
        assert float(run("linear", deltas, [1.0, 1.0, 1.0])) == 258.0

    @pytest.mark.parametrize("method", ["ties", "magnitude_norm", "sign"])
    def test_float16_mean_does_not_overflow(self, method: str) -> None:
        # 60000 + 60000 exceeds float16's 65504, the mean does not
        deltas = [torch.tensor([60000.0], dtype=torch.float16)] * 2
        assert float(run(method, deltas, density=1.0)) == 60000.0

    def test_equal_weights_of_any_size_leave_lone_entries_exact(self) -> None:
        # With w = 1/3, w * x / w is not always x; an entry of one shard must come back bit for bit.
        alone = normal((40, 50), 1)[0]
        assert torch.equal(merge([alone, torch.zeros(40, 50), torch.zeros(40, 50)], density=1.0), alone)


class TestErrors:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: merge([]), "no deltas: pass at least one"),
            (lambda: merge([A, B[:1]]), r"delta 1 has shape torch.Size\(\[1, 3\]\), but delta 0 torch.Size"),
            (lambda: merge([A, B.double()]), "delta 1 has dtype torch.float64, but delta 0 torch.float32"),
            (lambda: merge([A, B.to("meta")]), "delta 1 has device meta, but delta 0 cpu"),
            (lambda: merge([A.int()]), "delta 0 is torch.int32: pass floating-point deltas"),
            (lambda: merge([A, B], weights=[1.0]), "1 weights for 2 deltas"),
            (lambda: merge([A, B], weights=[1.0, 0.0]), r"weights are \[1.0, 0.0\], but must be positive"),
            (lambda: merge([A, B], weights=[1.0, -1.0]), "must be positive"),
            (lambda: merge([A, B], weights=[1.0, math.nan]), "must be positive"),
            (lambda: merge([A, B], weights=[1.0, math.inf]), "must be positive"),
            (lambda: merge([A, B], density=0.0), r"density is 0.0, but must lie in \(0, 1\]"),
            (lambda: merge([A, B], density=1.5), "density is 1.5"),
            (lambda: merge([A, B], density=math.nan), "density is nan"),
            (lambda: merge([A, B], density=0.1), "density is 0.1, which keeps 0 of 6 entries"),
            (lambda: merge([A, B], "dare_ties"), "pass a generator"),
            (lambda: merging.dare_linear([A], [1.0], 0.5, None), "pass a generator"),
            (lambda: merge([A, B], "tie"), "no method 'tie': did you mean 'ties'"),
            (lambda: merge([A, B], "dare-linear"), "did you mean 'dare_linear'"),
        ],
    )
    def test_message(self, call: Callable[[], Tensor], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call()

    def test_unknown_method_lists_all(self) -> None:
        with pytest.raises(ValueError, match=", ".join(MERGE_METHODS)):
            merge([A], "?")

    def test_table_is_frozen(self) -> None:
        with pytest.raises(TypeError):
            MERGE_METHODS["mine"] = MERGE_METHODS["ties"]  # type: ignore[index]
        row: MergeMethod = MERGE_METHODS["ties"]
        with pytest.raises(dataclasses.FrozenInstanceError):
            row.name = "mine"  # type: ignore[misc]
