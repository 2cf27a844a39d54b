"""Operators that merge the weight changes of k knowledge shards into one.

WISE trains shard i in its own copy of the side memory and merges the copies back (arXiv 2405.14768,
Section 2.3.2): with tau_i = W^i - W_v,  W_v' <- W_v + Merge(tau_1, ..., tau_k). WISE uses TIES
(arXiv 2306.01708) and compares most of the others in its Table 11. All are pure functions:

    operator(deltas, weights, density, generator) -> delta

``deltas`` are k >= 1 floating-point tensors of one shape, dtype and device; ``weights`` k positive numbers;
``density`` in (0, 1] is the share of entries kept by operators that trim or drop; only ``dare_*`` draw
from ``generator``. The result has the shape, dtype and device of the deltas, which are not modified;
float16 and bfloat16 are accumulated in float32. :func:`merge` validates and calls operators by name.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .sharding import random_mask

# Entries are independent once the trim thresholds are known, so shards are merged this many entries
# at a time. Intermediates stay in cache, peak memory does not grow with k, and on a CPU torch does not
# wake its threads for so few, which costs more than it gains (1.2 s against 20 s on a busy machine).
_BLOCK = 1 << 15

# Two directions with 1 - |cos| below this (0.26 degrees) count as parallel: slerp and the linear mean
# differ there by 3e-6 of the norm, while near 180 degrees 1 / sin would amplify rounding errors.
_PARALLEL = 1e-5

Deltas: TypeAlias = Sequence[Tensor]
Weights: TypeAlias = Sequence[float]
Generator: TypeAlias = torch.Generator | None
MergeOperator: TypeAlias = Callable[[Deltas, Weights, float, Generator], Tensor]
# Makes t_i of the entries of shard i that lie in a block: (i, entries, block) -> t_i, same shape.
Sparsifier: TypeAlias = Callable[[int, Tensor, slice], Tensor]


def ties(deltas: Deltas, weights: Weights, density: float, generator: Generator) -> Tensor:
    """TIES: trim, elect a sign, mean of the entries that agree (arXiv 2306.01708, Algorithm 1).

    1. trim:   t_i = tau_i where |tau_i| is among the int(density * numel) largest of shard i, else 0
    2. elect:  s = sgn(sum_i t_i), with sgn(0) = +1
    3. merge:  m = sum_{i in A} w_i t_i / sum_{i in A} w_i,  A = {i : sgn(t_i) = s, t_i != 0};  0 if A = {}

    The sign is elected on the unweighted sum and the weights enter the mean only, so a common factor
    of the weights cancels. Entries tied with the smallest kept magnitude are all kept. With equal
    weights this is PEFT's ``ties(..., majority_sign_method="total")`` with unit weights.

    Raises:
        ValueError: ``density`` keeps no entry of a delta.
    """
    return _blockwise(deltas, weights, _trimming(deltas, density), elect=True, mean=True)


def ties_weighted(deltas: Deltas, weights: Weights, density: float, generator: Generator) -> Tensor:
    """TIES as EasyEdit's code has it: s = sgn(sum_i w_i t_i), and of equal magnitudes at the cut some go.

    So exactly int(density * numel) entries of each shard are kept, those that ``torch.topk`` picks. The rest, and
    what is raised, as :func:`ties`.
    """
    shards = [delta * _largest(delta, density) for delta in deltas]
    total = _weighted_sum([_accumulator(shard) for shard in shards], weights)
    elected = torch.ones_like(total).copysign_(total).view(deltas[0].shape)
    agreeing = [shard * (shard * elected > 0) for shard in shards]
    return _blockwise(agreeing, weights, _trimming(agreeing, 1.0), elect=False, mean=True)


def magnitude(deltas: Deltas, weights: Weights, density: float, generator: Generator) -> Tensor:
    """Trim as TIES does, then sum: m = sum_i w_i t_i (magnitude pruning, arXiv 1506.02626).

    Raises as :func:`ties`.
    """
    return _blockwise(deltas, weights, _trimming(deltas, density), elect=False, mean=False)


def magnitude_norm(deltas: Deltas, weights: Weights, density: float, generator: Generator) -> Tensor:
    """Trim, then take the weighted mean of what survived, whatever its sign (TIES without election).

    m = sum_{i in A} w_i t_i / sum_{i in A} w_i,  A = {i : t_i != 0};  0 if A = {}

    Raises as :func:`ties`.
    """
    return _blockwise(deltas, weights, _trimming(deltas, density), elect=False, mean=True)


def sign(deltas: Deltas, weights: Weights, density: float, generator: Generator) -> Tensor:
    """TIES without the trim: steps 2 and 3 of :func:`ties` with t_i = tau_i; ``density`` is unused."""
    return _blockwise(deltas, weights, _trimming(deltas, 1.0), elect=True, mean=True)


def linear(deltas: Deltas, weights: Weights, density: float, generator: Generator) -> Tensor:
    """Weighted sum m = sum_i w_i tau_i (task arithmetic, arXiv 2212.04089); ``density`` is unused."""
    return _blockwise(deltas, weights, _trimming(deltas, 1.0), elect=False, mean=False)


def dare_linear(deltas: Deltas, weights: Weights, density: float, generator: Generator) -> Tensor:
    """DARE: drop at random, rescale, sum (arXiv 2311.03099, whose drop rate is p = 1 - density).

    m = sum_i w_i (B_i o tau_i) / density,  B_i ~ Bernoulli(density);  E[m] = sum_i w_i tau_i

    Raises:
        ValueError: ``generator`` is None.
    """
    return _blockwise(deltas, weights, _dropping(deltas, density, generator), elect=False, mean=False)


def dare_ties(deltas: Deltas, weights: Weights, density: float, generator: Generator) -> Tensor:
    """DARE with the sign election of TIES: drop at random, rescale, elect, weighted sum of what agrees.

    t_i = (B_i o tau_i) / density,  B_i ~ Bernoulli(density)
    m = sum_{i in A} w_i t_i,  A = {i : sgn(t_i) = sgn(sum_j t_j)},  sgn(0) = +1 for the sum

    Raises as :func:`dare_linear`.
    """
    return _blockwise(deltas, weights, _dropping(deltas, density, generator), elect=True, mean=False)


def slerp(deltas: Deltas, weights: Weights, density: float, generator: Generator) -> Tensor:
    """Spherical linear interpolation of the flattened deltas (Shoemake 1985, doi 10.1145/325334.325242).

    m = (sin((1 - t) a) tau_1 + sin(t a) tau_2) / sin(a),  t = w_2 / (w_1 + w_2),
    a = the angle between tau_1 and tau_2

    More than two are folded from left to right, the partial result carrying the weight of all it
    contains, so the order matters. Without an arc (a zero vector, parallel or opposite ones) a step is
    the mean (1 - t) tau_1 + t tau_2. ``density`` is unused; a common factor of the weights cancels.
    """
    partial = _accumulator(deltas[0]).clone()  # [numel]
    gathered = weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        other = _accumulator(delta)
        t = weight / (gathered + weight)
        first, second = _slerp_coefficients(partial, other, t)
        partial.mul_(first).add_(other, alpha=second)
        gathered += weight
    return partial.to(deltas[0].dtype).view(deltas[0].shape)


@dataclass(frozen=True)
class MergeMethod:
    """A row of :data:`MERGE_METHODS`: an operator, its source, and whether it needs a generator."""

    name: str
    function: MergeOperator
    reference_url: str
    description: str
    needs_generator: bool = False


_ARXIV = "https://arxiv.org/abs/"
_SHOEMAKE = "https://doi.org/10.1145/325334.325242"

MERGE_METHODS: Mapping[str, MergeMethod] = MappingProxyType(
    {
        "ties": MergeMethod("ties", ties, _ARXIV + "2306.01708", "trim, elect sign, mean of what agrees"),
        "ties_weighted": MergeMethod(
            "ties_weighted", ties_weighted, "https://github.com/zjunlp/EasyEdit", "TIES, sign elected on weighted sums"
        ),
        "magnitude": MergeMethod("magnitude", magnitude, _ARXIV + "1506.02626", "trim, sum"),
        "magnitude_norm": MergeMethod("magnitude_norm", magnitude_norm, _ARXIV + "1506.02626", "trim, mean"),
        "sign": MergeMethod("sign", sign, _ARXIV + "2306.01708", "elect sign, mean of what agrees"),
        "dare_ties": MergeMethod("dare_ties", dare_ties, _ARXIV + "2311.03099", "drop, elect, sum", True),
        "dare_linear": MergeMethod("dare_linear", dare_linear, _ARXIV + "2311.03099", "drop, sum", True),
        "linear": MergeMethod("linear", linear, _ARXIV + "2212.04089", "sum"),
        "slerp": MergeMethod("slerp", slerp, _SHOEMAKE, "interpolate along the arc between the deltas"),
    }
)


def merge(
    deltas: Sequence[Tensor],
    method: str = "ties",
    weights: Sequence[float] | None = None,
    density: float = 0.53,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Merge shard deltas tau_i = W^i - W_v by a method of :data:`MERGE_METHODS`.

    EasyEdit's ``weights: 1.0`` is the scale lambda, that is lambda / k for each shard; pass
    ``[lambda / k] * k`` here. The scale cancels in ties, ties_weighted, sign, magnitude_norm and slerp, which take
    means, and multiplies the result of linear, magnitude, dare_linear and dare_ties, which take sums.

    Args:
        deltas: k >= 1 floating-point tensors of one shape, dtype and device.
        method: Name of the method.
        weights: k positive numbers; 1 / k each when None.
        density: Share of entries kept by the methods that trim or drop, in (0, 1].
        generator: Source of randomness, needed by dare_ties and dare_linear.

    Returns:
        The merged delta, in memory of its own. Inputs are not checked for NaN and inf.

    Raises:
        ValueError: an argument is not as above, or dare has no generator, or density keeps no entry.
    """
    row = MERGE_METHODS.get(method)
    if row is None:
        near = difflib.get_close_matches(str(method), MERGE_METHODS, n=1, cutoff=0.0)[0]
        raise ValueError(f"no method {method!r}: did you mean {near!r}? All: {', '.join(MERGE_METHODS)}")
    _check_deltas(deltas)
    weights = [1.0 / len(deltas)] * len(deltas) if weights is None else weights
    if len(weights) != len(deltas):
        raise ValueError(f"{len(weights)} weights for {len(deltas)} deltas: pass one weight for each delta")
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"weights are {list(weights)}, but must be positive: leave out a delta of weight 0")
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}, but must lie in (0, 1]: it is the share of entries kept")
    return row.function(deltas, weights, density, generator)


