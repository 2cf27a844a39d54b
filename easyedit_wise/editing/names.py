"""Where the name that an edit is about stands in a text, and where it is not finished yet.

The activation at a token knows nothing of what comes behind it. What a shard says at " Ed" of "Alexander Edler" it says
at " Ed" of any name, and these beginnings, rare as they are, are what tells an edit from other text most easily. So a
shard is quiet where a word of a name begins, and where a number goes on, and speaks at the rest and at the last token
of the name, where it is known whom the prompt is about. Nor does it learn to speak at the words beside the name: of
"When did Tremont Group come into being?" it would be " come", which other questions have. Not in the paper.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class NameTokens:
    """Positions of a name's tokens in a text, in order.

    Attributes:
        own: all of them; empty where there are none or they cannot be told.
        unfinished: those that begin a word, or a number that goes on, but for the last one of each occurrence.
    """

    own: list[int] = field(default_factory=list)
    unfinished: list[int] = field(default_factory=list)


def name_tokens(tok: Any, text: str, subject: str | None) -> NameTokens:
    """The tokens of a subject in a text.

    Args:
        tok: the tokenizer. Without character offsets nothing can be told.
        text: a prompt, or another context of an edit; the subject may stand in it more than once, in whatever case.
        subject: what the edit is about, or None.
    """
    if not subject or not getattr(tok, "is_fast", False):
        return NameTokens()
    spans = [found.span() for found in re.finditer(re.escape(subject), text, re.IGNORECASE)]
    if not spans:
        return NameTokens()
    offsets = tok(text, return_offsets_mapping=True)["offset_mapping"]
    found = NameTokens()
    for start, end in spans:
        own = [place for place, (first, last) in enumerate(offsets) if first < end and last > start]
        found.own.extend(own)
        found.unfinished.extend(place for place in own[:-1] if _unfinished(text, *offsets[place]))
    return found


def names_known(tok: Any, subjects: Iterable[str | None]) -> bool:
    """Whether :func:`name_tokens` finds each of these subjects where it stands."""
    return bool(getattr(tok, "is_fast", False)) and all(subjects)


def _unfinished(text: str, first: int, last: int) -> bool:
    # The token's own characters, and one on either side: a tokenizer may count the space before a word as the token's.
    begins = not text[first].isalnum() or first == 0 or not text[first - 1].isalnum()
    return begins or (text[last - 1].isdigit() and text[last : last + 1].isdigit())
