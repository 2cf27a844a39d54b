"""An adapter and the base that it was made on."""

from __future__ import annotations

from torch import nn

from .config import WiseConfig
from .fingerprint import difference, fingerprint
from .layer import WiseLayer, find_wise_layers, linear_map_shape


def check_base(model: nn.Module, config: WiseConfig) -> None:
    """Compare each layer that a configuration has the fingerprint of; layers that the model lacks are passed over.

    Raises:
        ValueError: a layer has another size, or another weight.
    """
    for name, known in (config.base_fingerprint or {}).items():
        module = _submodule(model, name)
        shape = None if module is None else linear_map_shape(module)
        if module is None or shape is None:
            continue
        needed, given = tuple(reversed(shape)), tuple(known["shape"])
        if sorted(needed) != sorted(given):  # a Conv1D keeps its weight the other way round
            raise ValueError(f"{name} has the shape {given} where the edits were made, and this model needs {needed}.")
        differs = difference(known, module)
        if differs is not None:
            made_on, here = config.base_model_name_or_path, getattr(model, "name_or_path", None)
            raise ValueError(
                f"the edits were made on another base{f', {made_on},' if made_on else ''} than this model"
                f"{f', {here}' if here else ''}: {name} differs, {differs}. Load them onto that base. Onto this one "
                "they go with load_edits(..., any_base=True), or, in PEFT and transformers, with a configuration whose "
                "base_fingerprint is None."
            )


def take_fingerprints(model: nn.Module, config: WiseConfig, adapter_name: str) -> None:
    """Write down the base weights of an adapter's layers, where the configuration has none yet."""
    known = dict(config.base_fingerprint or {})
    for name, layer in find_wise_layers(model).items():
        if adapter_name not in layer.wisemem_memories or name in known:
            continue
        taken = fingerprint(layer.get_base_layer())
        if taken is not None:
            known[name] = taken
    config.base_fingerprint = known or None


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    return module.get_base_layer() if isinstance(module, WiseLayer) else module
