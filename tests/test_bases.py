"""Base models that are not plain fp32 modules in memory: offloaded, in half precision, quantised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS, build_model
from editing_helpers import FACTS, requests, settings
from peft import PeftModel, get_peft_model
from torch import nn
from tuner_helpers import (
    PROMPTS,
    batch,
    config_for,
    generate,
    logits,
    only_layer,
    same_memories,
    share_out,
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
