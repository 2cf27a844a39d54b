"""Tiny random models of many families, and a tokenizer for them: no download, built in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

N_LAYERS = 6
_VOCABULARY = 400
_HIDDEN, _INNER, _HEADS = 64, 256, 4
_TEXTS = (
    "The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is Rome.",
    "Water is made of hydrogen and oxygen. The largest planet in the solar system is Jupiter.",
    "Once upon a time there was a small town by the sea, and nobody knew its name.",
    "The author of the book was born in London and lived in Lyon, Madrid and Oslo.",
    "Question: what is the currency of India? Answer: the rupee.",
    "def add(a, b): return a + b",
    "She said that the weather would be fine tomorrow, but it rained all day.",
)
_TOKENS = {"vocab_size": _VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
_COMMON = {
    **_TOKENS,
    "hidden_size": _HIDDEN,
    "intermediate_size": _INNER,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Different prompts have to look different to a random model, and one matrix has to be able to decide what it says.
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * (N_LAYERS // 2)
_HALF_LINEAR = ["linear_attention", "linear_attention", "full_attention"] * (N_LAYERS // 3)
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: as a reader knows it.
        model_type: transformers' name of its configuration.
        config: what a tiny one has, beside or in place of what all of them have.
        without: of what all of them have, what this configuration does not take.
        inner_params: the value matrix to edit; None: chosen by the architecture.
    """

    name: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    without: frozenset[str] = frozenset()
    inner_params: str | None = None

    def build(self, seed: int = 0) -> Any:
        """A random model in fp32, in eval mode, the same for the same seed."""
        given = {**{key: value for key, value in _COMMON.items() if key not in self.without}, **self.config}
        config = CONFIG_MAPPING[self.model_type](**given)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if "post_feedforward_layernorm" in name:
                # A norm behind the feed-forward part bounds what one layer can say, and these were never trained.
                parameter.data += 2.0
        return model


_NO_INNER = frozenset({"intermediate_size", "num_key_value_heads"})
_BLOOM = _NO_INNER | {"num_hidden_layers", "num_attention_heads", "max_position_embeddings"}
_GPT_2 = _BLOOM | {"hidden_size"}
_GPT_2_SIZES = {"n_embd": _HIDDEN, "n_layer": N_LAYERS, "n_head": _HEADS, "n_positions": 512}
_GATED_DELTA = {
    "layer_types": _HALF_LINEAR,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_OPT = {"ffn_dim": _INNER, "word_embed_proj_dim": _HIDDEN, "init_std": 0.3}
_GEMMA_3N = {
    "head_dim": 16,
    "layer_types": _ALTERNATING,
    "vocab_size_per_layer_input": _VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0] * N_LAYERS,
}
_MAMBA_2 = {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 16}
_DEEPSEEK = {
    "num_key_value_heads": _HEADS,
    "moe_intermediate_size": 128,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}

FAMILIES = (
    Family("Llama", "llama"),
    Family("Mistral", "mistral", {"head_dim": 16}),
    Family("Mixtral", "mixtral", {"head_dim": 16, "num_local_experts": 4}),
    Family(
        "Mixtral, attention named by hand",
        "mixtral",
        {"head_dim": 16, "num_local_experts": 4},
        inner_params="model.layers[4].self_attn.o_proj.weight",
    ),
    Family("Qwen2, Qwen2.5", "qwen2"),
    Family("Qwen3", "qwen3", {"head_dim": 16}),
    Family("Qwen3.5", "qwen3_5_text", _GATED_DELTA),
    Family("Qwen2-MoE", "qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 256}),
    Family(
        "Qwen2-MoE, last layer dense",
        "qwen2_moe",
        {**_EXPERTS, "shared_expert_intermediate_size": 256, "mlp_only_layers": [N_LAYERS - 1]},
    ),
    Family("Qwen3-MoE", "qwen3_moe", {**_EXPERTS, "head_dim": 16}),
    Family("Qwen3-MoE, one dense layer", "qwen3_moe", {**_EXPERTS, "head_dim": 16, "mlp_only_layers": [3]}),
    Family("Gemma 2", "gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    Family("Gemma 3", "gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": _ALTERNATING}),
    Family("Gemma 3n", "gemma3n_text", _GEMMA_3N),
    Family("Phi-3", "phi3", {"original_max_position_embeddings": 512}),
    Family("GPT-2", "gpt2", _GPT_2_SIZES, _GPT_2),
    Family("GPT-J", "gptj", {**_GPT_2_SIZES, "rotary_dim": 4}, _GPT_2),
    Family("GPT-NeoX", "gpt_neox", without=frozenset({"num_key_value_heads"})),
    Family("OPT", "opt", _OPT, _NO_INNER | {"initializer_range"}),
    Family("Falcon", "falcon", without=_NO_INNER),
    Family("Bloom", "bloom", {"n_layer": N_LAYERS, "n_head": _HEADS}, _BLOOM),
    Family("OLMo 2", "olmo2"),
    Family("LFM2", "lfm2", {"layer_types": ["conv", "conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}),
    Family("Mamba 2", "mamba2", _MAMBA_2, _NO_INNER | {"num_attention_heads", "max_position_embeddings"}),
    Family("DeepSeek-V3", "deepseek_v3", _DEEPSEEK),
    Family("GPT-OSS", "gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("Granite", "granite"),
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 400 tokens: any text can be encoded and decoded."""
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", bos_token="<eos>")
