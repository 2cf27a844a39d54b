"""The journal: every acknowledged edit is on disk, a stopped stream goes on, an edit is taken back exactly."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from editing_helpers import FACTS, only_layer, requests, settings, stream_on
from test_consolidated import ON, about

from easyedit_wise.easyedit.apply import apply_wise_to_model
from easyedit_wise.editing.stream import EditStream
from easyedit_wise.hparams import WISEHyperParams
from easyedit_wise.journal import recording, restoring
from easyedit_wise.journal.calls import resume, unfinished
from easyedit_wise.journal.database import JournalError, JournalInUseError
from easyedit_wise.journal.entries import CallEntry
from easyedit_wise.journal.forgetting import forget, plan_of
from easyedit_wise.journal.journal import Journal
from easyedit_wise.journal.restoring import attached
from easyedit_wise.persistence import AdapterFileError, load_edits
from easyedit_wise.tuner.model import find_wise_layers

MARGIN: dict[str, Any] = {"save_freq": 3, "merge_freq": 6, "retrieve": True, "rehearsal": 0.1}
STREAMS = {
    "consolidated": ON,
    "margins": MARGIN,
    "merged": {**MARGIN, "retrieve": False},
    "long": {**ON, "save_freq": 30, "merge_freq": 30},
}


def memories(model: Any) -> list[tuple[Any, ...]]:
    return [
        (one.stage, one.n_edits, one.epsilon, one.weakest_edit, one.weakest_answered, one.delta_weight.clone())
        for one in only_layer(model).memories("default")
    ]


def same(left: list[tuple[Any, ...]], right: list[tuple[Any, ...]]) -> bool:
    return len(left) == len(right) and all(
        one[:-1] == other[:-1] and torch.equal(one[-1], other[-1]) for one, other in zip(left, right, strict=True)
    )


def edited(model: Any, tok: Any, folder: Path | None, asked: list[dict[str, Any]], **changes: Any) -> Any:
    model = copy.deepcopy(model)
    hparams = settings(**changes, **({} if folder is None else {"journal": str(folder)}))
    apply_wise_to_model(model, tok, asked, hparams)
    return model


def closed(model: Any) -> None:
    stream_on(model).sink.journal.close()  # type: ignore[union-attr]


class StopError(RuntimeError):
    """What stops a stream in a test."""


def stopped(model: Any, tok: Any, folder: Path, asked: list[dict[str, Any]], after: int, **changes: Any) -> None:
    """A stream that fails in training edit ``after``; its process is gone, so to speak."""
    count = 0
    real = EditStream._edit

    def failing(self: EditStream, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count > after:
            raise StopError
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EditStream, "_edit", failing)
        model = copy.deepcopy(model)
        with pytest.raises(StopError):
            apply_wise_to_model(model, tok, asked, settings(**changes, journal=str(folder)))
    if after:
        closed(model)


def test_a_journal_changes_nothing_of_the_edits(llama: Any, tok: Any, tmp_path: Path) -> None:
    with_it = edited(llama, tok, tmp_path / "j", about(7), **ON)
    assert same(memories(with_it), memories(edited(llama, tok, None, about(7), **ON)))


def test_it_says_what_was_edited(llama: Any, tok: Any, tmp_path: Path) -> None:
    edited(llama, tok, tmp_path, about(4), **ON)
    with Journal(tmp_path) as journal:
        edits = journal.edits()
        assert [(one.id, one.request["prompt"], one.request["target"]) for one in edits] == [
            (index, *FACTS[index - 1]) for index in range(1, 5)
        ]
        assert [(one.memory, one.shard_edit) for one in edits] == [(0, 1), (0, 2), (0, 3), (1, 1)]
        assert all(one.scores[0] is not None and one.scores[0] > 0 and one.epsilon > 0 for one in edits)
        facts = journal.facts()
        assert facts is not None
        assert facts.layer == "model.layers.1.mlp.down_proj"
        assert [state for _, state, _ in journal.calls()] == ["done"]
        assert unfinished(journal) is None


@pytest.mark.parametrize("kind", STREAMS)
def test_the_memories_in_it_answer(llama: Any, tok: Any, tmp_path: Path, kind: str) -> None:
    model = edited(llama, tok, tmp_path, about(5), **STREAMS[kind])
    loaded = copy.deepcopy(llama)
    with Journal(tmp_path) as journal:
        attached(loaded, tok, journal)
    assert same(memories(loaded), memories(model))
    assert stream_on(loaded).held == stream_on(model).held


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("after", [0, 1, 3, 5, 6])
def test_a_resumed_stream_is_an_uninterrupted_one(llama: Any, tok: Any, tmp_path: Path, kind: str, after: int) -> None:
    changes = STREAMS[kind]
    whole = memories(edited(llama, tok, None, about(8), **changes))
    stopped(llama, tok, tmp_path, about(8), after, **changes)
    with Journal(tmp_path) as journal:
        assert len(journal.edits()) == after
    model = copy.deepcopy(llama)
    resume(model, tok, tmp_path)
    assert same(memories(model), whole)
    with Journal(tmp_path) as journal:
        assert [edit.id for edit in journal.edits()] == list(range(1, 9))
        assert unfinished(journal) is None


@pytest.mark.parametrize("kind", STREAMS)
def test_a_long_shard_goes_on_from_its_kept_state(
    llama: Any, tok: Any, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "_STATE_EVERY", 2)
    changes = {**STREAMS[kind], "save_freq": 30, "merge_freq": 30}
    whole = memories(edited(llama, tok, None, about(9), **changes))
    stopped(llama, tok, tmp_path, about(9), 5, **changes)
    again: list[int] = []
    model = copy.deepcopy(llama)
    resume(model, tok, tmp_path, on_plan=lambda *plan: again.extend(plan))
    assert again == [1, 4]
    assert same(memories(model), whole)


def test_a_script_that_is_run_again_goes_on(llama: Any, tok: Any, tmp_path: Path) -> None:
    stopped(llama, tok, tmp_path, about(8), 5, **ON)
    again = edited(llama, tok, tmp_path, about(8), **ON)
    assert same(memories(again), memories(edited(llama, tok, None, about(8), **ON)))
    assert len(stream_on(again).held) == 8


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("which", [1, 3, 4, 8])
def test_a_forgotten_edit_never_was(llama: Any, tok: Any, tmp_path: Path, kind: str, which: int) -> None:
    changes, asked = STREAMS[kind], about(8)
    never = memories(edited(llama, tok, None, asked[: which - 1] + asked[which:], **changes))
    closed(edited(llama, tok, tmp_path, asked, **changes))
    model = copy.deepcopy(llama)
    forget(model, tok, tmp_path, which)
    assert same(memories(model), never)
    with Journal(tmp_path) as journal:
        assert [edit.id for edit in journal.edits()] == [one for one in range(1, 9) if one != which]
        assert [one.edit["id"] for one in journal.forgotten()] == [which]
        loaded = copy.deepcopy(llama)
        attached(loaded, tok, journal)
        assert same(memories(loaded), never)
    # The stream goes on, on the model and from the disk.
    apply_wise_to_model(model, tok, requests(9)[8:], settings(**changes, journal=str(tmp_path)))
    with Journal(tmp_path) as journal:
        assert journal.edits()[-1].id == 9


def test_forgetting_goes_on_where_it_was_stopped(llama: Any, tok: Any, tmp_path: Path) -> None:
    asked = about(9)
    never = memories(edited(llama, tok, None, asked[1:], **ON))
    model = edited(llama, tok, tmp_path, asked, **ON)
    whole = memories(model)
    count = 0

    def stop(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise StopError

    with pytest.raises(StopError):
        forget(model, tok, tmp_path, 1, on_edit=stop)
    assert same(memories(model), whole)  # neither the model nor the journal has changed
    with Journal(tmp_path) as journal:
        assert len(journal.edits()) == 9
        assert plan_of(journal, 1).done == 5
    again: list[int] = []
    forget(model, tok, tmp_path, 1, on_edit=lambda index, *_: again.append(index))
    assert len(again) == 3
    assert same(memories(model), never)


def test_load_edits_reads_a_journal(llama: Any, tok: Any, tmp_path: Path) -> None:
    model = edited(llama, tok, tmp_path, about(5), **ON)
    loaded = copy.deepcopy(llama)
    load_edits(loaded, tmp_path, "of_the_journal")
    (layer,) = find_wise_layers(loaded).values()
    assert layer.active_adapters == ["of_the_journal"]
    for one, other in zip(layer.memories("of_the_journal"), only_layer(model).memories("default"), strict=True):
        assert torch.equal(one.delta_weight, other.delta_weight)
    other_base = copy.deepcopy(llama)
    with torch.no_grad():
        other_base.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    with pytest.raises(AdapterFileError, match="do not fit this model"):
        load_edits(other_base, tmp_path)
    assert not find_wise_layers(other_base)
    load_edits(other_base, tmp_path, any_base=True)


def test_an_edit_that_is_not_there(llama: Any, tok: Any, tmp_path: Path) -> None:
    model = edited(llama, tok, tmp_path, about(2), **ON)
    with pytest.raises(JournalError, match=r"no edit 7: it has 2, from 1 to 2"):
        forget(model, tok, tmp_path, 7)
    forget(model, tok, tmp_path, 1)
    with pytest.raises(JournalError, match="that one was taken back"):
        forget(model, tok, tmp_path, 1)


def test_one_process_writes(llama: Any, tok: Any, tmp_path: Path) -> None:
    model = edited(llama, tok, tmp_path, about(2), **ON)
    other = copy.deepcopy(llama)
    with pytest.raises(JournalInUseError, match="another model of this one, writes to the journal"):
        apply_wise_to_model(other, tok, about(1), settings(**ON, journal=str(tmp_path)))
    with pytest.raises(ValueError, match="carries no edits"):
        stream_on_or_error(other)
    closed(model)
    apply_wise_to_model(other, tok, about(3)[2:], settings(**ON, journal=str(tmp_path)))
    assert len(stream_on(other).held) == 3


_WRITER = """
import sys, time
from easyedit_wise.journal.writing import JournalWriter
journal = JournalWriter(sys.argv[1])
sys.stdout.write("open\\n")
sys.stdout.flush()
time.sleep(600)
"""


def test_another_process_that_writes_is_named_and_its_end_lets_go(llama: Any, tok: Any, tmp_path: Path) -> None:
    closed(edited(llama, tok, tmp_path, about(2), **ON))
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "open\n"
            with pytest.raises(JournalInUseError, match="another process, or another model of this one, writes"):
                edited(llama, tok, tmp_path, about(1), **ON)
            with Journal(tmp_path) as journal:  # to read it is always possible
                assert len(journal.edits()) == 2
        finally:
            other.kill()
    model = edited(llama, tok, tmp_path, about(3)[2:], **ON)
    assert len(stream_on(model).held) == 3


def twenty() -> list[dict[str, Any]]:
    """The second and third time round the facts are edited again, to other answers."""
    first = about(9)
    return [{**first[i % 9], "target_new": first[(i + i // 9) % 9]["target_new"]} for i in range(20)]


@pytest.mark.soak
@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("which", [1, 7, 14, 20])
def test_one_of_twenty_forgotten(llama: Any, tok: Any, tmp_path: Path, kind: str, which: int) -> None:
    changes, asked = STREAMS[kind], twenty()
    never = memories(edited(llama, tok, None, asked[: which - 1] + asked[which:], **changes))
    closed(edited(llama, tok, tmp_path, asked, **changes))
    model = copy.deepcopy(llama)
    forget(model, tok, tmp_path, which)
    assert same(memories(model), never)


def stream_on_or_error(model: Any) -> None:
    from easyedit_wise.tuner.switch import last_route

    last_route(model)


def test_a_restored_call_is_taken_back(llama: Any, tok: Any, tmp_path: Path) -> None:
    hparams = settings(**ON, journal=str(tmp_path))
    apply_wise_to_model(llama, tok, about(4), hparams)
    before = memories(llama)
    _, restore = apply_wise_to_model(llama, tok, about(6)[4:], hparams)
    restore()
    assert same(memories(llama), before)
    with Journal(tmp_path) as journal:
        assert [edit.id for edit in journal.edits()] == [1, 2, 3, 4]
        assert [(one.edit["id"], one.how) for one in journal.forgotten()] == [(5, "restore"), (6, "restore")]
    closed(llama)


def test_a_first_call_that_was_taken_back_leaves_an_empty_journal(llama: Any, tok: Any, tmp_path: Path) -> None:
    """EasyEdit's editor edits, looks, and restores, request by request."""
    hparams = settings(**ON, journal=str(tmp_path))
    for one in about(2):
        _, restore = apply_wise_to_model(llama, tok, [one], hparams)
        restore()
        assert not find_wise_layers(llama)
    with Journal(tmp_path) as journal:
        assert journal.edits() == []
        assert [(one.edit["id"], one.how) for one in journal.forgotten()] == [(1, "restore"), (2, "restore")]
    apply_wise_to_model(llama, tok, about(3)[2:], hparams)
    with Journal(tmp_path) as journal:
        assert [edit.id for edit in journal.edits()] == [3]
    closed(llama)


def test_a_journal_of_before_a_setting_is_made_again_as_it_was_made() -> None:
    """Its calls name all settings that there were: what they lack did nothing then, whatever its default is now."""
    defaults = WISEHyperParams(inner_params=["model.layers.0.mlp.down_proj.weight"]).to_dict()
    later = ("prompt_gain", "level_limit", "after_answer", "unfinished_names")
    recorded = {key: value for key, value in defaults.items() if key not in later}
    found = restoring.settings_of(CallEntry("2026-11-25", recorded, [], 1))
    assert (found.prompt_gain, found.level_limit, found.after_answer, found.unfinished_names) == (1.0, 0.0, 0, 0.0)
    named = restoring.settings_of(CallEntry("2026-11-27", {**recorded, "prompt_gain": 1.5, "level_limit": 0.5}, [], 1))
    assert (named.prompt_gain, named.level_limit) == (1.5, 0.5)
