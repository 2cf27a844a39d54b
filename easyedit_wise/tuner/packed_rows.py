"""Packed rows: several texts in one row of a call, as trainers and servers write them to save padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .call import Call
from .padding import allowed


def packed_by(call: Call) -> str | None:
    """What says that a row of this call holds several texts, in words; None: each row is one text.

    Told at the prefill, where it costs a comparison of neighbours: positions that count, start again and count on
    (those of padding, on either side, stand still); a 4-D mask in which a token does not see the one before it; a 2-D
    mask that numbers the texts; or an argument that says where texts begin. Positions of pictures, shape (3, B, T),
    are none of it.
    """
    if call.shape is None:
        return None
    n_rows, n_tokens = call.shape
    for name, value in call.borders.items():
        if _has_borders(name, value, n_rows):
            return name
    if n_tokens < 2:
        return None
    if _starts_again(call.position_ids):
        return "position_ids that start again within a row"
    mask = call.attention_mask
    if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_floating_point() and bool((mask > 1).any()):
        return "an attention_mask that numbers texts within a row"
    # Of several kinds of attention, one in chunks is block-diagonal by design, but not all are.
    masks = list(mask.values()) if isinstance(mask, Mapping) else [mask]
    if masks and all(isinstance(one, Tensor) and one.dim() == 4 and _is_block_diagonal(one, n_tokens) for one in masks):
        return "a block-diagonal attention_mask"
    return None


def _has_borders(name: str, value: Any, n_rows: int) -> bool:
    """``cu_seq_lens_q`` and its like have one entry more than there are texts; ``seq_idx`` numbers each token's."""
    if isinstance(value, Mapping):
        return any(_has_borders(name, one, n_rows) for one in value.values())
    if name == "seq_idx":
        return isinstance(value, Tensor) and bool((value != value[..., :1]).any())
    return isinstance(value, (Tensor, list, tuple)) and len(value) > n_rows + 1


def _starts_again(positions: Any) -> bool:
    """Whether some row counts twice, with a step back or a standstill in between."""
    if isinstance(positions, Tensor) and positions.dim() == 3 and positions.shape[0] == 4:
        positions = positions[0]  # the text's own, beside a picture's three
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[-1] < 4:
        return False
    steps = positions.diff(dim=-1)
    counted = (steps == 1).cumsum(dim=-1)
    before, after = counted > 0, counted < counted[:, -1:]
    return bool(((steps < 1) & before & after).any())


def _is_block_diagonal(mask: Tensor, n_tokens: int) -> bool:
    """Whether a token that is real (it sees itself) does not see the real one before it."""
    if mask.shape[-2] != n_tokens or mask.shape[-1] < n_tokens:
        return False
    sees = allowed(mask[:, 0, :, :n_tokens])
    own, one_before = sees.diagonal(dim1=-2, dim2=-1), sees.diagonal(offset=-1, dim1=-2, dim2=-1)
    return bool((own[:, 1:] & own[:, :-1] & ~one_before).any())
