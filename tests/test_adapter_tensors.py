"""Packed tensors in files: every way of saving packs them, every way of loading reads them, and old files too."""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from tuner_helpers import PROMPTS, batch, config_for, logits, only_layer, same_memories

from easyedit_wise import WiseConfig, attach, detach, edits_disabled, load_edits, save_edits
from easyedit_wise.merging import merge
from easyedit_wise.sharding import random_mask
from easyedit_wise.tuner.adapter_tensors import packed, shapes_in, unpacked
from easyedit_wise.tuner.memory import MemoryState
from easyedit_wise.tuner.model import WiseModel, find_wise_layers
from easyedit_wise.tuner.packing import PackingError

LLAMA = LAYERS["llama"]
INPUTS = batch(PROMPTS)
WEIGHTS = "adapter_model.safetensors"
LAYER = "model.layers.1.mlp.down_proj"
MEMORIES = f"base_model.model.{LAYER}.wisemem_memories"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


def sparse_states(rows: int = 32, columns: int = 64, scale: float = 2.0) -> list[MemoryState]:
    """One memory of each kind that editing leaves: TIES of two shards, a shard of whole columns, a random live one."""
    generator = torch.Generator().manual_seed(3)

    def shard(mask: Tensor) -> Tensor:
        return torch.zeros(rows, columns).masked_scatter(mask, torch.randn(rows * columns, generator=generator) * scale)

    masks = [random_mask((rows, columns), 0.2, generator) for _ in range(3)]
    whole = (torch.arange(columns) % 5 == 0).expand(rows, columns)
    merged = merge([shard(mask) for mask in masks[:2]], "ties")
    return [
        MemoryState("merged", merged, None, 0.6, 7, 0.8, 0.7),
        MemoryState("shard", shard(whole), None, 0.9, 2),
        MemoryState("live", shard(masks[2]), masks[2].clone(), 1.1, 1),
    ]


def edited(model: Any, states: Sequence[MemoryState], adapter_name: str = "default") -> Tensor:
    only_layer(model).install(adapter_name, states)
    result = logits(model, INPUTS)
    with edits_disabled(model):
        assert not torch.equal(logits(model, INPUTS), result)
    return result


# -- every way to save, every way to load -------------------------------------------------------------


def saved_by_peft(model: Any, states: Sequence[MemoryState], path: Path, **config: Any) -> None:
    peft_model = get_peft_model(model, config_for(LLAMA, **config)).eval()
    edited(peft_model, states)
    peft_model.save_pretrained(path)


def saved_by_transformers(model: Any, states: Sequence[MemoryState], path: Path, **config: Any) -> None:
    model.add_adapter(config_for(LLAMA, **config))
    edited(model.eval(), states)
    model.save_pretrained(path)


def saved_by_us(model: Any, states: Sequence[MemoryState], path: Path, **config: Any) -> None:
    attach(model, config_for(LLAMA, **config))
    edited(model, states)
    save_edits(model, path)


def loaded_by_peft(model: Any, path: Path, base: Path) -> Any:
    return PeftModel.from_pretrained(model, path)


def loaded_frugally_by_peft(model: Any, path: Path, base: Path) -> Any:
    return PeftModel.from_pretrained(model, path, low_cpu_mem_usage=True)


def loaded_by_the_auto_class(model: Any, path: Path, base: Path) -> Any:
    return AutoPeftModelForCausalLM.from_pretrained(path)


def loaded_by_transformers(model: Any, path: Path, base: Path) -> Any:
    model.load_adapter(path)
    return model


def loaded_frugally_by_transformers(model: Any, path: Path, base: Path) -> Any:
    model.load_adapter(path, low_cpu_mem_usage=True)
    return model


