"""Attach WISE to a model in place and take it off again, leaving no trace."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..undisturbed import undisturbed
from .asked import BASE_MODEL
from .config import WiseConfig
from .fitting_names import is_linear_map, is_routed_expert, names_that_fit
from .hooks import remove_hooks
from .layer import WiseLayer
from .model import find_wise_layers, other_tuners
from .native_loading import remove_loading
from .registration import register_with_peft

_TRAINABLE = "_wise_trainable_before"
_LENT = "_wise_lent"
_TRANSFORMERS_FLAG = "_hf_peft_config_loaded"


def module_name_of(parameter: str) -> str:
    """``model.layers[27].mlp.down_proj.weight`` (EasyEdit) as a module name: ``model.layers.27.mlp.down_proj``."""
    name = parameter.replace("[", ".").replace("]", "")
    return name.removesuffix(".weight")


def check_layer(model: nn.Module, parameter: str) -> str:
    """The module name of a value matrix that a side memory can be attached to.

    Raises:
        ValueError: the model has no such module, it is not a linear map, or it is one of several routed experts; names
            that fit are given.
    """
    name = module_name_of(parameter)
    module = dict(model.named_modules()).get(name)
    if module is None:
        what = "does not exist in this model"
    elif not is_linear_map(module):
        what = f"is {type(module).__name__}, not a linear map"
    elif is_routed_expert(name):
        what = "is a part of one routed expert"
    elif module is _vocabulary_projection(model):
        what = "is the vocabulary projection, behind which no layer is left to say anything"
    else:
        return name
    raise ValueError(f"inner_params names {parameter[:200]!r}, which {what}. {names_that_fit(model, name)}")


def _vocabulary_projection(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    projection: nn.Module | None = find() if callable(find) else None
    return projection


@undisturbed
def attach(model: nn.Module, config: WiseConfig, adapter_name: str = "default") -> WiseLayer:
    """Wrap the one layer that ``config.target_modules`` names, in place, frozen for inference.

    Args:
        model: a Hugging Face model, or any module; it keeps its class and all attributes.
        config: names exactly one module; the model keeps a copy of it.
        adapter_name: the adapter that edits go into. A model may carry several, all in the same layer.

    Returns:
        The layer.

    Raises:
        ValueError: the model carries another PEFT method, other than one layer matches, the layer is no
            linear map, or the model's edits are in another one; the model is as before.
    """
    register_with_peft()
    foreign = other_tuners(model)
    if foreign:
        raise ValueError(
            f"this model already carries the PEFT method {', '.join(foreign)}: merge it into the weights "
            "(merge_and_unload()) or take it off (unload()) first, then edit."
        )
    if adapter_name in ("", BASE_MODEL):
        raise ValueError(f"adapter_name is {adapter_name!r}: that names no set, {BASE_MODEL!r} is the unedited model.")
    if "." in adapter_name:
        raise ValueError(f"adapter_name is {adapter_name!r}: PyTorch allows no dot in it, so leave it out.")
    name = _only_match(model, config)
    layers = find_wise_layers(model)
    if layers and name not in layers:
        raise ValueError(
            f"this model's edits are in {next(iter(layers))}, but the new ones go to {name}: all edits of a model are "
            "in one layer. Take the present ones off first (detach), or name the same layer."
        )
    if not layers or adapter_name not in layers[name].wisemem_memories:
        config = copy.deepcopy(config)
        config.target_modules = {name}  # type: ignore[assignment]  # a set is PEFT's own convention
        _inject(model, config, adapter_name, fresh=not layers)
    layer = find_wise_layers(model)[name]
    layer.set_adapter(adapter_name, inference_mode=True)
    return layer


def _only_match(model: nn.Module, config: WiseConfig) -> str:
    """The one module that a configuration names, as PEFT would match it."""
    inside = tuple(f"{name}." for name in find_wise_layers(model))
    names = [name for name, _ in model.named_modules() if name and not name.startswith(inside)]
    matching = [name for name in names if config.target_modules and check_target_module_exists(config, name)]
    if not matching and isinstance(config.target_modules, set) and len(config.target_modules) == 1:
        return check_layer(model, next(iter(config.target_modules)))  # names those that fit
    if len(matching) != 1:
        named = str(config.target_modules)[:200]
        found = f"{len(matching)} match: {', '.join(matching[:12])}" if matching else f"{named} names none"
        raise ValueError(f"WISE edits exactly one layer, but {found}.")
    return check_layer(model, matching[0])


def _inject(model: nn.Module, config: WiseConfig, adapter_name: str, fresh: bool) -> None:
    """PEFT's injection, or nothing at all if it fails."""
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if fresh:
        model.__dict__[_TRAINABLE] = trainable
    try:
        with warnings.catch_warnings():
            # A second set of edits on the same layer is meant.
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(config, model, adapter_name)
    except BaseException:
        if fresh:
            detach(model)
        else:
            model.__dict__["peft_config"].pop(adapter_name, None)
        raise
    if hasattr(type(model), _TRANSFORMERS_FLAG):
        # transformers then saves the edits as an adapter; it would else write a checkpoint with our names
        # in it, which loads with a random matrix in place of the edited layer's.
        model.__dict__[_TRANSFORMERS_FLAG] = True


def lend(model: nn.Module, name: str, value: Any) -> None:
    """Give a model that carries edits one more attribute, which :func:`detach` takes off with them."""
    model.__dict__[name] = value
    model.__dict__.setdefault(_LENT, set()).add(name)


@undisturbed
def detach(model: nn.Module) -> None:
    """Take every WISE layer off: the very modules, hooks and trainability from before :func:`attach`.

    What stays is the texts that an editor sampled from the model for its prefix augmentation.
    """
    layers = find_wise_layers(model)
    if not layers and _TRAINABLE not in model.__dict__:
        return
    for name, layer in layers.items():
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, layer.base_layer)
    remove_hooks(model)
    remove_loading(model)
    if isinstance(getattr(model, "peft_config", None), dict):
        del model.peft_config
    model.__dict__.pop(_TRANSFORMERS_FLAG, None)
    for name in model.__dict__.pop(_LENT, ()):
        model.__dict__.pop(name, None)
    for name in model.__dict__.pop(_TRAINABLE, []):
        model.get_parameter(name).requires_grad_(True)
