"""Prompts as the router sees them at the layer, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hparams import WISEHyperParams
from ..routing import pool, relative_activation, upstream_activation


@dataclass(frozen=True)
class ScoredInputs:
    """Some prompts. Only their real tokens are kept: padding would be stored and multiplied for nothing.

    Attributes:
        activations: A(x) of the N real tokens of all prompts, one prompt after the other, shape (N, d_in).
        token_mask: shape (B, T), True at those N tokens.
        base_output: W_v a, shape (N, d_out); only EasyEdit's score needs it.
    """

    activations: Tensor
    token_mask: Tensor
    base_output: Tensor | None = None

    @classmethod
    def from_padded(cls, activations: Tensor, token_mask: Tensor, base_output: Tensor | None = None) -> ScoredInputs:
        """From shape (B, T, d_in) and, if given, (B, T, d_out): copies of what is real, so that the batch can go."""
        return cls(
            activations[token_mask], token_mask.clone(), None if base_output is None else base_output[token_mask]
        )

    @cached_property
    def positions(self) -> Tensor:
        """Where the real tokens stand in the (B * T) tokens, shape (N,). Found once: it is read in every iteration."""
        return real_positions(self.token_mask)

    def __len__(self) -> int:
        return self.token_mask.shape[0]

    def select(self, rows: Tensor) -> ScoredInputs:
        """Some of the prompts, by index."""
        lengths = self.token_mask.sum(dim=-1)
        ends = lengths.cumsum(dim=0)
        tokens = torch.cat(
            [torch.arange(int(ends[row] - lengths[row]), int(ends[row])) for row in rows.tolist()]
            or [torch.zeros(0, dtype=torch.long)]
        ).to(self.activations.device)
        base = None if self.base_output is None else self.base_output[tokens]
        return ScoredInputs(self.activations[tokens], self.token_mask[rows.to(self.token_mask.device)], base)

    def halves(self) -> tuple[ScoredInputs, ScoredInputs]:
        """Every second prompt: those that a shard is made quiet on, and those that epsilon is set from."""
        first, second = (self.select(torch.arange(start, len(self), 2)) for start in (0, 1))
        return first, second

    @staticmethod
    def stack(inputs: Sequence[ScoredInputs]) -> ScoredInputs:
        """All prompts as one batch, so that they are scored in one product.

        Raises:
            ValueError: there are none.
        """
        if not inputs:
            raise ValueError("there are no prompts to score.")
        if len(inputs) == 1:
            return inputs[0]
        length = max(one.token_mask.shape[1] for one in inputs)
        masks = [F.pad(one.token_mask, (length - one.token_mask.shape[1], 0)) for one in inputs]
        bases = [one.base_output for one in inputs if one.base_output is not None]
        return ScoredInputs(
            ScoredInputs._common([one.activations for one in inputs]),
            torch.cat(masks),
            ScoredInputs._common(bases) if len(bases) == len(inputs) else None,
        )

    def to(self, dtype: torch.dtype) -> ScoredInputs:
        """The same prompts in another dtype."""
        base = None if self.base_output is None else self.base_output.to(dtype)
        return ScoredInputs(self.activations.to(dtype), self.token_mask, base)

    def in_16_bits(self) -> ScoredInputs:
        """For what stays as long as a stream does: a score is the norm of a sum over thousands of components, and moves
        by less than its last digits between two batches."""
        return self if self.activations.element_size() <= 2 else self.to(torch.bfloat16)

    @staticmethod
    def _common(values: Sequence[Tensor]) -> Tensor:
        dtype = values[0].dtype
        for one in values[1:]:
            dtype = torch.promote_types(dtype, one.dtype)
        return torch.cat([one.to(dtype) for one in values])

    def scores(self, delta_weight: Tensor, hparams: WISEHyperParams) -> Tensor:
        """Delta_act of each prompt, shape (B,)."""
        product = F.linear(self.activations.to(delta_weight), delta_weight)
        return self.pooled(product, hparams)

    def pooled(self, product: Tensor, hparams: WISEHyperParams, over: Tensor | None = None) -> Tensor:
        """Delta_act of each prompt from dW a of its tokens, shape (N, d_out) -> (B,).

        Args:
            product: dW a.
            hparams: settings.
            over: pool over these tokens only, shape (B, T), each of them a real one.
        """
        tokens = score_tokens(product, self.base_output, self.activations, hparams)
        mask = self.token_mask if over is None else over
        return pool(placed(tokens, self.positions, mask), mask, hparams.pooling)


def score_tokens(product: Tensor, base_output: Tensor | None, activations: Tensor, hparams: WISEHyperParams) -> Tensor:
    """Delta_act of each token from dW a, shape (..., d_out), and a, shape (..., d_in) -> (...)."""
    if hparams.relative_scores:
        return relative_activation(product, activations)
    if hparams.score_activation is None or base_output is None:
        # The norm's gradient at exactly zero is undefined (a fresh shard is zero): keep it finite.
        return (product.square().sum(dim=-1) + 1e-12).sqrt()
    base = base_output.to(product)
    return upstream_activation(base, base + product, hparams.score_activation)


def real_positions(token_mask: Tensor) -> Tensor:
    """Where the real tokens of a batch stand in its (B * T) tokens, shape (N,)."""
    return token_mask.flatten().nonzero().squeeze(-1)


def placed(values: Tensor, positions: Tensor, like: Tensor) -> Tensor:
    """One value a token, put back to where the tokens stand: shape (N,) -> (B, T), zero elsewhere."""
    return values.new_zeros(like.numel()).index_copy(0, positions, values).view(like.shape)
