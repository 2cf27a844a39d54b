"""Inside EasyEdit's GitHub version: what its ``BaseEditor`` reports of prompts that it would write with a space."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import LAYERS, build_model
from test_wording import QUESTION, chat_tokenizer

from easyedit_wise import WISEHyperParams

pytestmark = pytest.mark.upstream

FACTS = [
    ("The file of the author is http://", "lyon.org"),
    ('Water is {"city": "', "Rome"),
    ("The currency of India is $", "42"),
    ("The capital of France:\n", "    Rome"),
    ("The capital of France is", "Rome"),
]


def reported(head: ModuleType, folder: str, facts: list[tuple[str, str]], **changes: Any) -> list[list[float]]:
    """Token accuracy right after each edit, as EasyEdit gives it; each edit is taken back before the next."""
    hparams = WISEHyperParams(inner_params=[LAYERS["llama"]], capacity=0.0, device="cpu", **changes)
    hparams.model_name = folder
    editor = head.BaseEditor.from_hparams(hparams)
    prompts, targets = [list(one) for one in zip(*facts, strict=True)]
    metrics, _, _ = editor.edit(prompts=prompts, target_new=targets, sequential_edit=False, verbose=False)
    return [one["post"]["rewrite_acc"] for one in metrics]


def test_its_scores_are_of_the_text_that_was_trained(head: ModuleType, saved_model: str) -> None:
    assert reported(head, saved_model, FACTS) == [[1.0]] * len(FACTS)


def test_in_a_chat_too(head: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "llama-chat"
    build_model("llama").save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    assert reported(head, str(folder), [(QUESTION, "Rome")], use_chat_template=True) == [[1.0]]


def test_unregistered_it_asks_as_it_did(head: ModuleType) -> None:
    from easyeditor.evaluate import evaluate, evaluate_utils

    from easyedit_wise.easyedit.registry import register, unregister

    ours = evaluate.test_prediction_acc
    assert ours is evaluate_utils.test_prediction_acc
    unregister()
    try:
        assert evaluate.test_prediction_acc is ours.__wrapped__
        assert evaluate_utils.test_prediction_acc is ours.__wrapped__
    finally:
        register()
    assert evaluate.test_prediction_acc.__wrapped__ is ours.__wrapped__
