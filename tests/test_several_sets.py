"""Several sets of edits on one model: made apart, loaded together, asked for by name, and edited further."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model
from editing_helpers import FACTS, requests, settings
from torch import Tensor
from tuner_helpers import generate, logits, only_layer, same_memories

from easyedit_wise import (
    apply_wise_to_model,
    detach,
    edits_chosen,
    edits_disabled,
    last_route,
    load_edits,
    save_edits,
    use_edits,
)

NAMES = ("law", "news", "sport")
FACTS_OF = {name: requests()[3 * index : 3 * index + 3] for index, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def folders(tok: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three folders of three edits each, made on three copies of one model."""
    made = {}
    for index, name in enumerate(NAMES):
        model, _ = apply_wise_to_model(
            build_model("llama"),
            tok,
            FACTS_OF[name],
            settings(n_iter=8, edit_lr=0.2, seed=index, save_freq=2, merge_freq=4),
        )
        made[name] = save_edits(model, tmp_path_factory.mktemp("sets") / name)
    return made


@pytest.fixture
def loaded(folders: dict[str, Path], tok: Any) -> Any:
    model = build_model("llama")
    for name, folder in folders.items():
        load_edits(model, folder, adapter_name=name, tok=tok)
    return model


def prompts(tok: Any, texts: list[str]) -> dict[str, Tensor]:
    return dict(tok(texts, return_tensors="pt", padding=True))


def test_three_sets_are_routed_apart_or_together(loaded: Any, folders: dict[str, Path], tok: Any) -> None:
    layer = only_layer(loaded)
    assert layer.active_adapters == ["sport"]  # the one that was loaded last
    asked = prompts(tok, [prompt for prompt, _ in FACTS])
    alone = {}
    for name, folder in folders.items():
        model = build_model("llama")
        states = load_edits(model, folder).memories("default")
        assert same_memories(layer.memories(name), states)
        alone[name] = logits(model, asked), generate(model, asked), last_route(model).choice.tolist()
        assert any(choice >= 0 for choice in alone[name][2])
    names = [NAMES[row % 3] for row in range(len(FACTS))]
    with edits_chosen(loaded, names):
        mixed, said = logits(loaded, asked), generate(loaded, asked)
        route = last_route(loaded)
    assert {name.partition("/")[0] for name in route.memories} == set(NAMES)
    for row, name in enumerate(names):
        expected, answers, choice = alone[name]
        assert torch.allclose(mixed[row], expected[row], atol=1e-4)
        assert said[row] == answers[row]
        described = route.describe(row)["memory"]
        assert described == ("main" if choice[row] == -1 else f"{name}/{choice[row]}")
    for name in NAMES:
        use_edits(loaded, name)
        assert torch.equal(logits(loaded, asked), alone[name][0])
        assert {memory.partition("/")[0] for memory in last_route(loaded).memories} == {name}
    use_edits(loaded, NAMES)
    logits(loaded, asked)
    together = last_route(loaded)
    assert together.memories == tuple(f"{n}/{i}" for n in NAMES for i in range(len(layer.memories(n))))
    answering = {together.describe(row)["memory"].partition("/")[0] for row in range(len(FACTS))} - {"main"}
    assert len(answering) > 1
    with edits_disabled(loaded):
        assert torch.equal(logits(loaded, asked), logits(build_model("llama"), asked))
    detach(loaded)
    assert torch.equal(logits(loaded, asked), logits(build_model("llama"), asked))


def test_each_set_keeps_its_list_of_edits(loaded: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """Loading another set beside it must not cost a set its texts, its settings and its random numbers."""
    for name, folder in folders.items():
        save_edits(loaded, tmp_path / name, name)
        for file in ("wise_edits.json", "adapter_model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (folder / file).read_bytes()


def test_edits_go_on_in_the_set_that_is_in_use(loaded: Any, folders: dict[str, Path], tok: Any) -> None:
    alone = build_model("llama")
    load_edits(alone, folders["law"], tok=tok)
    # A live memory is edited in place, so that what is compared later has to be a copy.
    before = {
        name: [state.with_(delta_weight=state.delta_weight.clone()) for state in only_layer(loaded).memories(name)]
        for name in NAMES
    }
    use_edits(loaded, ["law", "sport"])
    values = settings(n_iter=8, edit_lr=0.2, seed=0, save_freq=2, merge_freq=4)
    for model in (loaded, alone):
        _, restore = apply_wise_to_model(model, tok, FACTS_OF["news"][:1], values)
    layer = only_layer(loaded)
    assert sum(state.n_edits for state in layer.memories("law")) == 4
    for name in ("news", "sport"):
        assert same_memories(layer.memories(name), before[name])
    assert [edit.request.prompt for edit in layer.edit_streams["law"].held][-1] == FACTS_OF["news"][0]["prompt"]
    assert len(layer.edit_streams["sport"].held) == 3
    # Training sees what the active sets answer nowhere: it is the edit that the set alone would have got.
    assert same_memories(layer.memories("law"), only_layer(alone).memories("default"))
    restore()
    assert same_memories(only_layer(alone).memories("default"), before["law"])


@pytest.mark.filterwarnings("ignore:Adapter law was active which is now deleted")
def test_a_set_is_loaded_again_in_place_of_itself(loaded: Any, folders: dict[str, Path], tok: Any) -> None:
    before = {name: only_layer(loaded).memories(name) for name in NAMES}
    load_edits(loaded, folders["news"], adapter_name="law", tok=tok)
    layer = only_layer(loaded)
    assert layer.active_adapters == ["law"]
    assert same_memories(layer.memories("law"), before["news"])
    assert same_memories(layer.memories("sport"), before["sport"])
    assert [edit.request.prompt for edit in layer.edit_stream.held] == [one["prompt"] for one in FACTS_OF["news"]]
    layer.delete_adapter("law")
    assert set(layer.edit_streams) == {"news", "sport"}


def test_a_copy_has_streams_of_its_own(loaded: Any, tok: Any) -> None:
    use_edits(loaded, "news")
    twin = copy.deepcopy(loaded)
    assert {id(s) for s in only_layer(twin).edit_streams.values()}.isdisjoint(
        {id(s) for s in only_layer(loaded).edit_streams.values()}
    )
    before = only_layer(loaded).memories("news")
    apply_wise_to_model(
        twin, tok, FACTS_OF["sport"][:1], settings(n_iter=8, edit_lr=0.2, seed=1, save_freq=2, merge_freq=4)
    )
    assert same_memories(only_layer(loaded).memories("news"), before)
    assert len(only_layer(twin).edit_stream.held) == 4
