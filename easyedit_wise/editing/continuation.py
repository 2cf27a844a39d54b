"""How the unedited model goes on with a text, token by token."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def last_logits_only(model: nn.Module) -> dict[str, Any]:
    """The keyword that spares all logits but the last, where a model's forward has it.

    A long text's logits over a large vocabulary take hundreds of megabytes.
    """
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}


@torch.no_grad()
def continued(model: nn.Module, ids: Tensor, mask: Tensor, n_tokens: int, pick: Callable[[Tensor], Tensor]) -> Tensor:
    """Texts with some more tokens. What the model's cache holds is not computed again, if it has one.

    Args:
        model: f_Theta, with its side memories off.
        ids: token ids, int64, shape (B, T), padded on the left.
        mask: 1 where a token is real, shape (B, T).
        n_tokens: how many more.
        pick: from the logits of the next token, shape (B, V), its id, shape (B, 1), on any device.

    Returns:
        Token ids, shape (B, T + n_tokens).
    """
    cache: Any = None
    # Always said where it can be: a model that reads images would go on from the positions of the last one it saw.
    placed = not bool(mask.all()) or "position_ids" in inspect.signature(type(model).forward).parameters
    for _ in range(n_tokens):
        new = ids if cache is None else ids[:, -1:]
        options: dict[str, Any] = last_logits_only(model)
        if placed:
            options["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        out = model(input_ids=new, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
        cache = getattr(out, "past_key_values", None)
        ids = torch.cat([ids, pick(out.logits[:, -1]).to(ids)], dim=-1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=-1)
    return ids


def likeliest(logits: Tensor) -> Tensor:
    """The greedy choice, shape (B, 1), of logits of shape (B, V)."""
    return logits.argmax(dim=-1, keepdim=True)
