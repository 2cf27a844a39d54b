"""Run a model's own forward with some of its modules answering from a recording."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..tuner.layer import WiseLayer
from .answers import Answer

_ABSENT = object()

Answers = Sequence[tuple[nn.Module, Sequence[Answer]]]


def replay(
    model: nn.Module,
    inputs: Mapping[str, Any],
    answers: Answers,
    layer: nn.Module,
    layer_output: Tensor,
    positions: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The model's logits with recorded answers and with ``layer_output`` in place of the layer's own output.

    Args:
        model: the whole model; its module tree is as before afterwards, also after an exception.
        inputs: keyword arguments of its forward.
        answers: modules, each with what it gave in the order of its calls.
        layer: the module whose output is replaced.
        layer_output: its output, in the shape that the model expects.
        positions: (rows, columns), each of shape (N,): compute the logits only there.

    Returns:
        Logits, shape (B, T, V), or (N, V) at ``positions``.
    """
    with _answering(answers, layer, layer_output), _unrouted(layer), _only_at(model, positions) as selected:
        logits: Tensor = model(**inputs).logits
    if selected:
        return logits[0]
    return logits if positions is None else logits[positions]


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a layer is applied to, whether it was given by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def as_sequences(values: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """(B, T, d) also where the model flattened the tokens to (B * T, d)."""
    tokens = inputs.get("input_ids")
    if values.dim() == 2 and isinstance(tokens, Tensor) and tokens.numel() == values.shape[0]:
        return values.reshape(*tokens.shape, -1)
    return values


@contextmanager
def _answering(answers: Answers, layer: nn.Module, layer_output: Tensor) -> Iterator[None]:
    saved: list[tuple[nn.Module, Any]] = []

    def answer(module: nn.Module, given: Sequence[Answer]) -> None:
        remaining = iter(given)
        saved.append((module, module.__dict__.get("forward", _ABSENT)))
        module.__dict__["forward"] = lambda *args, **kwargs: next(remaining).again(args, kwargs)

    try:
        for module, given in answers:
            answer(module, given)
        saved.append((layer, layer.__dict__.get("forward", _ABSENT)))
        layer.__dict__["forward"] = lambda *args, **kwargs: layer_output.clone()
        yield
    finally:
        for module, forward in reversed(saved):
            if forward is _ABSENT:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


@contextmanager
def _unrouted(layer: nn.Module) -> Iterator[None]:
    """No query is asked here, so there is none to decide or to refuse; looking would make an accelerator wait."""
    if not isinstance(layer, WiseLayer):
        yield
        return
    was_disabled, layer._disable_adapters = layer._disable_adapters, True
    try:
        yield
    finally:
        layer._disable_adapters = was_disabled


@contextmanager
def _only_at(model: nn.Module, positions: tuple[Tensor, Tensor] | None) -> Iterator[list[bool]]:
    """Let the vocabulary projection see only the wanted positions, as one sequence of N tokens.

    Yields a list that is empty as long as nothing was selected: there is nothing to select, or the
    forward does not call a projection of its own.
    """
    selected: list[bool] = []
    find_projection = getattr(model, "get_output_embeddings", None)
    projection = find_projection() if callable(find_projection) else None
    if positions is None or projection is None:
        yield selected
        return

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if selected or not args or args[0].dim() != 3:
            return None
        selected.append(True)
        return (args[0][positions].unsqueeze(0), *args[1:])

    handle = projection.register_forward_pre_hook(select)
    try:
        yield selected
    finally:
        handle.remove()
