"""Edits as files: what is written, what comes back, and what happens to files that are not as they should be."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS
from editing_helpers import requests, settings
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from tuner_helpers import (
    ALWAYS,
    PROMPTS,
    batch,
    config_for,
    generate,
    logits,
    memory,
    only_layer,
    same_memories,
    set_thresholds,
    share_out,
    with_memories,
)

import easyedit_wise.folders as folders
import easyedit_wise.persistence as persistence
from easyedit_wise import (
    AdapterFileError,
    EditStream,
    apply_wise_to_model,
    attach,
    detach,
    load_edits,
    save_edits,
)
from easyedit_wise.adapter_digests import sealed
from easyedit_wise.persistence import CONFIG_FILE, EDITS_FILE, WEIGHTS_FILE
from easyedit_wise.tuner.attach import module_name_of
from easyedit_wise.tuner.model import find_wise_layers

LLAMA = LAYERS["llama"]
WRITTEN = ["README.md", CONFIG_FILE, WEIGHTS_FILE, EDITS_FILE]
INPUTS = batch(PROMPTS)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.fixture
def folder(make_model: Callable[..., Any], tmp_path: Path) -> Path:
    """Saved edits of a tiny llama: three memories that share out the prompts."""
    model = make_model("llama")
    attach(model, config_for(LLAMA))
    share_out(model)
    return save_edits(model, tmp_path / "edits")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rewrite(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | changes), encoding="utf-8")


def reseal(folder: Path) -> None:
    """Give files that were changed the digests of unchanged ones, as somebody could who wants them to be read."""
    path = folder / EDITS_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(sealed(record, folder)), encoding="utf-8")
    except (ValueError, TypeError, AttributeError, OSError):
        pass  # files that are missing, or no JSON


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What a failed load must not change."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "attributes": sorted(vars(model)),
        "hooks": [len(model._forward_hooks), len(model._forward_pre_hooks)],
        "adapters": sorted(getattr(model, "peft_config", {})),
        "streams": [(id(layer.edit_stream), layer.active_adapters) for layer in find_wise_layers(model).values()],
        "configs": [dict(layer.wisemem_config) for layer in find_wise_layers(model).values()],
    }


# -- save and load ----------------------------------------------------------------------------------


def test_loaded_edits_answer_like_the_saved_ones(
    any_model: tuple[Any, str], make_model: Callable[..., Any], tmp_path: Path
) -> None:
    model, parameter = any_model
    attach(model, config_for(parameter))
    states = share_out(model)
    edited, said = logits(model, INPUTS), generate(model, INPUTS)
    assert len(set(only_layer(model).last_route.choice.tolist())) > 2
    assert save_edits(model, tmp_path / "edits") == tmp_path / "edits"
    detach(model)
    assert not torch.equal(logits(model, INPUTS), edited)

    layer = load_edits(model, tmp_path / "edits")
    assert layer is model.get_submodule(module_name_of(parameter))
    assert torch.equal(logits(model, INPUTS), edited)
    assert generate(model, INPUTS) == said
    assert same_memories(layer.memories("default"), states)
    assert not any(p.requires_grad for p in model.parameters())

    other = make_model(model.config.model_type)
    load_edits(other, str(tmp_path / "edits"), adapter_name="facts")
    assert torch.equal(logits(other, INPUTS), edited)
    assert generate(other, INPUTS) == said
    assert same_memories(only_layer(other).memories("facts"), states)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_exact_edits(
    make_model: Callable[..., Any], tmp_path: Path, dtype: torch.dtype
) -> None:
    model = make_model("llama").to(dtype)
    attach(model, config_for(LLAMA))
    states = share_out(model)
    edited = logits(model, INPUTS)
    save_edits(model, tmp_path / "edits")
    other = make_model("llama").to(dtype)
    load_edits(other, tmp_path / "edits")
    assert torch.equal(logits(other, INPUTS), edited)
    assert same_memories(only_layer(other).memories("default"), states)


def test_files_are_safetensors_and_json_only(folder: Path) -> None:
    assert sorted(files(folder)) == WRITTEN
    tensors = load_file(folder / WEIGHTS_FILE)
    memories = f"base_model.model.{module_name_of(LLAMA)}.wisemem_memories"
    scalars = ("epsilon", "n_edits", "weakest_edit", "weakest_answered")
    names = ("delta_weight.values", *scalars)
    expected = {f"{memories}.{index}.{name}" for index in range(2) for name in names}
    live = {f"{memories}.2.{name}" for name in ("delta_weight.values", "delta_weight.bits", "mask.bits")}
    assert set(tensors) == {*expected, *live, *(f"{memories}.2.{name}" for name in scalars)}
    assert tensors[f"{memories}.2.mask.bits"].dtype == torch.uint8
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    assert config["peft_type"] == "WISE"
    assert config["memories"] == ["merged", "shard", "live"]
    assert config["target_modules"] == [module_name_of(LLAMA)]
    record = json.loads((folder / EDITS_FILE).read_text(encoding="utf-8"))
    assert record["format_version"] == 5
    assert record["layer"] == module_name_of(LLAMA)
    assert [one["stage"] for one in record["memories"]] == ["merged", "shard", "live"]
    # Nothing temporary is left beside the folder, and others may read what is in it.
    assert [path.name for path in folder.parent.iterdir()] == ["edits"]
    assert folder.stat().st_mode & 0o755 == 0o755


def test_saving_changes_nothing_in_the_model(llama: Any, tmp_path: Path) -> None:
    with_memories(llama, LLAMA, 1.0, ALWAYS)
    edited, before = logits(llama, INPUTS), fingerprint(llama)
    save_edits(llama, tmp_path / "edits")
    assert fingerprint(llama) == before
    assert torch.equal(logits(llama, INPUTS), edited)


def test_saved_edits_load_with_peft(folder: Path, make_model: Callable[..., Any]) -> None:
    ours = make_model("llama")
    load_edits(ours, folder)
    theirs = PeftModel.from_pretrained(make_model("llama"), folder).eval()
    assert torch.equal(logits(theirs, INPUTS), logits(ours, INPUTS))
    assert generate(theirs, INPUTS) == generate(ours, INPUTS)


@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["layers.1.mlp.down_proj"]}, {"target_modules": ["down_proj"], "layers_to_transform": 1}],
)
def test_an_adapter_that_peft_saved_can_be_loaded(
    make_model: Callable[..., Any], tmp_path: Path, config: dict[str, Any]
) -> None:
    peft_model = get_peft_model(make_model("llama"), persistence.WiseConfig(task_type="CAUSAL_LM", **config)).eval()
    states = share_out(peft_model)
    edited = logits(peft_model, INPUTS)
    peft_model.save_pretrained(tmp_path / "peft")
    model = make_model("llama")
    layer = load_edits(model, tmp_path / "peft")
    assert torch.equal(logits(model, INPUTS), edited)
    assert same_memories(layer.memories("default"), states)
    assert layer.edit_stream is None  # PEFT knows of no stream
    save_edits(model, tmp_path / "peft")  # its README is no obstacle
    assert sorted(files(tmp_path / "peft")) == WRITTEN


def test_a_wrapped_model_can_be_saved(make_model: Callable[..., Any], tmp_path: Path) -> None:
    peft_model = get_peft_model(make_model("llama"), config_for(LLAMA, task_type="CAUSAL_LM")).eval()
    share_out(peft_model)
    save_edits(peft_model, tmp_path / "edits")
    model = make_model("llama")
    load_edits(model, tmp_path / "edits")
    assert torch.equal(logits(model, INPUTS), logits(peft_model, INPUTS))


def test_loading_replaces_edits_of_the_same_name(folder: Path, llama: Any) -> None:
    layer = with_memories(llama, LLAMA, 1.0, pooling="max")
    mine = layer.memories("default")
    kept = mine[0].delta_weight.clone()
    assert load_edits(llama, folder) is layer
    assert [state.stage for state in layer.memories("default")] == ["merged", "shard", "live"]
    assert llama.peft_config["default"].memories == ["merged", "shard", "live"]
    assert layer.wisemem_config["default"].pooling == "mean"
    assert torch.equal(mine[0].delta_weight, kept)  # a snapshot of before is still what it was


def test_loading_beside_other_edits_keeps_them(folder: Path, llama: Any, make_model: Callable[..., Any]) -> None:
    alone = make_model("llama")
    load_edits(alone, folder)
    layer = with_memories(llama, LLAMA, ALWAYS)
    mine = logits(llama, INPUTS)
    load_edits(llama, folder, adapter_name="more")
    assert layer.active_adapters == ["more"]
    assert torch.equal(logits(llama, INPUTS), logits(alone, INPUTS))
    layer.set_adapter("default")
    assert torch.equal(logits(llama, INPUTS), mine)


def test_the_named_set_of_edits_is_saved(folder: Path, llama: Any, tmp_path: Path) -> None:
    with_memories(llama, LLAMA, ALWAYS)
    load_edits(llama, folder, adapter_name="more")
    save_edits(llama, tmp_path / "again", adapter_name="more")
    saved, again = load_file(folder / WEIGHTS_FILE), load_file(tmp_path / "again" / WEIGHTS_FILE)
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[key], again[key]) for key in saved)
    with pytest.raises(ValueError, match="no set of edits called 'other': it has default, more"):
        save_edits(llama, tmp_path / "third", adapter_name="other")


# -- overwriting ------------------------------------------------------------------------------------


def is_whole(folder: Path) -> bool:
    return sorted(path.name for path in folder.iterdir()) == WRITTEN


def edited_llama(make_model: Callable[..., Any], *epsilons: float) -> Any:
    model = make_model("llama")
    with_memories(model, LLAMA, *epsilons)
    return model


def test_overwriting_replaces_the_folder_as_a_whole(
    folder: Path, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step that changes the file system, a whole folder has the name."""
    old, states = files(folder), []

    def watched(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **kwargs: Any) -> Any:
            assert is_whole(folder)
            try:
                return change(*args, **kwargs)
            finally:
                assert is_whole(folder)
                states.append(files(folder) == old)

        return changed

    if folders.exchange(folder, folder):  # Linux: the swap is one step
        monkeypatch.setattr(folders, "exchange", watched(folders.exchange))
        monkeypatch.setattr(os, "replace", watched(os.replace))
    monkeypatch.setattr(shutil, "rmtree", watched(shutil.rmtree))
    monkeypatch.setattr(persistence, "write_tensors", watched(persistence.write_tensors))
    model = edited_llama(make_model, 1.0, 2.0)
    save_edits(model, folder)
    assert states[0] is True
    assert states[-1] is False
    assert [path.name for path in folder.parent.iterdir()] == ["edits"]
    other = make_model("llama")
    load_edits(other, folder)
    assert [state.epsilon for state in only_layer(other).memories("default")] == [1.0, 2.0]


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two steps"])
@pytest.mark.parametrize("failing", ["write_tensors", "exchange", "os.replace 1", "os.replace 2"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failure_while_saving_leaves_the_old_folder(
    folder: Path,
    make_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    exchange: bool,
    failing: str,
    error: BaseException,
) -> None:
    old, n_replaced = files(folder), 0
    real_replace = os.replace

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    def replace(*args: Any) -> None:
        nonlocal n_replaced
        n_replaced += 1
        if failing == f"os.replace {n_replaced}":
            raise error
        real_replace(*args)

    if not exchange:
        monkeypatch.setattr(folders, "exchange", lambda *_: False)
    if failing == "write_tensors":
        monkeypatch.setattr(persistence, failing, fail)
    if failing == "exchange":
        monkeypatch.setattr(folders, failing, fail)
    monkeypatch.setattr(os, "replace", replace)
    model = edited_llama(make_model, 1.0)
    if exchange and failing.startswith("os.replace"):
        save_edits(model, folder)  # not used there
        assert n_replaced == 0
        return
    with pytest.raises(type(error)):
        save_edits(model, folder)
    assert files(folder) == old
    assert [path.name for path in folder.parent.iterdir()] == ["edits"]


def test_saving_in_two_steps_works_as_well(
    folder: Path, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "exchange", lambda *_: False)
    save_edits(edited_llama(make_model, 1.0, 2.0), folder)
    assert is_whole(folder)
    assert len(json.loads((folder / EDITS_FILE).read_text(encoding="utf-8"))["memories"]) == 2
    assert [path.name for path in folder.parent.iterdir()] == ["edits"]


def test_a_folder_with_other_files_is_not_replaced(llama: Any, tmp_path: Path) -> None:
    with_memories(llama, LLAMA, 1.0)
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds 'thesis.tex'.*name one of its own"):
        save_edits(llama, tmp_path)
    assert files(tmp_path) == {"thesis.tex": b"years of work"}
    (tmp_path / "empty" / "below").mkdir(parents=True)
    save_edits(llama, tmp_path / "empty" / "below")
    assert is_whole(tmp_path / "empty" / "below")


def test_a_link_to_a_folder_stays_a_link(folder: Path, make_model: Callable[..., Any]) -> None:
    link = folder.parent / "latest"
    link.symlink_to(folder)
    save_edits(edited_llama(make_model, 1.0), link)
    assert link.is_symlink()
    assert is_whole(folder)
    assert len(json.loads((folder / EDITS_FILE).read_text(encoding="utf-8"))["memories"]) == 1


def test_saving_needs_edits_and_a_folder(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="carries no edits"):
        save_edits(llama, tmp_path / "edits")
    with_memories(llama, LLAMA, 1.0)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="is a file"):
        save_edits(llama, tmp_path / "file")
    save_edits(llama, tmp_path / "new" / "and" / "deeper")
    assert is_whole(tmp_path / "new" / "and" / "deeper")


# -- files that are not as they should be -------------------------------------------------------------


def damage(folder: Path, how: str) -> str:
    """Spoil the saved edits; returns the name that the error must give."""
    config, weights, edits = folder / CONFIG_FILE, folder / WEIGHTS_FILE, folder / EDITS_FILE
    name, what = how.split(": ")
    path = {"config": config, "weights": weights, "edits": edits}[name]
    if what == "missing":
        path.unlink()
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif what == "garbage":
        path.write_bytes(bytes(range(256)) * 4)
    elif what == "a list":
        path.write_text("[1, 2]", encoding="utf-8")
    elif what == "a word":
        path.write_text('"WISE"', encoding="utf-8")
    elif what == "a folder":
        path.unlink()
        path.mkdir()
    elif what == "another method":
        rewrite(path, peft_type="LORA")
    elif what == "no method":
        rewrite(path, peft_type=None)
    elif what == "a bad value":
        rewrite(path, mask_ratio=7)
    elif what == "a text for a number":
        rewrite(path, mask_ratio="much")
    elif what == "a bad seed":
        rewrite(path, seed="many")
    elif what == "a bad stage":
        rewrite(path, memories=["merged", "shard", "melted"])
    elif what == "no stages":
        rewrite(path, memories=None)
    elif what == "other stages":
        rewrite(path, memories=["merged", "shard", "merged"])
        return WEIGHTS_FILE
    elif what == "fewer memories":
        rewrite(path, memories=["merged", "shard"])
        return WEIGHTS_FILE
    elif what == "more memories":
        rewrite(path, memories=["merged", "shard", "live", "merged"])
        return WEIGHTS_FILE
    elif what == "no layer":
        rewrite(path, target_modules=None)
        return "names none"
    elif what == "many layers":
        rewrite(path, target_modules=["down_proj"])
        return "3 match"
    elif what == "a newer format":
        rewrite(path, format_version=6)
    elif what == "settings of a later version":
        rewrite(path, settings={"inner_params": [LLAMA], "telepathy": True})
    elif what == "an edit without a prompt":
        rewrite(path, edits=[{"target_new": "x", "memory": 0}])
    elif what == "an edit without a memory":
        rewrite(path, edits=[{"prompt": "x", "target_new": "y"}])
    elif what == "an edit in no memory":
        rewrite(path, edits=[{"prompt": "x", "target_new": "y", "memory": 3}])
    elif what == "an edit that is a text":
        rewrite(path, edits=["x"])
    elif what == "a spoiled generator":
        rewrite(path, generator="abcd")
    elif what == "a generator that is a number":
        rewrite(path, generator=5)
    elif what == "no tensors":
        save_file({}, path)
    elif what in ("a tensor is missing", "a tensor too many", "another shape"):
        tensors = load_file(path)
        key = next(key for key in tensors if key.endswith("1.delta_weight.values"))
        if what == "a tensor is missing":
            del tensors[key]
        elif what == "a tensor too many":
            tensors[key.replace("delta_weight.values", "gamma")] = torch.zeros(1)
        else:
            tensors[key] = torch.zeros(32, 63)
            save_file(tensors, path)
            return "(32, 63)"
        save_file(tensors, path)
    else:
        raise AssertionError(how)
    return path.name


DAMAGES = [
    *(f"{name}: {what}" for name in ("config", "weights") for what in ("missing", "empty", "truncated", "garbage")),
    *(f"edits: {what}" for what in ("empty", "truncated", "garbage", "a list", "a word")),
    *(f"config: {what}" for what in ("a list", "a word", "a folder", "another method", "no method", "a bad value")),
    *(f"config: {what}" for what in ("a text for a number", "a bad seed", "a bad stage", "no stages")),
    *(f"config: {what}" for what in ("other stages", "fewer memories", "more memories", "no layer", "many layers")),
    "edits: a newer format",
    "edits: settings of a later version",
    *(f"edits: an edit {what}" for what in ("without a prompt", "without a memory", "in no memory", "that is a text")),
    *(f"edits: a {what}" for what in ("spoiled generator", "generator that is a number")),
    *(f"weights: {what}" for what in ("a folder", "no tensors", "a tensor is missing", "a tensor too many")),
    "weights: another shape",
]


@pytest.mark.parametrize("resealed", [True, False], ids=["resealed", "as it is"])
@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_files_are_named_and_leave_the_model_alone(folder: Path, llama: Any, how: str, resealed: bool) -> None:
    named = damage(folder, how)
    if resealed:
        reseal(folder)
    else:
        named = how.split(": ")[0].replace("weights", "model")
    base, before = logits(llama, INPUTS), fingerprint(llama)
    with pytest.raises(AdapterFileError) as error:
        load_edits(llama, folder)
    message = str(error.value)
    assert str(folder) in message
    assert named in message
    cures = (
        "save the edits again",
        "name a folder",
        "update easyedit_wise",
        "same save",
        "Load them onto",
        "from a backup",
        "WISE",
    )
    assert any(cure in message for cure in cures)
    assert fingerprint(llama) == before
    assert torch.equal(logits(llama, INPUTS), base)


@pytest.mark.parametrize("adapter_name", ["default", "more"])
@pytest.mark.parametrize("how", ["config: a bad seed", "config: other stages", "weights: another shape"])
def test_damaged_files_leave_earlier_edits_alone(folder: Path, llama: Any, how: str, adapter_name: str) -> None:
    damage(folder, how)
    layer = with_memories(llama, LLAMA, ALWAYS, 1.0)
    layer.install("default", [*layer.memories("default"), memory(layer, 2, stage="live")])
    layer.set_adapter("default", inference_mode=False)  # as while PEFT trains it
    layer.edit_stream = object()
    states = layer.memories("default")
    edited, before = logits(llama, INPUTS), fingerprint(llama)
    with pytest.raises(AdapterFileError):
        load_edits(llama, folder, adapter_name=adapter_name)
    assert fingerprint(llama) == before
    assert torch.equal(logits(llama, INPUTS), edited)
    assert same_memories(layer.memories("default"), states)


def test_the_folder_must_exist(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"nowhere.*does not exist: name a folder"):
        load_edits(llama, tmp_path / "nowhere")
    assert issubclass(AdapterFileError, ValueError)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_edits_of_another_architecture_are_refused(
    folder: Path, make_model: Callable[..., Any], architecture: str
) -> None:
    model = make_model(architecture)
    base, before = logits(model, INPUTS), fingerprint(model)
    with pytest.raises(AdapterFileError, match=r"do not fit this model.*does not exist.*Load them onto the model"):
        load_edits(model, folder)
    assert fingerprint(model) == before
    assert torch.equal(logits(model, INPUTS), base)


def test_edits_of_another_size_or_layer_are_refused(
    folder: Path, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    wide = nn.Linear(64, 48, bias=False)
    model = make_model("llama")
    model.model.layers[1].mlp.down_proj = wide
    with pytest.raises(AdapterFileError, match=r"do not fit this model.*\(32, 64\).*and this model needs \(48, 64\)"):
        load_edits(model, folder)
    assert model.model.layers[1].mlp.down_proj is wide
    assert not find_wise_layers(model)

    model = make_model("llama")
    with_memories(model, LLAMA.replace("[1]", "[2]"), ALWAYS)
    edited, before = logits(model, INPUTS), fingerprint(model)
    for name in ("default", "more"):
        with pytest.raises(AdapterFileError, match=r"edits are in model.layers.2.mlp.down_proj"):
            load_edits(model, folder, adapter_name=name)
        assert fingerprint(model) == before
        assert torch.equal(logits(model, INPUTS), edited)


def test_edits_are_not_loaded_beside_another_method(folder: Path, llama: Any) -> None:
    model = get_peft_model(llama, LoraConfig(target_modules=["q_proj"])).base_model.model
    before = fingerprint(model)
    with pytest.raises(AdapterFileError, match="carries the PEFT method"):
        load_edits(model, folder)
    assert fingerprint(model) == before


def test_the_error_says_which_model_the_edits_were_made_for(
    llama: Any, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    with_memories(llama, LLAMA, 1.0, base_model_name_or_path="tiny/llama")
    save_edits(llama, tmp_path / "edits")
    with pytest.raises(AdapterFileError, match="made for, tiny/llama"):
        load_edits(make_model("gpt2"), tmp_path / "edits")


# -- the stream of edits ------------------------------------------------------------------------------


def test_a_stream_continues_as_if_it_had_never_been_saved(
    tok: Any, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    """Masks, merges, thresholds: everything after loading is what it would have been."""
    hparams = settings(save_freq=2, merge_freq=4, retrieve=True, n_iter=2)
    model = make_model("llama")
    apply_wise_to_model(model, tok, requests(5), hparams)
    save_edits(model, tmp_path / "edits")
    loaded = make_model("llama")
    load_edits(loaded, tmp_path / "edits", tok=tok)
    stream = only_layer(loaded).edit_stream
    assert isinstance(stream, EditStream)
    assert stream.hparams == hparams
    assert [edit.request for edit in stream.held] == [edit.request for edit in only_layer(model).edit_stream.held]
    for one in (model, loaded):
        apply_wise_to_model(one, tok, requests(9)[5:], hparams)
    ours, theirs = only_layer(model).memories("default"), only_layer(loaded).memories("default")
    assert [state.stage for state in ours] == [state.stage for state in theirs] == ["merged", "merged", "live"]
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one.delta_weight, other.delta_weight, atol=1e-5)
        assert one.epsilon == pytest.approx(other.epsilon, rel=1e-3)
        assert one.n_edits == other.n_edits
    assert torch.equal(ours[-1].mask, theirs[-1].mask)


def test_a_new_shard_after_loading_has_a_mask_of_its_own(
    tok: Any, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    hparams = settings(save_freq=1, merge_freq=4)
    model = make_model("llama")
    apply_wise_to_model(model, tok, requests(1), hparams)
    save_edits(model, tmp_path / "edits")
    loaded = make_model("llama")
    load_edits(loaded, tmp_path / "edits", tok=tok)
    apply_wise_to_model(loaded, tok, requests(2)[1:], hparams)
    first, second = (state.delta_weight != 0 for state in only_layer(loaded).memories("default"))
    overlap = float((first & second).sum() / first.sum())
    assert overlap < 0.5  # two masks of 20 % share 20 % of each other, not all


@pytest.mark.parametrize("with_tok", [True, False])
def test_the_list_of_edits_survives_another_save(
    tok: Any, make_model: Callable[..., Any], tmp_path: Path, with_tok: bool
) -> None:
    model = make_model("llama")
    apply_wise_to_model(model, tok, requests(3, loc_prompt="Water is made of"), settings())
    save_edits(model, tmp_path / "one")
    loaded = make_model("llama")
    load_edits(loaded, tmp_path / "one", tok=tok if with_tok else None)
    save_edits(loaded, tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    record = json.loads((tmp_path / "two" / EDITS_FILE).read_text(encoding="utf-8"))
    assert [edit["target_new"] for edit in record["edits"]] == ["Rome", "the euro", "Saturn"]
    assert record["edits"][0]["loc_prompt"] == "Water is made of"
    # The next edit knows of them: the thresholds take all four into account.
    apply_wise_to_model(loaded, tok, requests(4)[3:], settings())
    assert len(only_layer(loaded).edit_stream.held) == 4
    apply_wise_to_model(model, tok, requests(4)[3:], settings())
    (ours,), (theirs,) = only_layer(model).memories("default"), only_layer(loaded).memories("default")
    assert ours.n_edits == theirs.n_edits == 4
    assert ours.epsilon == pytest.approx(theirs.epsilon, rel=1e-3)


def test_settings_for_the_rest_of_the_stream_can_be_given(
    tok: Any, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model("llama")
    apply_wise_to_model(model, tok, requests(1), settings())
    save_edits(model, tmp_path / "edits")
    loaded = make_model("llama")
    load_edits(loaded, tmp_path / "edits", tok=tok, hparams=settings(n_iter=1))
    assert only_layer(loaded).edit_stream.hparams.n_iter == 1


def test_a_device_among_the_settings_can_be_saved(tok: Any, make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model("llama")
    apply_wise_to_model(model, tok, requests(1), settings(device=torch.device("cpu")))
    save_edits(model, tmp_path / "edits")
    loaded = make_model("llama")
    load_edits(loaded, tmp_path / "edits", tok=tok)
    assert only_layer(loaded).edit_stream.hparams.device == "cpu"


def test_the_edits_of_one_set_are_not_written_beside_another(
    tok: Any, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model("llama")
    apply_wise_to_model(model, tok, requests(2), settings())
    layer = attach(model, config_for(LLAMA), "other")
    set_thresholds(layer, 1.0, adapter_name="other")
    save_edits(model, tmp_path / "other", adapter_name="other")
    record = json.loads((tmp_path / "other" / EDITS_FILE).read_text(encoding="utf-8"))
    assert record["edits"] == []
    assert record["settings"] is None


def test_tensors_are_not_shared_with_the_file_or_the_model(folder: Path, make_model: Callable[..., Any]) -> None:
    one, other = make_model("llama"), make_model("llama")
    load_edits(one, folder)
    load_edits(other, folder)
    edited = logits(other, INPUTS)
    with torch.no_grad():
        only_layer(one).memories("default")[0].delta_weight.zero_()
    assert torch.equal(logits(other, INPUTS), edited)
    only_layer(one).install("default", [memory(only_layer(one), 3)])
    load_edits(one, folder)
    assert torch.equal(logits(one, INPUTS), edited)


def test_all_files_may_be_read_by_whom_the_others_may(llama: Any, tok: Any, tmp_path: Path) -> None:
    apply_wise_to_model(llama, tok, requests(1), settings())
    folder = save_edits(llama, tmp_path / "edits")
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    (tmp_path / "other").write_text("", encoding="utf-8")
    assert modes == {(tmp_path / "other").stat().st_mode & 0o777}
