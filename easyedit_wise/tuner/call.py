"""One call of the top model: what it was given, as far as the edits' routes depend on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from .words import words

# transformers 5.24 renamed ``past_key_values`` to ``cache``; state space models have ``cache_params``.
_CACHES = ("past_key_values", "cache", "cache_params")
# What tells kernels where the texts of a packed row begin.
_BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")


@dataclass(frozen=True)
class Call:
    """What one call of the top model was given.

    Attributes:
        shape: (B, T), its sequences and new tokens; None where that is not known.
        input_ids: shape (B, T), or None.
        attention_mask: (B, cached + T), or what ``generate`` makes of it for a static cache, (B, 1, T, cache size),
            one for each kind of attention; or None.
        position_ids: (B, T) or (1, T); with a picture's positions (3, B, T) or (4, B, T); or None.
        cache: the key-value cache as given, or None.
        borders: arguments that say where the texts of a packed row begin, by name.
        pad_ids: ids that fill up rows where nobody says which of their tokens are real; none for a single row or token.
        words: bool, (B, T), False where a token stands for a part of an image, see :mod:`.words`; None: all are words.
        decoder_only: False for an encoder-decoder model, whose encoder's tokens are no beginning of its decoder's.
    """

    shape: tuple[int, int] | None = None
    input_ids: Tensor | None = None
    attention_mask: Any = None
    position_ids: Any = None
    cache: Any = None
    borders: Mapping[str, Any] = field(default_factory=dict)
    pad_ids: frozenset[int] = frozenset()
    words: Tensor | None = None
    decoder_only: bool = True

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call ``model(*args, **kwargs)``."""
        given = dict(kwargs)
        if args:
            given.update(zip(_parameters(type(model).forward), args, strict=False))
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        tokens = embeds if ids is None else ids
        shape = (tokens.shape[0], tokens.shape[1]) if isinstance(tokens, Tensor) and tokens.dim() >= 2 else None
        return cls(
            shape=shape,
            input_ids=ids if isinstance(ids, Tensor) and ids.dim() == 2 else None,
            attention_mask=given.get("attention_mask"),
            position_ids=given.get("position_ids"),
            cache=given_cache(given),
            borders={name: given[name] for name in _BORDERS if given.get(name) is not None},
            pad_ids=_pad_ids(model) if shape and min(shape) > 1 else frozenset(),
            words=words(model, ids),
            decoder_only=is_decoder_only(model),
        )


@lru_cache(maxsize=16)
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of what a model's forward takes, in order; asked in every call with positional arguments."""
    return tuple(inspect.signature(forward).parameters)[1:]


def is_decoder_only(model: nn.Module) -> bool:
    """Whether what the model reads is the beginning of what it says."""
    return not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def _pad_ids(model: nn.Module) -> frozenset[int]:
    """What a batch without an attention_mask is filled up with: 0 (lm-evaluation-harness), or a special token."""
    found = {0}
    configs = [getattr(model, "config", None), getattr(model, "generation_config", None)]
    configs += [getattr(configs[0], "text_config", None)]
    for config in configs:
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(config, name, None)
            found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return frozenset(value for value in found if isinstance(value, int))


def given_cache(given: Mapping[str, Any]) -> Any:
    """The key-value cache among a call's arguments, or None."""
    return next((given[name] for name in _CACHES if given.get(name) is not None), None)


def returned_cache(output: Any) -> Any:
    """The key-value cache in what a model returned, a ``ModelOutput`` or a tuple (return_dict=False); or None."""
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    return next((cache for name in _CACHES if (cache := getattr(output, name, None)) is not None), None)


def is_countable(cache: Any) -> bool:
    """Whether :func:`cache_length` knows this kind of cache; a paged one, of many texts, has no length."""
    return cache is None or isinstance(cache, (tuple, list)) or hasattr(cache, "get_seq_length")


def cache_length(cache: Any) -> int:
    """Tokens that a cache holds: a transformers ``Cache`` or a legacy tuple; 1 for a state that counts none."""
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except ValueError:  # a state space model's
            return int(cache.has_previous_state())
    if isinstance(cache, (tuple, list)) and cache and cache[0] is not None:
        return int(cache[0][0].shape[-2])
    return 0
