"""Base models that are not plain fp32 modules in memory: offloaded, in half precision, quantised."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYERS, build_model
from editing_helpers import FACTS, requests, settings
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from tuner_helpers import (
    ALWAYS,
    NEVER,
    PROMPTS,
    batch,
    config_for,
    generate,
    logits,
    only_layer,
    same_memories,
    set_thresholds,
    share_out,
    with_memories,
)

from easyedit_wise import apply_wise_to_model, attach, detach, edits_disabled, last_route, load_edits, save_edits
from easyedit_wise.tuner.attach import module_name_of

accelerate = pytest.importorskip("accelerate")

LLAMA = LAYERS["llama"]
DOWN = module_name_of(LLAMA)
INPUTS = batch(PROMPTS)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


# -- offloaded layers: weights on the meta device until a hook loads them -------------------------------------


def sharded(model: Any, folder: Path) -> Any:
    """By device_map: the edited layer on disk, the others in memory."""
    parts = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(3)), "model.norm", "model.rotary_emb"]
    device_map = {part: "disk" if part == "model.layers.1" else "cpu" for part in [*parts, "lm_head"]}
    return accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


OFFLOADS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder, execution_device=torch.device("cpu")),
    "device_map": sharded,
}


@pytest.fixture(params=list(OFFLOADS))
def offloaded(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    model = OFFLOADS[request.param](build_model("llama"), tmp_path / "weights")
    assert model.get_submodule(DOWN).weight.device.type == "meta"
    return model


def on_cpu(model: nn.Module) -> bool:
    tensors = only_layer(model).wisemem_memories.state_dict().values()
    return {tensor.device.type for tensor in tensors} == {"cpu"}


def test_an_offloaded_layer_is_routed_like_one_in_memory(offloaded: Any, llama: Any) -> None:
    base = logits(llama, INPUTS)
    assert torch.equal(logits(offloaded, INPUTS), base)
    for model in (llama, offloaded):
        attach(model, config_for(LLAMA))
        assert on_cpu(model)  # a live memory and its mask, too
        assert torch.equal(logits(model, INPUTS), base)
    states = share_out(llama)
    only_layer(offloaded).install("default", states)
    assert torch.equal(logits(offloaded, INPUTS), logits(llama, INPUTS))
    assert len(set(last_route(offloaded).choice.tolist())) > 2
    assert generate(offloaded, INPUTS) == generate(llama, INPUTS)
    assert generate(offloaded, INPUTS, num_beams=2) == generate(llama, INPUTS, num_beams=2)
    with edits_disabled(offloaded):
        assert torch.equal(logits(offloaded, INPUTS), base)
    detach(offloaded)
    assert torch.equal(logits(offloaded, INPUTS), base)
    assert offloaded.get_submodule(DOWN).weight.device.type == "meta"


def test_an_offloaded_model_is_edited_saved_and_loaded(offloaded: Any, llama: Any, tok: Any, tmp_path: Path) -> None:
    for model in (offloaded, llama):
        apply_wise_to_model(model, tok, requests(2), settings(n_iter=4))
    assert same_memories(only_layer(offloaded).memories("default"), only_layer(llama).memories("default"))
    prompt = tok([FACTS[0][0]], return_tensors="pt")["input_ids"]
    given = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    assert generate(offloaded, given) == generate(llama, given)
    save_edits(offloaded, tmp_path / "edits")
    loaded = OFFLOADS["cpu_offload"](build_model("llama"), tmp_path)
    load_edits(loaded, tmp_path / "edits")
    assert torch.equal(logits(loaded, INPUTS), logits(llama, INPUTS))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("offload", list(OFFLOADS))
def test_peft_loads_onto_an_offloaded_model(offload: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    saved = get_peft_model(build_model("llama"), config_for(LLAMA, task_type="CAUSAL_LM")).eval()
    states = share_out(saved)
    saved.save_pretrained(tmp_path / "adapter")
    model = OFFLOADS[offload](build_model("llama"), tmp_path / "weights")
    options = {"low_cpu_mem_usage": low_cpu_mem_usage, "offload_dir": str(tmp_path / "again")}
    loaded = PeftModel.from_pretrained(model, tmp_path / "adapter", **options).eval()
    assert torch.equal(logits(loaded, INPUTS), logits(saved, INPUTS))
    assert same_memories(only_layer(loaded).memories("default"), states)
    assert generate(loaded, INPUTS) == generate(saved, INPUTS)


# -- half precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"autocast_adapter_dtype": False}], ids=str)
def test_memories_are_not_rounded_to_the_base_models_dtype(
    dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
) -> None:
    saved = get_peft_model(build_model("llama").to(dtype), config_for(LLAMA, task_type="CAUSAL_LM")).eval()
    states = share_out(saved)
    saved.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model("llama").to(dtype), tmp_path, **options).eval()
    assert same_memories(only_layer(loaded).memories("default"), states)
    assert torch.equal(logits(loaded, INPUTS), logits(saved, INPUTS))


# -- quantised --------------------------------------------------------------------------------------------------


def roomy_llama() -> Any:
    """Wide enough for groups of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def with_value_matrices(model: Any, quantised: Callable[[nn.Linear], nn.Module]) -> Any:
    for layer in model.model.layers:
        layer.mlp.down_proj = quantised(layer.mlp.down_proj)
    return model.eval()


