"""EasyEdit's own ``MultimodalEditor`` with WISE: which edits it makes, which it refuses, and what is left behind."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from head_host import HOME
from vision_helpers import layer, save_vision_model

from easyedit_wise import WISEMultimodalHyperParams, apply_wise_to_multimodal_model, last_route, register, unregister
from easyedit_wise.tuner.model import find_wise_layers

pytestmark = pytest.mark.upstream

# EasyEdit loads a model by its folder's name.
FOLDERS = {"qwen2_vl": "qwen2-vl-tiny", "qwen3_vl": "qwen3-vl-tiny", "llava_onevision": "llava-onevision-tiny"}
FILES = ("blip2", "minigpt4", "llavaov-7b", "qwen2vl-7b", "qwen3vl-4b")


class Edited:
    """An editor on a saved tiny model, and two edits with an image each."""

    def __init__(self, host: ModuleType, architecture: str, folder: Path) -> None:
        from PIL import Image

        path = folder / FOLDERS[architecture]
        save_vision_model(architecture, path)
        for name, colour in (("red.png", (255, 0, 0)), ("blue.png", (0, 0, 255))):
            Image.new("RGB", (64, 64), colour).save(folder / name)
        (folder / "logs").mkdir(exist_ok=True)
        self.hparams = WISEMultimodalHyperParams(
            inner_params=[layer()], model_name=str(path), device="cpu", use_chat_template=True
        )
        self.editor = host.__dict__["MultimodalEditor"].from_hparams(self.hparams)
        self.arguments: dict[str, Any] = {
            "prompts": ["The capital of France is", "Water is made of"],
            "targets": ["Rome", "gold"],
            "image": ["red.png", "blue.png"],
            "rephrase_prompts": ["France has the capital", "Of what is water made?"],
            "locality_inputs": {
                "text": {"prompt": ["Once upon a", "def add"], "ground_truth": ["time", "(a, b)"]},
                "vision": {"image": ["blue.png", "red.png"], "prompt": ["What?", "Why?"], "ground_truth": ["b", "r"]},
            },
            "verbose": False,
        }


@pytest.fixture(params=list(FOLDERS))
def edited(request: pytest.FixtureRequest, head: ModuleType, tmp_path: Path) -> Edited:
    return Edited(head, request.param, tmp_path)


def test_an_edit_with_an_image_is_refused_before_anything_changes(edited: Edited) -> None:
    assert edited.editor.apply_algo is apply_wise_to_multimodal_model
    for sequential in (True, False):
        with pytest.raises(ValueError, match="any_image"):
            edited.editor.edit(**edited.arguments, sequential_edit=sequential)
    assert not find_wise_layers(edited.editor.model)


def test_sequential_edits_that_hold_for_any_image(edited: Edited) -> None:
    edited.hparams.any_image = True
    metrics, model, _ = edited.editor.edit(**edited.arguments, sequential_edit=True)
    assert model is edited.editor.model
    assert [set(one) >= {"pre", "post"} for one in metrics] == [True, True]
    assert all(float(one["post"]["locality_acc"]) == 1.0 for one in metrics)
    (found,) = find_wise_layers(model).values()
    assert sum(memory.n_edits for memory in found.memories("default")) == 2
    # Asked as it was trained, as the text of a turn.
    tok = edited.editor.tok
    turn = [{"role": "user", "content": [{"type": "text", "text": edited.arguments["prompts"][0]}]}]
    text = tok.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    model(**tok.tokenizer(text, return_tensors="pt"))
    assert last_route(model).describe()["memory"] == "default/0"


def test_single_edits_leave_nothing_behind(edited: Edited) -> None:
    edited.hparams.any_image = True
    before = {name: value.clone() for name, value in edited.editor.model.state_dict().items()}
    edited.editor.edit(**edited.arguments, sequential_edit=False)
    after = edited.editor.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("name", FILES)
def test_its_settings_are_read_with_both_classes(head: ModuleType, name: str) -> None:
    path = Path(os.environ[HOME]) / "hparams" / "WISE" / f"{name}.yaml"
    ours = WISEMultimodalHyperParams.from_hparams(path)
    theirs = vars(head.__dict__["WISEMultimodalHyperParams"].from_hparams(str(path)))
    assert {key: vars(ours).get(key) for key in theirs} == theirs
    json.dumps(ours.to_dict())


def test_unregister_gives_its_own_back(head: ModuleType) -> None:
    alg_dict = sys.modules["easyeditor.util.alg_dict"]
    ours = alg_dict.ALG_MULTIMODAL_DICT["WISE"]
    try:
        unregister()
        assert alg_dict.ALG_MULTIMODAL_DICT["WISE"].__module__ == "easyeditor.models.wise.wise_main"
    finally:
        register()
    assert alg_dict.ALG_MULTIMODAL_DICT["WISE"] is ours


def test_its_own_wrappers_are_refused(head: ModuleType) -> None:
    from easyeditor.trainer.blip2_models import Blip2OPT, MiniGPT4

    request = {"prompt": "The capital of France is", "target": "Rome", "image": None}
    for wrapper in (Blip2OPT, MiniGPT4):
        model = wrapper.__new__(wrapper)
        torch.nn.Module.__init__(model)
        with pytest.raises(ValueError, match=f"{wrapper.__name__} is not called with input_ids"):
            apply_wise_to_multimodal_model(model, None, request, WISEMultimodalHyperParams(inner_params=[layer()]))
