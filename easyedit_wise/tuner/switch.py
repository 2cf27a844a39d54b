"""Switch a model's edits off and on, and read back where the last query went."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .model import find_wise_layers
from .scope import Route


@contextmanager
def edits_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model answers from its main memory only: the base model, bit for bit.

    Raises:
        ValueError: the model carries no edits.
    """
    layers = list(find_wise_layers(model).values())
    if not layers:
        raise ValueError("this model carries no edits, so there is nothing to switch off.")
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def last_route(model: nn.Module) -> Route | None:
    """Which memory answered each sequence of the last prefill, with its scores and thresholds.

    Returns:
        None before the first query, or while the edits are switched off.

    Raises:
        ValueError: the model carries no edits.
    """
    layers = list(find_wise_layers(model).values())
    if not layers:
        raise ValueError("this model carries no edits, so no query was routed.")
    return None if layers[0].disable_adapters else layers[0].last_route
