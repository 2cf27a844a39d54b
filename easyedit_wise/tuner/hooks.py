"""Hooks on the top model that open and close the routing scope."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .asked import checked
from .call import Call, given_cache, is_decoder_only, returned_cache
from .choosing import rows_asking
from .layer import WiseLayer, find_wise_layers
from .roads import CONTINUOUS
from .scope import RoutingScope

_MARK = "_wise_routing_hooks"
_BEFORE = "_wise_methods_before"
_NAMES = "adapter_names"
# What ``generate`` may be given its prompts as.
_PROMPTS = ("inputs", "input_ids", "inputs_embeds")


def _layers(model: nn.Module) -> list[WiseLayer]:
    return list(find_wise_layers(model).values())


def _may_answer(model: nn.Module) -> bool:
    """Whether a memory could answer a query now: there are some, and they are on."""
    return any(layer.may_answer() for layer in _layers(model))


class _Enter:
    """Forward pre-hook: tell the scope what this call is about, and keep PEFT's ``adapter_names`` from the model."""

    def __init__(self, scope: RoutingScope) -> None:
        self.scope = scope

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names, kwargs = kwargs.get(_NAMES), {key: value for key, value in kwargs.items() if key != _NAMES}
        if names is not None:
            layers = _layers(model)
            known = {name for layer in layers for name in layer.wisemem_memories}
            names = checked(names, known, training=any(layer.training for layer in layers))
            if any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules()):
                raise ValueError(
                    "adapter_names was given to the model inside a PeftModel, whose modules_to_save follow the names "
                    "only if the PeftModel itself is called: call that, or use edits_chosen(model, names)."
                )
        self.scope.begin(Call.of(model, args, kwargs), partial(_may_answer, model), names)
        return args, kwargs


class _Leave:
    """Forward hook, also run after an exception: hand the route to the cache."""

    def __init__(self, scope: RoutingScope) -> None:
        self.scope = scope

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = given_cache(kwargs)
        self.scope.end(returned_cache(output) if cache is None else cache)


def _own(model: Any, method: str) -> Callable[..., Any]:
    """The model's method as it was before :func:`install_hooks`."""
    before = model.__dict__.get(_BEFORE, {}).get(method)
    return before if before is not None else partial(getattr(type(model), method), model)


def _generate_in_scope(model: Any, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
    """The model's own ``generate`` inside one routing scope; ``adapter_names`` say whose edits each prompt asks for."""
    generate = _own(model, "generate")
    if _MARK not in model.__dict__:  # taken off, but somebody kept the function
        return generate(*args, **kwargs)
    if adapter_names is not None:
        with rows_asking(model, _layers(model), adapter_names):
            return _generate_in_scope(model, *args, **kwargs)
    scope = model._forward_pre_hooks[model.__dict__[_MARK][0].id].scope
    prompts = args[0] if args else next((kwargs[key] for key in _PROMPTS if kwargs.get(key) is not None), None)
    prompts = prompts if isinstance(prompts, Tensor) else None
    scope.check_generation(None if prompts is None else prompts.shape[0], partial(_may_answer, model))
    read = kwargs.get("inputs_embeds")  # where both are given, the ids are not read
    read = read if isinstance(read, Tensor) else prompts
    n_prompt = read.shape[1] if read is not None and read.dim() >= 2 and is_decoder_only(model) else None
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    drafting = bool(getattr(config, "is_assistant", False))
    with scope.generating(n_prompt, drafting):
        return generate(*args, **kwargs)


def _refused_while_on(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own way into continuous batching, while no edit could answer.

    Raises:
        ValueError: one could.
    """
    if _MARK in model.__dict__ and _may_answer(model):
        raise ValueError(CONTINUOUS)
    return _own(model, "init_continuous_batching")(*args, **kwargs)


# Continuous batching runs in a thread of its own, which would log an error of the hooks and answer nothing. All of its
# entrances (``generate_batch``, a paged ``generate``) come through this one.
_WRAPPED = {"generate": _generate_in_scope, "init_continuous_batching": _refused_while_on}


def install_hooks(model: nn.Module, scope: RoutingScope) -> None:
    """Attach the scope to ``model``, the module that the user calls. Once; further calls change nothing."""
    if _MARK in model.__dict__:
        return
    enter = model.register_forward_pre_hook(_Enter(scope), with_kwargs=True)
    leave = model.register_forward_hook(_Leave(scope), with_kwargs=True, always_call=True)
    # Handles and a partial (not a bound method) survive pickling and a deep copy, and then belong to the copy.
    model.__dict__[_MARK] = (enter, leave)
    model.__dict__[_BEFORE] = {method: model.__dict__[method] for method in _WRAPPED if method in model.__dict__}
    for method, wrapper in _WRAPPED.items():
        if callable(getattr(type(model), method, None)):
            model.__dict__[method] = partial(wrapper, model)


def remove_hooks(model: nn.Module) -> None:
    """Take the hooks off again; the model is then as it was before :func:`install_hooks`."""
    for handle in model.__dict__.pop(_MARK, ()):
        handle.remove()
    before = model.__dict__.pop(_BEFORE, {})
    for method, wrapper in _WRAPPED.items():
        if getattr(model.__dict__.get(method), "func", None) is wrapper:
            del model.__dict__[method]
            if method in before:
                model.__dict__[method] = before[method]
