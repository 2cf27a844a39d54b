"""Names that are not finished yet: of "Alexander Edler" each token that a word of many other names begins with, too.

The activation at a token knows nothing of what comes behind it. What a shard says at " Ed" of one name it says at " Ed"
of any, and these beginnings, rare as they are, are what tells an edit from other text most easily. So a shard is quiet
where a word of a name begins, and where a number goes on, and speaks at the rest and at the last token of the name,
where it is known whom the prompt is about. Not in the paper.
"""

from __future__ import annotations

import re
from typing import Any


def unfinished_tokens(tok: Any, text: str, subject: str | None) -> list[int]:
    """Positions in a text of the tokens of a subject that begin a word or a number that goes on, but for its last.

    Args:
        tok: the tokenizer.
        text: a prompt, or another context of an edit; the subject may stand in it more than once, in whatever case.
        subject: what the edit is about, or None.

    Returns:
        An empty list where there are none or they cannot be told: no subject, or a tokenizer without character offsets.
    """
    if not subject or not getattr(tok, "is_fast", False):
        return []
    spans = [found.span() for found in re.finditer(re.escape(subject), text, re.IGNORECASE)]
    if not spans:
        return []
    offsets = tok(text, return_offsets_mapping=True)["offset_mapping"]
    places: list[int] = []
    for start, end in spans:
        own = [place for place, (first, last) in enumerate(offsets) if first < end and last > start]
        places += [place for place in own[:-1] if _unfinished(text, *offsets[place])]
    return places


def _unfinished(text: str, first: int, last: int) -> bool:
    # The token's own characters, and one on either side: a tokenizer may count the space before a word as the token's.
    begins = not text[first].isalnum() or first == 0 or not text[first - 1].isalnum()
    return begins or (text[last - 1].isdigit() and text[last : last + 1].isdigit())
