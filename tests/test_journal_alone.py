"""An edit that is taken out of its own memory alone: the other memories stay, and the journal goes on from there."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from editing_helpers import settings, stream_on
from test_consolidated import ON, about
from test_journal import STREAMS, StopError, closed, edited, memories, same, twenty

from easyedit_wise.easyedit.apply import apply_wise_to_model, stream_of
from easyedit_wise.editing.requests import EditRequest
from easyedit_wise.journal.calls import resume
from easyedit_wise.journal.forgetting import forget, plan_of
from easyedit_wise.journal.journal import Journal
from easyedit_wise.journal.restoring import attached

KINDS = {kind: STREAMS[kind] for kind in ("consolidated", "margins")}
SIZE = {"consolidated": 3, "margins": 6}  # edits in a memory


def its_memory_without(model: Any, tok: Any, asked: list[dict[str, Any]], place: int, **changes: Any) -> Any:
    """Memory ``place`` of a stream whose memories were closed as these were, one of them early."""
    model = copy.deepcopy(model)
    stream = stream_of(model, tok, settings(**changes))
    stream.apply([EditRequest.from_easyedit(one) for one in asked])
    stream.close_memory()
    return memories(model)[place]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [1, 2])
def test_its_memory_is_made_again_and_no_other(llama: Any, tok: Any, tmp_path: Path, kind: str, which: int) -> None:
    changes, size, asked = STREAMS[kind], SIZE[kind], about(8)
    model = edited(llama, tok, tmp_path, asked, **changes)
    whole = memories(model)
    closed(model)
    made: list[int] = []
    model = copy.deepcopy(llama)
    forget(model, tok, tmp_path, which, on_edit=lambda *_: made.append(1), exactly=False)
    assert len(made) == size - 1 + 2  # two of the eight are in an open shard
    after = memories(model)
    others = [one for index, one in enumerate(asked[:size], 1) if index != which]
    assert same([after[0]], [its_memory_without(llama, tok, others, 0, **changes)])
    assert same(after[1:-1], whole[1:-1])
    assert after[-1][:2] == whole[-1][:2]
    assert len(stream_on(model).held) == 7
    closed(model)

    # On disk it is the same, it goes on alike, and a second one can be taken back, alone or exactly.
    with Journal(tmp_path) as journal:
        loaded = copy.deepcopy(llama)
        attached(loaded, tok, journal)
        assert same(memories(loaded), after)
        assert [edit.id for edit in journal.edits()] == [one for one in range(1, 9) if one != which]
        assert [one.edit["id"] for one in journal.forgotten()] == [which]
    again = copy.deepcopy(llama)
    resume(again, tok, tmp_path)
    assert same(memories(again), after)
    forget(again, tok, tmp_path, 3, exactly=False)
    others = [one for index, one in enumerate(asked[:size], 1) if index not in (which, 3)]
    assert same([memories(again)[0]], [its_memory_without(llama, tok, others, 0, **changes)])
    forget(again, tok, tmp_path, 8)
    assert [held.request.prompt for held in stream_on(again).held] == [
        one["prompt"] for index, one in enumerate(asked, 1) if index not in (which, 3, 8)
    ]


def test_the_next_edits_come_out_the_same_from_the_disk(llama: Any, tok: Any, tmp_path: Path) -> None:
    here, copied = tmp_path / "here", tmp_path / "copied"
    model = edited(llama, tok, here, about(8), **ON)
    forget(model, tok, here, 4, exactly=False)
    shutil.copytree(here, copied)
    apply_wise_to_model(model, tok, about(9)[8:], settings(**ON, journal=str(here)))
    from_disk = copy.deepcopy(llama)
    apply_wise_to_model(from_disk, tok, about(9)[8:], settings(**ON, journal=str(copied)))
    assert same(memories(from_disk), memories(model))
    assert stream_on(from_disk).held == stream_on(model).held


def test_the_only_edit_of_a_memory_takes_the_memory_along(llama: Any, tok: Any, tmp_path: Path) -> None:
    changes = {**ON, "save_freq": 1, "merge_freq": 1}
    model = edited(llama, tok, tmp_path, about(4), **changes)
    whole = memories(model)
    forget(model, tok, tmp_path, 2, exactly=False)
    assert same(memories(model), [whole[0], *whole[2:]])
    assert [held.memory for held in stream_on(model).held] == [0, 1, 2]
    forget(model, tok, tmp_path, 1, exactly=False)
    forget(model, tok, tmp_path, 4, exactly=False)
    assert same(memories(model), [whole[2]])
    forget(model, tok, tmp_path, 3, exactly=False)
    assert memories(model) == []
    with Journal(tmp_path) as journal:
        assert journal.edits() == []
        assert journal.snapshot() is None
    apply_wise_to_model(model, tok, about(1), settings(**changes, journal=str(tmp_path)))
    assert len(memories(model)) == 1


@pytest.mark.parametrize(("kind", "which"), [("merged", 2), ("long", 2), ("consolidated", 8)])
def test_where_it_is_no_quicker_it_is_exact(llama: Any, tok: Any, tmp_path: Path, kind: str, which: int) -> None:
    changes, asked = STREAMS[kind], about(8)
    never = memories(edited(llama, tok, None, asked[: which - 1] + asked[which:], **changes))
    model = edited(llama, tok, tmp_path, asked, **changes)
    with Journal(tmp_path) as journal:
        assert plan_of(journal, which, exactly=False) == plan_of(journal, which)
    forget(model, tok, tmp_path, which, exactly=False)
    assert same(memories(model), never)


@pytest.mark.parametrize("after", [1, 3])  # in its memory, in the open shard
def test_stopped_nothing_has_changed_and_it_goes_on(llama: Any, tok: Any, tmp_path: Path, after: int) -> None:
    model = edited(llama, tok, tmp_path, about(8), **ON)
    whole = memories(model)
    count = 0

    def stop(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == after:
            raise StopError

    with pytest.raises(StopError):
        forget(model, tok, tmp_path, 2, on_edit=stop, exactly=False)
    assert same(memories(model), whole)
    with Journal(tmp_path) as journal:
        assert len(journal.edits()) == 8
        plan = plan_of(journal, 2, exactly=False)
        assert plan.done == (0 if after == 1 else 6)
        # 3 and 1 of its memory, 7 and 8 of the open shard; what was made is not made again.
        assert [one.id for one in plan.to_make] == ([1, 3, 7, 8] if after == 1 else [8])
        assert plan_of(journal, 2).done == 0  # the exact way is another one
        assert [one.id for one in plan_of(journal, 2).to_make] == [1, 3, 4, 5, 6, 7, 8]
    forget(model, tok, tmp_path, 2, exactly=False)
    stopped_once = memories(model)
    closed(model)
    other = edited(llama, tok, tmp_path / "other", about(8), **ON)
    forget(other, tok, tmp_path / "other", 2, exactly=False)
    assert same(stopped_once, memories(other))
    assert torch.equal(stream_on(model)._generator.get_state(), stream_on(other)._generator.get_state())


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [1, 7, 14, 20])
def test_any_of_twenty(llama: Any, tok: Any, tmp_path: Path, kind: str, which: int) -> None:
    model = edited(llama, tok, tmp_path, twenty(), **STREAMS[kind])
    whole, held = memories(model), [one.memory for one in stream_on(model).held]
    forget(model, tok, tmp_path, which, exactly=False)
    after, place = memories(model), held[which - 1]
    open_place = len(whole) - 1
    if place != open_place:
        assert same(
            [one for i, one in enumerate(after) if i not in (place, open_place)],
            [one for i, one in enumerate(whole) if i not in (place, open_place)],
        )
    closed(model)
    again = copy.deepcopy(llama)
    resume(again, tok, tmp_path)
    assert same(memories(again), after)
