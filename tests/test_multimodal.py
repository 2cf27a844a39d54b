"""WISE for EasyEdit's multimodal editor: requests, settings, its table of methods."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import build_model, build_tokenizer
from torch import nn
from vision_helpers import build_vision_model, layer, with_image

from easyedit_wise import (
    WISEHyperParams,
    WISEMultimodalHyperParams,
    apply_wise_to_model,
    apply_wise_to_multimodal_model,
    last_route,
    load_edits,
    save_edits,
)
from easyedit_wise.easyedit.multimodal import register_multimodal, text_side, unregister_multimodal
from easyedit_wise.tuner.model import find_wise_layers

# As EasyEdit's hparams/WISE/qwen2vl-7b.yaml, which a settings class of ours has to read.
HOST_SETTINGS = {
    "alg_name": "WISE",
    "model_name": "./hugging_cache/qwen2-vl-7b",
    "name": "./hugging_cache/qwen2-vl-7b",
    "tokenizer_class": ".",
    "tokenizer_name": ".",
    "dtype": "torch.bfloat16",
    "device": 0,
    "mask_ratio": 0.2,
    "edit_lr": 1.0,
    "n_iter": 10,
    "norm_constraint": 1.0,
    "act_margin": [5.0, 20.0, 10.0],
    "act_ratio": 0.4,
    "save_freq": 500,
    "merge_freq": 1000,
    "merge_alg": "ties",
    "objective_optimization": "only_label",
    "inner_params": [layer()],
    "densities": 0.53,
    "weights": 1.0,
    "retrieve": True,
    "replay": False,
    "sequential_edit": False,
    "model_parallel": False,
    "use_chat_template": True,
    "exact_match": True,
    "hidden_act": "silu",
    "qformer_checkpoint": ".",
    "qformer_name_or_path": ".",
    "state_dict_file": ".",
    "pretrained_ckpt": ".",
    "file_type": "image",
    "coco_image": "../",
    "rephrase_image": "../",
}
REQUEST = {"prompt": "The capital of France is", "target": "Rome", "image": ["pixels"], "file_type": "image"}


class Processor:
    """As a vision-language model's: a tokenizer, and a template that wants a turn's content in parts."""

    chat_template = "in parts"

    def __init__(self) -> None:
        self.tokenizer = build_tokenizer()

    def apply_chat_template(self, turns: list[dict[str, Any]], **options: Any) -> str:
        assert options == {"add_generation_prompt": True, "tokenize": False}
        said = [part["text"] for turn in turns for part in turn["content"] if part["type"] == "text"]
        return f"user: {' '.join(said)}\nassistant:\n"


def settings(**changes: Any) -> WISEMultimodalHyperParams:
    return WISEMultimodalHyperParams(inner_params=[layer()], **changes)


@pytest.fixture
def model() -> Any:
    return build_vision_model("qwen2_vl")


def test_a_request_with_an_image_is_refused_with_both_ways_round(model: Any) -> None:
    with pytest.raises(ValueError, match=r"has an image.*for every image.*any_image = True.*unregister\(\)"):
        apply_wise_to_multimodal_model(model, Processor(), [REQUEST], settings())
    assert not find_wise_layers(model)


@pytest.mark.parametrize("as_list", [True, False])
def test_a_fact_that_holds_for_any_image_is_edited_as_a_text(model: Any, as_list: bool) -> None:
    """EasyEdit hands over a list, or, with sequential_edit, a request alone."""
    processor, twin = Processor(), build_vision_model("qwen2_vl")
    edited, restore = apply_wise_to_multimodal_model(
        model, processor, [REQUEST] if as_list else REQUEST, settings(any_image=True), keep_original_weight=False
    )
    assert edited is model
    as_text = {"prompt": REQUEST["prompt"], "target_new": REQUEST["target"]}
    apply_wise_to_model(twin, processor.tokenizer, as_text, WISEHyperParams(inner_params=[layer()]))
    ours, theirs = ([m.delta_weight for m in next(iter(find_wise_layers(one).values())).memories("default")]
                    for one in (edited, twin))  # fmt: skip
    assert torch.equal(ours[0], theirs[0])
    model(**with_image(model, processor.tokenizer, REQUEST["prompt"]))
    assert last_route(model).choice.shape == (1,)
    restore()
    assert not find_wise_layers(model)


def test_any_image_may_be_set_on_the_hosts_settings(model: Any) -> None:
    class HostSettings:
        def __init__(self) -> None:
            margins = {"alpha": 5.0, "beta": 20.0, "gamma": 10.0}
            self.__dict__ |= {**HOST_SETTINGS, **margins, "n_iter": 1, "use_chat_template": False}
            del self.__dict__["act_margin"]

    hparams = HostSettings()
    with pytest.raises(ValueError, match="any_image"):
        apply_wise_to_multimodal_model(model, Processor(), [REQUEST], hparams)
    hparams.__dict__["any_image"] = "yes"
    with pytest.raises(ValueError, match="any_image is 'yes': it must be true or false"):
        apply_wise_to_multimodal_model(model, Processor(), [REQUEST], hparams)
    hparams.__dict__["any_image"] = True
    hparams.__dict__["any_images"] = True
    with pytest.raises(ValueError, match=r"'any_images'.*did you mean 'any_image'"):
        apply_wise_to_multimodal_model(model, Processor(), [REQUEST], hparams)
    del hparams.__dict__["any_images"]
    apply_wise_to_multimodal_model(model, Processor(), [REQUEST], hparams)
    assert len(find_wise_layers(model)) == 1


def test_a_request_without_an_image_needs_no_word(model: Any, tok: Any) -> None:
    request = {"prompt": "The capital of France is", "target": "Rome", "image": None}
    edited, _ = apply_wise_to_multimodal_model(model, tok, request, settings())
    edited(**tok(request["prompt"], return_tensors="pt"))
    assert last_route(edited).choice.tolist() == [0]


def test_a_processors_template_gets_the_text_in_parts(model: Any) -> None:
    side = text_side(Processor())
    turns = [{"role": "user", "content": "Who?"}]
    expected = "user: Who?\nassistant:\n"
    assert side.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) == expected
    assert side("Who?")["input_ids"] == build_tokenizer()("Who?")["input_ids"]
    assert side.is_fast
    request = {**REQUEST, "image": None}
    edited, _ = apply_wise_to_multimodal_model(model, Processor(), request, settings(use_chat_template=True))
    edited(**side(expected.replace("Who?", request["prompt"]), return_tensors="pt"))
    assert last_route(edited).choice.tolist() == [0]


def test_a_tokenizer_stays_what_it_is(tok: Any) -> None:
    assert text_side(tok) is tok


def test_a_model_that_is_called_with_samples_is_refused() -> None:
    """As EasyEdit's BLIP-2 and MiniGPT-4: a dict of samples, and a language model inside."""

    class Samples(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.opt_model = build_model("opt")

        def forward(self, samples: dict[str, Any]) -> None: ...

    with pytest.raises(ValueError, match=r"Samples is not called with input_ids.*model\.opt_model.*unregister\(\)"):
        apply_wise_to_multimodal_model(Samples(), Processor(), REQUEST, settings(any_image=True))


# -- settings ---------------------------------------------------------------------------------------


def test_the_hosts_multimodal_settings_are_read_and_kept_for_it() -> None:
    hparams = WISEMultimodalHyperParams.from_dict(HOST_SETTINGS)
    assert (hparams.alpha, hparams.beta, hparams.gamma) == (5.0, 20.0, 10.0)
    assert (hparams.n_iter, hparams.act_ratio, hparams.retrieve) == (10, 0.4, True)
    assert hparams.optimizer == "sgd"  # in EasyEdit's terms
    assert hparams.dtype is torch.bfloat16
    assert (hparams.coco_image, hparams.exact_match, hparams.file_type) == ("../", True, "image")
    assert not hparams.any_image


def test_the_class_for_language_models_names_the_other_one() -> None:
    with pytest.raises(ValueError, match="vision-language model") as error:
        WISEHyperParams.from_dict(HOST_SETTINGS)
    assert "WISEMultimodalHyperParams" in str(error.value)
    assert "did you mean" not in str(error.value)


def test_a_mistyped_setting_is_still_named_with_the_nearest() -> None:
    for cls in (WISEHyperParams, WISEMultimodalHyperParams):
        with pytest.raises(ValueError, match="did you mean 'retrieve'"):
            cls.from_dict({"inner_params": [layer()], "retreive": True})
    with pytest.raises(ValueError, match="did you mean 'coco_image'"):
        WISEMultimodalHyperParams.from_dict({"inner_params": [layer()], "coco_images": "x"})


@pytest.mark.parametrize(("name", "value"), [("dtype", "torch.nothing"), ("dtype", 16), ("any_image", "yes")])
def test_values_that_do_not_fit_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        settings(**{name: value})


def test_edits_that_were_made_with_them_are_saved_and_loaded(model: Any, tok: Any, tmp_path: Any) -> None:
    hparams = WISEMultimodalHyperParams.from_dict({**HOST_SETTINGS, "n_iter": 1, "use_chat_template": False})
    edited, _ = apply_wise_to_model(model, tok, {"prompt": "The capital of France is", "target_new": "Rome"}, hparams)
    save_edits(edited, tmp_path / "edits")
    fresh = build_vision_model("qwen2_vl")
    load_edits(fresh, tmp_path / "edits", tok=tok)
    inputs = with_image(model, tok, "The capital of France is")
    assert torch.equal(fresh(**inputs).logits, edited(**inputs).logits)


# -- the host's table -------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False])
def test_the_hosts_table_is_ours_until_it_is_given_back(own: bool) -> None:
    alg_dict = ModuleType("alg_dict")
    table: dict[str, Any] = {"IKE": print, **({"WISE": repr} if own else {})}
    names = set(table)
    alg_dict.__dict__.update(ALG_MULTIMODAL_DICT=table, MULTIMODAL_EDIT_ALGS=names)
    before = (dict(table), set(names), set(vars(alg_dict)))
    for _ in range(2):
        register_multimodal(alg_dict)
        assert table["WISE"] is apply_wise_to_multimodal_model
        assert names == {"IKE", "WISE"}
    for _ in range(2):
        unregister_multimodal(alg_dict)
        assert (table, names, set(vars(alg_dict))) == before


def test_a_host_without_such_a_table_is_left_alone() -> None:
    alg_dict = ModuleType("alg_dict")
    before = set(vars(alg_dict))
    register_multimodal(alg_dict)
    unregister_multimodal(alg_dict)
    assert set(vars(alg_dict)) == before
