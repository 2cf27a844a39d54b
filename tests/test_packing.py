"""Packed matrices: what goes in comes out, in the smallest form, and nothing that nobody packed is taken."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from easyedit_wise.tuner.packing import FLOAT_DTYPES, PackingError, pack, unpack

SPECIAL = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, 3.5, -1e38]
FAST = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """(a matrix with zeros where a mask is False, the mask): single entries, whole columns, nothing, or everything."""
    rows, columns = draw(st.integers(0, 9)), draw(st.integers(0, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from([0.0, 0.02, 0.2, 0.7, 1.0]))
    whole_columns = draw(st.booleans())
    mask = rng.random((1, columns) if whole_columns else (rows, columns)) < share
    mask = np.broadcast_to(mask, (rows, columns)).copy()
    values = rng.standard_normal((rows, columns)).astype(np.float32)
    special = rng.random((rows, columns)) < draw(st.sampled_from([0.0, 0.3]))
    values[special] = rng.choice(np.array(SPECIAL, dtype=np.float32), int(special.sum()))
    if draw(st.booleans()):  # a shard that filled only some of what it may change
        values[rng.random((rows, columns)) < 0.5] = 0.0
    return torch.from_numpy(np.where(mask, values, np.float32(0.0))), torch.from_numpy(mask)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Also of NaNs and of -0.0, of which == says nothing."""
    as_ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = as_ints[one.element_size()]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.view(bits), other.view(bits))


def n_bytes(parts: dict[str, Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in parts.values())


@FAST
@given(matrices(), st.booleans())
def test_floats_come_back_bit_for_bit(drawn: tuple[Tensor, Tensor], with_places: bool) -> None:
    matrix, mask = drawn
    before = matrix.clone()
    places = mask if with_places else None
    parts = pack(matrix, places)
    assert same_bits(unpack(parts, tuple(matrix.shape), places=places), before)
    assert same_bits(matrix, before)
    assert n_bytes(parts) <= matrix.numel() * 4
    assert all(part.is_contiguous() and part.device.type == "cpu" for part in parts.values())
    assert not {part.data_ptr() for part in parts.values() if part.numel()} & {matrix.data_ptr()}


@FAST
@given(matrices())
def test_masks_come_back(drawn: tuple[Tensor, Tensor]) -> None:
    _, mask = drawn
    parts = pack(mask)
    assert torch.equal(unpack(parts, tuple(mask.shape), is_mask=True), mask)
    assert n_bytes(parts) <= math.ceil(mask.numel() / 8)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_each_dtype_is_kept_and_comes_back_wide(dtype: torch.dtype) -> None:
    matrix = (torch.randn(6, 30, generator=torch.Generator().manual_seed(0)) * (torch.arange(30) % 4 == 0)).to(dtype)
    matrix[2, 4] = -0.0
    matrix[3, 8] = math.nan
    parts = pack(matrix)
    assert parts["values"].dtype == dtype
    assert same_bits(unpack(parts, (6, 30)), matrix.to(torch.promote_types(dtype, torch.float32)))


def test_a_negative_zero_and_a_nan_with_a_payload_are_entries() -> None:
    bits = torch.zeros(4, 64, dtype=torch.int32)
    bits[1, 3], bits[2, 60] = -(2**31), 0x7FC12345
    matrix = bits.view(torch.float32)
    parts = pack(matrix)
    assert set(parts) == {"values", "entries"}
    assert parts["entries"].tolist() == [64 + 3, 2 * 64 + 60]
    assert torch.equal(unpack(parts, (4, 64)).view(torch.int32), bits)


def random(rows: int, columns: int, there: Tensor) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).where(there, 0.0)


def share(rows: int, columns: int, rho: float, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < rho


@pytest.mark.parametrize(
    ("there", "places", "names"),
    [
        (torch.ones(40, 80, dtype=torch.bool), None, {"values"}),
        (share(1, 80, 0.2).expand(40, 80), None, {"values", "columns"}),
        (share(40, 80, 0.2), None, {"values", "bits"}),
        (share(40, 80, 0.2) & share(1, 80, 0.3, 1), None, {"values", "columns", "bits"}),
        (share(40, 80, 0.002), None, {"values", "entries"}),
        (torch.zeros(40, 80, dtype=torch.bool), None, {"values", "entries"}),
        (share(40, 80, 0.2), share(40, 80, 0.2), {"masked"}),
        (share(1, 80, 0.2).expand(40, 80), share(1, 80, 0.2).expand(40, 80), {"masked"}),
        # Something outside of it: the mask does not say where everything is.
        (share(40, 80, 0.2), share(40, 80, 0.1, 5), {"values", "bits"}),
    ],
)
def test_the_smallest_form_is_taken(there: Tensor, places: Tensor | None, names: set[str]) -> None:
    matrix = random(40, 80, there)
    parts = pack(matrix, places)
    assert set(parts) == names
    assert same_bits(unpack(parts, (40, 80), places=places), matrix)


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        (share(1, 80, 0.2).expand(40, 80), {"columns"}),
        (share(40, 80, 0.2), {"bits"}),
        (share(40, 80, 0.002), {"entries"}),
        (share(40, 80, 0.2) & share(1, 80, 0.2, 1), {"columns", "bits"}),
        (torch.ones(40, 80, dtype=torch.bool), {"columns"}),
        (torch.zeros(40, 80, dtype=torch.bool), {"entries"}),
    ],
)
def test_the_smallest_form_of_a_mask_is_taken(mask: Tensor, names: set[str]) -> None:
    assert set(pack(mask)) == names


