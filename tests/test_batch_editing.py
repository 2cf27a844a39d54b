"""Several edits of one shard, trained together: each with its own contexts, irrelevant prompt and losses."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import LAYERS
from editing_helpers import FACTS, mean_score, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import easyedit_wise.editing.stream as stream_module
from easyedit_wise.easyedit.apply import stream_of
from easyedit_wise.editing.loss_record import LossRecord
from easyedit_wise.editing.requests import EditRequest
from easyedit_wise.editing.stream import EditStream
from easyedit_wise.editing.task import EditTask
from easyedit_wise.editing.trainer import EditDivergedError, train_edit
from easyedit_wise.hparams import WISEHyperParams

EDITS = [EditRequest(prompt, target, loc_prompt=f"{target} in the north") for prompt, target in FACTS]


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[EditTask]:
    """Every task that a stream trains on from now on."""
    seen: list[EditTask] = []

    def spy(delta: Tensor, mask: Tensor, task: EditTask, *rest: Any, **options: Any) -> Any:
        seen.append(task)
        return train_edit(delta, mask, task, *rest, **options)

    monkeypatch.setattr(stream_module, "train_edit", spy)
    return seen


def stream(model: Any, tok: Any, **changes: Any) -> EditStream:
    return stream_of(model, tok, settings(**changes))


def first_losses(made: EditStream, edits: list[EditRequest]) -> tuple[float, float]:
    """(L, L_edit) of the first iteration."""
    outcome = made.apply(edits)[-1]
    return outcome.losses[0], outcome.edit_losses[0]


@pytest.mark.parametrize("contexts_per_step", [None, 2])
@pytest.mark.parametrize("subject_routing", [False, True])
def test_the_loss_of_a_batch_is_the_mean_of_its_edits(
    make_model: Any, tok: Any, contexts_per_step: int | None, subject_routing: bool
) -> None:
    options = {"n_contexts": 3, "contexts_per_step": contexts_per_step, "n_iter": 1, "save_freq": 9, "merge_freq": 9}
    edits = [replace(edit, subject=edit.prompt.split()[1]) for edit in EDITS[:3]]
    alone = [
        first_losses(stream(make_model("llama"), tok, subject_routing=subject_routing, **options), [edit])
        for edit in edits
    ]
    together = first_losses(
        stream(make_model("llama"), tok, subject_routing=subject_routing, batch_size=3, **options), edits
    )
    for index in range(2):
        assert together[index] == pytest.approx(sum(loss[index] for loss in alone) / 3, rel=1e-4)


def test_an_edit_is_held_against_its_own_irrelevant_prompt_only(llama: Any, tok: Any, tasks: list[EditTask]) -> None:
    mixed = [EDITS[0], replace(EDITS[1], loc_prompt=None), EDITS[2]]
    stream(llama, tok, batch_size=3, irrelevant_prompts=2, n_iter=1).apply(mixed)
    (task,) = tasks
    assert task.n_edits == 3
    assert task.irrelevant_of is not None
    assert [rows.tolist() for rows in task.irrelevant_of] == [[0, 2, 3], [2, 3], [1, 2, 3]]
    lengths = task.irrelevant.token_mask.sum(dim=-1).tolist()
    assert lengths[:2] == [len(tok(edit.loc_prompt)["input_ids"]) for edit in (EDITS[0], EDITS[2])]


def test_a_batch_ends_where_its_shard_does(llama: Any, tok: Any, tasks: list[EditTask]) -> None:
    made = stream(llama, tok, batch_size=4, save_freq=3, merge_freq=6, n_iter=1)
    learned: list[torch.Tensor] = []  # kept, or a later shard's dW could take an earlier one's place
    made.apply(EDITS[:8], on_edit=lambda *edit: learned.append(edit[2].delta_weight))
    assert [task.n_edits for task in tasks] == [3, 3, 2]
    assert [one is learned[0] for one in learned] == [True] * 3 + [False] * 5
    assert [held.request for held in made.held] == EDITS[:8]
    assert [(state.stage, state.n_edits) for state in made.layer.memories("default")] == [("merged", 6), ("live", 2)]


def test_each_edit_reports_its_own_scores(make_model: Any, tok: Any) -> None:
    made = stream(make_model("llama"), tok, batch_size=3, n_contexts=2, n_iter=1, edit_lr=0.3)
    made.apply(EDITS[:2])  # so that dW is not zero
    before = made.layer.memories("default")[0].delta_weight.clone()
    seen: list[tuple[int, str]] = []
    outcomes = made.apply(EDITS[2:5], on_edit=lambda index, request, _: seen.append((index, request.target)))
    assert seen == [(index, edit.target) for index, edit in enumerate(EDITS[2:5])]
    base = make_model("llama")
    for edit, outcome in zip(EDITS[2:5], outcomes, strict=True):
        assert len(outcome.edit_scores) == 3
        expected = mean_score(base, tok, LAYERS["llama"], before, edit.prompt)
        assert outcome.edit_scores[0] == pytest.approx(expected, rel=1e-3)


def test_a_batch_holds_all_its_edits(make_model: Any, tok: Any) -> None:
    made = stream(
        make_model("llama"), tok, batch_size=2, n_iter=150, edit_lr=0.03, mask_ratio=1.0, norm_constraint=None
    )
    made.apply(EDITS[:2])
    for edit in EDITS[:2]:
        prompt = tok(edit.prompt, return_tensors="pt")
        said = made.model.generate(**prompt, do_sample=False, max_new_tokens=8)[0, prompt["input_ids"].shape[1] :]
        assert tok.decode(said).strip().startswith(edit.target)


def test_rehearsal_goes_on_over_batches(llama: Any, tok: Any, tasks: list[EditTask]) -> None:
    stream(llama, tok, batch_size=2, rehearsal=0.1, n_iter=1).apply(EDITS[:4])
    tokens = sum(len(tok(f"{edit.prompt} {edit.target}")["input_ids"]) for edit in EDITS[:2])
    assert tasks[0].earlier is None
    assert tasks[1].earlier is not None
    assert tasks[1].earlier.n_tokens == tokens


def test_a_batch_that_diverges_is_taken_back_whole(llama: Any, tok: Any) -> None:
    made = stream(llama, tok, batch_size=2, n_iter=3)
    made.apply(EDITS[:2])
    before, weights = made.snapshot(), made.layer.memories("default")[0].delta_weight.clone()
    made.use(tok, settings(batch_size=2, n_iter=3, optimizer="sgd", edit_lr=1e37, norm_constraint=None))
    with pytest.raises(EditDivergedError, match=r"edits 3 to 4 \('The largest planet is' -> 'Saturn' and so on\)"):
        made.apply(EDITS[2:4])
    assert made.snapshot().held == before.held
    assert torch.equal(made.layer.memories("default")[0].delta_weight, weights)


def test_batches_are_deterministic(make_model: Any, tok: Any) -> None:
    runs = [stream(make_model("llama"), tok, batch_size=3, irrelevant_prompts=2) for _ in range(2)]
    for run in runs:
        run.apply(EDITS[:6])
    assert torch.equal(*(run.layer.memories("default")[0].delta_weight for run in runs))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_losses_read_late_train_the_same(
    make_model: Any, tok: Any, monkeypatch: pytest.MonkeyPatch, tasks: list[EditTask], optimizer: str
) -> None:
    """As on an accelerator: the host reads four iterations late, and what it finds late changes nothing."""
    hparams = settings(n_iter=12, optimizer=optimizer, edit_lr=1e-3, early_stop_loss=1e6, early_stop_change=0.05)

    def trained(lag: int, limits: WISEHyperParams) -> Any:
        made = stream_of(make_model("llama"), tok, limits)
        made.apply(EDITS[:1])
        mask = made.layer.memories("default")[0].mask
        losses = LossRecord(limits.n_iter, 1, limits.early_stop_loss, limits.early_stop_change, mask.device, lag=lag)
        return train_edit(torch.zeros(mask.shape), mask, tasks[-1], limits, record=losses)

    for limits in (hparams, replace(hparams, early_stop_loss=0.0)):
        at_once, late = trained(0, limits), trained(4, limits)
        assert (len(at_once.losses) == 12) == (limits.early_stop_loss == 0)
        assert torch.equal(at_once.delta_weight, late.delta_weight)
        assert at_once.losses == late.losses


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for an accelerator: reading a value, or a shape that depends on values.

    Not counted: Adam's step number, which lies on the host, and transformers' mask code, which looks once in each
    forward whether a batch is padded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2"):
            files = {frame.filename for frame in traceback.extract_stack()}
            if not any("masking_utils" in file or "torch/optim/adam" in file for file in files):
                self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes", [{}, {"margin_over_violated": True, "optimizer": "lion", "pooling": "max"}], ids=str
)
def test_no_iteration_makes_an_accelerator_wait(
    make_model: Any, tok: Any, tasks: list[EditTask], changes: dict[str, Any]
) -> None:
    counts = []
    for n_iter in (6, 18):
        hparams = settings(n_iter=n_iter, batch_size=2, rehearsal=0.1, n_contexts=2, **changes)
        made = stream_of(make_model("llama"), tok, hparams)
        made.apply(EDITS[:4])
        mask = made.layer.memories("default")[0].mask
        late = LossRecord(n_iter, 1, hparams.early_stop_loss, hparams.early_stop_change, mask.device, lag=4)
        with Waits() as waits:
            train_edit(torch.zeros(mask.shape), mask, tasks[-1], hparams, record=late)
        counts.append(waits.seen)
    assert counts[0] == counts[1]