def _check_deltas(deltas: Deltas) -> None:
    if not deltas:
        raise ValueError("no deltas: pass at least one")
    for index, delta in enumerate(deltas):
        if not delta.is_floating_point():
            raise ValueError(f"delta {index} is {delta.dtype}: pass floating-point deltas")
        for what in ("shape", "dtype", "device"):
            here, first = getattr(delta, what), getattr(deltas[0], what)
            if here != first:
                raise ValueError(f"delta {index} has {what} {here}, but delta 0 {first}: make them alike")


def _trimming(deltas: Deltas, density: float) -> Sparsifier:
    cuts = [_trim_cut(delta, density) for delta in deltas]
    return lambda i, entries, block: F.hardshrink(entries, cuts[i]) if cuts[i] else entries


def _dropping(deltas: Deltas, density: float, generator: Generator) -> Sparsifier:
    if generator is None:
        raise ValueError("dare drops at random: pass a generator, as torch.Generator().manual_seed(0)")
    # Drawn whole, shard by shard, so that the block size is no part of what a seed means.
    kept = [random_mask((d.numel(),), density, generator, d.device) for d in deltas]
    return lambda i, entries, block: (entries * kept[i][block]).div_(density)


def _trim_cut(delta: Tensor, density: float) -> float:
    """Largest magnitude below the int(density * numel)-th largest entry's; 0 when nothing has to go."""
    keep = int(density * delta.numel())
    # The normal case of WISE: a shard of rho = 0.2 has fewer non-zeros than density 0.53 would keep.
    if keep == delta.numel() or int(delta.count_nonzero()) <= keep:
        return 0.0
    if keep == 0:
        raise ValueError(f"density is {density}, which keeps 0 of {delta.numel()} entries: use a larger one")
    magnitudes = _accumulator(delta).abs()
    rank = delta.numel() - keep  # of the threshold, from 0, in ascending order
    if magnitudes.is_cpu:
        # In place, without int64 indices: 0.4 s for 4096 x 11008 where kthvalue and topk take 1.4 s.
        magnitudes.numpy().partition(rank)
        smallest_kept = magnitudes[rank]
    elif torch.are_deterministic_algorithms_enabled():  # torch then refuses kthvalue on CUDA, for its indices
        smallest_kept = magnitudes.sort().values[rank]
    else:
        smallest_kept = magnitudes.kthvalue(rank + 1).values
    # One step below it, because hardshrink drops what equals its bound.
    return float(smallest_kept.nextafter(torch.zeros_like(smallest_kept)))


