"""Which matrix is edited where nobody named one: in every family, in a vision-language model, or a reason why not."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model
from editing_helpers import requests, settings, traces
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from benchmarks.tiny_families import FAMILIES, Family
from easyedit_wise import WISEHyperParams, apply_wise_to_model, load_edits, save_edits
from easyedit_wise.journal.calls import close_journal
from easyedit_wise.journal.journal import Journal
from easyedit_wise.tuner.attach import check_layer
from easyedit_wise.tuner.model import find_wise_layers
from easyedit_wise.tuner.value_matrices import value_matrix_of

LLAMA = "model.layers[{}].mlp.down_proj.weight"
DENSE = LLAMA.format(4)
NEO_X = "{}[4].mlp.dense_4h_to_h.weight"
CHOSEN = {
    "Qwen2-MoE": "model.layers[4].mlp.shared_expert.down_proj.weight",
    "Qwen2-MoE, last layer dense": "model.layers[4].mlp.shared_expert.down_proj.weight",
    "Qwen3-MoE, one dense layer": LLAMA.format(3),
    "GPT-2": "transformer.h[4].mlp.c_proj.weight",
    "GPT-J": "transformer.h[4].mlp.fc_out.weight",
    "GPT-NeoX": NEO_X.format("gpt_neox.layers"),
    "OPT": "model.decoder.layers[4].fc2.weight",
    "Falcon": NEO_X.format("transformer.h"),
    "Bloom": NEO_X.format("transformer.h"),
    "LFM2": "model.layers[4].feed_forward.w2.weight",
    "Mamba 2": "backbone.layers[4].mixer.out_proj.weight",
    "DeepSeek-V3": "model.layers[4].mlp.shared_experts.down_proj.weight",
}
REFUSED = ("Mixtral", "Mixtral, attention named by hand", "Qwen3-MoE", "GPT-OSS")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_has_its_own_or_a_reason(family: Family) -> None:
    with torch.device("meta"):
        model = family.build()
    if family.name in REFUSED:
        with pytest.raises(
            ValueError, match=r"all feed-forward parts of model\.layers are routed experts.*a dense layer's"
        ):
            value_matrix_of(model)
        return
    chosen = value_matrix_of(model)
    assert chosen == CHOSEN.get(family.name, DENSE)
    check_layer(model, chosen)


# The sizes of models that people have: four fifths of the depth, as the packaged SmolLM2 settings name it.
@pytest.mark.parametrize(
    ("n_layers", "index"), [(1, 0), (2, 1), (3, 2), (12, 9), (18, 14), (28, 22), (30, 24), (32, 25)]
)
def test_four_fifths_of_the_depth(n_layers: int, index: int) -> None:
    with torch.device("meta"):
        assert value_matrix_of(build_model("llama", n_layers=n_layers)) == LLAMA.format(index)


# With these sizes a gate in front of the value matrix gives the residual stream's size, too.
@pytest.mark.parametrize(
    ("model_type", "sizes", "matrix"),
    [
        ("llama", {"intermediate_size": 64}, DENSE),
        ("phi3", {"intermediate_size": 32, "pad_token_id": 0}, DENSE),
        (
            "opt",
            {"num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 16},
            "model.decoder.layers[4].fc2.weight",
        ),
        ("rwkv", {"attention_hidden_size": 64}, "rwkv.blocks[4].feed_forward.value.weight"),
        ("mamba", {}, "backbone.layers[4].mixer.out_proj.weight"),
        ("falcon_h1", {"intermediate_size": 32}, "model.layers[4].feed_forward.down_proj.weight"),
        (
            "modernbert-decoder",
            {"intermediate_size": 32, "pad_token_id": 0, "num_attention_heads": 4},
            "model.layers[4].mlp.Wo.weight",
        ),
    ],
)
def test_it_is_found_by_structure(model_type: str, sizes: dict[str, Any], matrix: str) -> None:
    config = CONFIG_MAPPING[model_type](num_hidden_layers=6, hidden_size=64, vocab_size=100, **sizes)
    with torch.device("meta"):
        assert value_matrix_of(AutoModelForCausalLM.from_config(config)) == matrix


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl", "gemma3"])
def test_a_vision_tower_is_passed_by(model_type: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[model_type]())
    n_layers = model.config.get_text_config().num_hidden_layers
    assert value_matrix_of(model) == f"model.language_model.layers[{4 * n_layers // 5}].mlp.down_proj.weight"


def test_a_model_without_decoder_layers() -> None:
    with pytest.raises(ValueError, match=r"Linear has no list of decoder layers.*inner_params: \["):
        value_matrix_of(nn.Linear(3, 3))


# -- settings that name no matrix ---------------------------------------------------------------------


def unnamed(**changes: Any) -> WISEHyperParams:
    return WISEHyperParams.from_dict({**settings(**changes).to_dict(), "inner_params": None})


def edit(model: Any, tok: Any, hparams: Any, n: int = 1) -> Any:
    return apply_wise_to_model(model, tok, requests(n), hparams)[1]


@pytest.mark.parametrize("preset", ["default", "margin", "paper", "upstream"])
def test_settings_need_not_name_it(preset: str) -> None:
    assert WISEHyperParams.from_preset(preset).inner_params is None
    assert WISEHyperParams.from_dict({"preset": preset}).inner_params is None
    assert WISEHyperParams().changes() == {}


def test_the_choice_is_said_and_is_that_of_the_same_layer_named(
    make_model: Any, tok: Any, caplog: pytest.LogCaptureFixture
) -> None:
    chosen, named = make_model("llama"), make_model("llama")
    with caplog.at_level(logging.INFO, "easyedit_wise"):
        edit(chosen, tok, unnamed())
    assert f"{LLAMA.format(2)} is edited, of layers 0 to 2" in caplog.text
    edit(named, tok, settings(LLAMA.format(2)))
    (one,), (other,) = (find_wise_layers(model).values() for model in (chosen, named))
    assert torch.equal(one.memories("default")[0].delta_weight, other.memories("default")[0].delta_weight)


def test_another_layer_than_the_one_at_four_fifths_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    (family,) = (one for one in FAMILIES if one.name == "Qwen3-MoE, one dense layer")
    value_matrix_of(family.build())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "in layer 4, there is no linear map that every token goes through" in caplog.text


def test_a_model_that_carries_edits_keeps_its_layer(llama: Any, tok: Any, tmp_path: Path, make_model: Any) -> None:
    restore = edit(llama, tok, settings(LLAMA.format(0)))
    edit(llama, tok, unnamed())
    assert list(find_wise_layers(llama)) == ["model.layers.0.mlp.down_proj"]
    save_edits(llama, tmp_path / "edits")
    restore()
    again = make_model("llama")
    edit(again, tok, unnamed(load_path=str(tmp_path / "edits")))
    assert list(find_wise_layers(again)) == ["model.layers.0.mlp.down_proj"]


def test_what_is_kept_names_the_layer(llama: Any, tok: Any, tmp_path: Path, make_model: Any) -> None:
    edit(llama, tok, unnamed(journal=str(tmp_path / "journal")), 2)
    close_journal(llama)
    save_edits(llama, tmp_path / "edits")
    record = json.loads((tmp_path / "edits" / "wise_edits.json").read_text(encoding="utf-8"))
    assert record["settings"]["inner_params"] == [LLAMA.format(2)]
    with Journal(tmp_path / "journal") as journal:
        assert [call.settings["inner_params"] for _, _, call in journal.calls()] == [[LLAMA.format(2)]]
    loaded = make_model("llama")
    layer = load_edits(loaded, tmp_path / "edits", tok=tok, hparams=unnamed())
    assert layer.edit_stream.hparams.inner_params == [LLAMA.format(2)]


def test_a_journal_goes_on_in_its_own_layer(llama: Any, tok: Any, tmp_path: Path, make_model: Any) -> None:
    folder = str(tmp_path / "journal")
    edit(llama, tok, settings(LLAMA.format(0), journal=folder))
    close_journal(llama)
    again = make_model("llama")
    edit(again, tok, unnamed(journal=folder), 2)
    assert list(find_wise_layers(again)) == ["model.layers.0.mlp.down_proj"]
    close_journal(again)


def test_a_model_that_offers_none_is_as_before(tok: Any) -> None:
    model = next(one for one in FAMILIES if one.name == "Mixtral").build()
    before = traces(model)
    with pytest.raises(ValueError, match="routed experts"):
        edit(model, tok, unnamed())
    assert traces(model) == before
