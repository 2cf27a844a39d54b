"""When a shard is full."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS
from editing_helpers import only_layer, requests, settings, stream_on

from easyedit_wise import apply_wise_to_model, load_edits, save_edits
from easyedit_wise.editing.shards import is_full
from easyedit_wise.hparams import WISEHyperParams
from easyedit_wise.tuner.memory import LIVE, MemoryState


def closed_form(**changes: Any) -> WISEHyperParams:
    shards = {"save_freq": 3, "merge_freq": 3, "retrieve": True, "mask": "columns", "mask_ratio": 1.0}
    training = {"consolidation": 10.0, "optimizer": "steepest", "layer_units": True}
    return settings(LAYERS["llama"], **shards | training | changes)


def test_a_shard_is_full_at_its_capacity_by_hand() -> None:
    """Three of four columns: at .5 a column 1.5 tokens fill it; three edits do in any case."""
    live = MemoryState(LIVE, torch.zeros(2, 4), torch.tensor([[True, True, False, True]]).expand(2, 4), 0.0, 1)
    hparams = closed_form(capacity=0.5)
    assert [is_full(live, n_tokens, hparams) for n_tokens in (1, 2)] == [False, True]
    assert not is_full(live, 1000, replace(hparams, capacity=0.0))
    assert is_full(live.with_(n_edits=3), 1, hparams)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(("of_first", "held"), [(1.5, [2, 2]), (0.0, [3, 1])])
def test_long_edits_fill_a_memory_early(
    llama: Any, tok: Any, tmp_path: Path, loaded: bool, of_first: float, held: list[int]
) -> None:
    """Room for the tokens of one edit and a half: the second fills it. Without a capacity the third does."""
    asked = requests(4)
    model, restore = apply_wise_to_model(llama, tok, asked[:1], closed_form(capacity=0.0))
    shard, layer = stream_on(model)._open_shard, only_layer(model)
    assert shard is not None
    capacity = of_first * shard.n_tokens / layer.in_features
    if loaded:
        save_edits(model, tmp_path / "one")
        restore()
        load_edits(llama, tmp_path / "one")
    model, _ = apply_wise_to_model(llama, tok, asked[1:], closed_form(capacity=capacity))
    assert [state.n_edits for state in only_layer(model).memories("default")] == held
