"""Text at large: what the model itself writes, and how the layer's inputs are spread over it.

A shard has to be quiet on everything that is not about its edits, and no list of neutral prompts names all of that. The
model's own samples are its idea of text; their second moments E[a a^T] are what ROME and MEMIT weigh their updates with
(Meng et al., 2022). Not in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..tuner.devices import computing_device
from .contexts import start_token, without_special
from .continuation import continued
from .scored import ScoredInputs


@dataclass(frozen=True)
class WrittenText:
    """What the layer makes of texts that the model wrote.

    Attributes:
        spread: of one half of them, see :func:`spread`: what shards are made quiet on.
        held_out: the other half: how loud text at large is in a shard that was not made quiet on it. It is longer than
            a prompt, and the loudest of many tokens is louder.
    """

    spread: Tensor
    held_out: ScoredInputs

    @classmethod
    def of(cls, texts: ScoredInputs) -> WrittenText:
        """One half of some texts for each."""
        learned, held_out = texts.halves()
        return cls(spread(learned.activations), held_out.in_16_bits())


@torch.no_grad()
def written_tokens(
    model: nn.Module, tok: Any, n_texts: int, length: int, generator: torch.Generator, limit: int | None = None
) -> Tensor:
    """Texts that the model samples from nothing, from its whole distribution.

    Args:
        model: f_Theta, with its side memories off.
        tok: its tokenizer.
        n_texts: how many.
        length: tokens of each, the one that it begins with among them.
        generator: the only source of randomness, on the CPU.
        limit: for how many tokens the model has positions; None: there is no end.

    Returns:
        Token ids, int64, shape (n_texts, length), or (n_texts, limit).
    """
    ids = torch.full((n_texts, 1), start_token(tok), device=computing_device(model))

    def sampled(logits: Tensor) -> Tensor:
        return torch.multinomial(without_special(logits, tok).softmax(dim=-1), 1, generator=generator)

    return continued(model, ids, torch.ones_like(ids), length - 1, sampled, limit).cpu()


def spread(activations: Tensor) -> Tensor:
    """E[a a^T] with every token as loud as the middle one, shape (d_in, d_in), in fp32.

    A score is relative to ||a||, so a token that is a thousand times as loud as the others, as the first of a text is
    in some models, must not count a million times as much.

    Args:
        activations: A(x) of N tokens, shape (N, d_in).
    """
    tokens = activations.float()
    norms = tokens.norm(dim=-1, keepdim=True)
    tokens = tokens * (norms.median() / norms.clamp(min=torch.finfo(torch.float32).tiny))
    return tokens.T @ tokens / len(tokens)