def _largest(delta: Tensor, density: float) -> Tensor:
    """Bool, True at exactly int(density * numel) entries of the largest magnitude, or at all where fewer are not 0."""
    keep = int(density * delta.numel())
    if int(delta.count_nonzero()) <= keep:
        return torch.ones_like(delta, dtype=torch.bool)
    if keep == 0:
        raise ValueError(f"density is {density}, which keeps 0 of {delta.numel()} entries: use a larger one")
    largest = torch.topk(_accumulator(delta).abs(), keep).indices
    kept = torch.zeros(delta.numel(), dtype=torch.bool, device=delta.device)
    return kept.index_fill_(0, largest, True).view(delta.shape)


def _blockwise(deltas: Deltas, weights: Weights, sparsify: Sparsifier, *, elect: bool, mean: bool) -> Tensor:
    """The frame of every operator but slerp: sparsify, elect if asked, add up, divide if asked."""
    # The scale of the weights cancels in a mean; as ones, equal weights do so without rounding.
    if mean and len(set(weights)) == 1:
        weights = [1.0] * len(weights)
    flat = [delta.detach().reshape(-1) for delta in deltas]
    merged = torch.empty_like(flat[0])
    for start in range(0, merged.numel(), _BLOCK):
        block = slice(start, start + _BLOCK)
        shards = [sparsify(i, _accumulator(entries[block]), block) for i, entries in enumerate(flat)]
        merged[block] = _combine(shards, weights, elect=elect, mean=mean)
    return merged.view(deltas[0].shape)


