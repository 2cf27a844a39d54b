"""Algorithms of an EasyEdit that is installed: each in the middle of a stream, with what stands around it undone."""

from __future__ import annotations

import sys
from dataclasses import dataclass, make_dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import build_model
from editing_helpers import logits_of
from torch import nn

from easyedit_wise.easyedit.algorithms import make_editor
from easyedit_wise.easyedit.host_stream import HostStream, layers_answer_with_tuples
from easyedit_wise.evaluation.asking import Query, greedy_answers, teacher_forced


@dataclass
class ToyHyperParams:
    """Settings in EasyEdit's style."""

    scale: float
    device: str
    alg_name: str = "Toy"


@pytest.fixture
def toy_host(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An EasyEdit whose one algorithm adds random numbers to the last layer norm."""
    models = ModuleType("easyeditor.models.toy")

    def apply_toy(model: Any, tok: Any, requests: list[Any], hparams: Any) -> tuple[Any, dict[str, Any]]:
        assert tok.padding_side == "left"
        apply_toy.seen.append(requests[0]["prompt"])  # type: ignore[attr-defined]
        with torch.no_grad():
            model.model.norm.weight += hparams.scale * torch.rand(32)
        return model, {}

    apply_toy.__module__ = models.__name__
    apply_toy.seen = []  # type: ignore[attr-defined]
    models.apply_toy, models.ToyHyperParams = apply_toy, ToyHyperParams  # type: ignore[attr-defined]
    alg_dict = ModuleType("easyeditor.util.alg_dict")
    alg_dict.ALG_DICT = {"Toy": apply_toy}  # type: ignore[attr-defined]
    for module in (ModuleType("easyeditor"), ModuleType("easyeditor.util"), alg_dict, models):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return models


def test_a_hosts_algorithm_edits_on_and_has_its_own_random_numbers(toy_host: Any, tok: Any) -> None:
    def weight_after(chunks: list[list[str]], seed: int) -> torch.Tensor:
        model = build_model("llama")
        editor, config = make_editor("Toy", model, tok, {"scale": 0.5}, seed)
        assert config == {"scale": 0.5}
        for chunk in chunks:
            editor.edit([{"prompt": prompt, "target_new": "x"} for prompt in chunk], lambda: None)
        return editor.model.model.norm.weight.clone()

    before = torch.get_rng_state()
    together = weight_after([["a", "b"]], seed=1)
    assert toy_host.apply_toy.seen == ["a", "b"]
    assert torch.equal(together, weight_after([["a"], ["b"]], seed=1))  # checkpoints change nothing
    assert not torch.equal(together, weight_after([["a", "b"]], seed=2))
    assert not torch.equal(together, weight_after([["a"]], seed=1))
    assert torch.equal(before, torch.get_rng_state())


def test_a_hosts_settings_are_checked(toy_host: Any, tok: Any, llama: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown Toy setting 'scal': did you mean 'scale'\?"):
        HostStream("Toy", llama, tok, {"scal": 1.0}, 0, None)
    with pytest.raises(ValueError, match="the settings of Toy are not complete"):
        HostStream("Toy", llama, tok, {}, 0, None)
    with pytest.raises(ValueError, match=r"'Toi' is no algorithm: did you mean 'Toy'\?"):
        HostStream("Toi", llama, tok, {}, 0, None)


def test_the_settings_class_beside_the_algorithm_is_the_right_one(
    toy_host: Any, tok: Any, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ModuleType("easyeditor.models.other.settings")
    other.TOYHyperParams = make_dataclass("TOYHyperParams", ["name"])  # type: ignore[attr-defined]
    modules = {other.__name__: other, **sys.modules}  # found before the algorithm's own
    monkeypatch.setattr(sys, "modules", modules)
    assert HostStream("Toy", llama, tok, {"scale": 1.0}, 0, None).settings == {"scale": 1.0}


class Keyed(nn.Module):
    """A layer in the manner of GRACE's: it looks at one token of a query."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.key_id, self.looked_at = layer, -1, list[tuple[int, int]]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.looked_at.append((self.key_id, x.shape[1]))
        return self.layer(x)


class Around(nn.Module):
    """What GRACE answers with: it can be called and has no ``forward``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def test_a_model_with_an_editor_around_it_is_edited_on_and_asked_by_each_prompts_last_token(
    toy_host: Any, tok: Any, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = llama.model.layers[1].mlp

    def apply_keyed(model: Any, tok: Any, requests: list[Any], hparams: Any) -> tuple[Any, dict[str, Any]]:
        assert model is llama
        if not isinstance(mlp.down_proj, Keyed):
            mlp.down_proj = Keyed(mlp.down_proj)
        mlp.down_proj.key_id = 1
        model(**tok(requests[0]["prompt"], return_tensors="pt"))
        assert mlp.down_proj.key_id == 1  # an edit's own
        return Around(model), {}

    apply_keyed.__module__ = toy_host.__name__
    monkeypatch.setitem(sys.modules["easyeditor.util.alg_dict"].ALG_DICT, "Toy", apply_keyed)
    editor = HostStream("Toy", llama, tok, {"scale": 1.0}, 0, None)
    assert not editor.one_by_one
    editor.edit([{"prompt": prompt, "target_new": "x"} for prompt in ("France", "the capital of Peru")], lambda: None)
    assert editor.model is llama
    assert editor.one_by_one

    prompts = ["The capital of France is", "The capital of the country Peru is", "Peru"]
    ends = [len(tok(prompt)["input_ids"]) - 1 for prompt in prompts]
    for prompt, end in zip(prompts, ends, strict=True):
        mlp.down_proj.looked_at.clear()
        teacher_forced(editor.model, tok, [Query(prompt, "Lyon and Oslo")], batch_size=1)
        ((position, length),) = mlp.down_proj.looked_at
        assert position == end < length - 1
        mlp.down_proj.looked_at.clear()
        greedy_answers(editor.model, tok, [prompt], max_new_tokens=3)
        assert mlp.down_proj.looked_at[0] == (end, end + 1)


@pytest.mark.parametrize(("architecture", "template", "norm"), [
    ("llama", "model.layers.{}", "model.norm"),
    ("gpt2", "transformer.h.{}", "transformer.ln_f"),
])  # fmt: skip
def test_layers_that_answer_with_tuples_leave_the_model_as_it_is(
    tok: Any, architecture: str, template: str, norm: str
) -> None:
    model = build_model(architecture)
    expected = logits_of(model, tok, "The capital of France is")
    seen: list[Any] = []
    hparams = type("Settings", (), {"layer_module_tmp": template, "ln_f_module": norm})
    with layers_answer_with_tuples(model, hparams):
        handle = model.get_submodule(template.format(1)).register_forward_hook(lambda _, args, out: seen.append(out))
        assert torch.equal(logits_of(model, tok, "The capital of France is"), expected)
        handle.remove()
    assert isinstance(seen[0], tuple)
    assert seen[0][0].shape[-1] == 32
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
