"""EasyEdit's batch of one edit, in which padding counts (``padding_counts``).

EasyEdit pads the contexts and the irrelevant prompt on the left to one length T, lets the model number positions
from the padding on, takes the mean of the scores over all T positions, and finds the target by lengths: with P the
longest prompt's length, the last T - P tokens of every context are supervised. Where the irrelevant prompt is the
longest text, that is more than the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .requests import TokenBatch, left_padded


def padded_contexts(
    tok: Any, prompts: Sequence[str], target: str, irrelevant: str | None, device: torch.device
) -> TokenBatch:
    """The contexts of one edit as rows of EasyEdit's batch.

    Args:
        tok: the tokenizer.
        prompts: the contexts, the plain prompt first.
        target: what follows each of them, behind a space.
        irrelevant: the irrelevant prompt, whose length counts; None: there is none.
        device: where the tensors go.

    Raises:
        ValueError: the longest context with its target is no longer than the longest one without.
    """
    alone = max(len(tokens) for tokens in _encoded(tok, prompts))
    rows = _encoded(tok, [f"{prompt} {target}" for prompt in prompts])
    input_ids, attention_mask = left_padded(tok, rows, device, _length(tok, rows, irrelevant))
    if input_ids.shape[1] <= alone:
        raise ValueError(f"the target {target!r} tokenises to nothing after {prompts[0]!r}: choose one with text.")
    behind = torch.arange(input_ids.shape[1], device=device) >= alone
    supervised = behind & (input_ids != tok.pad_token_id)
    return TokenBatch(input_ids, attention_mask, torch.ones_like(supervised), supervised, pads_count=True)


def padded_irrelevant(
    tok: Any, prompts: Sequence[str], target: str, irrelevant: str, device: torch.device
) -> TokenBatch:
    """The irrelevant prompt as the last row of the batch that :func:`padded_contexts` makes."""
    rows = _encoded(tok, [f"{prompt} {target}" for prompt in prompts])
    (own,) = _encoded(tok, [irrelevant])
    input_ids, attention_mask = left_padded(tok, [own], device, _length(tok, rows, irrelevant))
    every = torch.ones_like(attention_mask, dtype=torch.bool)
    return TokenBatch(input_ids, attention_mask, every, torch.zeros_like(every), pads_count=True)


def _encoded(tok: Any, texts: Sequence[str]) -> list[list[int]]:
    return [list(tok(text)["input_ids"]) for text in texts]


def _length(tok: Any, rows: Sequence[Sequence[int]], irrelevant: str | None) -> int:
    others = [] if irrelevant is None else _encoded(tok, [irrelevant])
    return max(map(len, [*rows, *others]))
