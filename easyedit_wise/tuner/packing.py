"""A sparse matrix as a few small tensors, and back, bit for bit.

A side memory's dW is zero outside the columns or entries that its shards may change, and a mask says one of two things
of each entry: most of either need not be written down. A packed matrix is what is there and where it is, as a mapping
of *parts*; its shape is no part of it, so that nothing in a file decides how much memory is taken.

============================  =====================================================================
parts                         what they say
============================  =====================================================================
values                        the whole matrix, shape (rows, columns)
values, columns               some columns, shape (rows, k), and which, int32 (k,), rising
values, bits                  some entries, shape (n,), and a bit for each entry of the matrix, uint8
values, columns, bits         likewise, with a bit for each entry of those columns only
values, entries               some entries, shape (n,), and their places in the flat matrix, rising
masked                        the entries, shape (n,), at places that both sides know
============================  =====================================================================

A matrix of bools has the same parts without ``values``: all entries named are True.
An entry counts as there if any of its bits is set, so -0.0 and every NaN come back as they were.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

VALUES, COLUMNS, BITS, ENTRIES, MASKED = "values", "columns", "bits", "entries", "masked"
PARTS = (VALUES, COLUMNS, BITS, ENTRIES, MASKED)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_AS_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_INT32_END = 2**31


class PackingError(ValueError):
    """Parts that do not make up a matrix of the shape that is asked for."""


def pack(matrix: Tensor, places: Tensor | None = None) -> dict[str, Tensor]:
    """The smallest of the forms above.

    Args:
        matrix: floating or bool, shape (rows, columns).
        places: bool, same shape: where the reader knows that entries may be, such as a memory's mask. They are used
            if nothing is outside.

    Returns:
        The parts, on the CPU and in memory of their own; values have the matrix's dtype.

    Raises:
        ValueError: the matrix has not two dimensions, or another kind of numbers.
    """
    matrix = matrix.detach()
    if matrix.dim() != 2 or (matrix.dtype not in FLOAT_DTYPES and matrix.dtype != torch.bool):
        raise ValueError(
            f"a {matrix.dtype} tensor of shape {tuple(matrix.shape)} cannot be packed: give a matrix, bool or float."
        )
    there = _there(matrix)
    rows, in_columns = matrix.shape[0], there.any(dim=0)
    n, k = int(there.sum()), int(in_columns.sum())
    size = 0 if matrix.dtype == torch.bool else matrix.element_size()
    place = 4 if matrix.numel() < _INT32_END else 8
    sizes = {
        (ENTRIES,): n * (size + place),
        (COLUMNS,): k * rows * size + 4 * k,
        (COLUMNS, BITS): n * size + 4 * k + _n_bytes(k * rows),
        (BITS,): n * size + _n_bytes(matrix.numel()),
    }
    if not size and n < k * rows:
        del sizes[(COLUMNS,)]  # a mask's columns are whole
    if size:
        sizes[()] = matrix.numel() * size
        if places is not None and not bool((there & ~places).any()):
            sizes[(MASKED,)] = int(places.sum()) * size
    form = min(sizes, key=lambda one: sizes[one])
    if form == (MASKED,):
        return {MASKED: _own(matrix[places])}
    parts = {} if not size else {VALUES: _own(_values(matrix, there, in_columns, form))}
    if COLUMNS in form:
        parts[COLUMNS] = _own(in_columns.nonzero().squeeze(-1).to(torch.int32))
        there = there[:, in_columns]
    if BITS in form:
        parts[BITS] = torch.from_numpy(np.packbits(there.cpu().numpy().reshape(-1)))
    if ENTRIES in form:
        places_ = there.reshape(-1).nonzero().squeeze(-1)
        parts[ENTRIES] = _own(places_.to(torch.int32 if place == 4 else torch.int64))
    return parts


def unpack(
    parts: Mapping[str, Tensor], shape: tuple[int, int], is_mask: bool = False, places: Tensor | None = None
) -> Tensor:
    """The matrix that :func:`pack` was given; parts that nobody packed are refused.

    Args:
        parts: as from :func:`pack`. They may come from anywhere.
        shape: (rows, columns) of the matrix; nothing larger is allocated.
        is_mask: it is a matrix of bools.
        places: as given to :func:`pack`.

    Returns:
        Shape ``shape``, bool or float32 (float64 if that is what the values are), on the values' device.

    Raises:
        PackingError: a part is missing or too many, or its dtype, size, order or range is not what it must be.
    """
    given = frozenset(parts)
    without_values = given - {VALUES}
    known = without_values in ({COLUMNS}, {BITS}, {COLUMNS, BITS}, {ENTRIES}) and (VALUES in given) != is_mask
    if not (known or (not is_mask and given in ({VALUES}, {MASKED}))):
        raise PackingError(f"the parts {', '.join(sorted(given)) or '(none)'} do not make up a matrix.")
    if given == {VALUES}:
        _check(VALUES, parts, FLOAT_DTYPES, tuple(shape))
        return parts[VALUES].to(_wide(parts[VALUES]), copy=True)
    if given == {MASKED}:
        return _scattered(parts, MASKED, shape, _as_places(places, shape))
    if ENTRIES in given:
        flat = torch.zeros(shape[0] * shape[1], dtype=torch.bool, device="cpu")
        flat[_rising(ENTRIES, parts, (torch.int32, torch.int64), flat.numel())] = True
        there = flat.view(shape)
    else:
        there = _from_columns_and_bits(parts, shape)
    if is_mask:
        return there
    if given == {VALUES, COLUMNS}:
        columns = parts[COLUMNS].long().cpu()
        _check(VALUES, parts, FLOAT_DTYPES, (shape[0], columns.numel()))
        values = parts[VALUES]
        matrix = torch.zeros(shape, dtype=_wide(values), device=values.device)
        matrix[:, columns.to(values.device)] = values.to(matrix.dtype)
        return matrix
    return _scattered(parts, VALUES, shape, there)


def _there(matrix: Tensor) -> Tensor:
    if matrix.dtype == torch.bool:
        return matrix
    return matrix.contiguous().view(_AS_BITS[matrix.element_size()]) != 0


def _values(matrix: Tensor, there: Tensor, in_columns: Tensor, form: tuple[str, ...]) -> Tensor:
    if form == ():
        return matrix
    return matrix[:, in_columns] if form == (COLUMNS,) else matrix[there]


def _own(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True).contiguous()


def _wide(values: Tensor) -> torch.dtype:
    # dW is fp32 in whatever it was saved.
    return torch.promote_types(values.dtype, torch.float32)


def _n_bytes(n_bits: int) -> int:
    return -(-n_bits // 8)


def _check(name: str, parts: Mapping[str, Tensor], dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    part = parts[name]
    if part.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise PackingError(f"{name} is {str(part.dtype).removeprefix('torch.')}, and must be {allowed}.")
    if tuple(part.shape) != shape:
        raise PackingError(f"{name} has the shape {tuple(part.shape)}, and must have {shape}.")


def _rising(name: str, parts: Mapping[str, Tensor], dtypes: tuple[torch.dtype, ...], end: int) -> Tensor:
    """Places below ``end``, each once; more of them than places are refused, too."""
    part = parts[name]
    _check(name, parts, dtypes, (part.numel(),))
    places = part.long().cpu()
    if places.numel() and (int(places[0]) < 0 or int(places[-1]) >= end or not bool((places.diff() > 0).all())):
        raise PackingError(f"{name} must rise from 0 or more to {end - 1} or less, and does not.")
    return places


def _bits(parts: Mapping[str, Tensor], n: int) -> Tensor:
    _check(BITS, parts, (torch.uint8,), (_n_bytes(n),))
    packed = parts[BITS].cpu().numpy()
    if n % 8 and packed[-1] & ((1 << (8 - n % 8)) - 1):
        raise PackingError(f"bits has some set behind its {n} entries.")
    return torch.from_numpy(np.unpackbits(packed, count=n)).view(torch.bool)


def _from_columns_and_bits(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    if COLUMNS not in parts:
        return _bits(parts, shape[0] * shape[1]).view(shape)
    columns = _rising(COLUMNS, parts, (torch.int32,), shape[1])
    there = torch.zeros(shape, dtype=torch.bool, device="cpu")
    inside = _bits(parts, shape[0] * columns.numel()).view(shape[0], -1) if BITS in parts else None
    there[:, columns] = True if inside is None else inside
    return there


def _as_places(places: Tensor | None, shape: tuple[int, int]) -> Tensor:
    if places is None or places.dtype != torch.bool or tuple(places.shape) != tuple(shape):
        raise PackingError(f"{MASKED} needs a mask of shape {tuple(shape)}, and there is none.")
    return places


def _scattered(parts: Mapping[str, Tensor], name: str, shape: tuple[int, int], there: Tensor) -> Tensor:
    values = parts[name]
    _check(name, parts, FLOAT_DTYPES, (int(there.sum()),))
    matrix = torch.zeros(shape, dtype=_wide(values), device=values.device)
    matrix[there.to(values.device)] = values.to(matrix.dtype)
    return matrix
