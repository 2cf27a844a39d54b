"""A call whose rows ask for adapters by name, in a model that PEFT wrapped or that was edited in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .asked import BASE_MODEL, checked
from .layer import WiseLayer
from .scope import RoutingScope


@contextmanager
def rows_asking(
    model: nn.Module, layers: Iterable[WiseLayer], names: str | Sequence[str] | None, around_code: bool = False
) -> Iterator[None]:
    """Inside, calls of ``model`` by this thread are routed among the adapters that their rows ask for.

    Args:
        model: the model; its ``modules_to_save`` follow the names, too.
        layers: its WISE layers.
        names: one adapter's name for all rows, or one for each row; ``"__base__"`` is the unedited model; None: the
            active adapters.
        around_code: see :meth:`~easyedit_wise.tuner.scope.RoutingScope.asking`.

    Raises:
        TypeError, ValueError: see :func:`~easyedit_wise.tuner.asked.checked`; nothing ran yet.
    """
    layers = list(layers)
    known = {name for layer in layers for name in layer.wisemem_memories}
    training = any(layer.training for layer in layers)
    asked = None if names is None else checked(names, known, training)
    scopes = {id(layer.routing_scope): layer.routing_scope for layer in layers}
    with ExitStack() as stack:
        for scope in scopes.values():
            stack.enter_context(scope.asking(asked, around_code))
            for module in model.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    handle = module.register_forward_pre_hook(partial(_with_names, scope), with_kwargs=True)
                    stack.callback(handle.remove)
        yield


def _with_names(
    scope: RoutingScope, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tell a module of ``modules_to_save`` whose copy each row wants; another thread's call asks for nothing."""
    asked = scope.asked_by(len(args[0])) if args else None
    if asked is not None:
        kwargs = {**kwargs, "adapter_names": [name if name in module._adapters else BASE_MODEL for name in asked]}
    return args, kwargs


__all__ = ["rows_asking"]
