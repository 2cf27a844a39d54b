"""Screening: which exact scores a choice among many side memories needs.

The score of Eq. 3 is the norm of a linear map, and a random projection keeps norms: with r rows q_i drawn
from N(0, 1/r), the sketch S = Q dW has E ||S a||^2 = ||dW a||^2 at r/d_out of the cost (Johnson and
Lindenstrauss). A sketch may only *rule out*: a memory whose score could still matter is scored exactly, so the
choice is that of :func:`~easyedit_wise.routing.choose_memory` on the exact scores.

Notation as in ``routing``: B sequences of T tokens, M side memories, r rows in each sketch.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

from .routing import MAIN_MEMORY, pool

SKETCH_ROWS = 32
# The chance that a bound lies below a score; see score_bounds for what it means.
FAILURE = 1e-6
# Sketched tokens that are held at a time, so that a long prompt needs no large buffer.
_BLOCK = 4096


def random_projection(d_out: int, generator: torch.Generator, rows: int = SKETCH_ROWS) -> Tensor:
    """Q: independent entries from N(0, 1/rows), so that E ||Q y||^2 = ||y||^2.

    Returns:
        Shape (rows, d_out), fp32.
    """
    drawn = torch.randn(rows, d_out, generator=generator, dtype=torch.float32, device=generator.device)
    return drawn / math.sqrt(rows)


def sketch(delta_weight: Tensor, projection: Tensor) -> Tensor:
    """S = Q dW.

    Args:
        delta_weight: dW, shape (d_out, d_in).
        projection: Q, shape (r, d_out).

    Returns:
        Shape (r, d_in), in the projection's dtype.
    """
    return projection @ delta_weight.to(projection.dtype)


def least_share(degrees: Tensor, failure: float = FAILURE) -> Tensor:
    """The share c of a norm that its sketch keeps but for a chance of ``failure``: P(||Q y|| < c ||y||) = failure.

    ||Q y||^2 / ||y||^2 is a chi-square variable divided by its degrees of freedom k; Wilson and Hilferty (1931)
    give its quantile as (1 - 2/9k - z sqrt(2/9k))^3.

    Args:
        degrees: k, any shape: r for one direction y, more for a mean over several.
        failure: between 0 and 1/2.

    Returns:
        The same shape, in [0, 1); 0 where so few degrees promise nothing.
    """
    variance = 2 / (9 * degrees)
    z = -NormalDist().inv_cdf(failure)
    return (1 - variance - z * variance.sqrt()).clamp(min=0) ** 1.5


def n_directions(sketched: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """How many independent directions a mean over tokens averages over: 1 if all are parallel, n if n are orthogonal.

    1/n = sum_st w_s w_t cos^2(y_s, y_t) with w the tokens' shares of the sum of norms: the errors of two sketched
    norms correlate with cos^2. Measured on the sketches, whose cosines err upwards (by 1/r), hence n downwards.

    Args:
        sketched: S a, shape (B, M, T, r).
        token_mask: shape (B, T), True where a token is real; None means all are.

    Returns:
        Shape (B, M); not a number where nothing was excited.
    """
    norms = sketched.norm(dim=-1)
    if token_mask is not None:
        norms = torch.where(token_mask.bool()[:, None], norms, torch.zeros_like(norms))
    shares = norms / norms.sum(dim=-1, keepdim=True)
    directions = F.normalize(sketched, dim=-1) * shares.sqrt()[..., None]
    if directions.shape[-2] > directions.shape[-1]:
        # sum_t w_t u_t u_t^T has the same Frobenius norm as the Gram matrix, and here it is the smaller one.
        directions = directions.transpose(-1, -2)
    gram = directions @ directions.transpose(-1, -2)
    return 1 / gram.square().sum(dim=(-1, -2))


def score_bounds(
    activations: Tensor, sketches: Tensor, token_mask: Tensor | None = None, pooling: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Estimates of the pooled scores of all memories from one product, and what they hardly exceed.

    The pooled estimate keeps at least the share c = ``least_share(k)`` of the pooled exact score, so that
    estimate / c is an upper bound. For "max" and "last" only one token's error counts: k = r; the mean of two
    that "loudest" takes lies too low only if one of them does, at most twice as often. The mean averages over the
    tokens' errors: k = r n, with n = ``n_directions``.

    The bound is one of chance: for activations and memories that do not depend on the projection, a score that is just
    above its threshold is missed with probability ``FAILURE``. That holds for one direction (n = 1, a single token,
    "last"); n itself is estimated, and in simulated mixtures made to deceive it (every token half in common with the
    others) misses were up to 5 times as frequent as asked for at 1e-3, 11 times at 1e-4 and 24 times at 1e-5. A score
    well above its threshold is missed far less often.

    Args:
        activations: A(x), shape (B, T, d_in).
        sketches: shape (M, r, d_in).
        token_mask: shape (B, T), True (or non-zero) where a token is real; None means all are.
        pooling: as in :func:`~easyedit_wise.routing.pool`.

    Returns:
        (estimate, upper), each of shape (B, M), fp32. Where the estimate is not finite, upper is infinite.
    """
    n_memories, rows, _ = sketches.shape
    stacked = sketches.flatten(0, 1)
    sequences = max(1, _BLOCK // max(1, activations.shape[1]))
    estimates, shares = [], []
    for start in range(0, activations.shape[0], sequences):
        part = slice(start, start + sequences)
        mask = None if token_mask is None else token_mask[part]
        sketched = F.linear(activations[part].to(stacked.dtype), stacked)
        sketched = sketched.unflatten(-1, (n_memories, rows)).transpose(1, 2)
        norms = sketched.norm(dim=-1)
        estimates.append(pool(norms, None if mask is None else mask[:, None].expand_as(norms), pooling))
        degrees = torch.full_like(estimates[-1], rows)
        if pooling == "mean":
            degrees = degrees * n_directions(sketched, mask).nan_to_num(1.0).clamp(min=1.0)
        shares.append(least_share(degrees))
    estimate = torch.cat(estimates)
    # Nothing excited is nothing, whatever the share; what is not a number could be anything.
    upper = torch.where(estimate == 0, estimate, estimate / torch.cat(shares))
    return estimate, torch.where(estimate.isfinite(), upper, torch.full_like(upper, math.inf))


def next_to_score(
    upper: Tensor,
    epsilon: Tensor,
    scores: Tensor,
    known: Tensor,
    newest_within: float | None = None,
    recognised: Tensor | None = None,
) -> Tensor:
    """Which exact score the choice of Eq. 6 still needs: of the memories that could compete, the most promising one.

    A memory cannot compete if its bound does not exceed its own threshold, or lies below the score of one that is known
    to exceed its own, with ``newest_within`` below that share of it. With ``recognised``, once a memory is known to
    recognise the query, only those can that may recognise it themselves. Asked again with that score known, until
    nothing is needed, this leaves the choice that all exact scores would give, ties included: with each score what the
    memory sustains is known as well.

    Args:
        upper: bounds on the scores, shape (B, M).
        epsilon: shape (M,).
        scores: shape (B, M), exact where ``known``.
        known: bool, shape (B, M).
        newest_within: as for :func:`~easyedit_wise.routing.choose_memory`; scores are over 0 then.
        recognised: shape (M,), likewise; only with ``newest_within``.

    Returns:
        Shape (B,), int64: index of a memory, or ``MAIN_MEMORY`` (-1) where the choice is made.
    """
    above = known & (scores > epsilon)
    best = torch.where(above, scores, torch.full_like(scores, -math.inf)).amax(-1, keepdim=True)
    best = best if newest_within is None else best * newest_within
    # Negated, so that a bound that is not a number rules nothing out.
    level = ~(upper < best)
    if recognised is not None:
        recognises = (above & (scores >= recognised)).any(dim=-1, keepdim=True)
        level = ~(upper < recognised) | (level & ~recognises)
    open_ = ~known & ~(upper <= epsilon) & level
    promise = torch.where(open_, upper.nan_to_num(nan=math.inf, posinf=math.inf), torch.full_like(upper, -math.inf))
    leading = promise.argmax(dim=-1)
    return torch.where(open_.any(dim=-1), leading, torch.full_like(leading, MAIN_MEMORY))