def test_a_rho_of_a_fifth_is_small() -> None:
    mask = share(256, 640, 0.2)
    dense = 256 * 640 * 4
    matrix = random(256, 640, mask).bfloat16()
    assert n_bytes(pack(matrix, mask)) + n_bytes(pack(mask)) < 0.15 * dense
    columns = share(1, 640, 0.2).expand(256, 640)
    assert n_bytes(pack(random(256, 640, columns).bfloat16(), columns)) + n_bytes(pack(columns)) < 0.12 * dense


def test_only_matrices_of_bools_or_floats_are_packed() -> None:
    for tensor in (torch.zeros(3), torch.zeros(2, 2, 2), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="cannot be packed"):
            pack(tensor)


# -- parts that nobody packed ---------------------------------------------------------------------------

F = torch.tensor


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, r"\(none\)"),
        ({"columns": ints(0)}, "parts columns do not"),
        ({"values": F([1.0]), "bits": ints(1), "entries": ints(0)}, "do not make up"),
        ({"values": F([1.0]), "masked": F([1.0])}, "do not make up"),
        ({"values": torch.zeros(3, 5)}, r"values has the shape \(3, 5\), and must have \(2, 5\)"),
        ({"values": torch.zeros(2, 5, dtype=torch.int32)}, "values is int32, and must be float32"),
        ({"values": torch.zeros(2, 5, dtype=torch.complex64)}, "values is complex64"),
        ({"values": torch.zeros(2, 1), "columns": ints(5)}, "columns must rise from 0 or more to 4"),
        ({"values": torch.zeros(2, 1), "columns": ints(-1)}, "columns must rise"),
        ({"values": torch.zeros(2, 2), "columns": ints(1, 1)}, "columns must rise"),
        ({"values": torch.zeros(2, 2), "columns": ints(3, 1)}, "columns must rise"),
        (
            {"values": torch.zeros(2, 3), "columns": ints(1, 3)},
            r"values has the shape \(2, 3\), and must have \(2, 2\)",
        ),
        ({"values": torch.zeros(2, 1), "columns": ints(1, dtype=torch.int64)}, "columns is int64"),
        ({"values": torch.zeros(2, 1), "columns": torch.zeros(1, 1, dtype=torch.int32)}, "columns has the shape"),
        ({"values": F([1.0]), "entries": ints(10)}, "entries must rise from 0 or more to 9"),
        ({"values": F([1.0]), "entries": ints(-(2**31))}, "entries must rise"),
        ({"values": F([1.0]), "entries": ints(2**62, dtype=torch.int64)}, "entries must rise"),
        ({"values": F([1.0]), "entries": ints(1, 2)}, r"values has the shape \(1,\), and must have \(2,\)"),
        ({"values": F([1.0]), "entries": F([1.0])}, "entries is float32"),
        (
            {"values": F([1.0]), "bits": ints(128, dtype=torch.uint8)},
            r"bits has the shape \(1,\), and must have \(2,\)",
        ),
        ({"values": F([1.0]), "bits": ints(128, 1, dtype=torch.uint8)}, "some set behind its 10 entries"),
        ({"values": F([1.0]), "bits": ints(192, 0, dtype=torch.uint8)}, r"values has the shape \(1,\).*\(2,\)"),
        ({"values": F([1.0]), "bits": ints(128, 0)}, "bits is int32"),
        ({"masked": F([1.0])}, r"needs a mask of shape \(2, 5\)"),
    ],
)
def test_what_nobody_packed_is_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(PackingError, match=message):
        unpack(parts, (2, 5))


def test_a_mask_is_refused_where_a_matrix_is_due_and_the_other_way_round() -> None:
    with pytest.raises(PackingError):
        unpack(pack(torch.eye(5)), (5, 5), is_mask=True)
    with pytest.raises(PackingError):
        unpack(pack(torch.eye(5) > 0), (5, 5))
    with pytest.raises(PackingError, match="masked"):
        unpack({"masked": F([1.0])}, (2, 5), places=torch.ones(5, 2, dtype=torch.bool))
    with pytest.raises(PackingError, match=r"must have \(10,\)"):
        unpack({"masked": F([1.0])}, (2, 5), places=torch.ones(2, 5, dtype=torch.bool))


@FAST
@given(matrices(), st.data())
def test_whatever_is_done_to_the_parts_gives_a_matrix_of_the_shape_or_an_error(
    drawn: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    matrix, mask = drawn
    is_mask = data.draw(st.booleans())
    parts = pack(mask) if is_mask else pack(matrix)
    name = data.draw(st.sampled_from(sorted(parts)))
    raw = bytearray(parts[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if raw:
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
        parts[name] = torch.frombuffer(raw, dtype=parts[name].dtype).view(parts[name].shape)
    if data.draw(st.booleans()):
        parts[name] = parts[name][: data.draw(st.integers(0, 3))]
    try:
        result = unpack(parts, tuple(matrix.shape), is_mask=is_mask)
    except PackingError:
        return
    assert result.shape == matrix.shape
    assert result.dtype == (torch.bool if is_mask else torch.float32)
