"""The list of side memories as a stream changes it: a shard opens, closes, is folded with others (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..hparams import WISEHyperParams
from ..merging import merge
from ..routing import LONG_TEXT
from ..sharding import column_mask, random_mask
from ..tuner.memory import LIVE, MERGED, SHARD, MemoryState
from .subspace import MaskedEntries

# What an earlier memory weighs in EasyEdit's merges; the new shards share the rest.
_EASYEDITS_EARLIER = 0.6


def shard_size(hparams: WISEHyperParams) -> int:
    """Edits that one shard takes."""
    return hparams.save_freq or hparams.merge_freq


def settings_after(hparams: WISEHyperParams, n_earlier: int, n_tokens: int = 0) -> WISEHyperParams:
    """The settings of a shard with so many memories before it: ``unfinished_names`` is of later ones, and long prompts.

    Args:
        hparams: settings.
        n_earlier: the memories before it.
        n_tokens: of the shortest prompt among the edits to come. A long one has much else to be known by.
    """
    if not hparams.unfinished_names or n_earlier >= hparams.unfinished_names_after or n_tokens >= LONG_TEXT:
        return hparams
    return replace(hparams, unfinished_names=0.0)


def with_live_shard(
    states: Sequence[MemoryState],
    shape: tuple[int, int],
    device: torch.device,
    hparams: WISEHyperParams,
    generator: torch.Generator,
) -> list[MemoryState]:
    """The memories with a live shard at the end: the one that is there, or a new one with a random mask; in fp32."""
    live = states[-1] if states and states[-1].stage == LIVE else None
    if live is not None and live.n_edits:
        # A cast of the whole model takes dW along; small steps need fp32 all the same.
        return [*states[:-1], live.with_(delta_weight=live.delta_weight.float())]
    new_mask = column_mask if hparams.mask == "columns" else random_mask
    mask = new_mask(shape, hparams.mask_ratio, generator).to(device)
    zero = torch.zeros(shape, dtype=torch.float32, device=device)
    kept = states if live is None else states[:-1]
    return [*kept, MemoryState(LIVE, zero, mask, 0.0, 0)]


def set_aside(live: MemoryState) -> tuple[MemoryState, Tensor | None]:
    """A live shard, so that :func:`put_back` gives it back although edits go on in its own dW.

    Returns:
        (the shard, its masked entries, shape (n,)); one that is still empty takes no room and has None.
    """
    if live.n_edits and live.mask is not None:
        return live, MaskedEntries(live.mask).gather(live.delta_weight)
    if not bool(live.delta_weight.any()):
        return live.with_(delta_weight=live.delta_weight.new_zeros(()).expand_as(live.delta_weight)), None
    return live, None


def put_back(live: MemoryState, values: Tensor | None) -> MemoryState:
    """The shard as it was at :func:`set_aside`, in a tensor of its own: others may share the one that was edited."""
    if values is None or live.mask is None:
        return live.with_(delta_weight=live.delta_weight.contiguous())
    own = live.delta_weight.clone(memory_format=torch.contiguous_format)
    MaskedEntries(live.mask).write(values, own)
    return live.with_(delta_weight=own)


def room(states: Sequence[MemoryState], hparams: WISEHyperParams) -> int:
    """How many edits the shard that takes the next one still has room for, at least one."""
    held = states[-1].n_edits if states and states[-1].stage == LIVE else 0
    return max(1, shard_size(hparams) - held)


def is_full(live: MemoryState, n_tokens: int, hparams: WISEHyperParams) -> bool:
    """Whether the live shard takes no more edits.

    Args:
        live: the shard.
        n_tokens: of its edits, prompts and targets.
        hparams: settings.
    """
    if live.n_edits >= shard_size(hparams):
        return True
    if not hparams.capacity or live.mask is None:
        return False
    return n_tokens >= hparams.capacity * int(live.mask.any(dim=0).sum())


def with_epsilon_as_trained(
    states: Sequence[MemoryState], scores: Sequence[float], n_before: int, hparams: WISEHyperParams
) -> list[MemoryState]:
    """EasyEdit's epsilon after an edit of the live shard at the end: the running minimum.

    Args:
        states: the memories.
        scores: of the new edits, each the mean over its contexts in the last iteration.
        n_before: edits that the shard held before.
        hparams: settings, with an ``act_ratio``.
    """
    epsilon = min(scores) * (1.0 if hparams.act_ratio is None else hparams.act_ratio)
    if n_before:
        epsilon = min(epsilon, states[-1].epsilon)
    if hparams.retrieve:
        return [*states[:-1], states[-1].with_(epsilon=epsilon)]
    epsilon = min([epsilon, *(state.epsilon for state in states[:-1])])  # WISE-Merge has one threshold for all
    return [state.with_(epsilon=epsilon) for state in states]


@dataclass(frozen=True)
class Closed:
    """The memories after a shard was closed.

    Attributes:
        states: the memories.
        places: for each memory before, where its edits are now.
        changed: the memory whose threshold has to be set anew: the closed shard, or what it was folded into.
    """

    states: list[MemoryState]
    places: list[int]
    changed: int


def close_shard(
    states: Sequence[MemoryState], hparams: WISEHyperParams, generator: torch.Generator, early: bool = False
) -> Closed:
    """Close the live shard at the end, and fold the closed shards once there are k of them, or with ``early`` now."""
    closed = [*states[:-1], states[-1].with_(stage=SHARD, mask=None)]
    shards = [index for index, state in enumerate(closed) if state.stage == SHARD]
    if len(shards) < hparams.n_shards and not early:
        return Closed(closed, list(range(len(closed))), len(closed) - 1)
    return _fold(closed, shards, hparams, generator)


def _fold(states: list[MemoryState], shards: list[int], hparams: WISEHyperParams, generator: torch.Generator) -> Closed:
    """Eq. 8: W' <- W + Ties({W^i - W}); the earlier memory of WISE-Merge is one more of the W^i."""
    folded = list(shards)
    if not hparams.retrieve:
        folded = [index for index, state in enumerate(states) if state.stage == MERGED] + folded
    n_edits = sum(states[index].n_edits for index in folded)
    scale = hparams.weights if hparams.weights is not None else 1.0
    # Shards of equal size weigh lambda / k as in the paper; an earlier memory weighs by what it holds.
    weights = [scale * states[index].n_edits / n_edits for index in folded]
    method = hparams.merge_alg
    if hparams.easyedit_merge:
        method = "ties_weighted" if method == "ties" else method
        if len(folded) > len(shards):
            weights = [_EASYEDITS_EARLIER, *((1 - _EASYEDITS_EARLIER) / len(shards) for _ in shards)]
    merged = merge(
        [states[index].delta_weight for index in folded],
        method=method,
        weights=weights,
        density=hparams.densities if hparams.densities is not None else 1.0,
        generator=generator,
    )
    kept = [index for index in range(len(states)) if index not in folded]
    places = [kept.index(index) if index in kept else len(kept) for index in range(len(states))]
    epsilons = [states[index].epsilon for index in folded]
    epsilon = min(epsilons) if hparams.epsilon_as_trained else max(epsilons)
    memory = MemoryState(MERGED, merged, None, epsilon, n_edits)
    return Closed([*(states[index] for index in kept), memory], places, len(kept))
