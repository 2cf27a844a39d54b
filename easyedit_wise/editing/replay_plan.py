"""Which modules of a model answer from a recording, found by watching one forward.

Modules are found by the order in which they run, not by name, so any decoder works.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .answers import Answer, Entries, copied, entries
from .replay import replay


@dataclass(frozen=True)
class ReplayPlan:
    """How to replay one model from one layer on.

    Attributes:
        model: the whole model.
        layer: the module whose output training replaces.
        modules: the outermost modules that run before the layer, and only before it.
        unread: ids of those whose output nothing reads that a replay still runs: mostly all decoder layers but
            the last. A replay skips them, so nothing of them need be stored.
    """

    model: nn.Module
    layer: nn.Module
    modules: tuple[nn.Module, ...]
    unread: frozenset[int]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, layer: nn.Module, inputs: Mapping[str, Any]) -> ReplayPlan:
        """Watch one forward of the first row of ``inputs``, then find by trial whose output is never read.

        Raises:
            ValueError: the forward does not reach ``layer``, or reaches it more than once.
        """
        probe = _first_row(inputs)
        watcher = _Watcher(layer)
        with watcher.watching(model):
            expected = model(**probe).logits
        if watcher.n_reached != 1 or watcher.layer_output is None:
            raise ValueError(
                f"the layer to edit ran {watcher.n_reached} times in one forward of the model, but exactly once is "
                "needed: choose a layer of the decoder stack."
            )
        recorded, layer_output = watcher.finished_for_good(), watcher.layer_output

        def works_without(unread: frozenset[int]) -> bool:
            answers = [(m, [one.unread() for one in given] if id(m) in unread else given) for m, given in recorded]
            try:
                return torch.equal(replay(model, probe, answers, layer, layer_output), expected)
            except RuntimeError:  # torch refuses to write to a stand-in
                return False

        unread = _largest_unread([id(module) for module, _ in recorded], works_without)
        if not works_without(unread):  # each goes, but not all together: keep everything
            unread = frozenset()
        return cls(model, layer, tuple(module for module, _ in recorded), unread)

    @contextmanager
    def recording(self) -> Iterator[list[tuple[nn.Module, list[Answer]]]]:
        """Yields what the modules give in the calls made inside."""
        recorded: list[tuple[nn.Module, list[Answer]]] = [(module, []) for module in self.modules]
        handles: list[Any] = []

        def record(module: nn.Module, kept: list[Answer]) -> None:
            given: list[Entries] = []

            def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                given.append(entries(args, kwargs))

            def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                answer = Answer.of(output, given.pop(), args, kwargs)
                kept.append(answer.unread() if id(module) in self.unread else answer)

            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))

        try:
            for module, kept in recorded:
                record(module, kept)
            yield recorded
        finally:
            for handle in handles:
                handle.remove()


def _largest_unread(modules: Sequence[int], works_without: Any) -> frozenset[int]:
    """The modules that can go, by halves: whole groups of layers go at once."""
    if not modules:
        return frozenset()
    group = frozenset(modules)
    if works_without(group):
        return group
    if len(modules) == 1:
        return frozenset()
    half = len(modules) // 2
    return _largest_unread(modules[:half], works_without) | _largest_unread(modules[half:], works_without)


def _first_row(inputs: Mapping[str, Any]) -> dict[str, Any]:
    tokens = inputs.get("input_ids")
    if not isinstance(tokens, Tensor):
        return dict(inputs)
    rows = tokens.shape[0]
    return {
        key: value[:1] if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows else value
        for key, value in inputs.items()
    }


class _Watcher:
    """Watches one forward: the stack of calls under way, and what finished before the layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.n_reached = 0
        self.layer_output: Tensor | None = None
        # One list of finished calls for each call under way. When a call finishes before the layer,
        # what finished inside it is dropped: the outermost module answers for all of them.
        self._open: list[list[tuple[nn.Module, Answer]]] = [[]]
        self._given: list[Entries] = []
        self._called_later: set[int] = set()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is self.layer:
            self.n_reached += 1
        if self.n_reached:
            self._called_later.add(id(module))
        else:
            self._open.append([])
            self._given.append(entries(args, kwargs))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module is self.layer:
            self.layer_output = copied(output)
        elif not self.n_reached:
            self._open.pop()
            self._open[-1].append((module, Answer.of(output, self._given.pop(), args, kwargs)))

    def finished_for_good(self) -> list[tuple[nn.Module, list[Answer]]]:
        """Modules that ran before the layer only, each with what it gave in the order of its calls."""
        given: dict[int, tuple[nn.Module, list[Answer]]] = {}
        for calls in self._open:
            for module, answer in calls:
                given.setdefault(id(module), (module, []))[1].append(answer)
        return [entry for key, entry in given.items() if key not in self._called_later]
