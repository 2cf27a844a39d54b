"""Scores of a language model's answers, before and after, or against what was wanted."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .asking import Query, TokenPrediction, nonempty, share_equal, teacher_forced


def perplexity(model: Any, tok: Any, queries: Sequence[Query], batch_size: int = 16) -> list[float]:
    """Perplexity of each query's answer given its prompt; raises as :func:`teacher_forced` does."""
    return [prediction.perplexity for prediction in teacher_forced(model, tok, queries, batch_size)]


def locality(before: Sequence[TokenPrediction], after: Sequence[TokenPrediction]) -> list[float]:
    """Share of positions at which the model still predicts the token that it predicted before.

    Whether that token was right does not matter. One value in [0, 1] a query. Raises a ValueError
    when there is nothing to compare, or the two lists come from different queries.
    """
    _require_pairs(before, after)
    shares = []
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if old.answer != new.answer:
            raise ValueError(f"The predictions at index {i} are of different answers.")
        shares.append(share_equal(old.predicted, new.predicted))
    return shares


def same_text(before: Sequence[str], after: Sequence[str]) -> list[bool]:
    """Whether each answer reads as before but for white space; raises as :func:`locality` does."""
    _require_pairs(before, after)
    return [" ".join(old.split()) == " ".join(new.split()) for old, new in zip(before, after, strict=True)]


def exact_at_start(answer_text: str, target: str) -> bool:
    """Whether the written answer begins with the target as a whole word.

    Case and white space are folded. "Lyon, in the east" begins with "Lyon"; "Lyonnais" does not.
    Raises a ValueError for an empty target.
    """
    text, wanted = _normalised(answer_text), _normalised(nonempty("target", target))
    return _stands_at(0, text, wanted)


def contains(answer: str, target: str) -> bool:
    """Whether the target occurs in the written answer; compares as :func:`exact_at_start` does."""
    text, wanted = _normalised(answer), _normalised(nonempty("target", target))
    return any(_stands_at(i, text, wanted) for i in range(len(text)))


def token_f1(answer: str, target: str) -> float:
    """F1 of the words that both texts have, in [0, 1]; raises a ValueError for a wordless target."""
    given, wanted = (Counter(re.findall(r"\w+", _normalised(text))) for text in (answer, target))
    if not wanted:
        raise ValueError(f"The target {target!r} has no word to compare with.")
    shared = (given & wanted).total()
    return 2 * shared / (given.total() + wanted.total())


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _stands_at(i: int, text: str, wanted: str) -> bool:
    """Whether ``wanted`` is found at text[i] and no word runs across either of its ends."""
    borders = (text[i - 1 : i] + wanted[0], wanted[-1] + text[i + len(wanted) :][:1])
    return text.startswith(wanted, i) and not any(len(b) == 2 and all(map(_in_word, b)) for b in borders)


def _in_word(char: str) -> bool:
    # Scripts of wide characters write words without spaces: there, every character ends one.
    return char.isalnum() and unicodedata.east_asian_width(char) not in "WF"


def _require_pairs(before: Sequence[object], after: Sequence[object]) -> None:
    if not before or len(before) != len(after):
        raise ValueError(f"Compare equally many answers, at least one: got {len(before)} and {len(after)}.")
