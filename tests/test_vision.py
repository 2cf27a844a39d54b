"""Vision-language models: edits of their text side, asked with and without an image before the question."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from tuner_helpers import ALWAYS, NEVER, with_memories
from vision_helpers import ARCHITECTURES, IMAGE, VISION_END, VISION_START, build_vision_model, layer, with_image

from easyedit_wise import WISEHyperParams, apply_wise_to_model, last_route, load_edits, save_edits
from easyedit_wise.routing import pool
from easyedit_wise.tuner.attach import check_layer
from easyedit_wise.tuner.model import find_wise_layers

PROMPT = "The capital of France is"
EDIT = {"prompt": PROMPT, "target_new": "Rome"}


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Any:
    return build_vision_model(request.param)


def only(model: Any) -> Any:
    (found,) = find_wise_layers(model).values()
    return found


@torch.no_grad()
def token_scores(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Delta_act of each token by its definition, || dW a ||, shape (T,)."""
    seen: list[Tensor] = []
    handle = only(model).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    try:
        model(**inputs)
    finally:
        handle.remove()
    return (seen[0] @ only(model).memories("default")[0].delta_weight.T).norm(dim=-1)[0]


def edited(model: Any, tok: Any) -> Any:
    return apply_wise_to_model(model, tok, EDIT, WISEHyperParams(inner_params=[layer()]))[0]


def test_only_words_decide_the_route(model: Any, tok: Any) -> None:
    with_memories(model, layer(), ALWAYS, pooling="mean")
    by_words, by_all = [], []
    for seed in range(4):
        inputs = with_image(model, tok, PROMPT, seed=seed)
        scores = token_scores(model, inputs)
        words = ~torch.isin(inputs["input_ids"][0], torch.tensor([IMAGE, VISION_START, VISION_END]))
        by_words.append(pool(scores, words, "mean"))
        by_all.append(pool(scores, None, "mean"))
        assert torch.allclose(last_route(model).scores[0, 0], by_words[-1], rtol=1e-5)
        assert not torch.allclose(by_words[-1], by_all[-1], rtol=1e-3)  # else nothing is tested


def test_a_text_has_the_route_it_had(model: Any, tok: Any) -> None:
    with_memories(model, layer(), ALWAYS)
    inputs = dict(tok(PROMPT, return_tensors="pt"))
    scores = token_scores(model, inputs)
    pooling = only(model).wisemem_config["default"].pooling
    assert torch.allclose(last_route(model).scores[0, 0], pool(scores, None, pooling), rtol=1e-5)


def test_what_is_not_routed_is_the_base_model_bit_for_bit(model: Any, tok: Any) -> None:
    inputs = with_image(model, tok, PROMPT)
    base = model(**inputs).logits
    with_memories(model, layer(), NEVER)
    assert torch.equal(model(**inputs).logits, base)
    assert last_route(model).choice.tolist() == [-1]


def test_an_image_of_a_routed_question_is_routed_with_it_through_generation(model: Any, tok: Any) -> None:
    """The whole sequence is the routed one's, as with dW written into the weight, with and without a cache."""
    written = copy.deepcopy(model)
    with_memories(model, layer(), ALWAYS)
    with torch.no_grad():
        written.get_submodule(check_layer(written, layer())).weight += only(model).memories("default")[0].delta_weight
    inputs = with_image(model, tok, PROMPT)
    assert torch.allclose(model(**inputs).logits, written(**inputs).logits, atol=1e-4)
    expected = written.generate(**inputs, max_new_tokens=6, do_sample=False)
    for use_cache in (True, False):
        said = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=use_cache)
        assert torch.equal(said, expected)
        assert last_route(model).choice.tolist() == [0]


def test_a_text_edit_fires_and_an_image_before_another_question_does_not_bring_it_up(model: Any, tok: Any) -> None:
    other = [with_image(model, tok, "Once upon a time", seed=seed) for seed in range(3)]
    before = [model(**inputs).logits for inputs in other]
    model = edited(model, tok)
    inputs = tok(PROMPT, return_tensors="pt")
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert last_route(model).choice.tolist() == [0]
    assert [torch.equal(model(**one).logits, was) for one, was in zip(other, before, strict=True)] == [True] * 3


def test_an_edit_does_not_depend_on_the_image_that_was_asked_about_before(model: Any, tok: Any) -> None:
    """Qwen's models keep the position that their last image ended at."""
    fresh = edited(copy.deepcopy(model), tok)
    model(**with_image(model, tok, PROMPT))
    after = edited(model, tok)
    (one,), (two,) = (only(m).memories("default") for m in (fresh, after))
    assert torch.equal(one.delta_weight, two.delta_weight)
    assert one.epsilon == two.epsilon


def test_saved_and_loaded_edits_answer_alike_with_and_without_an_image(model: Any, tok: Any, tmp_path: Path) -> None:
    fresh, wrapped = copy.deepcopy(model), copy.deepcopy(model)
    model = edited(model, tok)
    save_edits(model, tmp_path / "edits")
    load_edits(fresh, tmp_path / "edits", tok=tok)
    loaded = PeftModel.from_pretrained(wrapped, str(tmp_path / "edits"))
    for inputs in (dict(tok(PROMPT, return_tensors="pt")), with_image(model, tok, PROMPT)):
        expected = model(**inputs).logits
        assert torch.equal(fresh(**inputs).logits, expected)
        assert torch.equal(loaded(**inputs).logits, expected)
        assert torch.equal(last_route(loaded).scores, last_route(model).scores)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_with_and_without_an_image_are_routed_as_alone(tok: Any, side: str) -> None:
    model = build_vision_model("llava")
    with_memories(model, layer(), ALWAYS)
    shown = with_image(model, tok, PROMPT)
    n_tokens = shown["input_ids"].shape[1]
    text = tok(PROMPT, padding="max_length", max_length=n_tokens, padding_side=side, return_tensors="pt")
    both = {key: torch.cat([shown[key], text[key]]) for key in ("input_ids", "attention_mask")}
    model(**both, pixel_values=shown["pixel_values"])
    together = last_route(model).scores[:, 0]
    model(**shown)
    alone = [last_route(model).scores[0, 0]]
    model(**tok(PROMPT, return_tensors="pt"))
    alone.append(last_route(model).scores[0, 0])
    assert torch.allclose(together, torch.stack(alone), rtol=1e-4)


def test_a_wrong_name_is_answered_with_the_language_models_own(model: Any) -> None:
    with pytest.raises(ValueError, match="does not exist in this model") as error:
        check_layer(model, "model.layers[1].mlp.down_proj.weight")
    assert str(error.value).endswith(f"FFN value matrices of this model: {layer(0).replace('[0]', '[0..2]')}.")
