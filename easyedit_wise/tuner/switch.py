"""Switch a model's edits off and on, choose among several sets, and read back where the last query went."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft import PeftModel
from torch import nn

from .asked import BASE_MODEL, checked
from .choosing import rows_asking
from .layer import WiseLayer
from .model import find_wise_layers
from .route import Route


@contextmanager
def edits_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model answers from its main memory only: the base model, bit for bit.

    Raises:
        ValueError: the model carries no edits.
    """
    layers = _layers(model, "to switch off")
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


@contextmanager
def edits_chosen(model: nn.Module, names: str | Sequence[str] | None) -> Iterator[None]:
    """Inside, a query is routed only among the edits of the set that it asks for, active or not.

    Sets are named where they are loaded: ``load_edits(model, path, adapter_name="law")``. It holds for calls by this
    thread or task, so that two may serve different sets; ``edits_disabled`` wins over it. What a call decided is kept
    while decoding with its cache, as long as the same names are asked for.

    A thread that is started inside does not inherit the choice (``contextvars``), unless it runs in a copy of the
    context. Since nobody can tell whether it means the same edits, a call that names none, from another thread or task
    while a choice is open, is refused. Name the edits in the call, ``model.generate(..., adapter_names=[...])``,
    which any thread can, or choose in the thread.

    Args:
        model: a model that carries edits, edited in place or wrapped by PEFT.
        names: one set for all rows, or a list with one for each row of the batch; in ``generate`` one for each prompt,
            and its beams and samples go with it. ``"__base__"`` is the unedited model, bit for bit. None: the sets
            that are active, which a thread beside others that choose says of itself.

    Raises:
        TypeError: ``names`` is neither a name nor a sequence of names.
        ValueError: there is no such set, or the model is in training mode; later, before anything is computed, a call
            has other than one row for each name.
    """
    with rows_asking(model, _layers(model, "to choose from"), names, around_code=True):
        yield


def use_edits(model: nn.Module, names: str | Sequence[str]) -> None:
    """From now on a query is routed among these sets of edits, all their memories together; others stay loaded.

    Where memories of several sets would answer much alike, a later set's goes first (``relative_scores``).

    Args:
        model: a model that carries edits, edited in place or wrapped by PEFT.
        names: a set, or several in order.

    Raises:
        TypeError: ``names`` is neither a name nor a sequence of names.
        ValueError: there is no such set, or one is named twice; the model is as before.
    """
    layers = _layers(model, "to use")
    asked = checked(names, {name for layer in layers for name in layer.wisemem_memories}, training=False)
    wanted = [asked] if isinstance(asked, str) else list(asked)
    if BASE_MODEL in wanted:
        raise ValueError(f"{BASE_MODEL!r} is no set of edits: switch them off with edits_disabled(model).")
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"names is {wanted}, with a set named twice: name each once.")
    if isinstance(model, PeftModel):
        model.base_model.set_adapter(wanted, inference_mode=True)
        return
    for layer in layers:
        layer.set_adapter(wanted, inference_mode=True)


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


def _layers(model: nn.Module, purpose: str) -> list[WiseLayer]:
    layers = list(find_wise_layers(model).values())
    if not layers:
        raise ValueError(f"this model carries no edits, so there is nothing {purpose}.")
    return layers
