"""Record what precedes the side memory once, replay it in every iteration.

While an edit trains, nothing before the side memory changes: the same tokens give the
same activations in all iterations. A recording keeps the output of every module that
finished before the side memory and that later code reads; a replay runs the model's own
forward with those modules answering from the recording. What glues them together
(residual sums, masks, positions) is the model's own code. A replay equals a full forward exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .answers import copied
from .replay import Answers, as_sequences, first_argument, replay
from .replay_plan import ReplayPlan


class _SideMemoryReached(Exception):  # noqa: N818  # control flow, not an error
    """Ends a forward that is only wanted up to the side memory."""


class FrozenPrefix:
    """One recorded batch.

    Attributes:
        layer_input: a = A(x), the input of the side memory's layer, shape (B, T, d_in); None once taken.
        layer_output: W_v a, its output from the main memory, shape (B, T, d_out).
    """

    def __init__(
        self,
        plan: ReplayPlan,
        inputs: Mapping[str, Any],
        answers: Answers,
        layer_input: Tensor,
        layer_output: Tensor,
    ) -> None:
        self._plan = plan
        self._inputs = dict(inputs)
        self._answers = answers
        # Some models (OPT) hand their FFN a flat list of tokens: (B * T, d).
        self._native_shape = layer_output.shape
        self.layer_input: Tensor | None = as_sequences(layer_input, inputs)
        self.layer_output = as_sequences(layer_output, inputs)

    @classmethod
    @torch.no_grad()
    def record(
        cls, model: nn.Module, layer: nn.Module, inputs: Mapping[str, Any], plan: ReplayPlan | None = None
    ) -> FrozenPrefix:
        """Run the forward as far as ``layer`` and keep what the rest of it needs.

        Args:
            model: the whole model, in eval mode, its side memories off.
            layer: the module whose output training replaces.
            inputs: keyword arguments of the model's forward.
            plan: what :meth:`ReplayPlan.of` found for this model and layer; None: found now, which takes a full
                forward and some replays of one row.

        Raises:
            ValueError: the forward does not reach ``layer``, or reaches it more than once.
        """
        plan = plan or ReplayPlan.of(model, layer, inputs)
        with plan.recording() as answers:
            layer_input, layer_output = _run_to(model, layer, inputs, through=True)
        return cls(plan, inputs, answers, layer_input, layer_output)

    def take_layer_input(self) -> Tensor:
        """The layer's input, for the last time: replays do not need it, so the recording lets it go.

        Raises:
            ValueError: it was taken before.
        """
        taken, self.layer_input = self.layer_input, None
        if taken is None:
            raise ValueError("the layer's input was taken from this recording before: keep what was returned.")
        return taken

    def replay(self, layer_output: Tensor, positions: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The model's logits with ``layer_output`` in place of the layer's own output.

        Args:
            layer_output: shape (B, T, d_out); gradients flow from the logits to it.
            positions: (rows, columns), each of shape (N,): compute the logits only there.

        Returns:
            Logits, shape (B, T, V), or (N, V) at ``positions``.
        """
        native = layer_output.reshape(self._native_shape)
        return replay(self._plan.model, self._inputs, self._answers, self._plan.layer, native, positions)


@torch.no_grad()
def layer_input_of(model: nn.Module, layer: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """a = A(x) at ``layer``, shape (B, T, d_in); the forward goes no further than that.

    Raises:
        ValueError: the forward does not reach ``layer``.
    """
    return as_sequences(_run_to(model, layer, inputs, through=False)[0], inputs)


def _run_to(model: nn.Module, layer: nn.Module, inputs: Mapping[str, Any], through: bool) -> list[Tensor]:
    """The layer's input and, if the forward is to go through it, its output."""
    reached: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Copies, because the model's own code may go on in place.
        reached.append(copied(first_argument(args, kwargs)))
        if not through:
            raise _SideMemoryReached

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        reached.append(copied(output))
        raise _SideMemoryReached

    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True), layer.register_forward_hook(leave)]
    try:
        model(**inputs)
    except _SideMemoryReached:
        return reached
    finally:
        for handle in handles:
            handle.remove()
    raise ValueError("the model's forward does not reach the layer to edit: choose a layer of the decoder stack.")
