"""Attach WISE to a model in place and take it off again, leaving no trace."""

from __future__ import annotations

import difflib
import re

from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn

from .config import WiseConfig
from .hooks import remove_hooks
from .layer import WiseLayer
from .model import find_wise_layers, other_tuners
from .registration import register_with_peft

_TRAINABLE = "_wise_trainable_before"


def module_name_of(parameter: str) -> str:
    """``model.layers[27].mlp.down_proj.weight`` (EasyEdit) as a module name: ``model.layers.27.mlp.down_proj``."""
    name = parameter.replace("[", ".").replace("]", "")
    return name.removesuffix(".weight").removesuffix(".bias")


def check_layer(model: nn.Module, parameter: str) -> str:
    """The module name of a value matrix that a side memory can be attached to.

    Raises:
        ValueError: the model has no such module or it is not a linear map; names that fit are given.
    """
    name = module_name_of(parameter)
    modules = dict(model.named_modules())
    module = modules.get(name)
    if module is not None and _is_linear_map(module):
        return name
    fitting = [key for key, value in modules.items() if _is_linear_map(value) and ".base_layer" not in key]
    what = "does not exist in this model" if module is None else f"is {type(module).__name__}, not a linear map"
    raise ValueError(f"inner_params names {parameter!r}, which {what}. {_names_that_fit(name, fitting)}")


def _is_linear_map(module: nn.Module) -> bool:
    if isinstance(module, WiseLayer):
        return True
    if isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd, nn.MultiheadAttention)):
        return False
    return None not in _get_in_out_features(module) and hasattr(module, "weight")


def _names_that_fit(name: str, fitting: list[str]) -> str:
    """The nearest names, and the pattern of all FFN value matrices with the range of layers."""
    nearest = difflib.get_close_matches(name, fitting, n=3, cutoff=0.3)
    patterns: dict[str, list[int]] = {}
    for candidate in fitting:
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", candidate)
        if len(numbers) == 1:
            patterns.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "{}", candidate), []).append(int(numbers[0]))
    value_matrices = [
        pattern.format(f"[{min(layers)}..{max(layers)}]").replace(".[", "[") + ".weight"
        for pattern, layers in patterns.items()
        if re.search(r"(down_proj|mlp\.c_proj|fc_out|fc2|dense_4h_to_h|w2|wo)$", pattern)
    ]
    text = f"Nearest: {', '.join(nearest)}. " if nearest else ""
    if value_matrices:
        return f"{text}FFN value matrices of this model: {', '.join(value_matrices)}."
    return f"{text}Linear maps of this model: {', '.join(fitting[:12])}."


def attach(model: nn.Module, config: WiseConfig, adapter_name: str = "default") -> WiseLayer:
    """Wrap the one layer that ``config.target_modules`` names, in place, frozen for inference.

    Args:
        model: a Hugging Face model, or any module; it keeps its class and all attributes.
        config: names exactly one module.
        adapter_name: the adapter that edits go into.

    Returns:
        The layer.

    Raises:
        ValueError: the model carries another PEFT method, or other than one layer matches.
    """
    register_with_peft()
    foreign = other_tuners(model)
    if foreign:
        raise ValueError(
            f"this model already carries the PEFT method {', '.join(foreign)}: merge it into the weights "
            "(merge_and_unload()) or take it off (unload()) first, then edit."
        )
    if not find_wise_layers(model):
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        inject_adapter_in_model(config, model, adapter_name)
        model.__dict__[_TRAINABLE] = trainable
    elif adapter_name not in next(iter(find_wise_layers(model).values())).wisemem_memories:
        inject_adapter_in_model(config, model, adapter_name)
    layers = find_wise_layers(model)
    if len(layers) != 1:
        detach(model)
        raise ValueError(f"WISE edits exactly one layer, but {len(layers)} match: {', '.join(layers)}.")
    layer = next(iter(layers.values()))
    layer.set_adapter(adapter_name, inference_mode=True)
    return layer


def detach(model: nn.Module) -> None:
    """Take every WISE layer off: the very modules, hooks and trainability from before :func:`attach`."""
    for name, layer in find_wise_layers(model).items():
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, layer.base_layer)
    remove_hooks(model)
    if isinstance(getattr(model, "peft_config", None), dict):
        del model.peft_config
    for name in model.__dict__.pop(_TRAINABLE, []):
        model.get_parameter(name).requires_grad_(True)
