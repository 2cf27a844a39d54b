"""Roads on which a call reaches the edits, and those on which they would answer wrongly.

A route is a fact about one whole text: decided where the text is read, one for each row, and kept by the cache that
the text's tokens fill. A call that holds a part of a text, several texts in a row, or a text whose beginning somebody
else read, has no such route. It is refused before a token is answered, with what to do instead (docs/serving.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .call import Call, is_countable
from .packed_rows import packed_by
from .route import Route

_OFF = "or switch the edits off for it: with edits_disabled(model)"
_WHOLE = f"Pass the whole text, all turns of a conversation and a system prompt included, without a cache, {_OFF}."

CONTINUOUS = (
    "continuous batching (generate_batch, a paged cache) runs all requests as one row, but edits are routed by row: "
    "one user's edit would answer another's question. Use generate(...) with a padded batch and its attention_mask, "
    f"{_OFF}."
)
CHOSEN_ELSEWHERE = (
    "edits_chosen(...) is open in another thread or task, and this one asks for no edits, so that nobody knows whether "
    "it means those: a new thread does not inherit them. Name them in the call, which any thread can: "
    "generate(..., adapter_names=[...]); or open edits_chosen(...) in this thread, edits_chosen(model, None) for the "
    "active ones; or start it by contextvars.copy_context().run."
)
CHANGED = (
    "the tokens in this cache were routed among other edits, for other rows, or not at all, so that this call cannot "
    f"go on with their route. {_WHOLE}"
)


@dataclass
class Held:
    """The routes of one text.

    Attributes:
        routes: each layer's, by the layer's identity.
        n_tokens: what a cache holds once the tokens that decided are in it.
        generated: whether ``generate`` read the text.
    """

    routes: dict[int, Route]
    n_tokens: int
    generated: bool


@dataclass
class Generation:
    """A ``generate`` under way.

    Attributes:
        n_prompt: tokens of each of its prompts, with padding; None where that is not known.
        drafting: it drafts for another generation, whose model has the last word: whatever it says is right.
        held: the routes of its prompts, once its first call has decided them.
    """

    n_prompt: int | None = None
    drafting: bool = False
    held: Held | None = None


def refusal(
    call: Call, n_cached: int, held: Held | None, generation: Generation | None, may_answer: Callable[[], bool]
) -> str | None:
    """Why this call would be answered wrongly, and what to do instead; None: it has a route, or can decide one.

    A call behind a cache *goes on* with the cache's route if it has one new token, as decoding has. With several new
    tokens it is a new turn, about which the route says nothing; so is a generation's first call behind a cache that no
    generation filled, such as that of a system prompt. (One token of a prompt after the other cannot be told from
    decoding.)

    Args:
        call: what it was given.
        n_cached: tokens in its cache.
        held: the route that it would go on with.
        generation: the generation that it belongs to.
        may_answer: tells whether a memory could answer it.
    """
    if not call.decoder_only or (generation is not None and (generation.held is not None or generation.drafting)):
        return None
    if not is_countable(call.cache):
        return CONTINUOUS
    if n_cached > 0:
        return _behind_a_cache(call, n_cached, held, generation)
    # Positions and masks are looked at only where a memory could answer: an accelerator is waited for.
    packed = packed_by(call) if may_answer() else None
    if packed is not None:
        return (
            f"this call packs several texts into one row ({packed}), but edits are routed by row: one text's edit "
            f"would answer another's. Give each text a row of its own, with padding and its attention_mask, {_OFF}."
        )
    n_prompt = None if generation is None else generation.n_prompt
    if n_prompt is not None and call.shape is not None and call.shape[1] < n_prompt:
        return (
            f"the first call of this generation has {call.shape[1]} of the prompt's {n_prompt} tokens, and would "
            f"decide for all of them which edit answers. Leave prefill_chunk_size out, {_OFF}."
        )
    return None


def _behind_a_cache(call: Call, n_cached: int, held: Held | None, generation: Generation | None) -> str | None:
    if held is None:
        return (
            f"the cache of this call holds {n_cached} tokens that these edits did not route: it is a copy, or was "
            f"filled by another model, while the edits were off, or before they were made. {_WHOLE}"
        )
    n_new = 1 if call.shape is None else call.shape[1]
    if n_new > 1 or (generation is not None and not held.generated):
        return (
            f"this call has {n_new} new token{'s' * (n_new > 1)} behind a cache of {n_cached}: a new turn, which would "
            f"be answered by the edit that the text before it asked for, or by none. {_WHOLE}"
        )
    if n_cached < held.n_tokens:
        return (
            f"the cache of this call was cut back to {n_cached} tokens, but a text of {held.n_tokens} decided which "
            f"edit answers. {_WHOLE}"
        )
    return None
