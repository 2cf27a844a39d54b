"""Tensors of a stream as bytes, and back: safetensors, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..editing.gain import SpokenEdit
from ..editing.open_shard import OpenShard
from ..editing.recorded import EditScores, RecordedEdit
from ..editing.scored import ScoredInputs
from ..least_squares import NormalEquations
from ..tuner.packing import pack, unpack

_EQUATIONS = ("columns", "edits", "outputs", "quiet")


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Named tensors as one safetensors file. A tensor that stands twice is written twice."""
    return bytes(save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}))


def from_bytes(data: bytes) -> dict[str, Tensor]:
    """The tensors of :func:`to_bytes`.

    Raises:
        ValueError: these are no tensors.
    """
    try:
        return dict(load(data))
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def memory_bytes(delta_weight: Tensor, mask: Tensor | None) -> bytes:
    """dW of a side memory, shape (d_out, d_in), without what is zero in it.

    Args:
        delta_weight: dW.
        mask: of a live shard, which the reader knows; None for the others.
    """
    return to_bytes(pack(delta_weight, mask))


def memory_from_bytes(data: bytes, shape: tuple[int, int], mask: Tensor | None) -> Tensor:
    """dW of :func:`memory_bytes`.

    Raises:
        ValueError: it is none of this shape.
    """
    return unpack(from_bytes(data), shape, places=mask)


def mask_bytes(mask: Tensor) -> bytes:
    """A shard's mask, bool, shape (d_out, d_in): of whole columns as their indices, others with a bit an entry."""
    return to_bytes({"shape": torch.tensor(mask.shape), **pack(mask)})


def mask_from_bytes(data: bytes, shape: tuple[int, int] | None = None) -> Tensor:
    """The mask of :func:`mask_bytes`.

    Args:
        data: its bytes.
        shape: that it must have; None: the one that the bytes say.

    Raises:
        ValueError: this is no mask, or one of another shape.
    """
    parts = from_bytes(data)
    d_out, d_in = (int(size) for size in parts.pop("shape", torch.zeros(0)))
    if shape is not None and shape != (d_out, d_in):
        raise ValueError(f"a mask has the shape {(d_out, d_in)}, the layer {shape}")
    return unpack(parts, (d_out, d_in), is_mask=True)


def rows_bytes(edit: RecordedEdit) -> bytes:
    """What the next shards need of an edit: A(x) of its tokens, and of its irrelevant prompt's."""
    rows = {"answered": edit.answered.activations}
    if edit.irrelevant is not None:
        rows["irrelevant"] = edit.irrelevant.activations
    return to_bytes(rows)


def rows_from_bytes(data: bytes, device: torch.device) -> RecordedEdit:
    """The edit of :func:`rows_bytes`, without its masks.

    Raises:
        ValueError: these are no such rows.
    """
    tensors = from_bytes(data)
    if "answered" not in tensors or any(one.dim() != 2 for one in tensors.values()):
        raise ValueError("the rows of an edit are missing")

    def prompt(rows: Tensor) -> ScoredInputs:
        return ScoredInputs(rows.to(device), torch.ones(1, len(rows), dtype=torch.bool, device=device))

    irrelevant = tensors.get("irrelevant")
    answered = prompt(tensors["answered"])
    return RecordedEdit(answered, answered.token_mask, None if irrelevant is None else prompt(irrelevant))


@dataclass
class _Packed:
    """Tensors under numbers, each once, for values that name them by number."""

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def put(self, value: Tensor | None) -> str | None:
        if value is None:
            return None
        name = str(len(self.tensors))
        self.tensors[name] = value
        return name


def pack_open_shard(shard: OpenShard) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An open shard as plain values, and the tensors that they name."""
    packed = _Packed()

    def inputs(one: ScoredInputs | None) -> list[str | None] | None:
        return (
            None
            if one is None
            else [packed.put(one.activations), packed.put(one.token_mask), packed.put(one.base_output)]
        )

    def edit(one: RecordedEdit) -> list[Any]:
        return [inputs(one.answered), packed.put(one.prompt_mask), inputs(one.irrelevant)]

    equations = shard.equations
    values = {
        "watched": [edit(one) for one in shard.watched],
        "others": [[one.prompt, one.answered, one.irrelevant] for one in shard.others],
        "sketch": packed.put(shard.sketch),
        "n_tokens": shard.n_tokens,
        "equations": None if equations is None else [packed.put(getattr(equations, name)) for name in _EQUATIONS],
        "spoken": [[edit(one.recorded), packed.put(one.share), packed.put(one.prompt_share)] for one in shard.spoken],
    }
    return values, packed.tensors


def unpack_open_shard(values: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> OpenShard:
    """The shard of :func:`pack_open_shard`.

    Raises:
        KeyError, ValueError, TypeError: something is missing.
    """

    def get(name: str) -> Tensor:
        return tensors[name].to(device)

    def maybe(name: str | None) -> Tensor | None:
        return None if name is None else get(name)

    def inputs(one: Sequence[Any]) -> ScoredInputs:
        return ScoredInputs(get(one[0]), get(one[1]), maybe(one[2]))

    def edit(one: Sequence[Any]) -> RecordedEdit:
        return RecordedEdit(inputs(one[0]), get(one[1]), None if one[2] is None else inputs(one[2]))

    equations = values["equations"]
    return OpenShard(
        tuple(edit(one) for one in values["watched"]),
        tuple(EditScores(*one) for one in values["others"]),
        maybe(values["sketch"]),
        int(values["n_tokens"]),
        None if equations is None else NormalEquations(*(get(one) for one in equations)),
        tuple(SpokenEdit(edit(one[0]), get(one[1]), get(one[2])) for one in values["spoken"]),
    )