def loaded_with_its_base_by_transformers(model: Any, path: Path, base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


def loaded_by_us(model: Any, path: Path, base: Path) -> Any:
    load_edits(model, path)
    return model


SAVED = [saved_by_peft, saved_by_transformers, saved_by_us]
LOADED = [
    loaded_by_peft,
    loaded_frugally_by_peft,
    loaded_by_the_auto_class,
    loaded_by_transformers,
    loaded_frugally_by_transformers,
    loaded_with_its_base_by_transformers,
    loaded_by_us,
]


@pytest.fixture
def base(make_model: Callable[..., Any], tmp_path: Path) -> Path:
    make_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("load", LOADED, ids=lambda function: function.__name__)
@pytest.mark.parametrize("save", SAVED, ids=lambda function: function.__name__)
def test_every_way_to_save_packs_and_every_way_to_load_unpacks(
    base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
    save: Callable[..., None],
    load: Callable[..., Any],
    save_dtype: str,
) -> None:
    states = sparse_states()
    folder = tmp_path / "adapter"
    names = {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}
    save(AutoModelForCausalLM.from_pretrained(base), states, folder, save_dtype=save_dtype, **names)
    tensors = load_file(folder / WEIGHTS)
    assert {key.rpartition(".")[2] for key in tensors} == {
        "values",
        "masked",
        "bits",
        "columns",
        "epsilon",
        "n_edits",
        "weakest_edit",
        "weakest_answered",
    }
    assert tensors[f"{MEMORIES}.2.delta_weight.masked"].dtype == getattr(torch, save_dtype)

    recwarn.clear()
    with caplog.at_level(logging.WARNING):
        model = load(AutoModelForCausalLM.from_pretrained(base), folder, base).eval()
    assert not [record.message for record in caplog.records if "MISSING" in record.message]
    assert not [str(one.message) for one in recwarn if "missing" in str(one.message)]
    dtype = getattr(torch, save_dtype)
    expected = [replace(state, delta_weight=state.delta_weight.to(dtype).float()) for state in states]
    assert same_memories(only_layer(model).memories("default"), expected)
    other = AutoModelForCausalLM.from_pretrained(base)
    attach(other, config_for(LLAMA))
    assert torch.equal(logits(model, INPUTS), edited(other, expected))


@pytest.mark.parametrize("unsaid", [("weakest_answered",), ("weakest_edit", "weakest_answered")])
def test_a_file_of_the_unpacked_format_is_read(base: Path, tmp_path: Path, unsaid: tuple[str, ...]) -> None:
    """Until version 0.1.0 each tensor was written as it is in the model."""
    states = sparse_states()
    model = AutoModelForCausalLM.from_pretrained(base)
    saved_by_us(model, states, tmp_path / "adapter", base_model_name_or_path=str(base), task_type="CAUSAL_LM")
    as_it_is = BaseTuner._get_adapter_state_dict.__func__(  # PEFT's own, without the packing
        WiseModel, model, model.peft_config["default"], "default", model.state_dict(), []
    )
    unpacked_file = {
        f"base_model.model.{WiseModel._remove_adapter_name_from_key(key, 'default')}": value.contiguous()
        for key, value in as_it_is.items()
        if not key.endswith(unsaid)
    }
    assert f"{MEMORIES}.0.delta_weight" in unpacked_file
    assert unpacked_file[f"{MEMORIES}.2.mask"].dtype == torch.bool
    save_file(unpacked_file, tmp_path / "adapter" / WEIGHTS)
    record = {"format_version": 1, "method": "WISE", "edits": [], "settings": None, "generator": None}
    (tmp_path / "adapter" / "wise_edits.json").write_text(json.dumps(record), encoding="utf-8")
    for load in LOADED:
        loaded = load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", base)
        known = [state.with_(**dict.fromkeys(unsaid, math.inf)) for state in states]
        assert same_memories(only_layer(loaded).memories("default"), known), load.__name__


def test_saving_packs_a_copy(llama: Any) -> None:
    attach(llama, config_for(LLAMA, save_dtype="float16"))
    states = sparse_states()
    edited(llama, states)
    before = {key: value.clone() for key, value in llama.state_dict().items()}
    get_peft_model_state_dict(llama)
    after = llama.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype for key in before)


# -- sizes ----------------------------------------------------------------------------------------------


def test_files_of_a_rho_of_a_fifth_are_small(tmp_path: Path) -> None:
    rows, columns = 256, 688
    dense = rows * columns * 4
    states = dict(zip(("ties of two", "columns", "live"), sparse_states(rows, columns), strict=True))
    sizes = {}
    for name, state in states.items():
        for dtype in ("float32", "bfloat16"):
            model = nn.Sequential(nn.Linear(columns, rows, bias=False))
            attach(model, WiseConfig(target_modules=["0"], save_dtype=dtype))
            only_layer(model).install("default", [state])
            save_edits(model, tmp_path / name / dtype)
            sizes[name, dtype] = (tmp_path / name / dtype / WEIGHTS).stat().st_size / dense
    assert sizes["columns", "bfloat16"] < 0.12
    assert sizes["live", "bfloat16"] < 0.15
    assert sizes["columns", "float32"] < 0.23
    assert sizes["live", "float32"] < 0.25
    # Two shards of a fifth cover 36 % of the entries, and a bit says of each whether it is there.
    assert sizes["ties of two", "bfloat16"] < 0.36 / 2 + 1 / 32 + 0.02
    assert sizes["ties of two", "float32"] < 0.36 + 1 / 32 + 0.02


