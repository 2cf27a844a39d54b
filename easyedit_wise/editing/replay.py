"""Run a model's own forward with some of its modules answering from a recording."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_ABSENT = object()

Answers = Sequence[tuple[nn.Module, Sequence[Any]]]


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
        answers: modules, each with its outputs in the order of its calls.
        layer: the module whose output is replaced.
        layer_output: its output, in the shape that the model expects.
        positions: (rows, columns), each of shape (N,): compute the logits only there.

    Returns:
        Logits, shape (B, T, V), or (N, V) at ``positions``.
    """
    with _answering(answers, layer, layer_output), _only_at(model, positions) as selected:
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


def copied(output: Any) -> Any:
    """The same output with tensors of its own: a tensor, a tuple, a list, or a mapping such as a ModelOutput."""
    return _mapped(output, lambda value: value if _is_stand_in(value) else value.detach().clone())


def stood_in(output: Any) -> Any:
    """The same output with nothing in it: floating tensors become one NaN in the tensor's shape.

    If later code reads it after all, its results are NaN, and if it writes to it, torch raises.
    """
    return _mapped(
        output,
        lambda value: (
            value.new_full((), float("nan")).expand(value.shape) if value.is_floating_point() else value.clone()
        ),
    )


def _is_stand_in(value: Tensor) -> bool:
    return value.dim() > 0 and not any(value.stride()) and value.numel() > 1


def _mapped(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(_mapped(value, change) for value in output))
    if isinstance(output, (tuple, list)):
        return type(output)(_mapped(value, change) for value in output)
    if isinstance(output, dict):
        copies = {key: _mapped(value, change) for key, value in output.items()}
        return copies if type(output) is dict else type(output)(**copies)
    return output


@contextmanager
def _answering(answers: Answers, layer: nn.Module, layer_output: Tensor) -> Iterator[None]:
    saved: list[tuple[nn.Module, Any]] = []

    def answer(module: nn.Module, outputs: Sequence[Any]) -> None:
        remaining = iter(outputs)
        saved.append((module, module.__dict__.get("forward", _ABSENT)))
        # A copy, because the model's own code may go on in place (hidden_states += residual).
        module.__dict__["forward"] = lambda *args, **kwargs: copied(next(remaining))

    try:
        for module, outputs in answers:
            answer(module, outputs)
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