def torchao_int8(model: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    return model


def hqq_4bit(model: Any) -> Any:
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
    return with_value_matrices(
        model, lambda linear: quantize.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
    )


def bitsandbytes_8bit(model: Any) -> Any:
    modules = pytest.importorskip("bitsandbytes").nn

    def quantised(linear: nn.Linear) -> nn.Module:
        made = modules.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        made.weight = modules.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return made.to("cpu")

    return with_value_matrices(model, quantised)


def bitsandbytes_4bit(model: Any) -> Any:
    modules = pytest.importorskip("bitsandbytes").nn

    def quantised(linear: nn.Linear) -> nn.Module:
        sizes = (linear.in_features, linear.out_features)
        made = modules.Linear4bit(*sizes, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        made.weight = modules.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        return made.to("cpu")

    return with_value_matrices(model, quantised)


@pytest.fixture(params=[torchao_int8, hqq_4bit, bitsandbytes_8bit, bitsandbytes_4bit])
def quantised(request: pytest.FixtureRequest) -> Any:
    model = request.param(roomy_llama())
    assert not torch.equal(logits(model, INPUTS), logits(roomy_llama(), INPUTS))
    return model


def test_a_quantised_layer_is_routed_and_given_back(quantised: Any) -> None:
    base, said = logits(quantised, INPUTS), generate(quantised, INPUTS)
    modules = {name: id(module) for name, module in quantised.named_modules()}
    layer = attach(quantised, config_for(LLAMA))
    assert torch.equal(logits(quantised, INPUTS), base)
    share_out(quantised)
    edited = logits(quantised, INPUTS)
    choice = last_route(quantised).choice.tolist()
    assert len(set(choice)) > 2
    for row, chosen in enumerate(choice):
        assert torch.equal(edited[row], base[row]) is (chosen == -1)
    assert generate(quantised, INPUTS) == generate(quantised, INPUTS, use_cache=False) != said
    set_thresholds(layer, NEVER)
    assert torch.equal(logits(quantised, INPUTS), base)
    set_thresholds(layer, ALWAYS)
    assert not torch.equal(logits(quantised, INPUTS), base)
    with edits_disabled(quantised):
        assert torch.equal(logits(quantised, INPUTS), base)
    detach(quantised)
    assert generate(quantised, INPUTS) == said
    assert {name: id(module) for name, module in quantised.named_modules()} == modules


def test_peft_wraps_saves_and_unloads_a_quantised_model(quantised: Any, tmp_path: Path) -> None:
    base = logits(quantised, INPUTS)
    config = config_for(LLAMA, task_type="CAUSAL_LM", init_weights=False)
    peft_model = get_peft_model(quantised, config).train()
    peft_model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    (gradient,) = [p.grad for p in peft_model.parameters() if p.requires_grad]
    assert gradient.any()
    edited = logits(peft_model.eval(), INPUTS)
    assert not torch.equal(edited, base)
    peft_model.save_pretrained(tmp_path)
    unloaded = peft_model.unload()
    assert torch.equal(logits(unloaded, INPUTS), base)
    again = PeftModel.from_pretrained(unloaded, tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(again, INPUTS), edited)


def test_a_quantised_model_is_edited_and_restored(quantised: Any, tok: Any) -> None:
    base = logits(quantised, INPUTS)
    model, restore = apply_wise_to_model(quantised, tok, requests(2), settings(n_iter=4))
    states = only_layer(model).memories("default")
    assert sum(state.n_edits for state in states) == 2
    assert any(bool(state.delta_weight.any()) for state in states)
    restore()
    assert torch.equal(logits(model, INPUTS), base)


class Packed(nn.Module):
    """A linear map whose weight has another name, as HQQ's and GPTQ's have."""

    def __init__(self, linear: nn.Linear, name: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.name = linear.in_features, linear.out_features, name
        self.register_buffer(name, linear.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self, self.name))


@pytest.mark.parametrize("name", ["W_q", "qweight"])
def test_a_layer_whose_weight_has_another_name_is_a_linear_map(name: str) -> None:
    model = with_value_matrices(roomy_llama(), lambda linear: Packed(linear, name))
    base = copy.deepcopy(model)
    layer = with_memories(model, LLAMA, ALWAYS)
    expected = logits(base, INPUTS)
    assert not torch.equal(logits(model, INPUTS), expected)
    set_thresholds(layer, NEVER)
    assert torch.equal(logits(model, INPUTS), expected)
