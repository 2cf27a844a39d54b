"""WISE as a PEFT tuner: everything that PEFT and transformers do with an adapter."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PeftType,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from tuner_helpers import (
    ALWAYS,
    NEVER,
    PROMPTS,
    batch,
    config_for,
    generate,
    logits,
    logits_with,
    memory,
    only_layer,
    same_memories,
    set_thresholds,
    share_out,
)

import easyedit_wise
from easyedit_wise import WiseConfig, WiseModel, edits_disabled, last_route, register_with_peft
from easyedit_wise.tuner.attach import module_name_of
from easyedit_wise.tuner.config import WisePeftType
from easyedit_wise.tuner.memory import MemoryState
from easyedit_wise.tuner.model import find_wise_layers

LLAMA = LAYERS["llama"]
DOWN = module_name_of(LLAMA)
INPUTS = batch(PROMPTS)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


def wrapped(model: Any, parameter: str = LLAMA, task_type: str | None = "CAUSAL_LM", **config: Any) -> PeftModel:
    return get_peft_model(model, config_for(parameter, task_type=task_type, **config)).eval()


# -- registration -----------------------------------------------------------------------------------


def test_peft_knows_wise_and_its_own_enum_is_untouched() -> None:
    members = list(PeftType)
    register_with_peft()
    register_with_peft()
    assert list(PeftType) == members
    assert "WISE" not in PeftType.__members__
    config = get_peft_config({"peft_type": "WISE", "target_modules": [DOWN]})
    assert isinstance(config, WiseConfig)
    assert config.peft_type is WisePeftType.WISE
    assert config.peft_type == "WISE"
    assert easyedit_wise.WiseModel is WiseModel


def test_the_prefix_is_part_of_no_common_module_name() -> None:
    for name in ("pointwise_conv", "depthwise_conv", "elementwise_affine", "rowwise_norm"):
        assert WiseModel.prefix not in name


# -- get_peft_model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_a_wrapped_model_routes_like_one_edited_in_place(any_model: tuple[Any, str], task_type: str | None) -> None:
    model, parameter = any_model
    base, untouched = copy.deepcopy(model), logits(model, INPUTS)
    peft_model = wrapped(model, parameter, task_type)
    layer = only_layer(peft_model)
    assert torch.equal(logits(peft_model, INPUTS), untouched)
    set_thresholds(layer, ALWAYS)
    expected = logits_with(base, parameter, layer.memories("default")[0].delta_weight, INPUTS)
    assert torch.equal(logits(peft_model, INPUTS), expected)
    # The mask reaches the scope through PEFT's wrappers: each prompt scores as it does alone.
    together = last_route(peft_model).scores
    for row, prompt in enumerate(PROMPTS):
        logits(peft_model, batch([prompt]))
        assert torch.allclose(last_route(peft_model).scores[0], together[row], rtol=1e-5)


def test_generation_of_a_wrapped_model_keeps_its_route(any_model: tuple[Any, str]) -> None:
    model, parameter = any_model
    base_said = generate(model, INPUTS)
    peft_model = wrapped(model, parameter)
    layer = only_layer(peft_model)
    set_thresholds(layer, ALWAYS)
    always = generate(peft_model, INPUTS)
    ranked = last_route(peft_model).scores.flatten().sort().values
    set_thresholds(layer, float(ranked[1:3].mean()))
    mixed = generate(peft_model, INPUTS)
    choice = last_route(peft_model).choice.tolist()
    assert sorted(choice) == [-1, -1, 0, 0]
    assert mixed == [always[row] if one == 0 else base_said[row] for row, one in enumerate(choice)]
    assert mixed == generate(peft_model, INPUTS, use_cache=False)


def test_exactly_the_live_memory_trains(llama: Any) -> None:
    peft_model = wrapped(llama)
    share_out(peft_model)
    trainable = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    assert trainable == [f"base_model.model.{DOWN}.wisemem_memories.default.2.delta_weight"]
    n_trainable, n_all = peft_model.get_nb_trainable_parameters()
    assert n_trainable == 32 * 64
    assert n_all > n_trainable


def test_a_training_step_moves_the_live_memory_inside_its_mask(llama: Any) -> None:
    peft_model = wrapped(llama)
    layer = only_layer(peft_model)
    merged, _, live = share_out(peft_model)
    before = {name: p.clone() for name, p in peft_model.state_dict().items()}
    live_before, mask = live.delta_weight.clone(), live.mask
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
    peft_model.train()
    peft_model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    (gradient,) = [p.grad for p in peft_model.parameters() if p.grad is not None]
    assert gradient[mask].any()
    assert not gradient[~mask].any()
    optimizer.step()
    moved = layer.memories("default")[2].delta_weight
    assert (moved != live_before)[mask].any()
    assert not moved[~mask].any()
    changed = [name for name, p in peft_model.state_dict().items() if not torch.equal(p, before[name])]
    assert changed == [f"base_model.model.{DOWN}.wisemem_memories.default.2.delta_weight"]
    peft_model.eval()
    peft_model(**INPUTS)
    assert last_route(peft_model).memories == ("default/0", "default/1", "default/2")
    assert torch.equal(layer.memories("default")[0].delta_weight, merged.delta_weight)


def test_target_modules_come_from_the_model_type(any_model: tuple[Any, str]) -> None:
    model, parameter = any_model
    peft_model = get_peft_model(model, WiseConfig())
    expected = [f"base_model.model.{module_name_of(parameter).replace('1', str(layer))}" for layer in range(3)]
    if "fc2" not in parameter:
        assert list(find_wise_layers(peft_model)) == expected
    else:  # "fc2" has a digit of its own
        assert len(find_wise_layers(peft_model)) == 3


def test_a_layer_that_is_no_linear_map_is_refused(llama: Any) -> None:
    with pytest.raises(ValueError, match="Embedding is not a linear map"):
        get_peft_model(llama, WiseConfig(target_modules=["embed_tokens"]))


# -- save and load ----------------------------------------------------------------------------------


@pytest.fixture
def saved(make_model: Callable[..., Any], tmp_path: Path) -> tuple[Path, list[MemoryState], Tensor, list[list[int]]]:
    """(folder, memories, logits, answers) of a saved adapter with three memories that share out the prompts."""
    peft_model = wrapped(make_model("llama"))
    states = share_out(peft_model)
    edited, said = logits(peft_model, INPUTS), generate(peft_model, INPUTS)
    assert len(set(last_route(peft_model).choice.tolist())) > 2  # several memories answer
    peft_model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", states, edited, said


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adapter_name": "other"},
        {"adapter_name": "wisemem"},
        {"adapter_name": "default_memories"},
        {"low_cpu_mem_usage": True},
        {"is_trainable": True},
        {"autocast_adapter_dtype": False},
    ],
    ids=str,
)
def test_save_and_load_give_the_same_logits(
    saved: tuple[Path, list[MemoryState], Tensor, list[list[int]]],
    make_model: Callable[..., Any],
    options: dict[str, Any],
) -> None:
    folder, states, edited, said = saved
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no missing keys
        warnings.filterwarnings("ignore", message="Could not find a config file")
        loaded = PeftModel.from_pretrained(make_model("llama"), folder, **options).eval()
    assert torch.equal(logits(loaded, INPUTS), edited)
    assert generate(loaded, INPUTS) == said
    name = options.get("adapter_name", "default")
    assert same_memories(only_layer(loaded).memories(name), states)
    trainable = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert len(trainable) == (1 if options.get("is_trainable") else 0)


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_base_models_keep_exact_memories_and_thresholds(
    saved: tuple[Path, list[MemoryState], Tensor, list[list[int]]],
    make_model: Callable[..., Any],
    tmp_path: Path,
    autocast: bool,
) -> None:
    folder, states, _, _ = saved
    model = PeftModel.from_pretrained(
        make_model("llama").to(torch.bfloat16), folder, autocast_adapter_dtype=autocast
    ).eval()
    assert same_memories(only_layer(model).memories("default"), states)  # 11.3 would be 11.3125 in bf16
    edited = logits(model, INPUTS)
    assert edited.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(make_model("llama").to(torch.bfloat16), tmp_path / "again").eval()
    assert torch.equal(logits(again, INPUTS), edited)


def test_the_auto_class_finds_base_model_and_adapter(make_model: Callable[..., Any], tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "base")
    peft_model = wrapped(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    share_out(peft_model)
    edited = logits(peft_model, INPUTS)
    peft_model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, INPUTS), edited)


def test_state_dicts_go_from_one_model_to_another(make_model: Callable[..., Any]) -> None:
    one, other = wrapped(make_model("llama")), make_model("llama")
    states = share_out(one)
    state = get_peft_model_state_dict(one)
    assert not any("default" in key for key in state)
    inject_adapter_in_model(copy.deepcopy(one.peft_config["default"]), other, "renamed")
    result = set_peft_model_state_dict(other, state, adapter_name="renamed")
    assert not result.unexpected_keys
    assert same_memories(only_layer(other).memories("renamed"), states)
    assert torch.equal(logits(other.eval(), INPUTS), logits(one, INPUTS))


def test_modules_to_save_are_saved_along(make_model: Callable[..., Any], tmp_path: Path) -> None:
    peft_model = wrapped(make_model("llama"), modules_to_save=["lm_head"])
    share_out(peft_model)
    with torch.no_grad():
        peft_model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.5)
    edited = logits(peft_model, INPUTS)
    peft_model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, INPUTS), edited)


# -- several adapters -------------------------------------------------------------------------------


def test_adapters_are_added_chosen_combined_and_deleted(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model("llama")
    base = logits(model, INPUTS)
    peft_model = wrapped(model)
    layer = only_layer(peft_model)
    share_out(peft_model)
    first = logits(peft_model, INPUTS)
    peft_model.add_adapter("second", config_for(LLAMA))
    states = share_out(peft_model, "second", first_seed=10)
    assert torch.equal(logits(peft_model, INPUTS), first)  # added, not active

    peft_model.set_adapter("second")
    second = logits(peft_model, INPUTS)
    assert last_route(peft_model).memories == ("second/0", "second/1", "second/2")
    assert not torch.equal(second, first)
    trainable = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    assert trainable == [f"base_model.model.{DOWN}.wisemem_memories.second.2.delta_weight"]

    peft_model.base_model.set_adapter(["default", "second"])
    logits(peft_model, INPUTS)
    route = last_route(peft_model)
    assert route.memories == tuple(f"{name}/{index}" for name in ("default", "second") for index in range(3))
    assert {one // 3 for one in route.choice.tolist() if one >= 0} == {0, 1}  # both sets answer

    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path / "second").eval()
    assert torch.equal(logits(loaded, INPUTS), second)
    loaded.load_adapter(tmp_path, "first")
    loaded.set_adapter("first")
    assert torch.equal(logits(loaded.eval(), INPUTS), first)
    assert same_memories(only_layer(loaded).memories("default"), states)

    peft_model.set_adapter("default")
    peft_model.delete_adapter("second")
    assert torch.equal(logits(peft_model, INPUTS), first)
    assert not [name for name in peft_model.state_dict() if "second" in name]
    assert list(layer.wisemem_config) == list(layer.wisemem_memories) == ["default"]
    peft_model.delete_adapter("default")
    assert torch.equal(logits(model, INPUTS), base)


def test_disable_adapter_is_the_base_model(any_model: tuple[Any, str]) -> None:
    model, parameter = any_model
    base, said = logits(model, INPUTS), generate(model, INPUTS)
    peft_model = wrapped(model, parameter)
    set_thresholds(only_layer(peft_model), ALWAYS)
    edited = logits(peft_model, INPUTS)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model, INPUTS), base)
        assert generate(peft_model, INPUTS) == said
    with edits_disabled(peft_model):
        assert torch.equal(logits(peft_model, INPUTS), base)
    assert torch.equal(logits(peft_model, INPUTS), edited)


def test_other_methods_do_not_join(llama: Any) -> None:
    peft_model = wrapped(llama)
    with pytest.raises(ValueError, match=r"different peft types|Cannot combine"):
        peft_model.add_adapter("another", LoraConfig(target_modules=["q_proj"]))


# -- merge and unload -------------------------------------------------------------------------------


def test_merging_is_refused_with_a_cure(llama: Any) -> None:
    peft_model = wrapped(llama)
    layer = only_layer(peft_model)
    set_thresholds(layer, ALWAYS)
    edited = logits(peft_model, INPUTS)
    for merge in (peft_model.merge_and_unload, peft_model.merge_adapter, layer.merge):
        with pytest.raises(ValueError, match=r"answer every query.*unload\(\)|unload\(\).*answer every query"):
            merge()
    assert torch.equal(logits(peft_model, INPUTS), edited)
    layer.unmerge()
    assert layer.supports_lora_conversion() is False


def test_unload_gives_the_base_model_back(any_model: tuple[Any, str]) -> None:
    model, parameter = any_model
    base, said = logits(model, INPUTS), generate(model, INPUTS)
    modules = {name: id(module) for name, module in model.named_modules()}
    attributes = set(vars(model))
    peft_model = wrapped(model, parameter)
    set_thresholds(only_layer(peft_model), ALWAYS)
    assert not torch.equal(logits(peft_model, INPUTS), base)
    unloaded = peft_model.unload()
    assert unloaded is model
    assert torch.equal(logits(unloaded, INPUTS), base)
    assert generate(unloaded, INPUTS) == said
    assert {name: id(module) for name, module in unloaded.named_modules()} == modules
    assert not unloaded._forward_hooks
    assert not unloaded._forward_pre_hooks
    assert set(vars(unloaded)) == attributes


def test_a_deep_copy_of_a_wrapped_model_is_independent(llama: Any) -> None:
    peft_model = wrapped(llama)
    share_out(peft_model)
    said = generate(peft_model, INPUTS)
    copied = copy.deepcopy(peft_model)
    assert generate(copied, INPUTS) == said
    only_layer(copied).install("default", [memory(only_layer(copied), 4, NEVER)])
    assert copied.peft_config["default"].memories == ["merged"]
    assert peft_model.peft_config["default"].memories == ["merged", "shard", "live"]
    assert generate(peft_model, INPUTS) == said != generate(copied, INPUTS)


# -- without PeftModel ------------------------------------------------------------------------------


def test_inject_adapter_in_model(any_model: tuple[Any, str]) -> None:
    model, parameter = any_model
    base = copy.deepcopy(model)
    assert inject_adapter_in_model(config_for(parameter), model) is model
    layer = only_layer(model)
    set_thresholds(layer, ALWAYS)
    expected = logits_with(base, parameter, layer.memories("default")[0].delta_weight, INPUTS)
    assert torch.equal(logits(model, INPUTS), expected)
    assert generate(model, INPUTS) == generate(model, INPUTS, use_cache=False) != generate(base, INPUTS)


def test_low_cpu_mem_usage_injects_on_the_meta_device(llama: Any) -> None:
    inject_adapter_in_model(config_for(LLAMA), llama, low_cpu_mem_usage=True)
    side_memory = only_layer(llama).wisemem_memories["default"][0]
    assert side_memory.delta_weight.device.type == "meta"
    assert side_memory.epsilon.device.type == "cpu"


def test_the_adapter_methods_of_transformers(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model("llama")
    base = logits(model, INPUTS)
    model.add_adapter(config_for(LLAMA), adapter_name="facts")
    states = share_out(model.eval(), "facts")
    edited = logits(model, INPUTS)
    assert not torch.equal(edited, base)
    model.disable_adapters()
    assert torch.equal(logits(model, INPUTS), base)
    model.enable_adapters()
    assert torch.equal(logits(model, INPUTS), edited)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()

    loaded = make_model("llama")
    loaded.load_adapter(tmp_path, adapter_name="again")
    assert torch.equal(logits(loaded.eval(), INPUTS), edited)
    assert same_memories(only_layer(loaded).memories("again"), states)
    assert loaded.active_adapters() == ["again"]
    loaded.delete_adapter("again")
    assert torch.equal(logits(loaded, INPUTS), base)


def test_the_adapter_methods_of_transformers_on_a_model_edited_in_place(llama: Any) -> None:
    base = logits(llama, INPUTS)
    layer = easyedit_wise.attach(llama, config_for(LLAMA))
    set_thresholds(layer, ALWAYS)
    edited = logits(llama, INPUTS)
    assert llama.active_adapters() == ["default"]
    llama.disable_adapters()
    assert torch.equal(logits(llama, INPUTS), base)
    llama.enable_adapters()
    assert torch.equal(logits(llama, INPUTS), edited)


def test_a_vanilla_module_can_be_wrapped() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    values = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    base = model(values)
    peft_model = get_peft_model(model, WiseConfig(target_modules=["2"])).eval()
    assert torch.equal(peft_model(values), base)
    set_thresholds(only_layer(peft_model), ALWAYS)
    assert not torch.equal(peft_model(values), base)
    assert torch.equal(peft_model.unload()(values), base)
