"""The random subspace that one shard trains in, as a vector (WISE, Section 2.3.2).

Eq. 7, W' <- W' - eta (M o g), moves the masked entries only. Here they are the vector theta: the gradient is
computed for them alone, the optimiser keeps its state for them alone, and no entry outside the mask *can* move.
dW itself is kept beside it, since products need a matrix. A mask of ones and zeros over a dense gradient would
take a second matrix, a third and a fourth for Adam, and on a CPU ten times as long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Entries of dW in one block of rows: the gradient is dense for one block at a time.
_BLOCK = 1 << 20


class MaskedEntries:
    """Where a mask has ones, by blocks of rows: to gather these entries of a matrix, and to write them back.

    Args:
        mask: M, bool, shape (d_out, d_in). The entries count in row-major order.
    """

    def __init__(self, mask: Tensor) -> None:
        d_out, d_in = mask.shape
        step = max(1, min(d_out, _BLOCK // d_in))
        self.blocks: list[tuple[slice, slice, Tensor]] = []
        start = 0
        for row in range(0, d_out, step):
            rows = slice(row, min(row + step, d_out))
            # int32 within a block: half the size, and as fast to gather with.
            place = mask[rows].reshape(-1).nonzero().squeeze(-1).to(torch.int32)
            self.blocks.append((rows, slice(start, start + place.numel()), place))
            start += place.numel()

    def gather(self, matrix: Tensor) -> Tensor:
        """The entries of a matrix at the mask, shape (n,)."""
        return torch.cat([matrix[rows].reshape(-1).index_select(0, place) for rows, _, place in self.blocks])

    def write(self, values: Tensor, matrix: Tensor) -> None:
        """Put values, shape (n,), where the mask has ones; the matrix must be contiguous."""
        for rows, entries, place in self.blocks:
            # Scattering wants int64: widened one block at a time.
            matrix[rows].view(-1).scatter_(0, place.long(), values[entries])


class Subspace:
    """dW of a live shard and its trainable entries.

    Args:
        delta_weight: dW, shape (d_out, d_in).
        mask: M, bool, same shape.
        in_place: let :meth:`write` write to ``delta_weight`` itself; else it works on a copy.

    Attributes:
        matrix: dW as it is now, shape (d_out, d_in).
        theta: its masked entries in row-major order, shape (n,): the leaf that an optimiser moves. Call
            :meth:`write` after each step.
    """

    def __init__(self, delta_weight: Tensor, mask: Tensor, in_place: bool = False) -> None:
        own = delta_weight.detach()
        self.matrix = own if in_place else own.clone(memory_format=torch.contiguous_format)
        self._masked = MaskedEntries(mask)
        self.theta = self._masked.gather(self.matrix).requires_grad_(True)

    def products(self, *activations: Tensor) -> tuple[Tensor, ...]:
        """dW a of several batches of rows a, each of shape (N_i, d_in), with theta as what is differentiated.

        Returns:
            One tensor for each batch, shape (N_i, d_out).
        """
        products: tuple[Tensor, ...] = _Products.apply(self.theta, self, *activations)
        return products

    @staticmethod
    def masked(gradient: Tensor) -> Tensor:
        """The gradient of theta as it is: nothing of it lies outside the mask."""
        return gradient

    @torch.no_grad()
    def clamp(self, limit: float) -> None:
        """Keep every entry within ``limit`` of zero."""
        self.theta.clamp_(-limit, limit)

    @torch.no_grad()
    def write(self) -> None:
        """Put theta into the matrix."""
        self._masked.write(self.theta, self.matrix)

    def gradient(self, activations: list[Tensor], output_gradients: list[Tensor]) -> Tensor:
        """Entries of sum_i G_i^T A_i at the mask, shape (n,), one block of rows after the other."""
        gradient = torch.empty_like(self.theta)
        for block, entries, place in self._masked.blocks:
            dense: Tensor | None = None
            for a, g in zip(activations, output_gradients, strict=True):
                dense = g[:, block].T @ a if dense is None else dense.addmm_(g[:, block].T, a)
            if dense is None:
                return gradient.zero_()
            torch.index_select(dense.view(-1), 0, place, out=gradient[entries])
        return gradient


class _Products(torch.autograd.Function):
    """y_i = dW a_i for all i; one gathered gradient for all of them."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, subspace: Subspace, *activations: Tensor) -> tuple[Tensor, ...]:
        ctx.subspace = subspace
        ctx.activations = activations
        return tuple(a @ subspace.matrix.T for a in activations)

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [(a, g) for a, g in zip(ctx.activations, output_gradients, strict=True) if g is not None]
        gradient = ctx.subspace.gradient([a for a, _ in given], [g for _, g in given])
        return (gradient, None, *(None for _ in ctx.activations))
