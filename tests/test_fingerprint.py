"""By what a base is known again, and what happens on another one."""

from __future__ import annotations

import base64
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D
from tuner_helpers import ALWAYS, PROMPTS, batch, config_for, logits, only_layer, set_thresholds, with_memories

from easyedit_wise import AdapterFileError, WiseConfig, attach, load_edits, save_edits
from easyedit_wise.tuner.attach import module_name_of
from easyedit_wise.tuner.fingerprint import N_SAMPLES, check_fingerprint, difference, fingerprint
from easyedit_wise.tuner.model import find_wise_layers

LLAMA = LAYERS["llama"]
DOWN = module_name_of(LLAMA)
INPUTS = batch(PROMPTS)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


def linear(seed: int = 0, rows: int = 48, columns: int = 96) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05
    return layer


class Quantised(nn.Module):
    """A layer as HQQ keeps it: integers and a scale for each group, and a method that multiplies them out."""

    def __init__(self, layer: nn.Linear, bits: int, group: int = 32) -> None:
        super().__init__()
        groups = layer.weight.data.reshape(-1, group)
        self.scale = groups.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
        self.W_q = (groups / self.scale).round().to(torch.int8)
        self.shape = layer.weight.shape

    def dequantize(self) -> torch.Tensor:
        return (self.W_q * self.scale).reshape(self.shape).bfloat16()


# -- the same weight ------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("here", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_same_weight_in_another_dtype_is_recognised(there: torch.dtype, here: torch.dtype) -> None:
    known = fingerprint(linear().to(there))
    assert known is not None
    assert difference(known, linear().to(here)) is None
    assert difference(known, linear(1).to(here)) is not None


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_weight_that_was_rounded_and_widened_again_is_recognised(narrow: torch.dtype) -> None:
    rounded = linear().to(narrow).float()
    assert difference(fingerprint(linear()), rounded) is None
    assert difference(fingerprint(rounded), linear()) is None


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_weight_is_recognised(bits: int) -> None:
    quantised = Quantised(linear(), bits)
    taken = fingerprint(quantised)
    assert taken is not None
    assert taken["quantised"] is True
    for dtype in (torch.float32, torch.bfloat16):
        assert difference(fingerprint(linear().to(dtype)), quantised) is None
        assert difference(taken, linear().to(dtype)) is None
        assert difference(fingerprint(linear(1).to(dtype)), quantised) is not None
    assert difference(taken, quantised) is None


def test_numbers_that_are_none_do_not_matter() -> None:
    layer = linear(rows=4, columns=8)
    layer.weight.data[1, 3] = torch.nan
    assert difference(fingerprint(layer), copy.deepcopy(layer).bfloat16()) is None


# -- another weight -------------------------------------------------------------------------------------


def test_one_changed_entry_is_enough() -> None:
    layer = linear()
    known = fingerprint(layer)
    layer.weight.data[17, 5] += 1e-3
    assert "SHA-256" in str(difference(known, layer))


def test_a_slightly_trained_weight_is_not_taken_for_a_rounded_one() -> None:
    """Its entries differ by less than bf16 rounds, but they are not the rounded ones."""
    layer = linear()
    known = fingerprint(layer)
    noise = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(9))
    layer.weight.data *= 1 + 5e-4 * noise
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        text = difference(known, copy.deepcopy(layer).to(dtype))
        assert text is not None
        assert "sampled entries" in text


# -- what is kept ---------------------------------------------------------------------------------------


def test_a_fingerprint_is_small_and_json() -> None:
    taken = fingerprint(linear())
    assert taken is not None
    assert json.loads(json.dumps(taken)) == taken
    assert len(json.dumps(taken)) < 2000
    assert taken["shape"] == [48, 96]
    assert taken["dtype"] == "float32"
    check_fingerprint(taken)


