"""Where an answer ends.

An edit that is trained on its target alone says it, and its memory goes on speaking: "1751" is followed by more digits,
"SC Braga B" by "raga", and a name by the same name again. So the token behind the target is trained, too: the one that
the model itself would put there, of those that end the target's last word. Not in the paper.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Of so many likeliest tokens one is taken.
_CANDIDATES = 64


def ending(logits: Tensor, tok: Any, tokens: Sequence[int], n_prompt: int) -> int | None:
    """The likeliest token that may follow a target: it begins with neither letter nor digit, and not the target again.

    Args:
        logits: of the model behind prompt and target, shape (V,).
        tok: its tokenizer.
        tokens: the prompt's and the target's.
        n_prompt: how many are the prompt's.

    Returns:
        A token id; None where none of the likeliest does.
    """
    target = list(tokens[n_prompt:])
    said = tok.decode(target, skip_special_tokens=True)
    for candidate in logits.topk(min(_CANDIDATES, len(logits))).indices.tolist():
        # Decoded together: alone, some tokenizers leave out the space that a token begins with.
        added = tok.decode([*target, candidate], skip_special_tokens=True)[len(said) :]
        if candidate != target[0] and "\ufffd" not in added and not _goes_on(added):
            return int(candidate)
    return None


def _goes_on(added: str) -> bool:
    """Whether a text goes on with the word before it: with a letter, a digit, or a mark such as a vowel sign."""
    return added[:1].isalnum() or (added != "" and unicodedata.category(added[0]).startswith("M"))


@torch.no_grad()
def endings(
    model: Any, tok: Any, inputs: dict[str, Any], pairs: Sequence[tuple[Sequence[int], int]]
) -> list[int | None]:
    """The :func:`ending` of each pair of prompt and target.

    Args:
        model: f_Theta, with its side memories off.
        tok: its tokenizer.
        inputs: keyword arguments of its forward: the pairs, padded on the left.
        pairs: tokens, and how many are the prompt's.
    """
    logits = model(**inputs).logits[:, -1].float()
    return [ending(row, tok, tokens, n_prompt) for row, (tokens, n_prompt) in zip(logits, pairs, strict=True)]
