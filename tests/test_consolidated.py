"""A stream whose shards are least-squares solutions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import LAYERS
from editing_helpers import only_layer, requests, settings, stream_on

from easyedit_wise.easyedit.apply import apply_wise_to_model, stream_of
from easyedit_wise.editing import task_maker
from easyedit_wise.editing.consolidated import with_irrelevant
from easyedit_wise.editing.open_shard import OpenShard
from easyedit_wise.editing.recorded import edit_scores
from easyedit_wise.editing.requests import EditRequest
from easyedit_wise.editing.trainer import EditDivergedError
from easyedit_wise.least_squares import NormalEquations
from easyedit_wise.persistence import load_edits, save_edits
from easyedit_wise.tuner.switch import last_route

ON: dict[str, Any] = {
    "consolidation": 100.0,
    "mask": "columns",
    "mask_ratio": 0.5,
    "relative_scores": True,
    "other_subjects": 3,
    "varied_contexts": True,
    "n_contexts": 3,
    "n_iter": 6,
    "layer_units": True,
    "edit_lr": 0.3,
    "pooling": "max",
    "optimizer": "steepest",
    "save_freq": 3,
    "merge_freq": 3,
    "retrieve": True,
    "densities": 1.0,
}


def about(n: int) -> list[dict[str, Any]]:
    return [{**one, "subject": one["prompt"].split()[-2]} for one in requests(n)]


def test_only_the_subspaces_columns_change(llama: Any, tok: Any) -> None:
    apply_wise_to_model(llama, tok, about(2), settings(**ON))
    (state,) = only_layer(llama).memories("default")
    assert state.mask is not None
    columns = state.mask.any(dim=0)
    assert torch.equal(columns, state.mask.all(dim=0))
    assert int(columns.sum()) == state.mask.shape[1] // 2
    assert state.delta_weight[:, columns].any()
    assert not state.delta_weight[:, ~columns].any()


def test_the_solution_says_what_the_edit_was_trained_to(llama: Any, tok: Any) -> None:
    """With nearly nothing to be quiet on, the least-squares solution is what training gave."""
    learned: dict[float, torch.Tensor] = {}
    for weight in (1e-2, 1e5):
        alone = {**ON, "consolidation": weight, "other_subjects": 0}
        model, restore = apply_wise_to_model(llama, tok, about(1), settings(**alone))
        equations = stream_on(model)._open_shard.equations  # type: ignore[union-attr]  # an edit was made
        assert equations is not None
        said = only_layer(model).memories("default")[0].delta_weight[:, equations.columns] @ equations.edits
        learned[weight] = (said - equations.outputs).norm() / equations.outputs.norm()
        restore()
    assert learned[1e-2] < 0.05 < 0.5 < learned[1e5]


def test_full_shards_become_memories_and_each_opens_quiet_on_the_others(llama: Any, tok: Any) -> None:
    model, _ = apply_wise_to_model(llama, tok, about(5), settings(**ON))
    states = only_layer(model).memories("default")
    assert [(state.stage, state.n_edits) for state in states] == [("merged", 3), ("live", 2)]
    open_shard = stream_on(model)._open_shard
    assert open_shard is not None
    assert open_shard.equations is not None
    model(**tok("The capital of France is", return_tensors="pt"))
    route = last_route(model)
    assert route is not None
    assert len(route.memories) == 2


def test_a_failed_edit_leaves_everything_as_it_was(llama: Any, tok: Any) -> None:
    model, _ = apply_wise_to_model(llama, tok, about(2), settings(**ON))
    stream = stream_on(model)
    before = only_layer(model).memories("default")[0].delta_weight.clone()
    shard = stream._open_shard
    with pytest.raises(EditDivergedError):
        apply_wise_to_model(model, tok, about(3)[2:], settings(**ON | {"edit_lr": 1e38, "norm_constraint": None}))
    assert torch.equal(only_layer(model).memories("default")[0].delta_weight, before)
    assert stream._open_shard is shard


def test_a_loaded_open_shard_goes_on(llama: Any, tok: Any, tmp_path: Any) -> None:
    import copy

    fresh = copy.deepcopy(llama)
    apply_wise_to_model(llama, tok, about(2), settings(**ON))
    save_edits(llama, tmp_path / "edits")
    load_edits(fresh, tmp_path / "edits")
    apply_wise_to_model(fresh, tok, about(3)[2:], settings(**ON))
    (state,) = only_layer(fresh).memories("default")
    assert (state.stage, state.n_edits) == ("merged", 3)
    assert torch.isfinite(state.delta_weight).all()


@pytest.mark.parametrize(("limit", "groups"), [(None, 3), (10_000, 3), (30, 2), (1, 1)])
def test_a_long_edit_has_fewer_contexts(llama: Any, tok: Any, limit: int | None, groups: int) -> None:
    """A plain prompt and three contexts, two of them a group: three groups of two rows of six tokens."""
    hparams = settings(**ON | {"contexts_per_step": 2, "context_tokens": limit})
    stream = stream_of(llama, tok, hparams)
    request = EditRequest.from_easyedit({"prompt": "Rome is", "target_new": "a town"})
    length = len(tok("Rome is")["input_ids"]) + len(tok(" a town")["input_ids"])
    assert length * 4 <= 30 < length * 6
    task = stream._tasks.task([request], [None], [], OpenShard())
    assert len(task.contexts) == groups


@pytest.mark.parametrize(("limit", "rows"), [(None, 4), (10_000, 4), (4 * 3 * 6, 3), (1, 2)])
def test_an_iteration_has_a_quarter_of_the_tokens(llama: Any, tok: Any, limit: int | None, rows: int) -> None:
    """Rows of six tokens: a quarter of 72 has room for three."""
    stream = stream_of(llama, tok, settings(**ON | {"contexts_per_step": 4, "context_tokens": limit}))
    request = EditRequest.from_easyedit({"prompt": "Rome is", "target_new": "a town"})
    assert len(tok("Rome is")["input_ids"]) + len(tok(" a town")["input_ids"]) == 6
    task = stream._tasks.task([request], [None], [], OpenShard())
    assert len(task.contexts[0].batch.input_ids) == rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": "random"}, "set mask: columns"),
        ({"consolidation": 0.0}, "preset: margin"),
        ({"consolidation": 0.0, "optimizer": "lion"}, "without consolidation"),
        ({"consolidation": -1.0}, "at least 0"),
        ({"replay": True}, "replay is True with consolidation"),
        ({"rehearsal": 0.1}, "rehearsal is 0.1 with consolidation"),
        ({"optimizer": "lion"}, "set both"),
        ({"mask": "rows"}, "random, columns"),
        ({"gain": 0.0}, "gain is 0.0.*over 0"),
        ({"prompt_gain": 0.9}, "prompt_gain is 0.9.*>= 1"),
        ({"prompt_gain": float("inf")}, "prompt_gain is inf.*finite"),
        ({"prompt_gain": "loud"}, "prompt_gain is 'loud'"),
        ({"level_limit": 0.4}, "level_limit is 0.4.*>= 0.5"),
        ({"level_limit": float("inf")}, "level_limit is inf.*finite"),
        ({"level_limit": "loud"}, "level_limit is 'loud'"),
        ({"asked_again": -1}, "asked_again is -1"),
        ({"asked_again_limit": 1.5}, "asked_again_limit is 1.5"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(LAYERS["llama"], **ON | changes)


def test_a_shard_is_quiet_on_its_targets_tokens_out_of_order(
    llama: Any, tok: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A memory that answers with some words must not be active wherever one of them stands."""
    seen: list[str] = []
    scrambled = task_maker.scrambled

    def spied(text: str, *rest: Any) -> list[str]:
        seen.append(text)
        return scrambled(text, *rest)

    monkeypatch.setattr(task_maker, "scrambled", spied)
    hparams = settings(**ON | {"scrambled": 2, "mask_ratio": 1.0})
    stream = stream_of(llama, tok, hparams)
    request = EditRequest("The capital of France is", "Rome", "France")
    task = stream._tasks.task([request], [None], [], OpenShard())
    assert seen == [" Rome"]
    assert task.scrambled_targets is not None
    assert len(task.scrambled_targets) == 2
    empty = NormalEquations.empty(torch.arange(stream.layer.in_features), stream.layer.out_features)
    quiet = with_irrelevant(empty, replace(task, about_others=None), [], hparams).quiet
    tokens = task.scrambled_targets.activations.float()
    torch.testing.assert_close(quiet, 1.5 * tokens.T @ tokens)  # all texts of an edit together count as three prompts


