"""Which matrices of a model a side memory can stand beside, and what is said where a name is none of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from .layer import WiseLayer, linear_map_shape

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_VALUE_MATRIX = re.compile(r"(down_proj|mlp\.c_proj|fc_out|fc2|dense_4h_to_h|w2|wo|shared_mlp\.output_linear)$")
# One of several experts that are modules of their own; transformers 5 keeps them in one parameter instead.
_ONE_EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.")


def is_linear_map(module: nn.Module) -> bool:
    """Whether a module is a linear map with a weight, a quantised or an edited one too."""
    # What has sizes but no weight of its own is a container; HQQ and GPTQ name theirs otherwise.
    has_weight = any(hasattr(module, name) for name in ("weight", "W_q", "qweight"))
    return isinstance(module, WiseLayer) or (has_weight and linear_map_shape(module) is not None)


def is_routed_expert(name: str) -> bool:
    """Whether a module's name is that of a part of one routed expert."""
    return _ONE_EXPERT.search(name) is not None


class Experts(NamedTuple):
    """The routed experts of a model.

    Attributes:
        names: the modules, in as few words as say all of them.
        parameters: for each matrix its name and shape; empty where every expert is a module of its own.
    """

    names: list[str]
    parameters: dict[str, tuple[int, ...]]


def routed_experts(model: nn.Module) -> Experts | None:
    """A model's routed experts, as found by walking its modules; None: it has none."""
    names: list[str] = []
    parameters: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if is_routed_expert(f"{name}."):
            names.append(re.sub(r"\.\d+$", "", name.split(".experts.")[0] + ".experts"))
            continue
        if "expert" not in f"{name.rpartition('.')[2]} {type(module).__name__}".lower() or is_linear_map(module):
            continue
        held = module.named_parameters(recurse=False)
        matrices = {k: tuple(v.shape) for k, v in held if v.dim() > 1 and not k.endswith("bias")}
        if matrices:
            names.append(name)
            parameters.update({key: parameters.get(key, shape) for key, shape in matrices.items()})
    return Experts(_in_few_words(list(dict.fromkeys(names))), parameters) if names else None


def names_that_fit(model: nn.Module, name: str) -> str:
    """What to name instead of ``name``: the nearest linear maps, and the FFN value matrices with their layers.

    Of a model that reads images, those of its language model only. In a mixture of experts a value matrix sees every
    token in dense layers and shared experts only; where there are neither, no matrix fits, and that is said.
    """
    fitting = [
        key
        for key, value in model.named_modules()
        if is_linear_map(value) and ".base_layer" not in key and not is_routed_expert(key)
    ]
    language = _language_model(model)
    values = [key for key in fitting if _VALUE_MATRIX.search(key) and key.startswith(language)]
    experts = routed_experts(model)
    if experts is not None:
        # Attention's maps look most like a name that does not exist, but hold no values.
        wanted = name.rpartition(".")[2]
        near = difflib.get_close_matches(name, [k for k in fitting if k in values or k.endswith(f".{wanted}")], n=3)
    else:
        near = difflib.get_close_matches(name, fitting, n=3, cutoff=0.3)
    text = f"Nearest: {', '.join(near)}. " if near else ""
    if experts is not None:
        text = f"{text}{_about(experts)} "
    if values:
        listed = ", ".join(f"{one}.weight" for one in _in_few_words(values))
        return f"{text}FFN value matrices of this model: {listed}."
    if experts is not None:
        return (
            f"{text}Nothing else of this model fits: it has neither dense layers nor shared experts, so no value "
            "matrix of its FFNs sees every token. Edit a model that has some."
        )
    return f"{text}Linear maps of this model: {', '.join(fitting[:12])}."


def _about(experts: Experts) -> str:
    where = ", ".join(experts.names)
    if not experts.parameters:
        return f"The routed experts ({where}) cannot be edited: each sees only the tokens that are sent to it."
    shapes = ", ".join(f"{name} {shape}" for name, shape in experts.parameters.items())
    return (
        f"The routed experts ({where}) cannot be edited: a matrix is one parameter for all of them ({shapes}), no "
        "linear map of its own, and each expert sees only the tokens that are sent to it."
    )


def _language_model(model: nn.Module) -> str:
    """The prefix of the names of the text decoder's modules; empty where it cannot be told from the rest."""
    find = getattr(model, "get_decoder", None)
    decoder = find() if callable(find) else None
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return f"{name}." if name else ""


def _in_few_words(names: Sequence[str]) -> list[str]:
    """``model.layers.0.mlp``, ``model.layers.1.mlp``, ... as ``model.layers[0..1].mlp``, by EasyEdit's spelling.

    Names with other than one number are as they are.
    """
    patterns: dict[str, list[int]] = {}
    for name in names:
        numbers = _NUMBER.findall(f"{name}.")
        pattern = _NUMBER.sub("{}", f"{name}.").removesuffix(".") if len(numbers) == 1 else name
        patterns.setdefault(pattern, []).extend(int(number) for number in numbers if len(numbers) == 1)
    return [
        pattern.replace(".{}", f"[{_range(layers)}]") if layers else pattern for pattern, layers in patterns.items()
    ]


def _range(layers: Sequence[int]) -> str:
    first, last = min(layers), max(layers)
    if len(set(layers)) == 1:
        return str(first)
    whole = set(layers) == set(range(first, last + 1))
    return f"{first}..{last}" if whole else ", ".join(map(str, sorted(set(layers))))
