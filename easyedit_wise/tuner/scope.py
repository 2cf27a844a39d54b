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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .asked import Asked, check_count, of_rows
from .call import Call, cache_length
from .padding import real_by_ending, real_tokens
from .roads import CHANGED, CHOSEN_ELSEWHERE, Generation, Held, refusal
from .route import Route


class _CallState(threading.local):
    """State of the call that this thread is in (two threads may serve one model)."""

    shape: tuple[int, int] | None = None
    token_mask: Tensor | None = None
    behind_cache: bool = False
    held: Held | None = None
    decided: dict[int, Route] | None = None
    generation: Generation | None = None
    named: Asked | None = None


class _Choice:
    """What calls of one scope's model ask for; None: the active adapters."""

    def __init__(self, scope: RoutingScope, asked: Asked | None) -> None:
        self.scope, self.asked = scope, asked


# What is asked for at this place of the program, the innermost last: a context variable, so that a task, or a thread
# that runs in a copy of the context, asks for the same.
_CHOICES: ContextVar[tuple[_Choice, ...]] = ContextVar("easyedit_wise_choices", default=())


class RoutingScope:
    """Shared by the WISE layers of one model; filled by hooks on the model (see ``hooks``)."""

    def __init__(self) -> None:
        self._call = _CallState()
        # Held by identity and weakly: a route lives exactly as long as the cache it belongs to.
        self._by_cache: weakref.WeakKeyDictionary[Any, Held] = weakref.WeakKeyDictionary()
        # Choices that are open around code of the user's, who may start threads there.
        self._open: set[_Choice] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingScope:
        # A copied model starts without calls under way.
        copied = type(self)()
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[type[RoutingScope], tuple[()]]:
        return (type(self), ())

    @contextmanager
    def generating(self, n_prompt: int | None = None, drafting: bool = False) -> Iterator[None]:
        """Everything called inside belongs to one generation: its first call decides the route, by the prompt.

        Args:
            n_prompt: tokens of each prompt, with padding; None: what the first call has.
            drafting: what it says is a draft for another model.
        """
        outer = self._call.generation
        self._call.generation = Generation(n_prompt, drafting)
        try:
            yield
        finally:
            self._call.generation = outer

    @contextmanager
    def asking(self, asked: Asked | None, around_code: bool = False) -> Iterator[None]:
        """Calls made inside are routed among the adapters that their rows ask for; None: the active ones.

        It holds for this thread and task, and for those that run in a copy of this context.

        Args:
            asked: the names.
            around_code: whether the user's own code runs inside, and not a call of the model alone: while it does, a
                call elsewhere that asks for nothing is refused (:meth:`begin`), since it may come from a thread that
                was started here.
        """
        choice = _Choice(self, asked)
        _CHOICES.set((*_CHOICES.get(), choice))
        if around_code and asked is not None:
            self._open.add(choice)
        try:
            yield
        finally:
            self._open.discard(choice)
            # Not by a token: a generator may be closed in another context than the one that it was begun in.
            _CHOICES.set(tuple(one for one in _CHOICES.get() if one is not choice))

    def _choice(self) -> _Choice | None:
        return next((choice for choice in reversed(_CHOICES.get()) if choice.scope is self), None)

    def asked(self) -> Asked | None:
        """The names that are asked for: in this very call, else around it; None: nothing, the active ones answer."""
        if self._call.named is not None:
            return self._call.named
        choice = self._choice()
        return None if choice is None else choice.asked

    def check_generation(self, n_rows: int | None, may_answer: Callable[[], bool]) -> None:
        """Before a generation: its prompts are as many as the names that are asked for, and it is known who asks.

        Raises:
            ValueError: another number, or names are asked for in another thread and none in this one.
        """
        self._call.named = None
        asked = self.asked()
        if asked is not None and n_rows is not None:
            check_count(asked, n_rows)
        if self._asks_elsewhere() and may_answer():
            raise ValueError(CHOSEN_ELSEWHERE)

    def _asks_elsewhere(self) -> bool:
        return bool(self._open) and self._call.named is None and self._choice() is None

    def asked_by(self, n_rows: int) -> tuple[str, ...] | None:
        """The adapter that each of a layer's rows asks for; None: the active ones.

        Raises:
            ValueError: another number of rows than of names.
        """
        asked = self.asked()
        # Beams and samples exist inside a generation only.
        return None if asked is None else of_rows(asked, n_rows, repeated=self._call.generation is not None)

    def begin(self, call: Call, may_answer: Callable[[], bool], named: Asked | None = None) -> None:
        """A call of the top model starts.

        Args:
            call: what it was given.
            may_answer: tells whether a memory could answer it; asked only where the call has no route to go on with.
            named: the adapters that this call itself asks for.

        Raises:
            ValueError: other than B names were asked for; or the edits would answer wrongly
                (:func:`~easyedit_wise.tuner.roads.refusal`). Nothing was computed.
        """
        state = self._call
        state.named = named
        asked, generation = self.asked(), state.generation
        if asked is not None and call.shape is not None:
            check_count(asked, call.shape[0], repeated=generation is not None)
        n_cached = cache_length(call.cache)
        held = generation.held if generation is not None else None
        if held is None and n_cached > 0:
            held = self._lookup(call.cache)
        if self._asks_elsewhere():
            reason: str | None = CHOSEN_ELSEWHERE
        else:
            reason = refusal(call, n_cached, held, generation, may_answer)
        if reason is not None and may_answer():
            raise ValueError(reason)
        state.shape, state.held, state.decided = call.shape, held, {}
        state.behind_cache = n_cached > 0 and call.decoder_only
        state.token_mask = _scored_tokens(call, n_cached, generation)

    def end(self, cache: Any) -> None:
        """The call is over; ``cache`` (if any) now holds its keys and values, so it holds its route, too."""
        state = self._call
        decided, held, generation = state.decided, state.held, state.generation
        state.decided = state.held = state.token_mask = state.shape = state.named = None
        state.behind_cache = False
        if decided:
            if held is None:
                held = Held(decided, cache_length(cache), generation is not None)
            else:  # what one call decided of some rows, and another of the rest
                held.routes.update(decided)
        if generation is not None and generation.held is None:
            generation.held = held
        if decided and held is not None and cache is not None:
            try:
                self._by_cache[cache] = held
            except TypeError:  # a legacy tuple cache cannot be referenced weakly: what follows it is refused
                return

    def _lookup(self, cache: Any) -> Held | None:
        try:
            return self._by_cache.get(cache)
        except TypeError:
            return None

    def held_route(self, layer: object, rows: int) -> Route | None:
        """The route that this call continues, for ``rows`` sequences, or None: decide."""
        held = self._call.held
        route = held.routes.get(id(layer)) if held else None
        return route.expand(rows) if route is not None else None

    def check_begins(self) -> None:
        """Before a layer decides: the call holds the text's beginning.

        Raises:
            ValueError: it goes on with a cache, whose route does not fit the call.
        """
        if self._call.behind_cache:
            raise ValueError(CHANGED)

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
        """Which of the layer's tokens count for its route, shape (rows, n_tokens), or None: all of them."""
        mask = self._call.token_mask
        if mask is None or mask.shape != (rows, n_tokens):
            return None
        return mask.to(device)


def _scored_tokens(call: Call, n_cached: int, generation: Generation | None) -> Tensor | None:
    """Which of a call's new tokens decide its route, shape (B, T): no padding, image or draft; None: all of them."""
    real = real_tokens(call.attention_mask, call.shape, n_cached)
    if call.words is not None:
        real = call.words if real is None else real.bool() & call.words
    if generation is None:
        if call.attention_mask is None and call.input_ids is not None and n_cached == 0:
            ending = real_by_ending(call.input_ids, call.pad_ids)
            if ending is not None:
                real = ending if real is None else real & ending
        return real
    # ``generate`` finds padding by itself. In assisted generation a draft stands behind the prompt in its first call.
    if generation.held is not None or not generation.n_prompt or call.shape is None or n_cached > 0:
        return real
    if call.shape[1] <= generation.n_prompt:
        return real
    prompt = torch.arange(call.shape[1]) < generation.n_prompt
    return prompt.expand(call.shape) if real is None else prompt.to(real.device) & real.bool()
