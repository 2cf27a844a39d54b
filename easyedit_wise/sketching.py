"""A fixed-size stand-in for activations that keep coming: Frequent Directions.

Liberty, "Simple and deterministic matrix sketching" (KDD 2013). Rehearsal needs the activations A of all
earlier edits only through A^T A; a matrix B of few rows with B^T B close to A^T A takes their place, so a
shard's memory does not grow with its edits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frequent_directions(sketch: Tensor | None, rows: Tensor, size: int) -> Tensor:
    """B of at most ``size`` rows, in place of the rows that ``sketch`` stands for and of ``rows``.

    While all of them fit, B is simply all of them. Then the rows [B; A] = U S V^T are reduced to
    B' = sqrt(S^2 - s^2) V^T, s the first singular value that is dropped, so that 0 <= A^T A - B'^T B' and its
    2-norm is at most || A - A_k ||_F^2 / (size - k + 1) for every k <= size (A_k: the best approximation of rank k).

    Args:
        sketch: B so far, shape (R, d), R <= size; None: none yet.
        rows: A, what comes in addition, shape (N, d).
        size: how many rows B may have, at least 1.

    Returns:
        Shape (min(R + N, size), d), in the dtype of ``rows``.

    Raises:
        ValueError: size is less than 1.
    """
    if size < 1:
        raise ValueError(f"size is {size}, but a sketch needs at least 1 row.")
    stacked = rows if sketch is None else torch.cat([sketch.to(rows), rows])
    if stacked.shape[0] <= size:
        return stacked
    # The small side decides the price: the rows' own products, not those of d dimensions. Double precision,
    # since squares of singular values are taken.
    exact = stacked.double()
    if stacked.shape[0] <= stacked.shape[1]:
        squares, left = torch.linalg.eigh(exact @ exact.T)  # in ascending order
        kept = squares[-size:].clamp(min=0)
        shrunk = (kept - squares[-size - 1].clamp(min=0)).clamp(min=0)
        scale = (shrunk / kept.clamp(min=torch.finfo(kept.dtype).tiny)).sqrt()
        return (scale[:, None] * (left[:, -size:].T @ exact)).to(rows.dtype)
    squares, right = torch.linalg.eigh(exact.T @ exact)
    size = min(size, squares.shape[0])
    dropped = squares[-size - 1].clamp(min=0) if size < squares.shape[0] else squares.new_zeros(())
    shrunk = (squares[-size:].clamp(min=0) - dropped).clamp(min=0)
    return (shrunk.sqrt()[:, None] * right[:, -size:].T).to(rows.dtype)
