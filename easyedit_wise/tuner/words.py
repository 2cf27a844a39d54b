"""Which tokens of a query are words, and which stand for an image, a video or a sound.

A memory is trained on texts and its threshold set among texts. At an image's tokens it was never asked, and there are
hundreds of them before a question of ten words: their loudest would decide most routes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# What transformers' configurations call the placeholder that a processor repeats, and the marks around it.
_MEDIA = (
    *("image_token_id", "video_token_id", "audio_token_id"),
    *("image_token_index", "video_token_index", "audio_token_index"),
    *("vision_start_token_id", "vision_end_token_id", "audio_start_token_id", "audio_end_token_id"),
    *("boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_id"),
)


def media_tokens(model: nn.Module) -> tuple[int, ...]:
    """Ids of the tokens that stand for an image, a video or a sound, or mark where one begins and ends."""
    config = getattr(model, "config", None)
    ids = {getattr(config, name, None) for name in _MEDIA}
    return tuple(sorted(one for one in ids if isinstance(one, int)))


def words(model: nn.Module, input_ids: Any) -> Tensor | None:
    """Which tokens are words, bool, shape (B, T); None: all of them.

    Args:
        model: the one that is called; its configuration tells.
        input_ids: shape (B, T), or None, as where embeddings are given: then it cannot be told.
    """
    # What is decoded token by token follows a route, and is a word.
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.shape[1] == 1:
        return None
    ids = media_tokens(model)
    return ~torch.isin(input_ids, torch.tensor(ids, device=input_ids.device)) if ids else None