def test_a_shard_begun_with_random_entries_is_refused(llama: Any, tok: Any) -> None:
    begun = {**ON, "consolidation": 0.0, "optimizer": "lion", "mask": "random"}
    begun |= {"relative_scores": False, "other_subjects": 0}
    apply_wise_to_model(llama, tok, about(1), settings(**begun))
    before = only_layer(llama).memories("default")[0].delta_weight.clone()
    with pytest.raises(ValueError, match="whole columns"):
        apply_wise_to_model(llama, tok, about(2)[1:], settings(**ON | {"relative_scores": False}))
    assert torch.equal(only_layer(llama).memories("default")[0].delta_weight, before)


def test_a_shard_is_quiet_on_other_memories_edits_about_the_same_subject(
    llama: Any, tok: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that both prompts have is the earlier edit's: the new one's memory says less to it."""
    asked = [
        {"prompt": "The capital of France is", "target_new": "Rome", "subject": "France"},
        {"prompt": "The largest town of France is", "target_new": "Oslo", "subject": "France"},
    ]
    hparams = settings(**ON | {"save_freq": 1, "merge_freq": 1})
    shares = []
    for known in (True, False):
        if not known:
            monkeypatch.setattr(task_maker, "related", lambda *_: [])
        model, restore = apply_wise_to_model(llama, tok, asked, hparams)
        stream = stream_on(model)
        second = only_layer(model).memories("default")[1].delta_weight
        first, own = (
            edit_scores(next(iter(stream._recorder.edits([held.request]))), second, hparams)[0].prompt
            for held in stream.held
        )
        shares.append(first / own)
        restore()
    assert shares[0] < 0.8 * shares[1]