def test_the_samples_are_spread_over_rows_and_columns() -> None:
    """4096 x 11008 has factors in common with every power of two: a fixed step would stay in a column."""
    places = torch.arange(48 * 96, dtype=torch.float32).view(48, 96)
    layer = linear()
    layer.weight.data = places
    samples = torch.frombuffer(bytearray(base64.b64decode(fingerprint(layer)["samples"])), dtype=torch.float32)
    assert len(samples.unique()) == N_SAMPLES
    assert len((samples // 96).unique()) == 48
    assert len((samples % 96).unique()) > 70


def test_weights_that_cannot_be_read_have_none() -> None:
    class Odd(nn.Module):
        weight = None

    assert fingerprint(Odd()) is None
    assert fingerprint(nn.Linear(4, 4, device="meta")) is None
    assert difference(fingerprint(linear()), nn.Linear(96, 48, device="meta")) is None
    packed_elsewhere = linear()
    packed_elsewhere.weight = nn.Parameter(torch.zeros(48, 12, dtype=torch.int32), requires_grad=False)
    assert fingerprint(packed_elsewhere) is None


def test_it_is_cheap() -> None:
    """4096 x 11008 takes an eighth of a second; here a sixteenth of that, with room for a busy machine."""
    layer = nn.Linear(2752, 1024, bias=False)
    start = time.perf_counter()
    fingerprint(layer)
    assert time.perf_counter() - start < 0.5


def test_a_conv1d_is_read_as_it_is() -> None:
    layer = Conv1D(48, 96)
    assert fingerprint(layer)["shape"] == [96, 48]
    assert difference(fingerprint(layer), layer) is None


GOOD = fingerprint(linear()) or {}


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": None},
        {"shape": [48]},
        {"shape": [48, "96"]},
        {"shape": [48, -96]},
        {"shape": [10**30, 10**30], "samples": ""},
        {"shape": [True, 96]},
        {"dtype": "int8"},
        {"dtype": ["float32"]},
        {"quantised": 1},
        {"sha256": "ab"},
        {"sha256": None},
        {"samples": "AAAA"},
        {"samples": "é"},
        {"samples": GOOD.get("samples", "")[:-8]},
        {"samples": 5},
    ],
)
def test_a_spoiled_fingerprint_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    spoiled = {**GOOD, **changes}
    with pytest.raises(ValueError, match=r"no fingerprint of a weight.*base_fingerprint to null"):
        check_fingerprint(spoiled)
    with pytest.raises(ValueError, match="no fingerprint of a weight"):
        WiseConfig(base_fingerprint={DOWN: spoiled})


@pytest.mark.parametrize("value", ["x", [GOOD], 5])
def test_a_fingerprint_belongs_to_a_layer(value: Any) -> None:
    with pytest.raises(ValueError, match="a fingerprint for each layer"):
        WiseConfig(base_fingerprint=value)


# -- adapters -------------------------------------------------------------------------------------------


def test_an_adapter_has_the_fingerprint_of_its_base(
    any_model: tuple[Any, str], make_model: Callable[..., Any], tmp_path: Path
) -> None:
    model, parameter = any_model
    name = module_name_of(parameter)
    expected = fingerprint(model.get_submodule(name))
    with_memories(model, parameter, ALWAYS)
    edited = logits(model, INPUTS)
    assert model.peft_config["default"].base_fingerprint == {name: expected}
    save_edits(model, tmp_path / "edits")
    written = json.loads((tmp_path / "edits" / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["base_fingerprint"] == {name: expected}
    same, other = make_model(model.config.model_type), make_model(model.config.model_type, seed=1)
    load_edits(same, tmp_path / "edits")
    assert torch.equal(logits(same, INPUTS), edited)
    with pytest.raises(AdapterFileError, match="another base"):
        load_edits(other, tmp_path / "edits")


def test_a_configuration_may_serve_several_models(make_model: Callable[..., Any]) -> None:
    config = config_for(LLAMA)
    one, other = get_peft_model(make_model("llama"), config), get_peft_model(make_model("llama", seed=1), config)
    assert config.base_fingerprint is None
    taken = [model.peft_config["default"].base_fingerprint for model in (one, other)]
    assert taken[0] != taken[1]
    set_thresholds(only_layer(one), 1.0, 2.0)
    assert other.peft_config["default"].memories == ["live"]
    assert only_layer(one).wisemem_config["default"] is one.peft_config["default"]


def test_a_model_without_data_has_none(make_model: Callable[..., Any]) -> None:
    model = make_model("llama").to("meta")
    attach(model, config_for(LLAMA))
    assert model.peft_config["default"].base_fingerprint is None


@pytest.fixture
def folder(make_model: Callable[..., Any], tmp_path: Path) -> Path:
    model = make_model("llama")
    with_memories(model, LLAMA, ALWAYS, base_model_name_or_path="tiny/llama", task_type="CAUSAL_LM")
    return save_edits(model, tmp_path / "edits")


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "attributes": sorted(vars(model)),
        "hooks": [len(model._forward_hooks), len(model._forward_pre_hooks)],
        "adapters": sorted(getattr(model, "peft_config", {})),
    }


LOADS: dict[str, Callable[[Any, Path], Any]] = {
    "load_edits": lambda model, path: load_edits(model, path),
    "PEFT": lambda model, path: PeftModel.from_pretrained(model, path),
    "PEFT, frugal": lambda model, path: PeftModel.from_pretrained(model, path, low_cpu_mem_usage=True),
    "transformers": lambda model, path: model.load_adapter(path),
}


@pytest.mark.parametrize("load", LOADS)
def test_another_base_is_refused_and_left_alone(folder: Path, make_model: Callable[..., Any], load: str) -> None:
    model = make_model("llama", seed=1)
    model.name_or_path = "tiny/other"
    base, before = logits(model, INPUTS), state_of(model)
    with pytest.raises(ValueError, match="another base") as error:
        LOADS[load](model, folder)
    for part in ("tiny/llama", "tiny/other", DOWN, "SHA-256", "any_base=True", "base_fingerprint is None"):
        assert part in str(error.value)
    assert state_of(model) == before
    assert torch.equal(logits(model, INPUTS), base)
    assert not find_wise_layers(model)


def test_the_auto_class_refuses_another_base(folder: Path, make_model: Callable[..., Any], tmp_path: Path) -> None:
    make_model("llama", seed=1).save_pretrained(tmp_path / "other")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "other")}), encoding="utf-8")
    with pytest.raises(ValueError, match="another base"):
        AutoPeftModelForCausalLM.from_pretrained(folder)


