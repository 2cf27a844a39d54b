"""Other forms of an edit's prompt, made from its text alone.

A rephrasing keeps the subject and changes the rest; a near-by prompt keeps the rest and changes the subject. Neither
is known when an edit is made, so both are imitated: words beside the subject are left out, and other subjects are put
in its place. Not in the paper, which puts random prefixes before the prompt and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch

from .contexts import behind

# A long target gives some of its tokens to each text.
_SCRAMBLED_TOKENS = 24


def words_left_out(prompt: str, subject: str | None, share: float, generator: torch.Generator) -> str:
    """The prompt with some of the words beside its subject left out.

    Args:
        prompt: x_e.
        subject: stays whole, with the punctuation that is glued to it; None: every word may go, but not all.
            White space that the prompt ends with stays, since the target stands behind it.
        share: the chance of each word to go, in [0, 1].
        generator: the only source of randomness, on the CPU.
    """
    before, named, after = prompt.partition(subject) if subject else (prompt, "", "")
    glued = after.split(maxsplit=1)[0] if after[:1].strip() else ""  # "'s", "?" and the like
    left, right = before.split(), after[len(glued) :].split()
    stays = (torch.rand(len(left) + len(right), generator=generator) >= share).tolist()
    kept_left = [word for word, stay in zip(left, stays[: len(left)], strict=True) if stay]
    kept_right = [word for word, stay in zip(right, stays[len(left) :], strict=True) if stay]
    text = " ".join([*kept_left, *([named + glued] if named else []), *kept_right])
    return text + white_end(prompt) if text else prompt


def white_end(prompt: str) -> str:
    """The white space that a text ends with."""
    return prompt[len(prompt.rstrip()) :]


def about_others(prompt: str, subject: str, others: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    """The same question about other subjects: what the edit must leave alone.

    Args:
        prompt: x_e.
        subject: occurs in it.
        others: names to choose from, each at most once; the subject itself is not chosen.
        count: how many.
        generator: the only source of randomness, on the CPU.
    """
    if not count:
        return []  # without a draw: settings that ask for none keep their random numbers
    names = [name for name in others if name.casefold() != subject.casefold()]
    picked = torch.randperm(len(names), generator=generator)[:count].tolist()
    return [prompt.replace(subject, names[index]) for index in picked]


def scrambled(target: str, others: Sequence[str], count: int, tok: Any, generator: torch.Generator) -> list[str]:
    """Some of the target's tokens in another order, each behind one of a prompt: the edit must not hang on them.

    They are said loudest of all: a memory that answers with a year would be active wherever a digit stands.

    Args:
        target: y_e as it stands behind its prompt.
        others: prompts to mix it with; one is drawn for each text.
        count: how many texts.
        tok: the tokenizer.
        generator: the only source of randomness, on the CPU.
    """
    own = tok(target, add_special_tokens=False)["input_ids"] if count else []
    texts = []
    for _ in range(count if own else 0):
        mine = [own[index] for index in torch.randperm(len(own), generator=generator)[:_SCRAMBLED_TOKENS].tolist()]
        drawn = others[int(torch.randint(len(others), (1,), generator=generator))]
        other = tok(drawn, add_special_tokens=False)["input_ids"]
        start = int(torch.randint(max(1, len(other) - len(mine) + 1), (1,), generator=generator))
        pairs = zip_longest(other[start : start + len(mine)], mine)
        text = str(tok.decode([token for pair in pairs for token in pair if token is not None]))
        texts.append(text)
    return texts


def varied_contexts(
    prompt: str,
    subject: str | None,
    prefixes: Sequence[str],
    generator: torch.Generator,
    share: float = 0.5,
    excess: Callable[[str], int] | None = None,
) -> list[str]:
    """One context for each prefix, of three kinds that take turns.

    The prompt behind a prefix, as in the paper; the prompt with words left out; the subject alone behind a prefix, so
    that the answer follows from whom or what a question is about. Where the subject is not known, the third is the
    prompt with words left out behind a prefix.

    Of a prefix as much of the beginning is left out as a context is too long, by ``excess`` tokens; None: nothing is.
    """
    contexts = []
    for index, prefix in enumerate(prefixes):
        kind = index % 3
        text = prompt if kind == 0 else words_left_out(prompt, subject, share, generator)
        if kind == 2 and subject:
            text = subject + white_end(prompt)
        contexts.append(text if kind == 1 else behind(prefix, text, excess=excess))
    return contexts