def _combine(shards: Deltas, weights: Weights, *, elect: bool, mean: bool) -> Tensor:
    """Steps 2 and 3 of TIES on a few entries ``[n]`` of every shard, each step optional."""
    # Arithmetic instead of masks: masked_fill and where take 30 times as long on a CPU.
    if elect:
        total = _weighted_sum(shards, [1.0] * len(shards))
        elected = torch.ones_like(total).copysign_(total)  # s
        shards = [(shard * elected).relu_() for shard in shards]  # |t_i| if sgn(t_i) = s, else 0
    merged = _weighted_sum(shards, weights)
    if mean:
        # Zeros never count: an entry that a shard did not train, or lost, is no vote for zero.
        share = _weighted_sum([shard.sign().abs_() for shard in shards], weights)
        merged /= share.clamp_(min=min(weights))  # only raises the 0 of entries that no shard has
    return merged.mul_(elected) if elect else merged


def _weighted_sum(terms: Deltas, weights: Weights) -> Tensor:
    total = terms[0] * weights[0]
    for term, weight in zip(terms[1:], weights[1:], strict=True):
        total.add_(term, alpha=weight)
    return total


def _accumulator(values: Tensor) -> Tensor:
    """Flat, detached, and float32 unless the dtype is wider; shares memory when nothing has to change."""
    return values.detach().reshape(-1).to(torch.promote_types(values.dtype, torch.float32))


def _slerp_coefficients(a: Tensor, b: Tensor, t: float) -> tuple[float, float]:
    norms = math.sqrt(_dot(a, a) * _dot(b, b))
    cosine = _dot(a, b) / norms if norms > 0 else 1.0
    if not 1.0 - abs(cosine) >= _PARALLEL:  # also when NaN, which is passed on rather than raised
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _dot(a: Tensor, b: Tensor) -> float:
    # Blocks are summed as Python floats, in double precision, without a double-precision copy.
    return sum(float((x * y).sum()) for x, y in zip(a.split(_BLOCK), b.split(_BLOCK), strict=True))
