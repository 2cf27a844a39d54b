"""Record what precedes the side memory once, replay it in every iteration.

While an edit trains, nothing before the side memory changes: the same tokens give the
same activations in all iterations. A recording keeps the output of every module that
finished before the side memory, and a replay runs the model's own forward with those
modules answering from the recording. Modules are found by the order in which they run,
so any decoder works, and what glues them together (residual sums, masks, positions) is
the model's own code. A replay equals a full forward exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_ABSENT = object()


class _SideMemoryReached(Exception):  # noqa: N818  # control flow, not an error
    """Ends a forward that is only wanted up to the side memory."""


class FrozenPrefix:
    """One recorded batch.

    Attributes:
        layer_input: a = A(x), the input of the side memory's layer, shape (B, T, d_in).
        layer_output: W_v a, its output from the main memory, shape (B, T, d_out).
    """

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module,
        inputs: Mapping[str, Any],
        recorded: list[tuple[nn.Module, list[Any]]],
        layer_input: Tensor,
        layer_output: Tensor,
    ) -> None:
        self._model = model
        self._layer = layer
        self._inputs = dict(inputs)
        self._recorded = recorded
        # Some models (OPT) hand their FFN a flat list of tokens: (B * T, d).
        self._native_shape = layer_output.shape
        self.layer_input = _as_sequences(layer_input, inputs)
        self.layer_output = _as_sequences(layer_output, inputs)

    @classmethod
    @torch.no_grad()
    def record(cls, model: nn.Module, layer: nn.Module, inputs: Mapping[str, Any]) -> FrozenPrefix:
        """Run one full forward and keep what finished before ``layer``.

        Args:
            model: the whole model, in eval mode, its side memories off.
            layer: the module whose output training replaces.
            inputs: keyword arguments of the model's forward.

        Raises:
            ValueError: the forward does not reach ``layer``, or reaches it more than once.
        """
        recorder = _Recorder(layer)
        with recorder.watching(model):
            model(**inputs)
        if recorder.n_reached != 1 or recorder.layer_input is None or recorder.layer_output is None:
            raise ValueError(
                f"the layer to edit ran {recorder.n_reached} times in one forward of the model, but exactly once is "
                "needed: choose a layer of the decoder stack."
            )
        return cls(model, layer, inputs, recorder.finished_for_good(), recorder.layer_input, recorder.layer_output)

    def replay(self, layer_output: Tensor, positions: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The model's logits with ``layer_output`` in place of the layer's own output.

        Args:
            layer_output: shape (B, T, d_out); gradients flow from the logits to it.
            positions: (rows, columns), each of shape (N,): compute the logits only there.

        Returns:
            Logits, shape (B, T, V), or (N, V) at ``positions``.
        """
        with self._replaying(layer_output.reshape(self._native_shape)), _only_at(self._model, positions) as selected:
            logits = self._model(**self._inputs).logits
        if selected:
            return logits[0]
        return logits if positions is None else logits[positions]

    @contextmanager
    def _replaying(self, layer_output: Tensor) -> Iterator[None]:
        saved: list[tuple[nn.Module, Any]] = []

        def answer(module: nn.Module, outputs: list[Any]) -> None:
            remaining = iter(outputs)
            saved.append((module, module.__dict__.get("forward", _ABSENT)))
            # A copy, because the model's own code may go on in place (hidden_states += residual).
            module.__dict__["forward"] = lambda *args, **kwargs: _copied(next(remaining))

        try:
            for module, outputs in self._recorded:
                answer(module, outputs)
            saved.append((self._layer, self._layer.__dict__.get("forward", _ABSENT)))
            self._layer.__dict__["forward"] = lambda *args, **kwargs: layer_output.clone()
            yield
        finally:
            for module, forward in reversed(saved):
                if forward is _ABSENT:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = forward


@torch.no_grad()
def layer_input_of(model: nn.Module, layer: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """a = A(x) at ``layer``, shape (B, T, d_in); the forward goes no further than that.

    Raises:
        ValueError: the forward does not reach ``layer``.
    """
    reached: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reached.append(_first_argument(args, kwargs).detach())
        raise _SideMemoryReached

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**inputs)
    except _SideMemoryReached:
        return _as_sequences(reached[0], inputs)
    finally:
        handle.remove()
    raise ValueError("the model's forward does not reach the layer to edit: choose a layer of the decoder stack.")


def _first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a layer is applied to, whether it was given by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def _as_sequences(values: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """(B, T, d) also where the model flattened the tokens to (B * T, d)."""
    tokens = inputs.get("input_ids")
    if values.dim() == 2 and isinstance(tokens, Tensor) and tokens.numel() == values.shape[0]:
        return values.reshape(*tokens.shape, -1)
    return values


class _Recorder:
    """Watches one forward: the stack of calls under way, and what finished before the layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.n_reached = 0
        self.layer_input: Tensor | None = None
        self.layer_output: Tensor | None = None
        # One list of finished calls for each call under way. When a call finishes before the layer,
        # what finished inside it is dropped: the outermost module answers for all of them.
        self._open: list[list[tuple[nn.Module, Any]]] = [[]]
        self._called_later: set[int] = set()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is self.layer:
            self.n_reached += 1
            self.layer_input = _copied(_first_argument(args, kwargs))
        if self.n_reached:
            self._called_later.add(id(module))
        else:
            self._open.append([])

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is self.layer:
            # A copy, because the model's own code may go on in place (Falcon: mlp_output += attention_output).
            self.layer_output = _copied(output)
        elif not self.n_reached:
            self._open.pop()
            self._open[-1].append((module, _copied(output)))

    def finished_for_good(self) -> list[tuple[nn.Module, list[Any]]]:
        """Modules that ran before the layer only, each with its outputs in the order of its calls."""
        outputs: dict[int, tuple[nn.Module, list[Any]]] = {}
        for calls in self._open:
            for module, output in calls:
                outputs.setdefault(id(module), (module, []))[1].append(output)
        return [entry for key, entry in outputs.items() if key not in self._called_later]


def _copied(output: Any) -> Any:
    """The same output with tensors of its own: a tensor, a tuple, a list, or a mapping such as a ModelOutput."""
    if isinstance(output, Tensor):
        return output.detach().clone()
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*map(_copied, output))
    if isinstance(output, (tuple, list)):
        return type(output)(map(_copied, output))
    if isinstance(output, dict):
        copies = {key: _copied(value) for key, value in output.items()}
        return copies if type(output) is dict else type(output)(**copies)
    return output


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
