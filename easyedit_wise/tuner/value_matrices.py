"""Which matrix to edit where nobody named one: the value matrix of the layer at four fifths of a decoder's depth.

A decoder layer's feed-forward part is a key-value memory, and its last matrix, which writes to the residual stream,
holds the values (Eq. 2). It is found by what a layer is made of: each architecture has another name for it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .layer import linear_map_shape

LOG = logging.getLogger(__name__)

_NAME_IT = "for instance inner_params: [model.layers[27].mlp.down_proj.weight]."
_ATTENTION = re.compile("attn|attention", re.IGNORECASE)

Left = Callable[[str, nn.Module], bool]


def value_matrix_of(model: nn.Module) -> str:
    """The value matrix of the layer at four fifths of the depth, as ``inner_params`` names it; the log says which.

    A layer's value matrix is the last linear map of its widest feed-forward part, that is, of a part that gives the
    residual stream's size and that every token goes through by itself: neither what mixes tokens (attention,
    convolutions) nor routed experts. Where no layer has a feed-forward part (Mamba), it is the last map of what mixes
    tokens. Where the layer at four fifths has none, the nearest that has one takes its place, of two the earlier.

    Args:
        model: a causal language model without edits, or one that holds one beside towers for other inputs.

    Returns:
        Such as ``model.layers[24].mlp.down_proj.weight``.

    Raises:
        ValueError: the layers have no such map, as where all feed-forward parts are routed experts, or no decoder
            layers are found; the message says why, and what fits.
    """
    name, layers, size = _decoder_layers(model)
    found = _value_matrices(layers, size, _mixes_tokens)
    if not found and not any(map(_has_experts, layers)):
        found = _value_matrices(layers, size, _is_attention)
    if not found:
        raise ValueError(f"inner_params is not given, and this model offers no value matrix: {_why_none(name, layers)}")
    wanted = 4 * len(layers) // 5
    index = min(found, key=lambda one: (abs(one - wanted), one))
    parameter = as_parameter(f"{name}.{index}.{found[index]}")
    if index == wanted:
        LOG.info("inner_params is not given: %s is edited, of layers 0 to %d.", parameter, len(layers) - 1)
    else:
        LOG.warning(
            "inner_params is not given: %s is edited, of layers 0 to %d; at four fifths of the depth, in layer %d, "
            "there is no linear map that every token goes through.",
            *(parameter, len(layers) - 1, wanted),
        )
    return parameter


def _decoder_layers(model: Any) -> tuple[str, Sequence[nn.Module], int]:
    """The text decoder's list of layers, its name, and the size of the residual stream."""
    # What a model calls its decoder may be its vocabulary projection: then the list is looked for everywhere.
    for decoder in (model.get_decoder() if hasattr(model, "get_decoder") else model, model):
        config = getattr(decoder, "config", None)
        size = getattr(config, "hidden_size", None)
        closed = partial(_is_list_or_other_tower, type(config))
        lists = {
            name: list(part)
            for name, part in _parts(decoder, closed)
            if isinstance(part, nn.ModuleList) and all(next(block.children(), None) is not None for block in part)
        }
        name = max(lists, key=lambda one: len(lists[one]), default="")
        if name and lists[name] and size is not None:
            prefix = next((key for key, module in model.named_modules() if module is decoder), "")
            return f"{prefix}.{name}".removeprefix("."), lists[name], size
    raise ValueError(
        f"inner_params is not given, and {type(model).__name__} has no list of decoder layers to choose one from: "
        f"name the value matrix to edit, {_NAME_IT}"
    )


def _is_list_or_other_tower(config: type, _: str, part: nn.Module) -> bool:
    return isinstance(part, nn.ModuleList) or (
        isinstance(part, PreTrainedModel) and not isinstance(part.config, config)
    )


def _value_matrices(layers: Sequence[nn.Module], size: int, left_out: Left) -> dict[int, str]:
    """Of each layer that has one, by its index: the name of its value matrix, inside the layer."""

    def closed(name: str, part: nn.Module) -> bool:
        return left_out(name, part) or _are_experts(name, part)

    found = {}
    for index, layer in enumerate(layers):
        # The last map of each part of the layer: a gate in front of it may have the same size.
        last: dict[str, tuple[int, str]] = {}
        for name, part in _parts(layer, closed):
            is_leaf = next(part.children(), None) is None and not closed(name, part)
            shape = linear_map_shape(part) if is_leaf else None
            if shape is not None and shape[1] == size:
                last[name.rpartition(".")[0]] = (shape[0], name)
        if last:
            found[index] = max(last.values(), key=lambda one: one[0])[1]
    return found


def _parts(module: nn.Module, closed: Left) -> Iterator[tuple[str, nn.Module]]:
    """The modules inside, by name and in order; of a closed one itself, and nothing inside it."""
    for name, child in module.named_children():
        yield name, child
        if not closed(name, child):
            yield from ((f"{name}.{inner}", part) for inner, part in _parts(child, closed))


def _is_attention(name: str, part: nn.Module) -> bool:
    return _ATTENTION.search(name) is not None or _ATTENTION.search(type(part).__name__) is not None


def _mixes_tokens(name: str, part: nn.Module) -> bool:
    """Attention, or a part with a convolution over tokens in it: state spaces, gated delta rules."""
    return _is_attention(name, part) or any(isinstance(inner, nn.Conv1d) for inner in part.children())


def _are_experts(name: str, part: nn.Module) -> bool:
    """Routed experts: modules of a kind, or one parameter for all of them, which has three dimensions."""
    if isinstance(part, (nn.ModuleList, nn.ModuleDict)):
        return "expert" in name.lower()
    parameters = () if isinstance(part, nn.Conv1d) else part.parameters(recurse=False)
    return any(one.dim() == 3 and one.shape[0] > 1 for one in parameters)


def _has_experts(layer: nn.Module) -> bool:
    return any(_are_experts(name.rpartition(".")[2], part) for name, part in layer.named_modules())


def _why_none(name: str, layers: Sequence[nn.Module]) -> str:
    if any(map(_has_experts, layers)):
        return (
            f"all feed-forward parts of {name} are routed experts, each of which sees some of the tokens only, while a "
            "side memory needs one linear map that every token goes through: a shared expert's, or a dense layer's. "
            "Edit a model that has some."
        )
    return f"no layer of {name} has a linear map that writes to the residual stream. Name a matrix, {_NAME_IT}"


def as_parameter(module_name: str) -> str:
    """``model.layers.24.mlp.down_proj`` as settings name its weight: ``model.layers[24].mlp.down_proj.weight``."""
    return re.sub(r"\.(\d+)(?=\.)", r"[\1]", module_name) + ".weight"
