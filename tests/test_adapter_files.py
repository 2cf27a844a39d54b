"""What is checked in the files of saved edits before a model sees them, and when they are on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS
from editing_helpers import requests, settings
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from tuner_helpers import ALWAYS, PROMPTS, batch, config_for, logits, only_layer, set_thresholds, share_out

import easyedit_wise.folders as folders
import easyedit_wise.persistence as persistence
from easyedit_wise import AdapterFileError, WiseConfig, apply_wise_to_model, attach, load_edits, save_edits
from easyedit_wise.adapter_digests import sealed
from easyedit_wise.tuner.attach import module_name_of

LLAMA = LAYERS["llama"]
DOWN = module_name_of(LLAMA)
INPUTS = batch(PROMPTS)
CONFIG, WEIGHTS, EDITS = "adapter_config.json", "adapter_model.safetensors", "wise_edits.json"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.fixture
def folder(tok: Any, make_model: Callable[..., Any], tmp_path: Path) -> Path:
    model = make_model("llama")
    apply_wise_to_model(model, tok, requests(2), settings(n_iter=2))
    return save_edits(model, tmp_path / "edits")


@pytest.fixture
def of_peft(make_model: Callable[..., Any], tmp_path: Path) -> Path:
    model = get_peft_model(make_model("llama"), config_for(LLAMA, task_type="CAUSAL_LM")).eval()
    share_out(model)
    model.save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


def read(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(read(path) | changes), encoding="utf-8")


# -- digests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, EDITS])
def test_one_changed_digit_is_noticed(folder: Path, llama: Any, name: str) -> None:
    """In each file at a place where it would otherwise be read without complaint."""
    data = bytearray((folder / name).read_bytes())
    data[{CONFIG: data.find(b'"seed": ') + 8, WEIGHTS: len(data) - 1, EDITS: data.find(b"Rome")}[name]] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(AdapterFileError, match=rf"{name}.*(SHA-256|digest).*from a backup"):
        load_edits(llama, folder)


def test_white_space_is_no_content(folder: Path, llama: Any) -> None:
    path = folder / EDITS
    path.write_text(json.dumps(read(path), indent=7), encoding="utf-8")
    load_edits(llama, folder)


def test_files_of_two_saves_are_noticed(folder: Path, make_model: Callable[..., Any], tok: Any, tmp_path: Path) -> None:
    model = make_model("llama")
    apply_wise_to_model(model, tok, requests(3), settings(n_iter=2))
    other = save_edits(model, tmp_path / "other")
    (folder / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes())
    with pytest.raises(AdapterFileError, match="is not the file that was saved with"):
        load_edits(make_model("llama"), folder)


def test_a_list_that_an_earlier_save_left_is_noticed(
    folder: Path, of_peft: Path, make_model: Callable[..., Any]
) -> None:
    """PEFT saves over the adapter and knows nothing of the list, which would be taken for the new edits'."""
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes((of_peft / name).read_bytes())
    with pytest.raises(AdapterFileError, match=r"remove wise_edits\.json, which belongs to the earlier one"):
        load_edits(make_model("llama"), folder)
    (folder / EDITS).unlink()
    model = make_model("llama")
    load_edits(model, folder)
    assert len(only_layer(model).memories("default")) == 3


def test_a_list_that_is_gone_is_noticed(folder: Path, make_model: Callable[..., Any]) -> None:
    with_list = make_model("llama")
    load_edits(with_list, folder)
    (folder / EDITS).unlink()
    with pytest.raises(AdapterFileError, match=r"wise_edits\.json does not exist.*PeftModel\.from_pretrained"):
        load_edits(make_model("llama"), folder)
    theirs = PeftModel.from_pretrained(make_model("llama"), folder).eval()
    assert torch.equal(logits(theirs, INPUTS), logits(with_list, INPUTS))


def test_a_list_of_the_first_format_has_no_digests(folder: Path, make_model: Callable[..., Any]) -> None:
    values = read(folder / EDITS)
    del values["files"], values["digest"]
    (folder / EDITS).write_text(json.dumps({**values, "format_version": 1}), encoding="utf-8")
    rewrite(folder / CONFIG, pooling="last")
    model = make_model("llama")
    load_edits(model, folder)
    assert len(only_layer(model).edit_stream.held) == 2


@pytest.mark.parametrize("gone", ["files", "digest"])
def test_the_second_format_must_have_them(folder: Path, llama: Any, gone: str) -> None:
    values = read(folder / EDITS)
    del values[gone]
    (folder / EDITS).write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(AdapterFileError, match=r"wise_edits\.json is damaged.*digest"):
        load_edits(llama, folder)


# -- without digests ------------------------------------------------------------------------------------


def test_no_room_is_made_for_memories_that_are_not_there(
    of_peft: Path, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred thousand of a 7B model's would be 18 TB."""
    rewrite(of_peft / CONFIG, memories=["merged"] * 100_000)
    monkeypatch.setattr(persistence, "attach", lambda *_: pytest.fail("room was made"))
    with pytest.raises(AdapterFileError, match=r"holds 3 memories, and adapter_config\.json lists 100000"):
        load_edits(llama, of_peft)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"(\w+)+\.mlp\.(\w+)*down_proj"},
        {"exclude_modules": "(.*)*x"},
        {"layers_pattern": ["(.*)*x"], "layers_to_transform": 1},
        {"layers_pattern": "(.*)*x", "layers_to_transform": 1},
        {"layers_pattern": [5]},
    ],
)
def test_patterns_are_not_run(of_peft: Path, llama: Any, changes: dict[str, Any]) -> None:
    rewrite(of_peft / CONFIG, **changes)
    with pytest.raises(AdapterFileError, match="is a pattern, and no plain name"):
        load_edits(llama, of_peft)


