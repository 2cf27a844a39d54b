"""Which tokens of a call are real: told by the attention_mask, or by how the rows end."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor


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
    return allowed(attention_mask[:, 0, :, n_cached : n_cached + shape[1]]).diagonal(dim1=-2, dim2=-1)


def allowed(mask: Tensor) -> Tensor:
    """Where attention is allowed, bool; additive masks have 0 there."""
    return mask if mask.dtype == torch.bool else mask == 0


def real_by_ending(input_ids: Tensor, pad_ids: Collection[int]) -> Tensor | None:
    """Which tokens of a batch without an attention_mask are not padding on the right, shape (B, T).

    Rows of one length are what a batch needs, so that some of several rows were filled up, on the right where there is
    no mask: a causal model's real tokens do not see it there, and lm-evaluation-harness scores that way, with id 0.
    To leave the filling out is right for all of them, while a score over it would depend on the batch. A row's first
    token is real. What this takes for padding and is not, a text's own end-of-text token in a batch, is merely
    not what recognises the text.

    A single row needs no filling: None, as it is without pad_ids.

    Args:
        input_ids: shape (B, T).
        pad_ids: what rows may be filled up with; a row's end counts if it is one of these, repeated.
    """
    if input_ids.shape[0] < 2 or not pad_ids:
        return None
    real = torch.ones_like(input_ids, dtype=torch.bool)
    for pad in pad_ids:
        ending = (input_ids == pad).flip(-1).to(torch.int32).cumprod(dim=-1).flip(-1).bool()
        real = real & ~ending
    real[:, 0] = True
    return real
