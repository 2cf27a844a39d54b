"""Tiny random models of several architectures, and a tokenizer for them: no download, built in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from head_host import import_head, why_no_head
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

# Tiny models: a second thread costs more than it brings, and a great deal on a busy machine.
torch.set_num_threads(1)

SENTENCES = [
    "The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is Rome.",
    "Water is made of hydrogen and oxygen. The largest planet in the solar system is Jupiter.",
    "Once upon a time there was a small town by the sea, and nobody knew its name.",
    "The author of the book was born in London and lived in Lyon, Madrid and Oslo.",
    "Question: what is the currency of India? Answer: the rupee.",
    "def add(a, b): return a + b",
    "She said that the weather would be fine tomorrow, but it rained all day.",
]
LAYERS = {
    "llama": "model.layers[1].mlp.down_proj.weight",
    "qwen2": "model.layers[1].mlp.down_proj.weight",
    "gpt2": "transformer.h[1].mlp.c_proj.weight",
    "gpt_neox": "gpt_neox.layers[1].mlp.dense_4h_to_h.weight",
    "opt": "model.decoder.layers[1].fc2.weight",
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens trained on SENTENCES: any text can be encoded and decoded."""
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", bos_token="<eos>", padding_side="left"
    )


def build_model(architecture: str, seed: int = 0, n_layers: int = 3) -> Any:
    """A random model with hidden size 32; layer 1 of ``n_layers`` is the one to edit (LAYERS)."""
    common = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "initializer_range": 0.2}
    rotary = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        **common,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if architecture == "llama":
            model: Any = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **rotary))
        elif architecture == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **rotary))
        elif architecture == "gpt_neox":
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**rotary))
        elif architecture == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=n_layers, n_head=4, n_positions=256, **common))
        elif architecture == "opt":
            common = {**common, "init_std": common.pop("initializer_range")}
            model = OPTForCausalLM(
                OPTConfig(
                    hidden_size=32,
                    ffn_dim=64,
                    num_hidden_layers=n_layers,
                    num_attention_heads=4,
                    max_position_embeddings=256,
                    word_embed_proj_dim=32,
                    **common,
                )
            )
        else:
            raise ValueError(f"no tiny {architecture}")
    return model.eval()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="also run the tests that are marked soak (make soak)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Not by "-m" in the settings: one on the command line, as in "make test-fast", would replace it.
    if config.getoption("--soak"):
        return
    skipped = pytest.mark.skip(reason="takes minutes: make soak, or pytest --soak")
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(skipped)


@pytest.fixture(scope="session")
def tok() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def make_model() -> Callable[..., Any]:
    return build_model


@pytest.fixture
def llama() -> Any:
    return build_model("llama")


@pytest.fixture(params=list(LAYERS))
def any_model(request: pytest.FixtureRequest) -> tuple[Any, str]:
    """(model, its layer as EasyEdit names it) for each architecture."""
    return build_model(request.param), LAYERS[request.param]


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """EasyEdit's GitHub version, imported, with WISE registered; in a folder of its own, since it writes ./logs."""
    reason = why_no_head()
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    return import_head()


@pytest.fixture
def saved_model(tmp_path: Path) -> str:
    """A tiny Llama and its tokenizer in a folder whose name tells EasyEdit how to load it."""
    folder = tmp_path / "llama-tiny"
    build_model("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)
