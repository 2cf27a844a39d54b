"""Prefix augmentation: the edit in several contexts (WISE, Section 3.1).

"We augment x_e by generating 10 random token sequences of length 10 using f_Theta."
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..positions import shortened
from ..tuner.devices import computing_device
from .continuation import continued

FIXED_WORDS = ("I", "You", "Because", "Yes", "Q: ")
FIXED_LENGTHS = (5, 10)


def start_token(tok: Any) -> int:
    """What a text that is sampled from nothing begins with."""
    return next((i for i in (tok.bos_token_id, tok.eos_token_id) if i is not None), 0)


def without_special(logits: Tensor, tok: Any) -> Tensor:
    """The logits of the next token, shape (B, V), on the CPU in fp32; special tokens have no chance."""
    logits = logits.float().cpu()
    special = sorted(set(getattr(tok, "all_special_ids", None) or []))
    if special and len(special) < logits.shape[-1]:
        logits[:, special] = -torch.inf
    return logits


@torch.no_grad()
def generate_prefixes(
    model: nn.Module,
    tok: Any,
    n_contexts: int,
    length: int,
    generator: torch.Generator,
    top_k: int = 50,
    limit: int | None = None,
) -> list[str]:
    """Texts that the model itself samples from nothing, to be put before a prompt.

    Args:
        model: f_Theta, with its side memories off.
        tok: its tokenizer.
        n_contexts: how many.
        length: tokens of each.
        generator: the only source of randomness, on the CPU.
        top_k: sample among this many most likely tokens.
        limit: for how many tokens the model has positions; None: there is no end.

    Returns:
        ``n_contexts`` stripped, non-empty texts.
    """
    if not n_contexts:
        return []
    start = torch.full((n_contexts, 1), start_token(tok), device=computing_device(model))

    def sampled(logits: Tensor) -> Tensor:
        values, tokens = without_special(logits, tok).topk(min(top_k, logits.shape[-1]), dim=-1)
        return tokens.gather(-1, torch.multinomial(values.softmax(dim=-1), 1, generator=generator))

    ids = continued(model, start, torch.ones_like(start), length, sampled, limit)
    texts = [tok.decode(row[1:], skip_special_tokens=True).strip() for row in ids]
    return [text or str(tok.decode(row[-1:])) for text, row in zip(texts, ids, strict=True)]


@torch.no_grad()
def fixed_prefixes(model: nn.Module, tok: Any, limit: int | None = None) -> list[str]:
    """EasyEdit's ten: five fixed words, each with 5 and then each with 10 greedy tokens behind it.

    Args:
        model: f_Theta, with its side memories off.
        tok: its tokenizer.
        limit: for how many tokens the model has positions; None: there is no end.

    Returns:
        Ten texts, as they are decoded, with the word that each begins with.
    """
    device = computing_device(model)
    eos = getattr(model.config, "eos_token_id", None)
    ends = set(eos if isinstance(eos, (list, tuple)) else [eos])
    continued: list[tuple[int, list[int]]] = []
    for word in FIXED_WORDS:
        ids = list(tok(word)["input_ids"])
        n_word = len(ids)
        length = n_word + max(FIXED_LENGTHS)
        length = length if limit is None else min(length, limit)
        while len(ids) < length and (len(ids) == n_word or ids[-1] not in ends):
            tokens = torch.tensor([ids], device=device)
            ids.append(int(model(input_ids=tokens, use_cache=False).logits[0, -1].argmax()))
        continued.append((n_word, ids))
    return [
        tok.decode(ids[: n_word + length], skip_special_tokens=True)
        for length in FIXED_LENGTHS
        for n_word, ids in continued
    ]


def behind(prefix: str, prompt: str, fixed: bool = False, excess: Callable[[str], int] | None = None) -> str:
    """The prompt behind a prefix: as a sentence of its own, or, behind a fixed one, as EasyEdit has it.

    Args:
        prefix: what is put before it.
        prompt: stays whole.
        fixed: the prefix is one of EasyEdit's fixed ones.
        excess: how many tokens a context is too long: so much of the prefix's beginning is left out. None: none is.
    """
    between = " " if fixed else ". "
    if excess is not None:
        prefix = shortened(prefix, lambda left: excess(f"{left}{between}{prompt}"))
    return f"{prefix}{between}{prompt}" if prefix or excess is None else prompt


def context_groups(
    prompt: str,
    prefixes: Sequence[str],
    group_size: int | None = None,
    fixed: bool = False,
    excess: Callable[[str], int] | None = None,
) -> list[list[str]]:
    """The plain prompt and the prompt behind each prefix, in groups that all begin with the plain prompt.

    Args:
        prompt: x_e.
        prefixes: what to put before it.
        group_size: texts in one group; None for a single group of them all.
        fixed: the prefixes are EasyEdit's fixed ones.
        excess: as in :func:`behind`.
    """
    return in_groups(prompt, [behind(prefix, prompt, fixed, excess) for prefix in prefixes], group_size)


def in_groups(prompt: str, augmented: Sequence[str], group_size: int | None = None) -> list[list[str]]:
    """The plain prompt and its other contexts, in groups that all begin with the plain prompt.

    Args:
        prompt: x_e.
        augmented: the other contexts.
        group_size: as in :func:`context_groups`.
    """
    if group_size is None or group_size > len(augmented):
        return [[prompt, *augmented]]
    if group_size == 1:
        return [[prompt], *([text] for text in augmented)]
    step = group_size - 1
    return [[prompt, *augmented[start : start + step]] for start in range(0, len(augmented), step)]
