"""Random subspaces for knowledge shards: which entries of a side memory one shard of edits may train.

WISE (arXiv 2405.14768, Section 2.3.2) splits T edits into k shards and trains shard i in the subspace
of a binary mask M_i whose share of ones is rho: W^i <- W^i - eta (M_i o g_i). The mask decides how
many entries two shards share, hence how much there is to reconcile when they are merged
(:mod:`easyedit_wise.merging`).

Every function is pure. Randomness comes only from the ``torch.Generator`` handed in: a mask is drawn
on the generator's device and then moved, so one seed gives one mask whatever device the model is on,
and the global RNG is never touched. Masks are bool; :func:`pack_mask` stores one bit an entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

# Uniform draws are made this many entries at a time: 128 KB of float32 instead of 180 MB for one
# 4096 x 11008 projection, and faster, since the block stays in cache.
_BLOCK = 1 << 15

Device: TypeAlias = torch.device | str | None


def random_mask(shape: Sequence[int], rho: float, generator: torch.Generator, device: Device = None) -> Tensor:
    """Mask of WISE: every entry is independently 1 with probability rho (Section 2.3.2).

    M[j] = 1{u_j < rho},  u_j ~ U[0, 1)

    The number of ones is binomial; k such masks share rho^k of the entries on average (Theorem 2.1).

    Args:
        shape: Shape of the side memory's weight, for instance ``(out, in)``.
        rho: Share of ones, in (0, 1].
        generator: Source of randomness; advanced by ``numel`` draws.
        device: Where the mask is wanted; the generator's device when None.

    Returns:
        Bool tensor of ``shape``.

    Raises:
        ValueError: rho is outside (0, 1].
    """
    _check_rho(rho)
    mask = torch.empty(tuple(shape), dtype=torch.bool, device=generator.device)
    for block in mask.view(-1).split(_BLOCK):
        uniform = torch.rand(block.numel(), generator=generator, dtype=torch.float32, device=generator.device)
        torch.lt(uniform, rho, out=block)
    return mask.to(device)


def non_overlapping_masks(
    shape: Sequence[int], rho: float, k: int, generator: torch.Generator, device: Device = None
) -> list[Tensor]:
    """k disjoint masks of exactly ``int(rho * numel)`` ones each: subspaces that share nothing.

    M_i = 1{ (i-1) n <= pi(j) < i n },  n = int(rho * numel),  pi a random permutation of the entries

    The "w/o overlap" arm of WISE's knowledge-anchor ablation (Table 13): nothing conflicts in the merge.

    Args:
        shape: Shape of the side memory's weight.
        rho: Share of ones in each mask, in (0, 1] and at most 1 / k.
        k: Number of masks, at least 1.
        generator: Source of randomness.
        device: Where the masks are wanted; the generator's device when None.

    Returns:
        k bool tensors of ``shape``.

    Raises:
        ValueError: rho is outside (0, 1], k < 1, k * rho > 1, or rho is too small for one entry.
    """
    _check_rho(rho)
    if k < 1:
        raise ValueError(f"k is {k}, but at least 1 mask is needed: pass the number of shards")
    # rho = 1 / k may give k * rho just above 1: allow for the rounding; numel // k keeps masks disjoint.
    if k * rho > 1 + 1e-9:
        raise ValueError(
            f"k * rho is {k} * {rho} = {k * rho:g}, but disjoint masks need k * rho <= 1: "
            f"use rho <= {1 / k:g}, or at most {int(1 / rho)} shards, or random_mask, which may overlap"
        )
    numel = math.prod(shape)
    size = min(_exact_count(rho, numel, "entries"), numel // k)
    # int32 halves the permutation; only its k slices are ever widened, one at a time, by the indexing.
    index_dtype = torch.int32 if numel < 2**31 else torch.int64
    order = torch.randperm(numel, generator=generator, device=generator.device, dtype=index_dtype)
    masks = []
    for i in range(k):
        mask = torch.zeros(numel, dtype=torch.bool, device=generator.device)
        mask[order[i * size : (i + 1) * size]] = True
        masks.append(mask.view(tuple(shape)).to(device))
    return masks


def column_mask(shape: Sequence[int], rho: float, generator: torch.Generator, device: Device = None) -> Tensor:
    """Mask of whole input columns: ``int(rho * in)`` of them, drawn without replacement.

    M[:, c] = 1 for c in a random subset C of the columns,  |C| = int(rho * in)

    Args:
        shape: ``(out, in)``, the shape of an ``nn.Linear`` weight.
        rho: Share of columns, in (0, 1].
        generator: Source of randomness.
        device: Where the mask is wanted; the generator's device when None.

    Returns:
        Bool tensor ``[out, in]``.

    Raises:
        ValueError: rho is outside (0, 1] or too small for one column; shape is not two-dimensional.
    """
    out_features, in_features = _matrix_shape(shape)
    count = _exact_count(rho, in_features, "input columns")
    chosen = torch.randperm(in_features, generator=generator, device=generator.device)[:count]
    return _columns_to_mask(chosen, out_features, in_features).to(device)


def activation_mask(shape: Sequence[int], rho: float, activations: Tensor) -> Tensor:
    """Mask of the input columns that matter most to the given inputs; nothing random.

    M[:, c] = 1 for the int(rho * in) columns of largest  mean_n |A[n, c]|

    The gradient of a linear layer is an outer product with its input, so columns whose input is
    near zero cannot store an edit; this keeps the columns that can.

    Args:
        shape: ``(out, in)``, the shape of an ``nn.Linear`` weight.
        rho: Share of columns, in (0, 1].
        activations: A, the inputs of the layer ``[n, in]``, one row a token.

    Returns:
        Bool tensor ``[out, in]`` on the activations' device.

    Raises:
        ValueError: rho is outside (0, 1] or too small for one column; shape is not two-dimensional;
            activations are not ``[n, in]`` with n >= 1.
    """
    out_features, in_features = _matrix_shape(shape)
    if activations.dim() != 2 or activations.shape[0] < 1 or activations.shape[1] != in_features:
        raise ValueError(
            f"activations have shape {tuple(activations.shape)}, but [n, {in_features}] with n >= 1 is "
            "needed: pass the layer's inputs flattened to one row a token"
        )
    count = _exact_count(rho, in_features, "input columns")
    score = activations.detach().abs().mean(dim=0, dtype=torch.float32)  # [in]
    return _columns_to_mask(score.topk(count, sorted=False).indices, out_features, in_features)


MaskGenerator: TypeAlias = Callable[[Sequence[int], float, torch.Generator, Device], Tensor]

# The generators that need nothing but a seed, so that a setting can name one; the other two need
# every shard at once, or data.
MASK_GENERATORS: Mapping[str, MaskGenerator] = MappingProxyType({"random": random_mask, "column": column_mask})


def overlap(masks: Sequence[Tensor]) -> float:
    """Measured share of entries that are active in all masks.

    | M_1 and ... and M_k | / numel,  whose expectation for :func:`random_mask` is rho^k (Theorem 2.1)

    Args:
        masks: k >= 1 bool tensors of one shape and device.

    Returns:
        A number in [0, 1]; compare with :func:`expected_overlap`.

    Raises:
        ValueError: no mask, no entry, a dtype other than bool, or shapes that differ.
    """
    if not masks:
        raise ValueError("masks is empty, but at least 1 mask is needed: pass the shards' masks")
    common = masks[0]
    for index, mask in enumerate(masks):
        _check_bool(mask)
        if mask.shape != common.shape:
            raise ValueError(
                f"mask {index} has shape {tuple(mask.shape)}, but mask 0 has {tuple(common.shape)}: "
                "compare masks of one weight"
            )
        common = common & mask
    if common.numel() == 0:
        raise ValueError(f"masks of shape {tuple(common.shape)} have no entry to share: pass non-empty masks")
    return int(common.count_nonzero()) / common.numel()


def expected_overlap(rho: float, k: int) -> float:
    """Expected share of entries that are active in all of k independent random masks.

    rho^k  (Theorem 2.1). WISE finds its best settings where this "knowledge anchor" is near 0.03.

    Raises:
        ValueError: rho is outside (0, 1] or k < 1.
    """
    _check_rho(rho)
    if k < 1:
        raise ValueError(f"k is {k}, but at least 1 mask is needed: pass the number of shards")
    return float(rho**k)


def pack_mask(mask: Tensor) -> Tensor:
    """Store a mask in one bit an entry.

    byte[b] = sum_{i<8} mask[8 b + i] << i  over the flattened mask, padded with zeros to a whole byte

    Args:
        mask: Bool tensor of any shape.

    Returns:
        uint8 tensor ``[ceil(numel / 8)]`` on the mask's device.

    Raises:
        ValueError: mask is not bool.
    """
    _check_bool(mask)
    entries = mask.reshape(-1).view(torch.uint8)
    padding = -entries.numel() % 8
    if padding:
        entries = torch.cat([entries, entries.new_zeros(padding)])
    entries = entries.view(-1, 8)  # [bytes, 8]
    packed = torch.zeros(entries.shape[0], dtype=torch.uint8, device=mask.device)
    for bit in range(8):
        packed |= entries[:, bit] << bit
    return packed


def unpack_mask(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of :func:`pack_mask`: ``unpack_mask(pack_mask(m), m.shape)`` equals m.

    mask[8 b + i] = (byte[b] >> i) & 1

    Args:
        bits: uint8 tensor ``[ceil(numel / 8)]``.
        shape: Shape of the mask that was packed.

    Returns:
        Bool tensor of ``shape`` on the device of ``bits``.

    Raises:
        ValueError: bits is not uint8, or its length does not belong to ``shape``.
    """
    numel = math.prod(shape)
    expected = (numel + 7) // 8
    if bits.dtype != torch.uint8 or bits.shape != (expected,):
        raise ValueError(
            f"bits are {bits.dtype} of shape {tuple(bits.shape)}, but a mask of shape {tuple(shape)} packs "
            f"into torch.uint8 of shape ({expected},): pass what pack_mask returned, and that mask's shape"
        )
    entries = torch.empty((expected, 8), dtype=torch.uint8, device=bits.device)
    for bit in range(8):
        entries[:, bit] = (bits >> bit) & 1
    # Every byte is 0 or 1 here, so the same memory can be read as bool without a copy.
    return entries.view(-1)[:numel].view(torch.bool).view(tuple(shape))


def _check_rho(rho: float) -> None:
    if not 0 < rho <= 1:
        raise ValueError(
            f"rho is {rho}, but must lie in (0, 1]: it is the share of entries one shard trains "
            "(WISE uses 0.2; 1 trains all of them)"
        )


def _check_bool(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}, but torch.bool is needed: pass mask.bool()")


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) != 2:
        raise ValueError(f"shape is {tuple(shape)}, but columns need [out, in]: pass a matrix's shape")
    return shape[0], shape[1]


def _exact_count(rho: float, total: int, what: str) -> int:
    """int(rho * total), refusing a mask with no ones: its shard would train nothing, silently."""
    _check_rho(rho)
    count = int(rho * total)
    if count == 0:
        cure = f"use rho >= {1 / total:g}" if total else "pass a non-empty shape"
        raise ValueError(f"rho is {rho}, which selects 0 of {total} {what}, but 1 is needed: {cure}")
    return count


def _columns_to_mask(columns: Tensor, out_features: int, in_features: int) -> Tensor:
    row = torch.zeros(in_features, dtype=torch.bool, device=columns.device)
    row[columns] = True
    return row.expand(out_features, in_features).contiguous()