def test_a_plain_name_is_no_pattern(of_peft: Path, make_model: Callable[..., Any]) -> None:
    for changes in (
        {"target_modules": DOWN},
        {"target_modules": ["down_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ):
        rewrite(of_peft / CONFIG, **changes)
        load_edits(make_model("llama"), of_peft)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "x" * 10_000},
        {"target_modules": ["x" * 10_000]},
        {"target_modules": ["nowhere"], "base_model_name_or_path": "x" * 10_000},
    ],
    ids=["a layer", "a list of layers", "the base model"],
)
def test_an_error_does_not_quote_pages(of_peft: Path, llama: Any, changes: dict[str, Any]) -> None:
    rewrite(of_peft / CONFIG, **changes)
    with pytest.raises(AdapterFileError, match="do not fit this model") as caught:
        load_edits(llama, of_peft)
    assert len(str(caught.value)) < 1500


def test_whole_modules_are_left_to_peft(llama: Any, make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = get_peft_model(llama, config_for(LLAMA, task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"replaces whole modules.*lm_head.*PeftModel\.from_pretrained"):
        load_edits(make_model("llama"), tmp_path)
    PeftModel.from_pretrained(make_model("llama"), tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("delta_weight.values", torch.tensor(torch.nan)),
        ("delta_weight.values", torch.tensor(torch.inf)),
        ("epsilon", torch.tensor(torch.nan)),
        ("epsilon", torch.tensor(3)),
        ("weakest_edit", torch.tensor(torch.nan)),
        ("weakest_answered", torch.tensor(torch.nan)),
        ("n_edits", torch.tensor(-1)),
        ("n_edits", torch.tensor(1.5)),
    ],
)
def test_numbers_that_no_edit_leaves_are_refused(of_peft: Path, llama: Any, name: str, value: Tensor) -> None:
    tensors = load_file(of_peft / WEIGHTS)
    key = next(key for key in tensors if key.endswith(name))
    changed = tensors[key].clone().to(value.dtype)
    changed.view(-1)[:1] = value
    save_file({**tensors, key: changed}, of_peft / WEIGHTS)
    with pytest.raises(AdapterFileError, match=rf"is damaged.*{name.split('.')[0]}.*holds what no edit leaves there"):
        load_edits(llama, of_peft)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, EDITS])
def test_a_pipe_is_not_waited_for(folder: Path, llama: Any, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(AdapterFileError, match=name):
        load_edits(llama, folder)


@pytest.mark.parametrize("name", [CONFIG, EDITS])
def test_what_is_nested_too_deep_is_refused(folder: Path, llama: Any, name: str) -> None:
    (folder / name).write_text('{"peft_type": ' + "[" * 200_000 + "]" * 200_000 + "}", encoding="utf-8")
    if name == CONFIG:
        record = sealed(read(folder / EDITS), folder)
        (folder / EDITS).write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(AdapterFileError, match=rf"{name} is damaged"):
        load_edits(llama, folder)


def test_a_long_text_is_not_quoted_whole(of_peft: Path, llama: Any) -> None:
    rewrite(of_peft / CONFIG, task_type="x" * 100_000)
    with pytest.raises(AdapterFileError) as error:
        load_edits(llama, of_peft)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_ratio": "0.2"},
        {"mask_ratio": True},
        {"mask_ratio": float("nan")},
        {"seed": 1.5},
        {"seed": 2**64},
        {"pooling": ["mean"]},
        {"pooling": "sum"},
        {"save_dtype": 32},
        {"relative_scores": "no"},
        {"memories": "live"},
        {"memories": [["live"]]},
        {"modules_to_save": [""]},
        {"score_activation": "nonsense"},
        {"score_activation": 5},
    ],
)
def test_a_configuration_of_other_kinds_is_refused(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=name):
        WiseConfig(**changes)


# -- on the disk ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exists", [True, False])
def test_files_are_on_the_disk_before_they_get_their_name(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    happened: list[str] = []
    names: dict[int, str] = {}
    really = {"open": os.open, "fsync": os.fsync, "replace": os.replace, "exchange": folders.exchange}

    def opened(path: Any, *args: Any, **kwargs: Any) -> int:
        descriptor = really["open"](path, *args, **kwargs)
        names[descriptor] = Path(path).name if isinstance(path, (str, Path)) else ""
        return descriptor

    def synced(descriptor: int) -> None:
        happened.append(f"sync {names[descriptor]}")
        really["fsync"](descriptor)

    def moved(name: str) -> Callable[..., Any]:
        def move(*args: Any) -> Any:
            happened.append("move")
            return really[name](*args)

        return move

    attach(llama, config_for(LLAMA))
    set_thresholds(only_layer(llama), ALWAYS)
    if exists:
        save_edits(llama, tmp_path / "edits")
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved("replace"))
    monkeypatch.setattr(folders, "exchange", moved("exchange"))
    save_edits(llama, tmp_path / "edits")
    before = happened[: happened.index("move")]
    assert {f"sync {name}" for name in (CONFIG, WEIGHTS, EDITS, "README.md")} < set(before)
    assert before[-1].startswith("sync .edits-")  # the folder, after what is in it
    assert happened[-1] == f"sync {tmp_path.name}"
