"""An adapter is replaced by another one of its name, or nothing happens to the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .attach import detach
from .model import find_wise_layers

# What loading changes on a layer beside its memories.
_SWITCHED = ("_active_adapter", "edit_streams", "last_route")


@contextmanager
def all_or_nothing(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Set the adapter of that name aside; put everything back if what happens inside fails."""
    layers = list(find_wise_layers(model).values())
    if not layers:
        try:
            yield
        except BaseException:
            detach(model)
            raise
        return
    configs = model.__dict__["peft_config"]
    configs_before = dict(configs)
    before = [
        (
            layer,
            dict(layer.wisemem_memories.items()),
            dict(layer.wisemem_config),
            {k: layer.__dict__[k] for k in _SWITCHED},
        )
        for layer in layers
    ]
    trainable = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        configs.pop(adapter_name, None)
        for layer in layers:
            if adapter_name in layer.wisemem_config:
                del layer.wisemem_config[adapter_name], layer.wisemem_memories[adapter_name]
        yield
    except BaseException:
        configs.clear()
        configs.update(configs_before)
        for layer, memories, layer_configs, switched in before:
            layer.wisemem_memories.clear()
            layer.wisemem_memories.update(memories)
            layer.wisemem_config = layer_configs
            layer.__dict__.update(switched)
        for parameter, required in trainable:
            parameter.requires_grad_(required)
        raise
