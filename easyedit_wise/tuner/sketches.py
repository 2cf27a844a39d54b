"""Sketches of a layer's side memories: derived data, made when they are needed and never saved."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..screening import random_projection, sketch

# Fixed, so that a model decides alike in every process; nothing that is edited depends on it.
_SEED = 20240523
# Lists of memories that are kept: the adapters that rows ask for by turns, each by itself, and all of them.
_LISTS = 8


@dataclass(frozen=True)
class _Made:
    """The sketch of one dW and how to tell that it still is this dW's."""

    source: weakref.ReferenceType[Tensor]
    mark: tuple[Any, ...]
    sketch: Tensor

    def is_of(self, delta_weight: Tensor, mark: tuple[Any, ...]) -> bool:
        return self.source() is delta_weight and self.mark == mark

    def is_current(self) -> bool:
        delta_weight = self.source()
        return delta_weight is not None and _mark(delta_weight) == self.mark


def _mark(delta_weight: Tensor) -> tuple[Any, ...]:
    # In-place writes raise the version; swapping ``.data`` changes the address.
    return (delta_weight._version, delta_weight.data_ptr(), delta_weight.device, delta_weight.dtype)


class SketchCache:
    """The sketches of the memories that were screened last. A copied or unpickled model starts without any."""

    def __init__(self) -> None:
        # Replaced as a whole, never written to: two threads may serve one model.
        self._held: tuple[tuple[list[_Made], Tensor], ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> SketchCache:
        copied = type(self)()
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[type[SketchCache], tuple[()]]:
        return (type(self), ())

    def clear(self) -> None:
        """Forget all sketches."""
        self._held = ()

    @torch.no_grad()
    def of(self, delta_weights: Sequence[Tensor]) -> Tensor | None:
        """The sketches of these dW, shape (M, r, d_in); a dW that is new or was written to is sketched anew.

        Args:
            delta_weights: M tensors (d_out, d_in) on one device.

        Returns:
            None for tensors made under ``torch.inference_mode``: they do not tell when they are written to.
        """
        if any(delta_weight.is_inference() for delta_weight in delta_weights):
            return None
        marks = [_mark(delta_weight) for delta_weight in delta_weights]
        held = self._held
        for made, stacked in held:
            if len(made) == len(marks) and all(map(_Made.is_of, made, delta_weights, marks)):
                return stacked
        d_out, device = delta_weights[0].shape[0], delta_weights[0].device
        projection = random_projection(d_out, torch.Generator().manual_seed(_SEED)).to(device)
        usable = {id(one.source()): one for made, _ in held for one in made}
        sketches = []
        for delta_weight, mark in zip(delta_weights, marks, strict=True):
            earlier = usable.get(id(delta_weight))
            same = earlier is not None and earlier.is_of(delta_weight, mark)
            sketches.append(earlier.sketch if earlier is not None and same else sketch(delta_weight, projection))
        stacked = torch.stack(sketches)
        entries = [
            _Made(weakref.ref(dw), mark, row) for dw, mark, row in zip(delta_weights, marks, stacked, strict=True)
        ]
        # A list that this one merely goes on from (a memory was appended) is not asked for again.
        kept = [entry for entry in held if all(map(_Made.is_current, entry[0])) and not _begins(entries, entry[0])]
        self._held = ((entries, stacked), *kept[: _LISTS - 1])
        return stacked


def _begins(entries: Sequence[_Made], start: Sequence[_Made]) -> bool:
    return len(start) < len(entries) and all(a.source() is b.source() for a, b in zip(entries, start, strict=False))
