"""Edits whose prompts go on from one another, in different memories: either memory may answer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from editing_helpers import only_layer, settings, stream_on
from hypothesis import given
from hypothesis import strategies as st
from test_consolidated import ON
from test_journal import closed, edited, memories

from easyedit_wise.easyedit.apply import apply_wise_to_model
from easyedit_wise.editing import task_maker
from easyedit_wise.editing.consolidated import with_trained
from easyedit_wise.editing.held import HeldEdit
from easyedit_wise.editing.inherited import Inherited, divided, inherited_by, shared_beginning
from easyedit_wise.editing.open_shard import OpenShard
from easyedit_wise.editing.recorded import RecordedEdit
from easyedit_wise.editing.recorder import plain_edits
from easyedit_wise.editing.requests import EditRequest
from easyedit_wise.editing.scored import ScoredInputs
from easyedit_wise.journal.forgetting import forget, plan_of
from easyedit_wise.journal.journal import Journal
from easyedit_wise.least_squares import NormalEquations
from easyedit_wise.persistence import load_edits, save_edits

ONE_EACH: dict[str, Any] = {**ON, "save_freq": 1, "merge_freq": 1}
SHORT, LONG = "The capital of France is", "The capital of France is a town called"
OTHER = "The mayor of Spain is"


def asking(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "target_new": target} for prompt, target in pairs]


def held(*places: tuple[str, int]) -> list[HeldEdit]:
    return [HeldEdit(EditRequest(prompt, str(number)), place) for number, (prompt, place) in enumerate(places)]


def requests_for(*prompts: str) -> list[EditRequest]:
    return [EditRequest(prompt, "new") for prompt in prompts]


def test_what_goes_on_from_one_another_is_inherited_in_order() -> None:
    elsewhere = held((LONG, 0), (OTHER, 0), ("The capital of", 1))
    assert inherited_by(requests_for(SHORT), elsewhere, 9) == [elsewhere[0], elsewhere[2]]
    assert inherited_by(requests_for(SHORT), elsewhere, 1) == [elsewhere[2]]
    assert inherited_by(requests_for(OTHER), elsewhere, 9) == []
    assert inherited_by(requests_for(SHORT, LONG), elsewhere, 9) == [elsewhere[2]]  # LONG is overruled


def test_an_edit_that_the_shard_overruled_is_not_inherited() -> None:
    """SHORT was edited again in the open shard, which then takes an edit that goes on from it."""
    elsewhere = held((SHORT, 0), ("The capital of", 0))
    assert inherited_by(requests_for(LONG), elsewhere, 9) == elsewhere
    assert inherited_by(requests_for(LONG), elsewhere, 9, requests_for(SHORT)) == elsewhere[1:]


def test_a_stream_does_not_inherit_what_its_open_shard_overruled(
    llama: Any, tok: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[HeldEdit]] = []
    monkeypatch.setattr(task_maker, "inherited_by", lambda *given: seen.append(inherited_by(*given)) or seen[-1])
    asked = asking((SHORT, "Rome"), (OTHER, "Ann"), (SHORT, "Oslo"), (LONG, "Bonn"))
    apply_wise_to_model(llama, tok, asked, settings(**ON | {"save_freq": 2, "merge_freq": 2}))
    assert seen
    assert not any(seen)


def test_of_one_prompt_the_latest_edit_is_inherited() -> None:
    elsewhere = held((LONG, 0), (LONG, 1))
    assert inherited_by(requests_for(SHORT), elsewhere, 9) == [elsewhere[1]]


def test_an_inherited_edit_says_what_its_own_memory_says() -> None:
    tokens = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    there = torch.tensor([[False, True, True, True]])
    edit = RecordedEdit(ScoredInputs(tokens, there), torch.tensor([[False, True, True, False]]))
    inherited = Inherited.of([(edit, torch.tensor([[1.0, 2.0], [3.0, 0.0]]), ())])
    assert inherited is not None
    assert inherited.outputs.tolist() == [[1.0, 3.0], [4.0, 0.0], [3.0, 3.0]]
    assert inherited.in_prompt.tolist() == [True, True, False]
    without_one = Inherited.of([(edit, torch.tensor([[1.0, 2.0], [3.0, 0.0]]), {1})])
    assert without_one is not None
    assert without_one.activations.tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert without_one.outputs.tolist() == [[1.0, 3.0], [3.0, 3.0]]
    assert without_one.in_prompt.tolist() == [True, False]
    assert Inherited.of([]) is None


@pytest.mark.parametrize(
    ("own", "other", "its_left", "own_left"),
    [
        # It goes on from the new edit's prompt: all that they share is the new one's, its answer's first token too.
        (([1, 2, 7, 8], 2), ([1, 2, 7, 4, 5], 4), [0, 1, 2], 0),
        # The new one goes on from it: its prompt and what of its answer the new prompt has stay with it.
        (([1, 2, 3, 4, 9], 4), ([1, 2, 3, 8], 2), [], 3),
        # Its whole answer is in the new prompt, but for the token that both answers follow.
        (([1, 2, 3, 9], 3), ([1, 2, 3, 4], 2), [2], 2),
        # The new answer begins with what it answers.
        (([1, 2, 3, 4], 2), ([1, 2, 3, 4, 5], 1), [1, 2, 3], 1),
        (([1, 2], 1), ([3, 4], 1), [], 0),
    ],
)
def test_whose_the_shared_tokens_are_by_hand(
    own: tuple[list[int], int], other: tuple[list[int], int], its_left: list[int], own_left: int
) -> None:
    places, first = divided(own, other)
    assert (list(places), first) == (its_left, own_left)


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_the_shared_beginning_is_the_longest(one: list[int], other: list[int]) -> None:
    shared = shared_beginning(one, other)
    assert one[:shared] == other[:shared]
    assert one[: shared + 1] != other[: shared + 1] or shared == min(len(one), len(other))


def test_a_shared_token_is_said_by_one_edit_alone(llama: Any, tok: Any) -> None:
    """No plain token of a new edit that goes on from an inherited one is asked for two outputs; its contexts' are."""
    model, _ = apply_wise_to_model(llama, tok, asking((SHORT, "a town Bonn")), settings(**ONE_EACH))
    stream, states = stream_on(model), only_layer(model).memories("default")
    longer = EditRequest(LONG, "Rome")
    with stream._recorder.main_memory_only():
        task = stream._tasks.task([longer], [None], stream.held, OpenShard(), states)
    shared = shared_beginning(tok(f"{SHORT} a town Bonn")["input_ids"], tok(f"{LONG} Rome")["input_ids"])
    assert len(tok(SHORT)["input_ids"]) < shared < len(tok(LONG)["input_ids"])
    assert task.n_inherited == [shared]
    assert task.inherited is not None
    assert len(task.inherited.activations) == len(tok(f"{SHORT} a town Bonn")["input_ids"])
    stands = NormalEquations.empty(torch.arange(stream.layer.in_features), stream.layer.out_features)
    outputs = [torch.ones(len(group.activations), stream.layer.out_features) for group in task.contexts]
    said, _ = with_trained(stands, task, outputs, plain_edits(task.contexts[0], [None], False), stream.hparams)
    expected = torch.zeros_like(said.edits)
    for group in task.contexts:
        weights = torch.where(group.row == 0, 1 / len(task.contexts), 0.3) * torch.where(group.in_prompt, 3.0, 1.0)
        weights[(group.row == 0).nonzero().flatten()[:shared]] = 0.0
        expected += (group.activations * weights[:, None]).T @ group.activations
    torch.testing.assert_close(said.edits, expected)


