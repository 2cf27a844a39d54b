"""Hooks on the top model that open and close the routing scope."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

from torch import Tensor, nn

from .scope import RoutingScope
from .words import words

_MARK = "_wise_routing_hooks"
_GENERATE_BEFORE = "_wise_generate_before"
# What ``generate`` may be given its prompts as.
_PROMPTS = ("inputs", "input_ids", "inputs_embeds")


@lru_cache(maxsize=16)
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of what a model's forward takes, in order; asked in every call with positional arguments."""
    return tuple(inspect.signature(forward).parameters)[1:]


def _given_cache(given: Mapping[str, Any]) -> Any:
    """The key-value cache that a call was given; transformers 5.24 renamed ``past_key_values`` to ``cache``."""
    cache = given.get("past_key_values")
    return given.get("cache") if cache is None else cache


class _Enter:
    """Forward pre-hook: tell the scope what this call is about."""

    def __init__(self, scope: RoutingScope) -> None:
        self.scope = scope

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(kwargs)
        if args:
            given.update(zip(_parameters(type(model).forward), args, strict=False))
        tokens = given.get("input_ids")
        if tokens is None:
            tokens = given.get("inputs_embeds")
        shape = (tokens.shape[0], tokens.shape[1]) if isinstance(tokens, Tensor) and tokens.dim() >= 2 else None
        counted = words(model, given.get("input_ids"))
        self.scope.begin(given.get("attention_mask"), _given_cache(given), shape, counted)


class _Leave:
    """Forward hook, also run after an exception: hand the route to the cache."""

    def __init__(self, scope: RoutingScope) -> None:
        self.scope = scope

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = _given_cache(kwargs)
        if cache is None:
            cache = getattr(output, "past_key_values", None)
        if cache is None and isinstance(output, tuple):  # return_dict=False
            cache = next((part for part in output if hasattr(part, "get_seq_length")), None)
        self.scope.end(cache)


def _generate_in_scope(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own ``generate`` inside one routing scope."""
    generate = model.__dict__.get(_GENERATE_BEFORE) or partial(type(model).generate, model)
    if _MARK not in model.__dict__:  # taken off, but somebody kept the function
        return generate(*args, **kwargs)
    scope = model._forward_pre_hooks[model.__dict__[_MARK][0].id].scope
    prompts = args[0] if args else next((kwargs[key] for key in _PROMPTS if kwargs.get(key) is not None), None)
    if isinstance(prompts, Tensor):
        scope.check_rows(prompts.shape[0])
    with scope.generating():
        return generate(*args, **kwargs)


def install_hooks(model: nn.Module, scope: RoutingScope) -> None:
    """Attach the scope to ``model``, the module that the user calls. Once; further calls change nothing."""
    if _MARK in model.__dict__:
        return
    enter = model.register_forward_pre_hook(_Enter(scope), with_kwargs=True)
    leave = model.register_forward_hook(_Leave(scope), with_kwargs=True, always_call=True)
    # Handles and a partial (not a bound method) survive pickling and a deep copy, and then belong to the copy.
    model.__dict__[_MARK] = (enter, leave)
    if callable(getattr(type(model), "generate", None)):
        if "generate" in model.__dict__:
            model.__dict__[_GENERATE_BEFORE] = model.__dict__["generate"]
        model.__dict__["generate"] = partial(_generate_in_scope, model)


def remove_hooks(model: nn.Module) -> None:
    """Take the hooks off again; the model is then as it was before :func:`install_hooks`."""
    for handle in model.__dict__.pop(_MARK, ()):
        handle.remove()
    if getattr(model.__dict__.get("generate"), "func", None) is _generate_in_scope:
        del model.__dict__["generate"]
        if _GENERATE_BEFORE in model.__dict__:
            model.__dict__["generate"] = model.__dict__.pop(_GENERATE_BEFORE)
