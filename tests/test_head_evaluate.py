"""The algorithms of EasyEdit's GitHub version in a stream, each with its packaged settings cut to a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import build_model
from editing_helpers import logits_of

from easyedit_wise.easyedit.algorithms import make_editor, settings_of

pytestmark = pytest.mark.upstream

LAYER = "model.layers.1.mlp.down_proj"
TINY: dict[str, dict[str, Any]] = {
    "FT": {"layers": [1], "num_steps": 2},
    "LoRA": {"num_steps": 2},
    "ROME": {"layers": [1], "v_loss_layer": 2, "v_num_grad_steps": 2},
    "R-ROME": {"layers": [1], "v_loss_layer": 2, "v_num_grad_steps": 2},
    "MEMIT": {"layers": [0, 1], "v_loss_layer": 2, "v_num_grad_steps": 2},
    "AlphaEdit": {"layers": [0, 1], "v_loss_layer": 2, "v_num_grad_steps": 2, "nullspace_threshold": 1e9},
    "GRACE": {"inner_params": ["model.layers[1].mlp.down_proj.weight"], "n_iter": 20},
    "ULTRAEDIT": {"inner_params": [LAYER], "lr": 1e-3},
    "SimIE": {},
}
EDITS = [("The capital of France is", "France", "Oslo"), ("The capital of Italy is", "Italy", "Lyon")]


def config_of(name: str) -> dict[str, Any]:
    config = settings_of(name, "smollm2-135m", TINY[name])
    if name == "SimIE":
        config["base_hparams"] |= TINY["ROME"]
    return config


def edited(name: str, tok: Any, edits: list[tuple[str, str, str]] = EDITS) -> Any:
    """A tiny model after these edits."""
    model = build_model("llama")
    model.config._name_or_path = "llama-tiny"
    editor, _ = make_editor(name, model, tok, config_of(name))
    requests = [
        {"prompt": prompt, "subject": subject, "target_new": target, "ground_truth": ""}
        for prompt, subject, target in edits
    ]
    editor.edit(requests, lambda: None)
    return editor.model


@pytest.mark.parametrize("name", TINY)
def test_packaged_settings_run(head: ModuleType, tok: Any, name: str) -> None:
    before = logits_of(build_model("llama"), tok, EDITS[0][0])
    assert not torch.equal(logits_of(edited(name, tok), tok, EDITS[0][0]), before)


def test_alphaedit_leaves_nothing_to_the_next_run(head: ModuleType, tok: Any) -> None:
    first, second = (edited("AlphaEdit", tok).get_submodule(LAYER).weight for _ in range(2))
    assert torch.equal(first, second)  # the second has none of the first's keys
    # But within a run the second edit knows of the first: made alone it is another.
    weight = build_model("llama").get_submodule(LAYER).weight
    alone = edited("AlphaEdit", tok, EDITS[1:]).get_submodule(LAYER).weight - weight
    assert not torch.allclose(first - edited("AlphaEdit", tok, EDITS[:1]).get_submodule(LAYER).weight, alone)
    module = sys.modules["easyeditor.models.alphaedit.AlphaEdit_main"]
    assert (module.P_loaded, module.cache_c_new, module.COV_CACHE) == (False, False, {})  # type: ignore[attr-defined]
    assert not hasattr(module, "P")
    assert not list(Path.cwd().glob("*.pt"))


def test_ultraedits_own_file_is_read(head: ModuleType, tok: Any) -> None:
    config = config_of("ULTRAEDIT")
    config["class_name"] = config.pop("model_class")  # as some of EasyEdit's files have it
    make_editor("ULTRAEDIT", build_model("llama"), tok, config)
