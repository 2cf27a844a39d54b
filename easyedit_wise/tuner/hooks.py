"""Hooks on the top model that open and close the routing scope."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from .scope import RoutingScope

_MARK = "_wise_routing_hooks"


class _Enter:
    """Forward pre-hook: tell the scope what this call is about."""

    def __init__(self, scope: RoutingScope) -> None:
        self.scope = scope

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(kwargs)
        if args:
            parameters = list(inspect.signature(type(model).forward).parameters)[1:]
            given.update(zip(parameters, args, strict=False))
        tokens = given.get("input_ids")
        if tokens is None:
            tokens = given.get("inputs_embeds")
        shape = (tokens.shape[0], tokens.shape[1]) if isinstance(tokens, Tensor) and tokens.dim() >= 2 else None
        self.scope.begin(given.get("attention_mask"), given.get("past_key_values"), shape)


class _Leave:
    """Forward hook, also run after an exception: hand the route to the cache."""

    def __init__(self, scope: RoutingScope) -> None:
        self.scope = scope

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None and output is not None:
            cache = getattr(output, "past_key_values", None)
        self.scope.end(cache)


def _generate_in_scope(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own ``generate`` inside one routing scope."""
    enter = self.__dict__[_MARK][0]
    scope: RoutingScope = next(
        hook.scope for key, hook in self._forward_pre_hooks.items() if key == enter and isinstance(hook, _Enter)
    )
    with scope.generating():
        return type(self).generate(self, *args, **kwargs)


def install_hooks(model: nn.Module, scope: RoutingScope) -> None:
    """Attach the scope to ``model``, the module that the user calls. Once; further calls change nothing."""
    if _MARK in model.__dict__:
        return
    enter = model.register_forward_pre_hook(_Enter(scope), with_kwargs=True)
    leave = model.register_forward_hook(_Leave(scope), with_kwargs=True, always_call=True)
    # Plain ids, not handles: they survive a deep copy of the model, and so does a bound method,
    # whose copy is bound to the copied model.
    model.__dict__[_MARK] = (enter.id, leave.id)
    if callable(getattr(type(model), "generate", None)):
        model.__dict__["generate"] = _generate_in_scope.__get__(model)


def remove_hooks(model: nn.Module) -> None:
    """Take the hooks off again; the model is then as it was before :func:`install_hooks`."""
    ids = model.__dict__.pop(_MARK, None)
    if ids is None:
        return
    enter, leave = ids
    model._forward_pre_hooks.pop(enter, None)
    model._forward_pre_hooks_with_kwargs.pop(enter, None)
    model._forward_hooks.pop(leave, None)
    model._forward_hooks_with_kwargs.pop(leave, None)
    model._forward_hooks_always_called.pop(leave, None)
    if getattr(model.__dict__.get("generate"), "__func__", None) is _generate_in_scope:
        del model.__dict__["generate"]