def test_what_a_shard_inherited_takes_room(llama: Any, tok: Any) -> None:
    """Beside two edits the third memory has room for one more token: what the second inherits fills it."""
    asked = asking((SHORT, "Rome"), (OTHER, "Ann"), (LONG, "Oslo"), ("Rome is", "old"))
    held_by = {}
    for name, order in (("goes on", asked), ("alone", [asked[1], *asked[1:]])):
        lengths = [len(tok(f"{one['prompt']} {one['target_new']}")["input_ids"]) for one in order[1:3]]
        model, restore = apply_wise_to_model(llama, tok, order[:1], settings(**ONE_EACH))
        columns = round(ON["mask_ratio"] * only_layer(model).in_features)
        roomy = {**ON, "save_freq": 3, "merge_freq": 3, "capacity": (sum(lengths) + 1) / columns}
        model, _ = apply_wise_to_model(model, tok, order[1:], settings(**roomy))
        held_by[name] = [one.memory for one in stream_on(model).held]
        restore()
    assert held_by == {"goes on": [0, 1, 1, 2], "alone": [0, 1, 1, 1]}


def distance(model: Any, index: int, memory: int) -> float:
    """How far what a memory says of an edit is from what the edit's own memory says, as a share of that."""
    stream, states = stream_on(model), only_layer(model).memories("default")
    ((edit,),) = stream._recorder.edits([stream.held[index].request])
    tokens = edit.answered.activations
    own, other = (tokens @ states[one].delta_weight.T for one in (stream.held[index].memory, memory))
    return float((own - other).norm() / own.norm())