# -- rounding -------------------------------------------------------------------------------------------


def test_an_unknown_save_dtype_is_refused(llama: Any) -> None:
    with pytest.raises(ValueError, match=r"save_dtype is 'int8': choose one of float32, bfloat16, float16"):
        WiseConfig(save_dtype="int8")
    attach(llama, config_for(LLAMA))
    llama.peft_config["default"].save_dtype = "half"  # later, where the configuration does not look
    with pytest.raises(ValueError, match="save_dtype is 'half'"):
        get_peft_model_state_dict(llama)


def test_one_save_can_be_rounded(llama: Any, tmp_path: Path) -> None:
    attach(llama, config_for(LLAMA))
    states = sparse_states()
    edited(llama, states)
    save_edits(llama, tmp_path / "exact")
    save_edits(llama, tmp_path / "rounded", save_dtype="bfloat16")
    assert llama.peft_config["default"].save_dtype == "float32"
    assert same_memories(only_layer(llama).memories("default"), states)
    config = json.loads((tmp_path / "rounded" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["save_dtype"] == "bfloat16"
    assert "the memories are bfloat16" in (tmp_path / "rounded" / "README.md").read_text(encoding="utf-8")
    sizes = [(tmp_path / name / WEIGHTS).stat().st_size for name in ("exact", "rounded")]
    assert sizes[1] < 0.7 * sizes[0]
    loaded = copy.deepcopy(llama)
    detach(loaded)
    load_edits(loaded, tmp_path / "rounded")
    for one, other in zip(only_layer(loaded).memories("default"), states, strict=True):
        assert torch.equal(one.delta_weight, other.delta_weight.bfloat16().float())
    with pytest.raises(ValueError, match="save_dtype is 'int4'"):
        save_edits(llama, tmp_path / "rounded", save_dtype="int4")
    assert llama.peft_config["default"].save_dtype == "float32"
    assert (tmp_path / "rounded" / WEIGHTS).stat().st_size == sizes[1]


def test_what_float16_cannot_hold_is_refused_and_names_the_cure(llama: Any) -> None:
    attach(llama, config_for(LLAMA, save_dtype="float16"))
    (state, *_) = sparse_states()
    big = state.delta_weight.clone()
    big[3, 5] = -70000.0
    only_layer(llama).install("default", [state.with_(delta_weight=big)])
    with pytest.raises(ValueError, match=r'0.delta_weight has an entry of 7e\+04.*6.55e\+04.*save_dtype="bfloat16"'):
        get_peft_model_state_dict(llama)


def test_a_narrow_dw_is_not_widened() -> None:
    key = "a.wisemem_memories.default.0.delta_weight"
    state = packed({key: torch.ones(4, 4, dtype=torch.float16)}, "bfloat16")
    assert state[f"{key}.values"].dtype == torch.float16


def test_thresholds_are_never_rounded(llama: Any) -> None:
    attach(llama, config_for(LLAMA, save_dtype="bfloat16"))
    memory = sparse_states()[0].with_(epsilon=11.3, weakest_edit=12.7, weakest_answered=11.9)
    only_layer(llama).install("default", [memory])
    state = get_peft_model_state_dict(llama)
    assert state[f"{LAYER}.wisemem_memories.0.epsilon"] == torch.tensor(11.3)
    assert state[f"{LAYER}.wisemem_memories.0.weakest_edit"] == torch.tensor(12.7)
    assert state[f"{LAYER}.wisemem_memories.0.weakest_answered"] == torch.tensor(11.9)


# -- what is not ours stays as it is ----------------------------------------------------------------------


def test_other_tensors_and_tensors_without_data_are_left_alone() -> None:
    head = "x.wisemem_memories.default.0"
    state = {
        f"{head}.epsilon": torch.tensor(1.0),
        f"{head}.delta_weight": torch.empty(4, 4, device="meta"),
        "x.delta_weight": torch.eye(4),
        "x.wisemem_memories.default.delta_weight": torch.eye(4),
        "y.weight": torch.eye(4),
    }
    result = packed(state, "bfloat16")
    assert all(result[key] is value for key, value in state.items())
    assert result.keys() == state.keys()


def test_parts_of_a_layer_that_the_model_lacks_stay_as_they_are(llama: Any) -> None:
    attach(llama, config_for(LLAMA))
    parts = {"elsewhere.wisemem_memories.0.mask.bits": torch.zeros(4, dtype=torch.uint8)}
    assert unpacked(parts, shapes_in(find_wise_layers(llama))) == parts


# -- files from anywhere ----------------------------------------------------------------------------------

SPOILED = {
    "too few values": (f"{MEMORIES}.0.delta_weight.values", lambda t: t[:-1], "0.delta_weight.*values has the shape"),
    "too few bits": (f"{MEMORIES}.2.mask.bits", lambda t: t[:-1], "2.mask.*bits has the shape"),
    "a column outside": (f"{MEMORIES}.1.delta_weight.columns", lambda t: t + 60, "1.delta_weight.*rise from 0"),
    "columns as floats": (f"{MEMORIES}.1.delta_weight.columns", lambda t: t.float(), "1.delta_weight.*float32"),
    "no place": (f"{MEMORIES}.0.delta_weight.bits", lambda t: None, "0.delta_weight.*has the shape"),
    "no mask": (f"{MEMORIES}.2.mask.bits", lambda t: None, "2.delta_weight.*needs a mask"),
}


@pytest.mark.parametrize("load", [loaded_by_peft, loaded_frugally_by_peft, loaded_by_transformers, loaded_by_us])
@pytest.mark.parametrize("how", SPOILED)
def test_spoiled_parts_are_refused_on_every_way(base: Path, tmp_path: Path, how: str, load: Callable[..., Any]) -> None:
    key, spoil, message = SPOILED[how]
    saved_by_peft(AutoModelForCausalLM.from_pretrained(base), sparse_states(), tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    value = spoil(tensors.pop(key))
    save_file(tensors if value is None else {**tensors, key: value}, tmp_path / "adapter" / WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match=message):
        load(model, tmp_path / "adapter", base)


def test_a_spoiled_file_takes_no_adapters_name_in_transformers(base: Path, tmp_path: Path) -> None:
    saved_by_peft(AutoModelForCausalLM.from_pretrained(base), sparse_states(), tmp_path / "good")
    saved_by_peft(AutoModelForCausalLM.from_pretrained(base), sparse_states(), tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / WEIGHTS)
    tensors[f"{MEMORIES}.0.delta_weight.values"] = torch.zeros(1)
    save_file(tensors, tmp_path / "bad" / WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(base)
    untouched = logits(model, INPUTS)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"0\.delta_weight is damaged"):
            model.load_adapter(tmp_path / "bad")
        assert torch.equal(logits(model, INPUTS), untouched)
    model.load_adapter(tmp_path / "good")
    assert same_memories(only_layer(model).memories("default"), sparse_states())


def test_a_tensor_as_a_whole_and_in_parts_is_refused() -> None:
    head = "x.wisemem_memories.0.delta_weight"
    state = {head: torch.eye(4), f"{head}.values": torch.eye(4)}
    with pytest.raises(PackingError, match="as a whole and in parts"):
        unpacked(state, lambda name: (4, 4))


def test_transformers_is_not_given_a_pickle_with_packed_tensors(base: Path, tmp_path: Path) -> None:
    """It would leave all memories at zero and say no more than that keys are unexpected."""
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config_for(LLAMA, task_type="CAUSAL_LM"))
    edited(peft_model.eval(), sparse_states())
    peft_model.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    with pytest.raises(ValueError, match=r"safetensors files only.*PeftModel.from_pretrained"):
        AutoModelForCausalLM.from_pretrained(base).load_adapter(tmp_path / "adapter", use_safetensors=False)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert same_memories(only_layer(loaded).memories("default"), sparse_states())


# -- the method on the model ------------------------------------------------------------------------------


def test_the_models_own_loading_is_put_back(llama: Any) -> None:
    attach(llama, config_for(LLAMA))
    assert "_load_pretrained_model" in vars(llama)
    attach(llama, config_for(LLAMA), "second")
    detach(llama)
    assert not [name for name in vars(llama) if "load_pretrained" in name]

    def mine(**_: Any) -> None:
        return None

    llama._load_pretrained_model = mine
    attach(llama, config_for(LLAMA))
    assert llama._load_pretrained_model is not mine
    detach(llama)
    assert llama._load_pretrained_model is mine
    assert not [name for name in vars(llama) if name.startswith("_wise")]


def test_copies_load_into_themselves(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    saved_by_peft(AutoModelForCausalLM.from_pretrained(base), sparse_states(), tmp_path / "adapter")
    model.load_adapter(tmp_path / "adapter", adapter_name="one")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.load_adapter(tmp_path / "adapter", adapter_name="two")
        assert same_memories(only_layer(other).memories("two"), sparse_states())
        assert "two" not in only_layer(model).wisemem_memories
