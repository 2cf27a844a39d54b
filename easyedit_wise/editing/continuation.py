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
def continued(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    n_tokens: int,
    pick: Callable[[Tensor], Tensor],
    limit: int | None = None,
) -> Tensor:
    """Texts with some more tokens. What the model's cache holds is not computed again, if it has one.

    Args:
        model: f_Theta, with its side memories off.
        ids: token ids, int64, shape (B, T), padded on the left.
        mask: 1 where a token is real, shape (B, T).
        n_tokens: how many more.
        pick: from the logits of the next token, shape (B, V), its id, shape (B, 1), on any device.
        limit: for how many tokens the model has positions, of which each text has no more; None: there is no end.

    Returns:
        Token ids, shape (B, T + n_tokens); fewer where the limit lets none of the texts have so many. What stands
        behind the limit in one of them, see :func:`with_room`, says nothing.
    """
    cache: Any = None
    if limit is not None:
        n_tokens = min(n_tokens, limit - int(mask.sum(dim=-1).min()))
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
        mask = with_room(mask, 1, limit)
    return ids


def with_room(mask: Tensor, n_tokens: int, limit: int | None) -> Tensor:
    """The mask, shape (B, T + n_tokens), of texts that went on: 0 behind the limit, so that no position is beyond it.

    Args:
        mask: 1 where a token is real, shape (B, T).
        n_tokens: how many more.
        limit: for how many tokens the model has positions; None: there is no end.
    """
    added = torch.ones_like(mask[:, :1]).expand(-1, n_tokens)
    if limit is not None:
        added = (mask.sum(dim=-1, keepdim=True) + added.cumsum(dim=-1) <= limit).to(mask)
    return torch.cat([mask, added], dim=-1)


def likeliest(logits: Tensor) -> Tensor:
    """The greedy choice, shape (B, 1), of logits of shape (B, V)."""
    return logits.argmax(dim=-1, keepdim=True)