@pytest.mark.parametrize(("first", "second"), [(SHORT, LONG), (LONG, SHORT)])
def test_the_later_memory_says_the_earlier_ones_answer(
    llama: Any, tok: Any, monkeypatch: pytest.MonkeyPatch, first: str, second: str
) -> None:
    found = {}
    for inherits in (True, False):
        if not inherits:
            monkeypatch.setattr(task_maker, "inherited_by", lambda *_: [])
        model, restore = apply_wise_to_model(
            llama, tok, asking((first, "Rome"), (second, "Oslo")), settings(**ONE_EACH)
        )
        found[inherits] = distance(model, 0, 1)
        restore()
    assert found[True] < 0.7
    assert found[True] < 0.6 * found[False]


def test_a_loaded_open_shard_goes_on_with_what_it_inherited(llama: Any, tok: Any, tmp_path: Path) -> None:
    hparams = settings(**ON | {"save_freq": 2, "merge_freq": 2})
    fresh, asked = copy.deepcopy(llama), asking((SHORT, "Rome"), (OTHER, "Ann"), (LONG, "Oslo"), ("Rome is", "old"))
    apply_wise_to_model(llama, tok, asked[:3], hparams)
    save_edits(llama, tmp_path)
    load_edits(fresh, tmp_path)
    for model in (llama, fresh):
        apply_wise_to_model(model, tok, asked[3:], hparams)
    assert distance(llama, 0, 1) < 0.75
    assert distance(fresh, 0, 1) < 0.75


def test_what_a_later_memory_says_as_well_is_not_taken_back_from_one_alone(
    llama: Any, tok: Any, tmp_path: Path
) -> None:
    """No memory may hold an edit that was taken back, so all that came after it is made again."""
    asked = asking((SHORT, "Rome"), (OTHER, "Ann"), (LONG, "Oslo"))
    closed(edited(llama, tok, tmp_path, asked, **ONE_EACH))
    never = memories(edited(llama, tok, None, asked[1:], **ONE_EACH))
    with Journal(tmp_path) as journal:
        assert plan_of(journal, 1, exactly=False).alone is None
        assert plan_of(journal, 2, exactly=False).alone is not None
        assert plan_of(journal, 3, exactly=False).alone is not None  # nothing came after it
    model = copy.deepcopy(llama)
    forget(model, tok, tmp_path, 1, exactly=False)
    assert len(memories(model)) == len(never) == 2
    for one, other in zip(memories(model), never, strict=True):
        assert one[:3] == other[:3]
        assert torch.equal(one[-1], other[-1])
