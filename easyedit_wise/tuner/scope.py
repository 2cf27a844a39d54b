"""The routing scope: what one call of the top model tells the layer inside it.

The layer sees activations only. Which tokens are padding, and whether a call
continues a generation whose prompt was routed before, is known at the top. The
route is decided at prefill and *held*: by the cache that the call fills, so decoding
with that cache keeps it, and inside ``generate`` also without a cache. Two
generations that take turns keep apart because each has its own cache.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..routing import MAIN_MEMORY


@dataclass
class Route:
    """Where each sequence of a call went.

    Attributes:
        choice: shape (B,), index into ``memories`` or -1 for the main memory.
        scores: shape (B, M), Delta_act of each memory, exact or estimated from its sketch.
        epsilon: shape (M,), each memory's threshold.
        memories: M names, ``adapter/index``.
        decided: shape (B,), False where a sequence had no real token yet, so that its turn is still to
            come (a prompt prefilled in chunks starts with padding only); None: all are decided.
        exact: bool, shape (B, M), False where a score is an estimate; None: all are exact. A chosen memory's
            score is exact.
        rows: for each memory that answers at least one sequence, the sequences' indices on ``choice``'s
            device; None: all of them.
    """

    choice: Tensor
    scores: Tensor
    epsilon: Tensor
    memories: tuple[str, ...]
    decided: Tensor | None = None
    exact: Tensor | None = None
    rows: dict[int, Tensor | None] = field(init=False, default_factory=dict)
    _expanded: dict[int, Route] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # One synchronisation here, at prefill, spares one in every decode step.
        choice = self.choice.tolist()
        for index in sorted(set(choice) - {MAIN_MEMORY}):
            rows = [row for row, chosen in enumerate(choice) if chosen == index]
            self.rows[index] = None if len(rows) == len(choice) else torch.tensor(rows, device=self.choice.device)
        if self.decided is not None and bool(self.decided.all()):
            self.decided = None
        if self.exact is not None and bool(self.exact.all()):
            self.exact = None

    @property
    def active(self) -> tuple[int, ...]:
        """Indices of the memories that at least one sequence goes to."""
        return tuple(self.rows)

    def expand(self, rows: int) -> Route | None:
        """The same route for ``rows`` sequences: as it is, or each repeated for its beams.

        Returns:
            None when ``rows`` is no multiple of the sequences that were routed.
        """
        routed = self.choice.shape[0]
        if rows == routed:
            return self
        if routed == 0 or rows % routed:
            return None
        if rows not in self._expanded:  # kept, since every decode step asks
            repeat = rows // routed
            self._expanded[rows] = Route(
                self.choice.repeat_interleave(repeat),
                self.scores.repeat_interleave(repeat, dim=0),
                self.epsilon,
                self.memories,
                None if self.decided is None else self.decided.repeat_interleave(repeat),
                None if self.exact is None else self.exact.repeat_interleave(repeat, dim=0),
            )
        return self._expanded[rows]

    def describe(self, row: int = 0) -> dict[str, Any]:
        """The route of one sequence in plain values: memory, score, epsilon, and whether the score is exact."""
        choice = int(self.choice[row])
        best = choice if choice != MAIN_MEMORY else (int(self.scores[row].argmax()) if self.memories else None)
        return {
            "memory": self.memories[choice] if choice != MAIN_MEMORY else "main",
            "score": None if best is None else float(self.scores[row, best]),
            "epsilon": None if best is None else float(self.epsilon[best]),
            "exact": best is None or self.exact is None or bool(self.exact[row, best]),
        }


Held = dict[int, Route]


class _CallState(threading.local):
    """State of the call that this thread is in (two threads may serve one model)."""

    shape: tuple[int, int] | None = None
    token_mask: Tensor | None = None
    held: Held | None = None
    decided: Held | None = None
    generation: Held | None = None


class RoutingScope:
    """Shared by the WISE layers of one model; filled by hooks on the model (see ``hooks``)."""

    def __init__(self) -> None:
        self._call = _CallState()
        # Held by identity and weakly: a route lives exactly as long as the cache it belongs to.
        self._by_cache: weakref.WeakKeyDictionary[Any, Held] = weakref.WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingScope:
        # A copied model starts without calls under way.
        copied = type(self)()
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[type[RoutingScope], tuple[()]]:
        return (type(self), ())

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Everything called inside belongs to one generation: its first call decides the route."""
        outer = self._call.generation
        self._call.generation = {}
        try:
            yield
        finally:
            self._call.generation = outer

    def begin(self, attention_mask: Any, cache: Any, shape: tuple[int, int] | None) -> None:
        """A call of the top model starts.

        Args:
            attention_mask: as given to the model: (B, cached + T), or what ``generate`` makes of it for a
                static cache, (B, 1, T, cache size), one for each kind of attention.
            cache: the key-value cache as given, or None.
            shape: (B, T), the sequences and new tokens of this call, if known.
        """
        call = self._call
        call.shape = shape
        n_cached = cache_length(cache)
        call.token_mask = real_tokens(attention_mask, shape, n_cached)
        call.decided = {}
        call.held = None
        if call.generation:
            call.held = call.generation
        elif n_cached > 0:
            call.held = self._lookup(cache)

    def end(self, cache: Any) -> None:
        """The call is over; ``cache`` (if any) now holds its keys and values, so it holds its route, too."""
        call = self._call
        decided = call.decided
        call.decided = call.held = call.token_mask = call.shape = None
        if not decided:
            return
        if call.generation is not None:
            call.generation.update(decided)
        if cache is not None:
            try:
                self._by_cache[cache] = decided
            except TypeError:  # a legacy tuple cache cannot be referenced weakly: decided anew at each step
                return

    def _lookup(self, cache: Any) -> Held | None:
        try:
            return self._by_cache.get(cache)
        except TypeError:
            return None

    def held_route(self, layer: object, rows: int) -> Route | None:
        """The route that this call continues, for ``rows`` sequences, or None: decide."""
        held = self._call.held
        route = held.get(id(layer)) if held else None
        return route.expand(rows) if route is not None else None

    def hold(self, layer: object, route: Route) -> None:
        """Keep a decision for the calls that continue this one."""
        if self._call.decided is not None:
            self._call.decided[id(layer)] = route

    def as_sequences(self, values: Tensor) -> Tensor:
        """(B, T, d) of what a layer was given; tokens that a model flattened (OPT) are put back in rows.

        Outside a call of the model, each row of a flat input is a sequence of one token.
        """
        if values.dim() != 2:
            return values
        shape = self._call.shape
        if shape is not None and shape[0] * shape[1] == values.shape[0]:
            return values.reshape(*shape, -1)
        return values.unsqueeze(1)

    def token_mask(self, rows: int, n_tokens: int, device: torch.device) -> Tensor | None:
        """Which of the layer's tokens are real, shape (rows, n_tokens), or None: all of them."""
        mask = self._call.token_mask
        if mask is None or mask.shape != (rows, n_tokens):
            return None
        return mask.to(device)


