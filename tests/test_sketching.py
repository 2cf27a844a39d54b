"""Frequent Directions: a few rows that stand for many."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from easyedit_wise.sketching import frequent_directions


def gram(rows: Tensor) -> Tensor:
    return rows.double().T @ rows.double()


def random(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_while_they_fit_the_sketch_is_the_rows() -> None:
    first, second = random(3, 5, 0), random(2, 5, 1)
    sketch = frequent_directions(None, first, 5)
    assert torch.equal(sketch, first)
    assert torch.equal(frequent_directions(sketch, second, 5), torch.cat([first, second]))


def test_by_hand() -> None:
    # Rows (3, 0, 0), (0, 2, 0), (0, 0, 1) have the singular values 3, 2, 1. Two rows: their squares lose the
    # square of the third one: 9 - 1 and 4 - 1.
    sketch = frequent_directions(None, torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
    torch.testing.assert_close(gram(sketch), torch.diag(torch.tensor([8.0, 3.0, 0.0], dtype=torch.float64)))


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(1, 12),
    size=st.integers(1, 8),
    batches=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    rank=st.integers(1, 12),
    seed=st.integers(0, 999),
)
def test_the_published_bound_holds(d: int, size: int, batches: list[int], rank: int, seed: int) -> None:
    basis = random(min(rank, d), d, seed)
    parts = [random(n, len(basis), seed + index) @ basis for index, n in enumerate(batches)]
    sketch: Tensor | None = None
    for part in parts:
        sketch = frequent_directions(sketch, part, size)
        assert sketch.shape[0] <= size
    assert sketch is not None
    rows = torch.cat(parts).double()
    missing = torch.linalg.eigvalsh(gram(rows) - gram(sketch))
    total = float(rows.square().sum())
    assert missing.min() > -1e-4 * total  # never more than there is, in any direction
    squares = torch.linalg.svdvals(rows).square()
    bounds = [float(squares[k:].sum()) / (size - k) for k in range(size)]
    assert float(missing.max()) <= min(bounds) + 1e-4 * total


def test_rows_of_low_rank_are_held_exactly_however_many_there_are() -> None:
    basis = random(3, 40, 0)
    sketch: Tensor | None = None
    rows = [random(10, 3, seed) @ basis for seed in range(1, 9)]
    for part in rows:
        sketch = frequent_directions(sketch, part, 6)
    assert sketch is not None
    torch.testing.assert_close(gram(sketch), gram(torch.cat(rows)), rtol=1e-3, atol=1e-2)


def test_more_rows_than_dimensions() -> None:
    rows = random(30, 4, 0)
    torch.testing.assert_close(gram(frequent_directions(None, rows, 20)), gram(rows), rtol=1e-4, atol=1e-4)
    assert frequent_directions(None, rows, 20).shape == (4, 4)


def test_it_keeps_dtype_and_leaves_its_input_alone() -> None:
    rows = random(9, 4, 0).to(torch.bfloat16)
    before = rows.clone()
    sketch = frequent_directions(rows, rows, 3)
    assert sketch.dtype == torch.bfloat16
    assert torch.equal(rows, before)
    assert frequent_directions(None, torch.zeros(9, 4), 3).isfinite().all()


def test_no_room_at_all() -> None:
    with pytest.raises(ValueError, match="size is 0, but a sketch needs at least 1 row"):
        frequent_directions(None, random(2, 2, 0), 0)
