"""Mixtures of experts: what of them can be edited, and what is said of the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from editing_helpers import requests
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from easyedit_wise import WiseConfig, WISEHyperParams, apply_wise_to_model, attach, last_route
from easyedit_wise.tuner.attach import check_layer

COMMON = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}
SMALL = {"moe_intermediate_size": 64}
HEADS = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
SHARED = {**SMALL, "num_experts": 4, "shared_expert_intermediate_size": 64}
DEEPSEEK = {**SMALL, **HEADS, "head_dim": 8, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}
WRONG = "model.layers[1].mlp.experts[0].down_proj.weight"


def build(architecture: str) -> Any:
    """A random mixture of experts with three layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if architecture == "mixtral":
            model: Any = MixtralForCausalLM(MixtralConfig(num_local_experts=4, **COMMON))
        elif architecture == "gpt_oss":
            rope = {"rope_type": "default", "rope_theta": 10000.0}
            config = GptOssConfig(num_local_experts=4, head_dim=8, rope_parameters=rope, **COMMON)
            model = GptOssForCausalLM(config)
        elif architecture == "qwen2_moe":
            model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SHARED, **COMMON))
        elif architecture == "qwen2_moe_with_dense":
            model = Qwen2MoeForCausalLM(Qwen2MoeConfig(mlp_only_layers=[0, 2], **SHARED, **COMMON))
        else:
            model = DeepseekV3ForCausalLM(DeepseekV3Config(first_k_dense_replace=1, **DEEPSEEK, **COMMON))
    return model.eval()


def refusal(model: Any, name: str = WRONG) -> str:
    with pytest.raises(ValueError, match="inner_params names") as error:
        check_layer(model, name)
    return str(error.value)


@pytest.mark.parametrize("name", [WRONG, "model.layers[1].mlp.down_proj.weight", "model.layers[1].mlp.experts"])
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_where_only_routed_experts_are_nothing_fits_and_no_attention_is_proposed(architecture: str, name: str) -> None:
    said = refusal(build(architecture), name)
    assert "The routed experts (model.layers[0..2].mlp.experts) cannot be edited" in said
    assert "one parameter for all of them" in said
    assert "down_proj (4, " in said
    assert "neither dense layers nor shared experts" in said
    assert "self_attn" not in said
    assert "bias" not in said


@pytest.mark.parametrize(
    ("architecture", "experts", "fitting"),
    [
        ("qwen2_moe", "[0..2]", ["model.layers[0..2].mlp.shared_expert.down_proj.weight"]),
        (
            "qwen2_moe_with_dense",
            "[1]",
            ["model.layers[0, 2].mlp.down_proj.weight", "model.layers[1].mlp.shared_expert.down_proj.weight"],
        ),
        (
            "deepseek_v3",
            "[1..2]",
            ["model.layers[0].mlp.down_proj.weight", "model.layers[1..2].mlp.shared_experts.down_proj.weight"],
        ),
    ],
)
def test_what_fits_is_named_as_it_is_in_this_model(architecture: str, experts: str, fitting: list[str]) -> None:
    said = refusal(build(architecture))
    assert f"The routed experts (model.layers{experts}.mlp.experts) cannot be edited" in said
    assert said.endswith(f"FFN value matrices of this model: {', '.join(fitting)}.")
    assert "self_attn" not in said


@pytest.mark.parametrize(
    ("architecture", "parameter"),
    [
        ("qwen2_moe", "model.layers[1].mlp.shared_expert.down_proj.weight"),
        ("qwen2_moe_with_dense", "model.layers[2].mlp.down_proj.weight"),
        ("deepseek_v3", "model.layers[1].mlp.shared_experts.down_proj.weight"),
        ("deepseek_v3", "model.layers[0].mlp.down_proj.weight"),
    ],
)
def test_what_is_named_can_be_edited(tok: Any, architecture: str, parameter: str) -> None:
    model = build(architecture)
    query = tok([request["prompt"] for request in requests(2)], return_tensors="pt", padding=True)
    unedited = model(**query).logits
    edited, restore = apply_wise_to_model(model, tok, requests(2), WISEHyperParams(inner_params=[parameter]))
    assert not torch.equal(edited(**query).logits, unedited)
    assert last_route(edited).choice.tolist() == [0, 0]
    restore()
    assert torch.equal(model(**query).logits, unedited)


class Sparse(nn.Module):
    """An FFN with a list of experts, as models outside of transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"down_proj": nn.Linear(4, 4)}) for _ in range(3))


def test_one_expert_of_a_list_is_refused_too() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([Sparse(), Sparse()])
    said = refusal(model, "layers[0].experts[1].down_proj.weight")
    assert "is a part of one routed expert" in said
    assert "The routed experts (layers[0..1].experts) cannot be edited: each sees only the tokens" in said
    with pytest.raises(ValueError, match="is a part of one routed expert"):
        attach(model, WiseConfig(target_modules=["layers.0.experts.1.down_proj"]))
