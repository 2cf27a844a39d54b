"""An adapter's tensors as they are kept in files: each memory's dW and mask packed, the rest as it is.

PEFT and transformers know an adapter's tensors by name only. ``....wisemem_memories.0.delta_weight`` is one of them in
a model, and in a file there are its parts, such as ``....wisemem_memories.0.delta_weight.values``; a file with the
tensor itself, as earlier versions wrote it, is read as well. It does not say what weakest edits score.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .packing import PARTS, PackingError, pack, unpack

CONTAINER = "wisemem_memories"
SAVE_DTYPES = ("float32", "bfloat16", "float16")
_DELTA_WEIGHT, _MASK = "delta_weight", "mask"
# What files of earlier versions do not say.
_WEAKEST = ("weakest_edit", "weakest_answered")
_PACKED = (_DELTA_WEIGHT, _MASK)
_PEFT_PREFIX = "base_model.model."
_KEY = re.compile(
    rf"(?P<layer>.*)\.{CONTAINER}\.(?P<memory>(?:.+\.)?\d+)\.(?P<name>{'|'.join(_PACKED)})(?:\.(?P<part>{'|'.join(PARTS)}))?",
    re.DOTALL,
)


def tensor_name(key: str) -> str:
    """The name of the tensor that a file's key is, or is a part of."""
    match = _KEY.fullmatch(key)
    return key if match is None or match["part"] is None else key.rpartition(".")[0]


def memory_names(state: Mapping[str, Tensor]) -> set[str]:
    """The names of the side memories that a file has any dW of."""
    suffix = f".{_DELTA_WEIGHT}"
    names = (tensor_name(key) for key in state if _KEY.fullmatch(key))
    return {name.removesuffix(suffix) for name in names if name.endswith(suffix)}


def packed(state: Mapping[str, Tensor], save_dtype: str) -> dict[str, Tensor]:
    """What is written of these tensors.

    Args:
        state: tensors by their names in a model, with or without the adapter's name.
        save_dtype: dW is rounded to it if it is narrower; "float32" keeps every bit.

    Returns:
        The same with parts in place of each dW and mask. Tensors without data (on "meta", or sharded) stay.

    Raises:
        ValueError: ``save_dtype`` is none of :data:`SAVE_DTYPES`, or an entry of dW is too large for it.
    """
    check_save_dtype(save_dtype)
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        if match is None or match["part"] is not None or not _has_data(tensor):
            result[key] = tensor
            continue
        places = None
        if match["name"] == _DELTA_WEIGHT:
            mask = state.get(key.removesuffix(_DELTA_WEIGHT) + _MASK)
            places = mask.detach() if mask is not None and _has_data(mask) else None
            tensor = _rounded(key, tensor.detach(), getattr(torch, save_dtype))
        result.update({f"{key}.{part}": value for part, value in pack(tensor, places).items()})
    return result


def unpacked(state: Mapping[str, Tensor], shape_of: Callable[[str], tuple[int, int] | None]) -> dict[str, Tensor]:
    """The tensors that were packed, and all others as they are, and what weakest edits score is infinite if unknown.

    Args:
        state: what a file holds; it may come from anywhere.
        shape_of: (d_out, d_in) of the layer of this name in the model, or None if there is no such layer. The
            parts do not say how large their matrix is, so a file cannot ask for more memory than the model needs.

    Raises:
        PackingError: parts do not fit; it names the tensor. Those of a layer that the model lacks are left alone.
    """
    result: dict[str, Tensor] = {}
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name = tensor_name(key)
        if name == key:
            result[key] = value
        else:
            groups.setdefault(name, {})[key.rpartition(".")[2]] = value
    # Masks first: a dW may lie where its mask is.
    for name, parts in sorted(groups.items(), key=lambda item: item[0].endswith(_DELTA_WEIGHT)):
        match = _KEY.fullmatch(name)
        shape = shape_of(match["layer"]) if match is not None else None
        if shape is None:
            result.update({f"{name}.{part}": value for part, value in parts.items()})
            continue
        if name in state:
            raise PackingError(f"{name} is there as a whole and in parts: take a file that one save has written.")
        is_mask = name.endswith(_MASK)
        places = None if is_mask else result.get(name.removesuffix(_DELTA_WEIGHT) + _MASK)
        try:
            result[name] = unpack(parts, shape, is_mask, places)
        except PackingError as error:
            raise PackingError(
                f"{name} is damaged, or made for a layer of another size than this one, {shape}: {error} "
                "Take the file from a backup, or load it onto the model that it was made for."
            ) from error
    for memory in memory_names(state):
        for name in _WEAKEST:
            result.setdefault(f"{memory}.{name}", torch.tensor(math.inf, dtype=torch.float32, device="cpu"))
    return result


def shapes_in(layers: Mapping[str, nn.Module]) -> Callable[[str], tuple[int, int] | None]:
    """The look-up that :func:`unpacked` needs, from WISE layers by name; PEFT's prefix is optional."""
    shapes = {
        name.removeprefix(_PEFT_PREFIX): (layer.out_features, layer.in_features) for name, layer in layers.items()
    }
    return lambda name: shapes.get(name.removeprefix(_PEFT_PREFIX))  # type: ignore[return-value]  # PEFT's sizes are untyped


def check_save_dtype(save_dtype: str) -> None:
    """Raise ValueError unless it is one of :data:`SAVE_DTYPES`."""
    if save_dtype not in SAVE_DTYPES:
        raise ValueError(
            f"save_dtype is {save_dtype!r}: choose one of {', '.join(SAVE_DTYPES)}; float32 keeps every bit."
        )


def _has_data(tensor: Tensor) -> bool:
    # A sharded tensor (DTensor) is of a class of its own, and its shards are packed nowhere.
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta"


def _rounded(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.element_size() <= dtype.itemsize:
        return tensor
    rounded = tensor.to(dtype)
    if bool((rounded.isinf() & ~tensor.isinf()).any()):
        largest = float(tensor[tensor.isfinite()].abs().max())
        raise ValueError(
            f"{key} has an entry of {largest:.3g}, and {dtype} ends at {torch.finfo(dtype).max:.3g}: save it with "
            'save_dtype="bfloat16" or "float32".'
        )
    return rounded
