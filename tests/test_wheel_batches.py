"""``batch_edit`` of the bridged wheel, on a small editor that has what it uses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from easyedit_wise.easyedit.wheel_batches import batch_edit, edit_dataset

PROMPTS, TARGETS = ["a", "b", "c"], ["x", "y", "z"]
INPUTS = {"prompt": ["p", "q", "r"], "ground_truth": ["1", "2", "3"]}


class Editor:
    """Each edit adds one to a weight; a score is the weight itself."""

    alg_name, model_name, tok = "FT", "tiny", None

    def __init__(self, algorithm: Callable[..., Any] | None = None, batch_size: int = 2) -> None:
        self.model: Any = nn.Linear(1, 1)
        nn.init.zeros_(self.model.weight)
        self.hparams = SimpleNamespace(batch_size=batch_size, device="cpu")
        self.apply_algo = algorithm or self.add

    def add(self, model: Any, tok: Any, requests: list[Any], hparams: Any, **options: Any) -> Any:
        before = {"weight": model.weight.detach().clone()}
        with torch.no_grad():
            model.weight += len(requests)
        return model, before if options["keep_original_weight"] else {}

    def _prepare_requests(
        self,
        prompts: Any,
        targets: Any,
        truths: Any,
        rephrases: Any,
        locality: Any,
        portability: Any,
        subject: Any = None,
        **rest: Any,
    ) -> list[dict[str, Any]]:
        return [
            {
                "prompt": prompt,
                "target_new": target,
                "ground_truth": truth,
                "locality": {} if locality is None else {key: value["prompt"][i] for key, value in locality.items()},
                "portability": {} if portability is None else dict(portability),
            }
            for i, (prompt, target, truth) in enumerate(zip(prompts, targets, truths, strict=True))
        ]


class Records(list[dict[str, Any]]):
    """One of the wheel's data sets, as far as it is used."""


@pytest.fixture(autouse=True)
def wheel_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def score(model: Any, name: str, hparams: Any, tok: Any, request: Any, device: Any, **options: Any) -> Any:
        value = float(model.weight)
        return {
            "rewrite_acc": [value],
            "locality": {f"{key}_output": [[1, 2 if value < 2 else 3]] for key in request["locality"]},
            **options,
        }

    module = ModuleType("easyeditor.editors.editor")
    module.__dict__["compute_edit_quality"] = score
    module.__dict__["BatchEditor"] = SimpleNamespace(is_batchable_method=lambda name: name == "FT")
    module.__dict__["DS_DICT"] = {"records": Records}
    module.__dict__["SingletonEditor"] = SimpleNamespace(is_singleton_method=lambda name: name == "ROME")
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize(
    ("arguments", "before", "after", "left"),
    [
        ({}, [0, 0, 2], [2, 2, 3], 3),
        ({"sequential_edit": True}, [0, 0, 2], [2, 2, 3], 3),
        ({"sequential_edit": True, "keep_original_weight": True}, [0, 0, 2], [2, 2, 3], 3),
        ({"sequential_edit": False}, [0, 0, 0], [2, 2, 1], 0),
        ({"keep_original_weight": True}, [0, 0, 0], [2, 2, 1], 0),
    ],
    ids=str,
)
def test_every_batch_is_scored_before_and_after(
    arguments: dict[str, bool], before: list[int], after: list[int], left: int
) -> None:
    editor = Editor()
    metrics, model, _ = batch_edit(editor, PROMPTS, TARGETS, **arguments)
    assert [metric["requested_rewrite"]["prompt"] for metric in metrics] == PROMPTS
    assert [metric["case_id"] for metric in metrics] == [0, 1, 2]
    assert [metric["pre"]["rewrite_acc"][0] for metric in metrics] == before
    assert [metric["post"]["rewrite_acc"][0] for metric in metrics] == after
    assert float(model.weight) == left


@pytest.mark.parametrize(
    ("arguments", "n_batches"),
    [
        ({}, 2),
        ({"sequential_edit": False}, 2),
        ({"keep_original_weight": True}, 2),
        ({"sequential_edit": True}, 0),
        ({"keep_original_weight": False}, 0),
    ],
    ids=str,
)
def test_what_restores_by_a_call(arguments: dict[str, bool], n_batches: int) -> None:
    called: list[int] = []
    editor = Editor(lambda model, *args, **options: (model, lambda: called.append(1)))
    batch_edit(editor, PROMPTS, TARGETS, **arguments)
    assert len(called) == n_batches


def test_locality_and_portability() -> None:
    metrics, _, _ = batch_edit(
        Editor(), PROMPTS, TARGETS, locality_inputs={"near": INPUTS}, portability_inputs={"hop": INPUTS}
    )
    # The second of two tokens is another one from the second edit on.
    assert [metric["post"]["locality"] for metric in metrics] == [
        {"near_acc": [0.5]},
        {"near_acc": [0.5]},
        {"near_acc": [1.0]},
    ]
    assert all("locality" not in metric["pre"] for metric in metrics)
    assert metrics[0]["requested_rewrite"]["portability"] == {"hop": INPUTS}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_new": ["x"]}, "3 prompts, 1 target_new and 3 ground_truth"),
        ({"ground_truth": "one"}, "3 prompts, 3 target_new and 1 ground_truth"),
        ({"locality_prompts": ["p"]}, "write locality_inputs="),
        ({"locality_ground_truth": ["p"]}, "write locality_inputs="),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    editor = Editor()
    with pytest.raises(ValueError, match=message):
        batch_edit(editor, **{"prompts": PROMPTS, "target_new": TARGETS, **changes})
    assert float(editor.model.weight) == 0


def test_an_algorithm_that_cannot() -> None:
    editor = Editor()
    editor.alg_name = "ROME"
    with pytest.raises(ValueError, match="ROME cannot edit in batches"):
        batch_edit(editor, PROMPTS, TARGETS)


@pytest.mark.parametrize(("algorithm", "after"), [("FT", [2, 2, 3]), ("ROME", [1, 2, 3])])
def test_a_data_set(algorithm: str, after: list[int]) -> None:
    editor = Editor()
    editor.alg_name = algorithm
    records = [
        {"prompt": p, "target_new": t, "ground_truth": "", "locality": {}}
        for p, t in zip(PROMPTS, TARGETS, strict=True)
    ]
    records[1]["case_id"] = 7
    metrics, _, _ = edit_dataset(editor, Records(records), sequential_edit=True)
    assert [metric["case_id"] for metric in metrics] == [0, 7, 2]
    assert [metric["post"]["rewrite_acc"][0] for metric in metrics] == after
    edit_dataset(editor, Records(records), keep_original_weight=True)
    assert float(editor.model.weight) == 3
    with pytest.raises(ValueError, match="edit_dataset got a list: it takes Records"):
        edit_dataset(editor, records)
