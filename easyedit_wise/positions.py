"""How many tokens a model has positions for.

A model that looks positions up in a table (GPT-2, OPT, GPT-J) fails behind its end, with an index out of range. One
that computes them (rotary embeddings, ALiBi) goes on, whatever ``max_position_embeddings`` says it was trained for, and
so does a sliding window: these are no limit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

# wpe, embed_positions, positions_embed, pos_encoding; but not what is relative, nor numbers of positions.
_TABLE = re.compile(r"(^|[._])(wpe|pos)(?!\w*_ids)")
_RELATIVE = re.compile(r"(^|[._])rel")


def position_limit(model: Any) -> int | None:
    """The longest text that a model can read, in tokens; None: there is no end.

    Args:
        model: a causal language model, in a wrapper or not. Of one that sees or hears, its language model counts.
    """
    return min((rows for module, name in _text_modules(model) for rows in _tables(module, name)), default=None)


def shortened(text: str, excess: Callable[[str], int]) -> str:
    """A text without its first words, as many as it takes; without its first characters where it has no words.

    Args:
        text: what is to be cut.
        excess: how many tokens a text is too long.

    Returns:
        The text itself where it is not too long; an empty one where even that is.
    """
    while text and (over := excess(text)) > 0:
        left = text[over:]  # a token has a character or more, so this is hardly ever too much
        behind = left.partition(" ")[2]
        text = behind if behind.strip() else left
    return text


def _tables(module: nn.Module, name: str) -> Iterator[int]:
    """For how many tokens each table of a module's own has positions."""
    if isinstance(module, nn.Embedding) and _is_table(name):
        yield module.num_embeddings - int(getattr(module, "offset", 0))
    for key, buffer in module.named_buffers(recurse=False):
        if buffer.dim() == 2 and _is_table(key):
            yield len(buffer)
    biases = getattr(module, "max_seq_length", None)
    if isinstance(biases, int):  # MPT's ALiBi biases are made for so many tokens
        yield biases


def _is_table(name: str) -> bool:
    own = ".".join(name.split(".")[-2:])  # a wrapped one is called wpe.base_layer
    return _TABLE.search(own) is not None and _RELATIVE.search(own) is None


def _text_modules(model: Any) -> Iterator[tuple[nn.Module, str]]:
    """The modules that read text, with their names: a vision tower's positions are those of an image's patches."""
    configs = ((module, getattr(module, "config", None)) for module in model.modules())
    root, config = next(((module, one) for module, one in configs if hasattr(one, "get_text_config")), (model, None))
    kinds = None if config is None else {type(config), type(config.get_text_config(decoder=True))}
    yield from _inside(root, "", kinds)


def _inside(module: nn.Module, name: str, kinds: set[type] | None) -> Iterator[tuple[nn.Module, str]]:
    config = getattr(module, "config", None)
    if kinds is not None and hasattr(config, "get_text_config") and type(config) not in kinds:
        return
    yield module, name
    for key, child in module.named_children():
        yield from _inside(child, f"{name}.{key}" if name else key, kinds)
