"""What stands between a prompt and its target: the one place that puts a text behind another.

A model met "is Lyon" with a space, and "http://example.org", "$5" and "首都是北京" without one. An edit that is trained
on the other text teaches tokens that nobody's prompt leads to. The rule looks at the two texts alone, so it is the same
for every model, and what it cannot know is named with "space" or "none".
"""

from __future__ import annotations

import re
import unicodedata

AUTO, SPACE, NONE = "auto", "space", "none"
SEPARATORS = (AUTO, SPACE, NONE)

# Scripts whose words are written without spaces: Thai, Lao, Tibetan, Myanmar, Khmer, Tai, Han, Kana, Bopomofo and Yi,
# with their punctuation and the full-width forms. Hangul has spaces.
_UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u2e80-\u312f\u3190-\ua4cf\ua9e0-\ua9ff\uaa60-\uaadf"
    "\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff9f\uffe0-\uffef\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)
# Ends of a prompt that what follows is glued to. A mark that stands alone ("x =", "either /") is followed by a space.
_GLUES = re.compile(
    r"""(?: \\ | @                      # C:\   user@
        | \S/                           # http://   and/
        | [^\W_][-\u2010\u2011\u2013\u2014_&]  # well-   1914-   snake_   ?a=1&
        | [\w)\]"']= | [\w)\]}]\^       # x=   x^
        | \w:: | [\w)\]]-> | \w<        # std::   ptr->   vector<
        | (?:^|\s)\*\*                  # **bold**
        | (?:^|[\s(\[{=,])[rbfuRBFU]{1,2}["']  # f"
        )$""",
    re.VERBOSE,
)
_NAMES_WITH_DOTS = re.compile(r"(?:\w{2,}\.){2,}")
# How a name goes on behind a dot; a sentence begins with a capital or a digit.
_MEMBER = re.compile(r"_|[^\W\d]\w*(?:[(\[]|\.\w)")
_ENDS_A_CLAUSE = re.compile(r"""[.,;:!?…]+(?:$|[\s"'\u201d\u2019])""")
_PERCENT = re.compile(r"%(?:$|[\s.,;:!?)])")
_AFTER_WORDS = frozenset(".,!?;…%\"'")


def joined(prompt: str, target: str, separator: str = AUTO) -> str:
    """The text of a prompt and its target.

    Args:
        prompt: what stands before.
        target: what follows.
        separator: see :func:`gap`.
    """
    return prompt + gap(prompt, target, separator) + target


def gap(prompt: str, target: str, separator: str = AUTO) -> str:
    """What stands between a prompt and its target: one space or nothing.

    Args:
        prompt: what stands before.
        target: what follows.
        separator: "none": nothing. "space": a space, unless the prompt ends or the target begins with white space.
            "auto": likewise, and no space where the two are written without one: behind an opening bracket or quote, a
            currency sign, a mark glued to what is before it (``http://``, ``user@``, ``x=``), a dot of a dotted name
            or a call that the target goes on (``f(x).``), and in scripts without spaces; nor before punctuation that
            ends a clause, a closing bracket, or the quote that closes the prompt's.
    """
    if separator == NONE or not prompt or not target or prompt[-1].isspace() or target[0].isspace():
        return ""
    if separator == SPACE:
        return " "
    glued = _one_script(prompt, target) or _opens(prompt) or _goes_on(prompt, target) or _closes(prompt, target)
    return "" if glued else " "


def _one_script(prompt: str, target: str) -> bool:
    """Whether a script without spaces ends the prompt, or goes on in the target behind a number or a sign."""
    if _UNSPACED.match(prompt[-1]):
        return True
    if not _UNSPACED.match(target[0]):
        return False
    if unicodedata.category(target[0]) in ("Pe", "Pf", "Po"):
        return True
    letters = (char for char in reversed(prompt) if char.isalpha() or _UNSPACED.match(char))
    return bool(_UNSPACED.match(next(letters, " ")))


def _opens(prompt: str) -> bool:
    """Whether the prompt ends with a bracket, quote or currency sign that stands before what it belongs to."""
    last, before = prompt[-1], prompt[-2:-1]
    kind = unicodedata.category(last)
    if kind == "Ps":
        return True
    if kind == "Sc":
        if prompt[:-1].rstrip()[-1:].isdigit():  # "5 $"
            return False
        return not before or before.isspace() or prompt.count(last) % 2 == 1  # "$x$" is closed
    if kind != "Pi" and last not in "\"'`":
        return False
    if not before or before.isspace() or unicodedata.category(before) == "Ps":
        return True
    if before.isalnum():
        return False
    if kind == "Pi":  # German „Ja!“ ends with it
        return before not in _AFTER_WORDS and unicodedata.category(before) not in ("Pe", "Pf")
    return prompt.count(last) % 2 == 1  # ["a", "b","


def _goes_on(prompt: str, target: str) -> bool:
    """Whether the prompt ends in the middle of an address, a number, a word or a name in code."""
    if _GLUES.search(prompt) or (prompt[-1] == ":" and re.match(r"//\S", target)):
        return True
    if prompt[-1] != "." or not (target[0].islower() or _MEMBER.match(target)):
        return False
    last = prompt.split()[-1]
    return "://" in last or last == "www." or bool(_NAMES_WITH_DOTS.fullmatch(last)) or _ends_with_call(prompt[:-1])


def _ends_with_call(text: str) -> bool:
    """Whether a text ends with ``f(x)`` or ``a[0]``: brackets that close, opened right behind a name."""
    depth = 0
    for place in range(len(text) - 1, -1, -1):
        depth += (text[place] in ")]") - (text[place] in "([")
        if depth <= 0:
            return text[place] in "([" and re.match(r"\w", text[place - 1 : place]) is not None
    return False


def _closes(prompt: str, target: str) -> bool:
    """Whether the target begins with what ends something in the prompt."""
    first = target[0]
    if unicodedata.category(first) == "Pe" or first == "”" or _ENDS_A_CLAUSE.match(target):
        return True
    if _PERCENT.match(target):
        return prompt[-1].isdigit()
    return first == '"' and prompt.count('"') % 2 == 1 and _opens(prompt[: prompt.rindex('"') + 1])
