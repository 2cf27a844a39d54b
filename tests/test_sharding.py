"""Mask generators: sizes, independence, reproducibility, packing, errors."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from easyedit_wise import sharding
from easyedit_wise.sharding import (
    MASK_GENERATORS,
    activation_mask,
    column_mask,
    expected_overlap,
    non_overlapping_masks,
    overlap,
    pack_mask,
    random_mask,
    unpack_mask,
)

few = settings(max_examples=60, deadline=None)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestRandomMask:
    def test_share_of_ones(self) -> None:
        # Binomial(90,000, 0.2): deviation of the share sqrt(0.16 / 90,000) = 0.00133; 5 of it allowed
        mask = random_mask((300, 300), 0.2, seeded())
        assert mask.dtype == torch.bool
        assert mask.shape == (300, 300)
        assert int(mask.sum()) / mask.numel() == pytest.approx(0.2, abs=5 * 0.00133)

    def test_rows_and_columns_are_no_units(self) -> None:
        # Deviation of a share over 300 entries sqrt(0.16 / 300) = 0.0231; 600 shares within 5 of it
        mask = random_mask((300, 300), 0.2, seeded()).float()
        for shares in (mask.mean(0), mask.mean(1)):
            assert (shares - 0.2).abs().max() < 5 * 0.0231

    def test_rho_one_trains_everything(self) -> None:
        assert random_mask((40, 50), 1.0, seeded()).all()

    def test_is_its_equation(self) -> None:
        assert torch.equal(random_mask((4, 5), 0.3, seeded(3)), torch.rand(4, 5, generator=seeded(3)) < 0.3)

    def test_block_size_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = random_mask((40, 50), 0.3, seeded())
        monkeypatch.setattr(sharding, "_BLOCK", 7)
        assert torch.equal(random_mask((40, 50), 0.3, seeded()), whole)

    @pytest.mark.parametrize(("rho", "k"), [(0.5, 2), (0.2, 2), (0.3, 3)])
    def test_overlap_of_theorem_2_1(self, rho: float, k: int) -> None:
        draws = seeded()
        masks = [random_mask((400, 500), rho, draws) for _ in range(k)]
        share = expected_overlap(rho, k)
        deviation = math.sqrt(share * (1 - share) / 200_000)
        assert overlap(masks) == pytest.approx(share, abs=5 * deviation)


class TestNonOverlappingMasks:
    @few
    @given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
    def test_exact_and_disjoint(self, rows: int, columns: int, k: int, seed: int) -> None:
        rho, numel = 1 / k, rows * columns
        if int(rho * numel) == 0:
            return
        masks = non_overlapping_masks((rows, columns), rho, k, seeded(seed))
        assert len(masks) == k
        assert all(mask.dtype == torch.bool and mask.shape == (rows, columns) for mask in masks)
        assert [int(mask.sum()) for mask in masks] == [int(rho * numel)] * k
        assert int(torch.stack(masks).sum(0).max()) == 1

    def test_every_entry_is_equally_likely(self) -> None:
        # 600 draws of 2 of 6 entries: each is hit 200 times on average, deviation sqrt(600 * 2/9) = 11.5
        draws = seeded()
        hits = sum(non_overlapping_masks((2, 3), 1 / 3, 3, draws)[1].int() for _ in range(600))
        assert isinstance(hits, Tensor)
        assert (hits - 200).abs().max() < 5 * 11.5

    def test_one_over_k_is_allowed_for_every_k(self) -> None:
        for k in range(1, 60):
            assert len(non_overlapping_masks((8, 8), 1 / k, k, seeded())) == k

    def test_no_overlap(self) -> None:
        assert overlap(non_overlapping_masks((8, 9), 0.2, 2, seeded())) == 0.0


class TestColumnMasks:
    def test_column_mask_takes_whole_columns(self) -> None:
        # int(0.3 * 10) = 3 columns of 4 rows
        mask = column_mask((4, 10), 0.3, seeded())
        assert mask.dtype == torch.bool
        assert mask.shape == (4, 10)
        assert sorted(mask.sum(0).tolist()) == [0] * 7 + [4] * 3

    def test_column_mask_owns_its_entries(self) -> None:
        mask = column_mask((4, 10), 0.3, seeded())
        mask[0] = False  # a broadcast view would clear every row
        assert int(mask.sum()) == 9

    def test_activation_mask_by_hand(self) -> None:
        # mean |activation| per column: (1 + 3) / 2 = 2, (0 + 1) / 2 = 0.5, (2 + 4) / 2 = 3, 0
        # int(0.5 * 4) = 2 columns: 2 and 0. Signed means would be -1, 0.5, -3, 0.
        activations = torch.tensor([[1.0, 0.0, -2.0, 0.0], [-3.0, 1.0, -4.0, 0.0]])
        expected = torch.tensor([[True, False, True, False]] * 3)
        assert torch.equal(activation_mask((3, 4), 0.5, activations), expected)
        assert torch.equal(activation_mask((3, 4), 0.5, activations.bfloat16().requires_grad_()), expected)

    def test_activation_mask_with_ties_is_still_exact(self) -> None:
        assert int(activation_mask((2, 10), 0.4, torch.ones(3, 10)).sum()) == 8


@pytest.mark.parametrize("name", MASK_GENERATORS)
class TestGenerators:
    def test_same_seed_same_mask(self, name: str) -> None:
        draw = MASK_GENERATORS[name]
        masks = [draw((20, 30), 0.3, seeded(seed), None) for seed in (1, 1, 2)]
        assert torch.equal(masks[0], masks[1])
        assert not torch.equal(masks[0], masks[2])

    def test_generator_advances(self, name: str) -> None:
        draws = seeded()
        first, second = (MASK_GENERATORS[name]((20, 30), 0.3, draws, None) for _ in range(2))
        assert not torch.equal(first, second)

    def test_drawn_on_the_generators_device_then_moved(self, name: str) -> None:
        assert MASK_GENERATORS[name]((20, 30), 0.3, seeded(), "meta").device.type == "meta"
        assert MASK_GENERATORS[name]((20, 30), 0.3, seeded(), "cpu").device.type == "cpu"


def test_global_rngs_untouched() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    random_mask((9, 9), 0.5, seeded())
    non_overlapping_masks((9, 9), 0.5, 2, seeded(), "cpu")
    column_mask((9, 9), 0.5, seeded())
    activation_mask((9, 9), 0.5, torch.ones(2, 9))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


class TestOverlap:
    def test_by_hand(self) -> None:
        # active in both: entry (0, 1) alone, 1 of 6; in all three: none
        a = torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
        b = torch.tensor([[0, 1, 1], [0, 0, 1]]).bool()
        c = torch.tensor([[1, 0, 0], [0, 0, 0]]).bool()
        assert overlap([a]) == 2 / 6
        assert overlap([a, b]) == 1 / 6
        assert overlap([a, b, c]) == 0.0

    def test_expected(self) -> None:
        assert expected_overlap(0.2, 2) == pytest.approx(0.04)  # the paper's setting, near its 0.03
        assert expected_overlap(0.5, 5) == 0.03125
        assert expected_overlap(1.0, 7) == 1.0


class TestPacking:
    def test_by_hand(self) -> None:
        # entries 0, 2, 7 of the first byte: 1 + 4 + 128 = 133; entry 8 is the low bit of the second: 1
        mask = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]]).bool()
        packed = pack_mask(mask)
        assert packed.dtype == torch.uint8
        assert packed.tolist() == [133, 1]
        assert torch.equal(unpack_mask(packed, (3, 3)), mask)

    @few
    @given(st.lists(st.integers(0, 5), min_size=0, max_size=3), st.integers(0, 99))
    def test_round_trip(self, shape: list[int], seed: int) -> None:
        mask = random_mask(shape, 0.4, seeded(seed))
        packed = pack_mask(mask)
        assert packed.shape == (math.ceil(mask.numel() / 8),)
        restored = unpack_mask(packed, shape)
        assert restored.dtype == torch.bool
        assert restored.shape == mask.shape
        assert torch.equal(restored, mask)

    def test_is_numpys_little_endian_order(self) -> None:
        mask = random_mask((13, 17), 0.5, seeded())
        assert pack_mask(mask).tolist() == np.packbits(mask.numpy(), bitorder="little").tolist()

    def test_strided_and_unmodified(self) -> None:
        mask = random_mask((8, 6), 0.5, seeded())
        copy = mask.clone()
        assert torch.equal(unpack_mask(pack_mask(mask.t()), (6, 8)), mask.t())
        assert torch.equal(mask, copy)


class TestErrors:
    @pytest.mark.parametrize("rho", [0.0, -0.1, 1.5, math.nan])
    @pytest.mark.parametrize(
        "call",
        [
            lambda rho: random_mask((4, 5), rho, seeded()),
            lambda rho: non_overlapping_masks((4, 5), rho, 1, seeded()),
            lambda rho: column_mask((4, 5), rho, seeded()),
            lambda rho: activation_mask((4, 5), rho, torch.ones(1, 5)),
            lambda rho: expected_overlap(rho, 2),
        ],
    )
    def test_rho(self, call: Callable[[float], object], rho: float) -> None:
        with pytest.raises(ValueError, match=rf"rho is {rho}, but must lie in \(0, 1\].*WISE uses 0.2"):
            call(rho)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (
                lambda: non_overlapping_masks((9, 9), 0.4, 3, seeded()),
                r"k \* rho is 3 \* 0.4 = 1.2, .* use rho <= 0.333333, or at most 2 shards",
            ),
            (lambda: non_overlapping_masks((9, 9), 0.4, 0, seeded()), "k is 0, but at least 1"),
            (
                lambda: non_overlapping_masks((2, 3), 0.1, 2, seeded()),
                "rho is 0.1, which selects 0 of 6 entries, but 1 is needed: use rho >= 0.166667",
            ),
            (lambda: non_overlapping_masks((0, 3), 0.1, 2, seeded()), "pass a non-empty shape"),
            (lambda: column_mask((9, 4), 0.2, seeded()), "selects 0 of 4 input columns.*use rho >= 0.25"),
            (lambda: column_mask((9,), 0.2, seeded()), r"shape is \(9,\), but columns need \[out, in\]"),
            (lambda: activation_mask((2, 2, 2), 0.5, torch.ones(1, 2)), "pass a matrix's shape"),
            (
                lambda: activation_mask((9, 4), 0.5, torch.ones(2, 3, 4)),
                r"activations have shape \(2, 3, 4\), but \[n, 4\]",
            ),
            (lambda: activation_mask((9, 4), 0.5, torch.ones(2, 9)), r"\(2, 9\), but \[n, 4\]"),
            (lambda: activation_mask((9, 4), 0.5, torch.ones(0, 4)), "n >= 1"),
            (lambda: expected_overlap(0.2, 0), "k is 0"),
            (lambda: overlap([]), "masks is empty"),
            (lambda: overlap([torch.ones(2)]), "dtype torch.float32, but torch.bool.*mask.bool"),
            (lambda: overlap([torch.ones(0).bool()]), "no entry to share"),
            (lambda: overlap([torch.ones(2).bool(), torch.ones(3).bool()]), r"mask 1 has shape \(3,\)"),
            (lambda: pack_mask(torch.ones(8)), "torch.bool is needed"),
            (lambda: unpack_mask(torch.zeros(2), (3, 3)), "bits are torch.float32"),
            (lambda: unpack_mask(torch.zeros(1, dtype=torch.uint8), (3, 3)), r"torch.uint8 of shape \(2,\)"),
        ],
    )
    def test_message(self, call: Callable[[], object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call()

    def test_table_is_frozen(self) -> None:
        with pytest.raises(TypeError):
            MASK_GENERATORS["mine"] = random_mask  # type: ignore[index]