def real_tokens(attention_mask: Any, shape: tuple[int, int] | None, n_cached: int) -> Tensor | None:
    """Which of a call's (B, T) new tokens are not padding, or None where the mask does not tell.

    Args:
        attention_mask: (B, cached + T); or (B, 1, T, keys), in which a real token, and no other, attends
            to itself; or a mapping with such a mask for each kind of attention.
        shape: (B, T).
        n_cached: tokens in the cache before this call.
    """
    if isinstance(attention_mask, Mapping):
        attention_mask = next((mask for mask in attention_mask.values() if isinstance(mask, Tensor)), None)
    if not isinstance(attention_mask, Tensor):
        return None
    if attention_mask.dim() == 2:
        return attention_mask[:, -shape[1] :] if shape else attention_mask
    if attention_mask.dim() != 4 or shape is None or attention_mask.shape[-1] < n_cached + shape[1]:
        return None
    own = attention_mask[:, 0, :, n_cached : n_cached + shape[1]].diagonal(dim1=-2, dim2=-1)
    # Additive masks have 0 where attention is allowed.
    return own if own.dtype == torch.bool else own == 0


def cache_length(cache: Any) -> int:
    """Tokens that a key-value cache holds: a transformers ``Cache`` or a legacy tuple."""
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    if isinstance(cache, (tuple, list)) and cache and cache[0] is not None:
        return int(cache[0][0].shape[-2])
    return 0
