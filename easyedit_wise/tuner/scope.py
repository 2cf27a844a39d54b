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
from typing import Any

import torch
from torch import Tensor

from .asked import Asked, check_count, of_rows
from .route import Route

Held = dict[int, Route]


class _CallState(threading.local):
    """State of the call that this thread is in (two threads may serve one model)."""

    shape: tuple[int, int] | None = None
    token_mask: Tensor | None = None
    held: Held | None = None
    decided: Held | None = None
    generation: Held | None = None
    asked: Asked | None = None


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

    @contextmanager
    def asking(self, asked: Asked) -> Iterator[None]:
        """Calls made inside, by this thread, are routed among the adapters that their rows ask for."""
        outer = self._call.asked
        self._call.asked = asked
        try:
            yield
        finally:
            self._call.asked = outer

    def check_rows(self, n_rows: int) -> None:
        """Before a generation: its prompts are as many as the names that are asked for.

        Raises:
            ValueError: another number.
        """
        if self._call.asked is not None:
            check_count(self._call.asked, n_rows)

    def asked_by(self, n_rows: int) -> tuple[str, ...] | None:
        """The adapter that each of a layer's rows asks for; None: the active ones.

        Raises:
            ValueError: another number of rows than of names.
        """
        asked = self._call.asked
        # Beams and samples exist inside a generation only.
        return None if asked is None else of_rows(asked, n_rows, repeated=self._call.generation is not None)

    def begin(
        self, attention_mask: Any, cache: Any, shape: tuple[int, int] | None, words: Tensor | None = None
    ) -> None:
        """A call of the top model starts.

        Args:
            attention_mask: as given to the model: (B, cached + T), or what ``generate`` makes of it for a
                static cache, (B, 1, T, cache size), one for each kind of attention.
            cache: the key-value cache as given, or None.
            shape: (B, T), the sequences and new tokens of this call, if known.
            words: bool, (B, T), False where a token stands for a part of an image and says nothing about the route;
                None: all are words.

        Raises:
            ValueError: other than B names were asked for.
        """
        call = self._call
        if call.asked is not None and shape is not None:
            check_count(call.asked, shape[0], repeated=call.generation is not None)
        call.shape = shape
        n_cached = cache_length(cache)
        call.token_mask = real_tokens(attention_mask, shape, n_cached)
        if words is not None:
            call.token_mask = words if call.token_mask is None else call.token_mask.bool() & words
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