def test_a_second_adapter_of_another_base_leaves_the_first(folder: Path, make_model: Callable[..., Any]) -> None:
    wrapped = get_peft_model(make_model("llama", seed=1), config_for(LLAMA)).eval()
    in_place = make_model("llama", seed=1)
    attach(in_place, config_for(LLAMA))
    for model, load in (
        (wrapped, lambda: wrapped.load_adapter(folder, "second")),
        (in_place, lambda: load_edits(in_place, folder, adapter_name="second")),
        (in_place, lambda: in_place.load_adapter(folder, adapter_name="second")),
    ):
        set_thresholds(only_layer(model), ALWAYS)
        edited = logits(model, INPUTS)
        with pytest.raises(ValueError, match="another base"):
            load()
        assert list(model.peft_config) == ["default"]
        assert list(only_layer(model).wisemem_memories) == ["default"]
        assert torch.equal(logits(model, INPUTS), edited)


def test_they_go_onto_any_base_if_told_to(folder: Path, make_model: Callable[..., Any], tmp_path: Path) -> None:
    other = make_model("llama", seed=1)
    untouched = logits(other, INPUTS)
    load_edits(other, folder, any_base=True)
    moved = logits(other, INPUTS)
    assert not torch.equal(moved, untouched)
    # From now on it is an adapter of this base.
    save_edits(other, tmp_path / "moved")
    load_edits(make_model("llama", seed=1), tmp_path / "moved")
    with pytest.raises(AdapterFileError, match="another base"):
        load_edits(make_model("llama"), tmp_path / "moved")

    config = WiseConfig.from_pretrained(folder)
    config.base_fingerprint = None
    theirs = PeftModel.from_pretrained(make_model("llama", seed=1), folder, config=config).eval()
    assert torch.equal(logits(theirs, INPUTS), moved)
    native = make_model("llama", seed=1)
    native.load_adapter(folder, peft_config=copy.deepcopy(config))
    assert torch.equal(logits(native.eval(), INPUTS), moved)


def test_adapters_from_before_have_no_fingerprint_and_load(folder: Path, make_model: Callable[..., Any]) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["base_fingerprint"], config["save_dtype"]
    path.write_text(json.dumps(config), encoding="utf-8")
    record = {"format_version": 1, "edits": [], "settings": None}  # nor has their list of edits digests
    (folder / "wise_edits.json").write_text(json.dumps(record), encoding="utf-8")
    for load in LOADS.values():
        load(make_model("llama"), folder)
        load(make_model("llama", seed=1), folder)


def test_a_base_of_another_size_is_refused_by_peft_before_anything_is_changed(
    folder: Path, make_model: Callable[..., Any]
) -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.down_proj = nn.Linear(64, 48, bias=False)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"down_proj has the shape \(32, 64\).*this model needs \(48, 64\)"):
        PeftModel.from_pretrained(model, folder)
    assert state_of(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_loaded_in_another_dtype_is_the_same(
    folder: Path, make_model: Callable[..., Any], dtype: torch.dtype
) -> None:
    for load in LOADS.values():
        load(make_model("llama").to(dtype), folder)
