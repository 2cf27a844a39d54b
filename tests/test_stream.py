"""A stream of edits: shards, merges, thresholds, what is kept, and what an error leaves."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from conftest import LAYERS
from editing_helpers import FACTS, layer_input, logits_of, mean_score, requests, settings, traces
from torch import Tensor, nn

import easyedit_wise.editing.shards as shards_module
import easyedit_wise.editing.stream as stream_module
from easyedit_wise.calibration import calibrated_threshold, minimum_threshold, spent_position
from easyedit_wise.data import neutral_prompts
from easyedit_wise.easyedit.apply import wise_config
from easyedit_wise.editing.requests import EditRequest
from easyedit_wise.editing.stream import EditStream
from easyedit_wise.editing.trainer import EditDivergedError, EditOutcome, EditTask, train_edit
from easyedit_wise.hparams import WISEHyperParams
from easyedit_wise.merging import merge
from easyedit_wise.tuner.attach import attach, check_layer
from easyedit_wise.tuner.memory import MemoryState

EDITS = [EditRequest.from_easyedit(request) for request in requests()]


def open_stream(model: nn.Module, tok: Any, hparams: WISEHyperParams) -> EditStream:
    name = check_layer(model, hparams.inner_params[0])
    layer = attach(model, wise_config(model, name, hparams))
    return EditStream(model, tok, hparams, layer)


def memories(stream: EditStream) -> list[MemoryState]:
    return stream.layer.memories(stream.adapter_name)


def copied(stream: EditStream) -> list[MemoryState]:
    return [copy.deepcopy(state) for state in memories(stream)]


def same(first: list[MemoryState], second: list[MemoryState]) -> bool:
    """Bit for bit."""
    return len(first) == len(second) and all(
        (a.stage, a.epsilon, a.n_edits) == (b.stage, b.epsilon, b.n_edits)
        and torch.equal(a.delta_weight, b.delta_weight)
        and (a.mask is None) == (b.mask is None)
        and (a.mask is None or torch.equal(a.mask, b.mask))
        for a, b in zip(first, second, strict=True)
    )


@pytest.fixture
def spied_tasks(monkeypatch: pytest.MonkeyPatch) -> list[EditTask]:
    """What each edit trains on."""
    tasks: list[EditTask] = []

    def spy(delta: Tensor, mask: Tensor, task: EditTask, *rest: Any, **options: Any) -> EditOutcome:
        tasks.append(task)
        return train_edit(delta, mask, task, *rest, **options)

    monkeypatch.setattr(stream_module, "train_edit", spy)
    return tasks


# -- shards and merges ----------------------------------------------------------------------------

MERGED_TWICE = [
    # stages with their edits after each edit, and the memory of each edit held
    ("live1", [0]),
    ("shard2", [0, 0]),
    ("shard2 live1", [0, 0, 1]),
    ("merged4", [0] * 4),
    ("merged4 live1", [0] * 4 + [1]),
    ("merged4 shard2", [0] * 4 + [1, 1]),
    ("merged4 shard2 live1", [0] * 4 + [1, 1, 2]),
    ("merged8", [0] * 8),
    ("merged8 live1", [0] * 8 + [1]),
]
RETRIEVED_TWICE = [
    *MERGED_TWICE[:7],
    ("merged4 merged4", [0] * 4 + [1] * 4),
    ("merged4 merged4 live1", [0] * 4 + [1] * 4 + [2]),
]
EVERY_THIRD = [
    ("live1", [0]),
    ("live2", [0] * 2),
    ("merged3", [0] * 3),
    ("merged3 live1", [0] * 3 + [1]),
    ("merged3 live2", [0] * 3 + [1] * 2),
    ("merged3 merged3", [0] * 3 + [1] * 3),
]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"save_freq": 2, "merge_freq": 4}, MERGED_TWICE),
        ({"save_freq": 2, "merge_freq": 4, "retrieve": True}, RETRIEVED_TWICE),
        ({"save_freq": None, "merge_freq": 3, "retrieve": True}, EVERY_THIRD),
        ({"save_freq": 3, "merge_freq": 3, "retrieve": True}, EVERY_THIRD),
        ({"save_freq": None, "merge_freq": 100}, [(f"live{n}", [0] * n) for n in (1, 2, 3)]),
        ({"save_freq": 1, "merge_freq": 3}, [("shard1", [0]), ("shard1 shard1", [0, 1]), ("merged3", [0] * 3)]),
        ({"save_freq": 1, "merge_freq": 1}, [("merged1", [0]), ("merged2", [0] * 2), ("merged3", [0] * 3)]),
    ],
    ids=["merge", "retrieve", "retrieve-no-save_freq", "retrieve-k1", "never", "three-shards", "every-edit"],
)
def test_bookkeeping(llama: Any, tok: Any, changes: dict[str, Any], expected: list[tuple[str, list[int]]]) -> None:
    stream = open_stream(llama, tok, settings(n_iter=1, **changes))
    for count, (stages, held) in enumerate(expected):
        stream.apply([EDITS[count]])
        assert " ".join(f"{state.stage}{state.n_edits}" for state in memories(stream)) == stages
        assert [edit.memory for edit in stream.held] == held
        assert [edit.request for edit in stream.held] == EDITS[: count + 1]
        assert all((state.mask is None) == (state.stage != "live") for state in memories(stream))
        assert stream.layer.wisemem_config["default"].memories == [state.stage for state in memories(stream)]


def test_one_call_or_many_give_the_same(make_model: Any, tok: Any) -> None:
    hparams = settings(save_freq=2, merge_freq=4, replay=True, rehearsal=0.1, irrelevant_prompts=2)
    at_once, one_by_one = (open_stream(make_model("llama"), tok, hparams) for _ in range(2))
    at_once.apply(EDITS[:6])
    for edit in EDITS[:6]:
        one_by_one.apply([edit])
        logits_of(one_by_one.model, tok, edit.prompt)  # a query in between changes nothing
    assert same(memories(at_once), memories(one_by_one))


def test_the_seed_decides_everything(make_model: Any, tok: Any) -> None:
    hparams = {"save_freq": 2, "merge_freq": 4, "merge_alg": "dare_ties", "replay": True, "densities": 0.5}
    streams = []
    for seed, global_seed in ((1, 0), (1, 99), (2, 0)):
        torch.manual_seed(global_seed)
        numpy.random.seed(global_seed)
        streams.append(open_stream(make_model("llama"), tok, settings(seed=seed, **hparams)))
        streams[-1].apply(EDITS[:5])
    assert same(memories(streams[0]), memories(streams[1]))
    assert not torch.equal(memories(streams[0])[0].delta_weight, memories(streams[2])[0].delta_weight)
    assert not torch.equal(memories(streams[0])[1].mask, memories(streams[2])[1].mask)


def test_shards_have_masks_of_their_own(llama: Any, tok: Any) -> None:
    stream = open_stream(llama, tok, settings(save_freq=2, merge_freq=8, mask_ratio=0.3, n_iter=1))
    masks = []
    for count in range(0, 6, 2):
        stream.apply([EDITS[count]])
        live = memories(stream)[-1]
        masks.append(live.mask)
        assert torch.count_nonzero(live.delta_weight[~live.mask]) == 0
        stream.apply([EDITS[count + 1]])
        closed = memories(stream)[-1].delta_weight
        assert torch.count_nonzero(closed[~masks[-1]]) == 0  # the second edit kept to the first one's mask
        assert torch.count_nonzero(closed[masks[-1]]) > 0
    for index, mask in enumerate(masks):
        assert float(mask.float().mean()) == pytest.approx(0.3, abs=0.05)
        for other in masks[:index]:
            assert float((mask & other).float().mean()) == pytest.approx(0.09, abs=0.04)  # rho^2: independent draws


def test_an_edit_goes_on_from_the_shards_earlier_ones(llama: Any, tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Tensor] = []

    def spy(delta: Tensor, *rest: Any, **options: Any) -> EditOutcome:
        starts.append(delta.clone())
        return train_edit(delta, *rest, **options)

    monkeypatch.setattr(stream_module, "train_edit", spy)
    stream = open_stream(llama, tok, settings(n_iter=1, save_freq=2, merge_freq=4))
    ends: list[Tensor] = []
    stream.apply(EDITS[:3], on_edit=lambda *made: ends.append(made[2].delta_weight.clone()))
    assert not starts[0].any()
    assert torch.equal(starts[1], ends[0])
    assert not starts[2].any()  # a new shard starts from the main memory, not from the closed one
    assert torch.equal(memories(stream)[1].delta_weight, ends[2])


@pytest.mark.parametrize("retrieve", [False, True], ids=["merge", "retrieve"])
@pytest.mark.parametrize(
    ("method", "scale", "density"),
    [("ties", 1.0, 0.53), ("linear", 2.0, None), ("slerp", None, 0.5), ("sign", 1.0, 0.1)],
)
def test_what_is_merged_is_the_merge_of_the_shards(
    llama: Any, tok: Any, retrieve: bool, method: str, scale: float | None, density: float | None
) -> None:
    hparams = settings(
        save_freq=2, merge_freq=4, merge_alg=method, weights=scale, densities=density, retrieve=retrieve, n_iter=1
    )
    stream = open_stream(llama, tok, hparams)
    learned: list[Tensor] = []
    outcomes = stream.apply(EDITS[:8], on_edit=lambda *made: learned.append(made[2].delta_weight))
    assert {outcome.delta_weight for outcome in outcomes} == {None}  # or the list would keep every shard
    shards = [learned[index] for index in (1, 3, 5, 7)]
    options = {"method": method, "density": 1.0 if density is None else density}
    scale = 1.0 if scale is None else scale
    first = merge(shards[:2], weights=[scale / 2] * 2, **options)
    if retrieve:
        expected = [first, merge(shards[2:], weights=[scale / 2] * 2, **options)]
    else:
        # The memory so far is one more shard, and weighs by the edits that it holds.
        expected = [merge([first, *shards[2:]], weights=[scale / 2, scale / 4, scale / 4], **options)]
    assert len(memories(stream)) == len(expected)
    for state, delta in zip(memories(stream), expected, strict=True):
        assert torch.equal(state.delta_weight, delta)


def test_closed_memories_stay_as_they_are(llama: Any, tok: Any) -> None:
    stream = open_stream(llama, tok, settings(save_freq=1, merge_freq=2, retrieve=True))
    stream.apply(EDITS[:2])
    before = copied(stream)
    stream.apply(EDITS[2:5])
    assert same(before, memories(stream)[:1])


def test_settings_may_change_between_calls(make_model: Any, tok: Any) -> None:
    stream = open_stream(make_model("llama"), tok, settings(save_freq=2, merge_freq=4, mask_ratio=0.2, n_iter=1))
    (short,) = stream.apply(EDITS[:1])
    stream.use(tok, settings(save_freq=3, merge_freq=6, mask_ratio=0.9, n_iter=4))
    (long,) = stream.apply(EDITS[1:2])
    assert (len(short.losses), len(long.losses)) == (1, 4)
    assert [state.stage for state in memories(stream)] == ["live"]
    stream.apply(EDITS[2:4])
    assert [(state.stage, state.n_edits) for state in memories(stream)] == [("shard", 3), ("live", 1)]
    assert float(memories(stream)[1].mask.float().mean()) == pytest.approx(0.9, abs=0.05)


@pytest.mark.parametrize(
    "changes", [{"n_contexts": 4}, {"score_activation": "silu"}, {"irrelevant_prompts": 3}], ids=str
)
def test_a_stream_whose_settings_changed_trains_as_they_say(
    llama: Any, tok: Any, spied_tasks: list[EditTask], changes: dict[str, Any]
) -> None:
    stream = open_stream(llama, tok, settings())
    stream.apply(EDITS[:1])
    hparams = settings(**changes)
    stream.use(tok, hparams)
    stream.apply(EDITS[1:2])
    task = spied_tasks[1]
    assert task.contexts[0].batch.input_ids.shape[0] == 1 + hparams.n_contexts
    assert len(task.irrelevant) == max(1, hparams.irrelevant_prompts)
    assert (task.irrelevant.base_output is None) == (hparams.score_activation is None)


# -- thresholds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("retrieve", [False, True], ids=["merge", "retrieve"])
@pytest.mark.parametrize("act_ratio", [1.0, 0.5])
def test_epsilon_by_the_papers_rule(make_model: Any, tok: Any, act_ratio: float, retrieve: bool) -> None:
    base = make_model("llama")
    hparams = settings(act_ratio=act_ratio, save_freq=2, merge_freq=4, retrieve=retrieve)
    stream = open_stream(make_model("llama"), tok, hparams)
    for count in range(9):
        stream.apply([EDITS[count]])
        for index, state in enumerate(memories(stream)):
            mine = [edit.request.prompt for edit in stream.held if edit.memory == index]
            assert len(mine) == state.n_edits
            scores = [mean_score(base, tok, LAYERS["llama"], state.delta_weight, prompt) for prompt in mine]
            assert state.epsilon == pytest.approx(minimum_threshold(scores, act_ratio), rel=1e-4)
            assert state.epsilon == pytest.approx(act_ratio * min(scores), rel=1e-2)
            assert state.weakest_edit == pytest.approx(min(scores), rel=1e-4)


@pytest.mark.parametrize(("position", "retrieve"), [(0.0, False), (0.7, False), (0.4, True)])
def test_epsilon_calibrated(make_model: Any, tok: Any, position: float, retrieve: bool) -> None:
    base = make_model("llama")
    merge_freq = 1 if retrieve else 2
    hparams = settings(epsilon_position=position, save_freq=1, merge_freq=merge_freq, retrieve=retrieve, n_iter=8)
    stream = open_stream(make_model("llama"), tok, hparams)
    edits = [EditRequest(prompt, target, loc_prompt=f"{target} in the north") for prompt, target in FACTS[:3]]
    for count, edit in enumerate(edits):
        stream.apply([edit])
        for index, state in enumerate(memories(stream)):
            mine = [held.request for held in stream.held if held.memory == index]

            def scores(prompts: Any, delta: Tensor = state.delta_weight) -> list[float]:
                return [mean_score(base, tok, LAYERS["llama"], delta, prompt) for prompt in prompts]

            # An edit is asked by its prompt alone and, when it is scored, with the answer behind it.
            asked = scores([edit.prompt for edit in mine] + [f"{edit.prompt} {edit.target}" for edit in mine])
            others = scores([*(edit.loc_prompt for edit in mine), *neutral_prompts()])
            # Of the memories that stay beside each other, each further one is stricter.
            expected = calibrated_threshold(asked, others, spent_position(position, index if retrieve else 0))
            assert state.epsilon == pytest.approx(expected, rel=1e-3), (count, index)
            assert state.weakest_edit == pytest.approx(min(asked[: len(mine)]), rel=1e-4), (count, index)
            assert state.weakest_answered == pytest.approx(min(asked[len(mine) :]), rel=1e-4), (count, index)


def test_an_edit_is_answered_by_its_memory_and_other_prompts_are_not(make_model: Any, tok: Any) -> None:
    base, model = make_model("llama"), make_model("llama")
    stream = open_stream(model, tok, settings(n_iter=25, edit_lr=0.1, norm_constraint=None, irrelevant_prompts=20))
    stream.apply(EDITS[:2])

    def answered_by(prompt: str) -> int:
        logits = logits_of(model, tok, prompt)
        assert stream.layer.last_route is not None
        (choice,) = stream.layer.last_route.choice.tolist()
        assert torch.equal(logits, logits_of(base, tok, prompt)) == (choice == -1)  # bit for bit, or changed
        return choice

    assert [answered_by(edit.prompt) for edit in EDITS[:2]] == [0, 0]
    # A random model tells prompts apart badly, but most of the others stay in the main memory.
    assert [answered_by(prompt) for prompt in neutral_prompts()[:20]].count(-1) > 10


# -- what an edit trains on -----------------------------------------------------------------------


def test_replay_only_of_what_other_memories_hold(llama: Any, tok: Any, spied_tasks: list[EditTask]) -> None:
    stream = open_stream(llama, tok, settings(save_freq=2, merge_freq=2, retrieve=True, replay=True, n_iter=1))
    stream.apply(EDITS[:5])
    assert [None if task.past is None else len(task.past) for task in spied_tasks] == [None, None, 2, 2, 4]
    base = copy.deepcopy(llama)
    stored = spied_tasks[2].past
    rows = [stored.select(torch.tensor([row])).activations for row in range(2)]
    base.model.layers[1].mlp.down_proj = base.model.layers[1].mlp.down_proj.base_layer
    for edit in EDITS[:2]:  # the two edits of the first memory, in whatever order
        wanted = layer_input(base, tok, LAYERS["llama"], edit.prompt)
        assert any(row.shape == wanted.shape and torch.allclose(row, wanted, atol=1e-5) for row in rows)


def test_no_replay_unless_asked_for(llama: Any, tok: Any, spied_tasks: list[EditTask]) -> None:
    stream = open_stream(llama, tok, settings(save_freq=1, merge_freq=1, retrieve=True, n_iter=1))
    stream.apply(EDITS[:3])
    assert [task.past for task in spied_tasks] == [None] * 3


def test_replay_is_of_a_few_edits_however_many_there_are(llama: Any, tok: Any, spied_tasks: list[EditTask]) -> None:
    hparams = settings(save_freq=1, merge_freq=1, retrieve=True, replay=True, n_iter=1, n_contexts=0)
    open_stream(llama, tok, hparams).apply([*EDITS, *EDITS[:2]])
    assert max(len(task.past) for task in spied_tasks if task.past is not None) == 8


def test_rehearsal_of_the_shards_own_earlier_edits(llama: Any, tok: Any, spied_tasks: list[EditTask]) -> None:
    stream = open_stream(llama, tok, settings(save_freq=3, merge_freq=6, rehearsal=0.1, n_iter=1))
    stream.apply(EDITS[:5])
    tokens = [len(tok(f"{edit.prompt} {edit.target}")["input_ids"]) for edit in EDITS]
    seen = [0 if task.earlier is None else len(task.earlier.rows) for task in spied_tasks]
    assert seen == [0 if task.earlier is None else task.earlier.n_tokens for task in spied_tasks]
    assert seen == [0, tokens[0], tokens[0] + tokens[1], 0, tokens[3]]


@pytest.mark.parametrize(
    ("loc_prompt", "irrelevant_prompts", "expected"), [(None, 0, 1), (None, 5, 5), ("Oslo is", 0, 1), ("Oslo is", 5, 6)]
)
def test_irrelevant_prompts(
    llama: Any, tok: Any, spied_tasks: list[EditTask], loc_prompt: str | None, irrelevant_prompts: int, expected: int
) -> None:
    stream = open_stream(llama, tok, settings(irrelevant_prompts=irrelevant_prompts, n_iter=1))
    stream.apply([EditRequest("The capital of France is", "Rome", loc_prompt=loc_prompt)])
    irrelevant = spied_tasks[0].irrelevant
    assert len(irrelevant) == expected
    if loc_prompt is not None:
        assert int(irrelevant.token_mask[0].sum()) == len(tok(loc_prompt)["input_ids"])


def test_contexts_take_turns(llama: Any, tok: Any, spied_tasks: list[EditTask]) -> None:
    open_stream(llama, tok, settings(n_contexts=4, contexts_per_step=3, n_iter=1)).apply(EDITS[:1])
    batches = [group.batch.input_ids for group in spied_tasks[0].contexts]
    assert [batch.shape[0] for batch in batches] == [3, 3]
    assert torch.equal(batches[0][0][-6:], batches[1][0][-6:])  # the plain prompt leads both


def test_earlier_edits_do_not_leak_into_what_is_recorded(
    make_model: Any, tok: Any, spied_tasks: list[EditTask]
) -> None:
    # Everything is recorded from the main memory, although the model answers with its edits by now.
    stream = open_stream(make_model("llama"), tok, settings(n_iter=10, edit_lr=0.3, norm_constraint=None))
    stream.apply([EDITS[0], EDITS[0]])
    first, second = (task.contexts[0] for task in spied_tasks)
    assert torch.equal(first.prefix.layer_output, second.prefix.layer_output)
    assert torch.equal(first.activations, second.activations)
    assert stream.layer.disable_adapters is False


# -- memory ---------------------------------------------------------------------------------------


def kept_tensors(kept: Any) -> list[Tensor]:
    """All tensors that something keeps alive, each once."""
    found: dict[int, Tensor] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value
        elif isinstance(value, (tuple, list)):
            for part in value:
                visit(part)
        elif hasattr(value, "__dict__"):
            visit(list(vars(value).values()))

    visit(kept)
    return list(found.values())


def kept_bytes(kept: Any) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in kept_tensors(kept))


@pytest.mark.parametrize("retrieve", [False, True], ids=["merge", "retrieve"])
def test_closed_shards_keep_no_activations(llama: Any, tok: Any, retrieve: bool) -> None:
    hparams = settings(save_freq=2, merge_freq=4, rehearsal=0.1, retrieve=retrieve, n_iter=1, score_activation="silu")
    stream = open_stream(llama, tok, hparams)
    for edit in EDITS:
        stream.apply([edit])
        assert not kept_tensors(stream.held)
        is_open = memories(stream)[-1].stage == "live"
        assert bool(kept_tensors(stream.snapshot().open_shard)) == is_open


def test_what_an_open_shard_keeps_does_not_hold_the_whole_batch(llama: Any, tok: Any) -> None:
    stream = open_stream(llama, tok, settings(n_contexts=9, rehearsal=0.1, n_iter=1))
    stream.apply(EDITS[:1])
    for tensor in kept_tensors(stream.snapshot().open_shard):
        # No more than a few texts of 64 numbers a token: a view would keep the ten contexts alive.
        assert tensor.untyped_storage().nbytes() <= 4 * 64 * 40


def test_an_open_shard_does_not_grow_with_its_edits(llama: Any, tok: Any) -> None:
    hparams = settings(rehearsal=0.1, n_iter=1, n_contexts=0, save_freq=200, merge_freq=200)
    stream = open_stream(llama, tok, hparams)
    edit = EditRequest("The capital of France is", "Rome", loc_prompt="Water is made of")
    size = []
    for count in range(40):
        stream.apply([edit if count % 2 else replace(edit, target="Lyon")])
        size.append(kept_bytes([stream.snapshot().open_shard, [vars(state) for state in memories(stream)]]))
    assert size[10] > size[0]
    assert len(set(size[25:])) == 1
    assert memories(stream)[-1].n_edits == 40


def test_an_edit_is_made_in_the_shards_own_matrix(llama: Any, tok: Any) -> None:
    stream = open_stream(llama, tok, settings())
    stream.apply(EDITS[:1])
    place = memories(stream)[0].delta_weight.data_ptr()
    stream.apply(EDITS[1:3])
    assert memories(stream)[0].delta_weight.data_ptr() == place  # not a second one beside it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_edits_go_on_in_fp32_after_the_model_was_cast(llama: Any, tok: Any, dtype: torch.dtype) -> None:
    stream = open_stream(llama, tok, settings(rehearsal=0.1))
    stream.apply(EDITS[:1])
    first = memories(stream)[0].delta_weight.clone()
    llama.to(dtype)
    (outcome,) = stream.apply(EDITS[1:2])
    live = memories(stream)[0]
    assert live.delta_weight.dtype == torch.float32
    assert live.n_edits == 2
    assert all(math.isfinite(loss) for loss in outcome.losses)
    assert not torch.equal(live.delta_weight, first)
    assert logits_of(llama, tok, EDITS[0].prompt).dtype == dtype


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_snapshots_hold_although_edits_are_made_in_place(llama: Any, tok: Any, order: tuple[int, ...]) -> None:
    stream = open_stream(llama, tok, settings(save_freq=2, merge_freq=4))
    snapshots, contents = [stream.snapshot()], [copied(stream)]
    for count in range(3):  # a live shard, a closed one, a live one beside it
        stream.apply(EDITS[count : count + 1])
        snapshots.append(stream.snapshot())
        contents.append(copied(stream))
    stream.apply(EDITS[3:6])
    for index in order:
        stream.restore(snapshots[index])
        assert same(memories(stream), contents[index])
    stream.restore(snapshots[1])
    stream.apply(EDITS[1:3])  # the same edits again give the same memories
    assert same(memories(stream), contents[3])
    stream.restore(snapshots[2])
    assert same(memories(stream), contents[2])


# -- what an edit leaves alone --------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_an_edit_leaves_modes_gradients_and_generators_alone(llama: Any, tok: Any, training: bool) -> None:
    stream = open_stream(llama, tok, settings(save_freq=1, merge_freq=2))
    stream.apply(EDITS[:1])
    llama.train(training)
    llama.model.layers[0].eval()
    base = {name for name, _ in llama.named_modules() if "wisemem" not in name}

    def state() -> dict[str, Any]:
        found = traces(llama)
        return {
            kind: {name: value for name, value in found[kind].items() if name in base or kind == "trainable"}
            for kind in ("training", "attributes", "hooks", "trainable")
        } | {
            "torch": torch.get_rng_state().tolist(),
            "python": random.getstate(),
            "numpy": numpy.random.get_state()[1].tolist(),
            "padding": (tok.padding_side, tok.pad_token, len(tok)),
            "gradients on": torch.is_grad_enabled(),
            "gradients": [parameter.grad is None for parameter in llama.parameters()],
        }

    before = state()
    before["trainable"] = {name: value for name, value in before["trainable"].items() if "wisemem" not in name}
    stream.apply(EDITS[1:4])
    after = state()
    after["trainable"] = {name: value for name, value in after["trainable"].items() if "wisemem" not in name}
    assert after == before


def test_new_memories_have_the_mode_of_their_layer(llama: Any, tok: Any) -> None:
    stream = open_stream(llama, tok, settings(save_freq=1, merge_freq=2))
    stream.apply(EDITS[:2])
    assert not [name for name, module in llama.named_modules() if module.training]


def test_the_base_weights_are_never_written_to(any_model: tuple[Any, str], tok: Any) -> None:
    model, parameter = any_model
    before = {name: value.clone() for name, value in model.named_parameters()}
    identities = {id(value) for value in model.parameters()}
    stream = open_stream(model, tok, settings(parameter, save_freq=1, merge_freq=2, edit_lr=0.5))
    stream.apply(EDITS[:3])
    after = {
        name.replace(".base_layer", ""): value for name, value in model.named_parameters() if "wisemem" not in name
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {id(value) for value in after.values()} == identities


def test_dropout_does_not_reach_an_edit(make_model: Any, tok: Any) -> None:
    parameter = LAYERS["gpt2"]
    streams = []
    for training in (True, True, False):
        model = make_model("gpt2")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        streams.append(open_stream(model, tok, settings(parameter)))
        model.train(training)
        streams[-1].apply(EDITS[:3])
        assert model.training is training
    model.train()
    assert not torch.equal(logits_of(model, tok, "Water is"), logits_of(model, tok, "Water is"))  # it does elsewhere
    for other in streams[1:]:
        assert same(memories(streams[0]), memories(other))


def test_a_base_model_that_is_trainable_gets_no_gradients(llama: Any, tok: Any) -> None:
    stream = open_stream(llama, tok, settings())
    llama.requires_grad_(True)
    stream.apply(EDITS[:1])
    assert all(parameter.grad is None for parameter in llama.parameters())


# -- errors ---------------------------------------------------------------------------------------


def interrupting(edit: int, iteration: int, error: type[BaseException]) -> Callable[[int, float], None]:
    """on_iteration that raises in one iteration of one edit (counted from 0)."""
    started = -1

    def on_iteration(index: int, loss: float) -> None:
        nonlocal started
        started += index == 0
        if (started, index) == (edit, iteration):
            raise error

    return on_iteration


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_an_interrupt_in_the_third_edit_leaves_the_first_two(
    make_model: Any, tok: Any, error: type[BaseException]
) -> None:
    hparams = settings(save_freq=2, merge_freq=4, replay=True, rehearsal=0.1)
    stream, undisturbed = (open_stream(make_model("llama"), tok, hparams) for _ in range(2))
    committed: list[int] = []
    with pytest.raises(error):
        stream.apply(
            EDITS[:5],
            on_edit=lambda index, request, outcome: committed.append(index),
            on_iteration=interrupting(2, 1, error),
        )
    undisturbed.apply(EDITS[:2])
    assert committed == [0, 1]
    assert same(memories(stream), memories(undisturbed))
    assert [held.request for held in stream.held] == EDITS[:2]
    for text in ("Water is", EDITS[0].prompt, EDITS[2].prompt):
        assert torch.equal(logits_of(stream.model, tok, text), logits_of(undisturbed.model, tok, text))
    assert traces(stream.model)["hooks"] == traces(undisturbed.model)["hooks"]
    assert stream.layer.disable_adapters is False
    # The generator, too: both go on alike.
    for one in (stream, undisturbed):
        one.apply(EDITS[2:5])
    assert same(memories(stream), memories(undisturbed))


def test_an_edit_that_diverges_says_which_and_is_taken_back(
    llama: Any, tok: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = open_stream(llama, tok, settings(save_freq=3, merge_freq=3, n_iter=4))
    stream.apply(EDITS[:1])
    original, calls = stream_module.train_edit, []

    def poisoned(delta: Tensor, mask: Tensor, task: EditTask, *rest: Any, **options: Any) -> EditOutcome:
        calls.append(1)
        if len(calls) == 2:
            task.irrelevant.activations[:] = float("nan")
        return original(delta, mask, task, *rest)

    monkeypatch.setattr(stream_module, "train_edit", poisoned)
    with pytest.raises(EditDivergedError, match=r"edit 3 \('The largest planet is' -> 'Saturn'\) became nan in iter"):
        stream.apply(EDITS[1:4])
    assert [held.request for held in stream.held] == EDITS[:2]
    assert [(state.stage, state.n_edits) for state in memories(stream)] == [("live", 2)]
    stream.apply(EDITS[2:4])  # and the poison is gone: the third edit closes the shard, the fourth opens one
    assert [(state.stage, state.n_edits) for state in memories(stream)] == [("merged", 3), ("live", 1)]
    assert all(state.delta_weight.isfinite().all() for state in memories(stream))


def test_a_step_that_is_too_large_leaves_the_model_as_it_was(llama: Any, tok: Any) -> None:
    stream = open_stream(llama, tok, settings())
    stream.apply(EDITS[:1])
    before, logits = copied(stream), logits_of(llama, tok, EDITS[0].prompt)
    stream.use(tok, settings(optimizer="sgd", edit_lr=1e37, norm_constraint=None, n_iter=5))
    with pytest.raises(EditDivergedError, match=r"edit 2 .* iteration 2 of 5"):
        stream.apply(EDITS[1:2])
    assert same(before, memories(stream))
    assert torch.equal(logits_of(llama, tok, EDITS[0].prompt), logits)


def test_an_error_in_a_merge_takes_the_edit_back(llama: Any, tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open_stream(llama, tok, settings(save_freq=1, merge_freq=2))
    stream.apply(EDITS[:1])
    before = copied(stream)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(shards_module, "merge", fail)
    with pytest.raises(MemoryError):
        stream.apply(EDITS[1:2])
    assert same(before, memories(stream))
    assert [held.memory for held in stream.held] == [0]


def test_an_error_in_on_edit_comes_after_the_commit(llama: Any, tok: Any) -> None:
    stream = open_stream(llama, tok, settings())

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream.apply(EDITS[:2], on_edit=fail)
    assert [state.n_edits for state in memories(stream)] == [1]


# -- copies and independence ----------------------------------------------------------------------


def test_snapshots_put_everything_back(llama: Any, tok: Any) -> None:
    stream = open_stream(llama, tok, settings(save_freq=2, merge_freq=4, replay=True))
    stream.apply(EDITS[:3])
    snapshot, before = stream.snapshot(), copied(stream)
    stream.apply(EDITS[3:6])
    after = copied(stream)
    stream.restore(snapshot)
    assert same(before, memories(stream))
    assert [held.request for held in stream.held] == EDITS[:3]
    stream.apply(EDITS[3:6])
    assert same(after, memories(stream))


def test_a_copied_model_goes_on_by_itself(llama: Any, tok: Any) -> None:
    stream = open_stream(llama, tok, settings(save_freq=2, merge_freq=4))
    stream.layer.edit_stream = stream
    stream.apply(EDITS[:3])
    before = copied(stream)
    twin = copy.deepcopy(llama)
    other = twin.model.layers[1].mlp.down_proj.edit_stream
    assert other is not stream
    assert other.model is twin
    assert other.layer is twin.model.layers[1].mlp.down_proj
    other.apply(EDITS[3:5])
    assert same(before, memories(stream))
    stream.apply(EDITS[3:5])
    assert same(memories(stream), memories(other))


def test_two_models_know_nothing_of_each_other(make_model: Any, tok: Any) -> None:
    # EasyEdit keeps its history in module globals, so the second editor replayed the first one's edits.
    hparams = settings(save_freq=1, merge_freq=1, retrieve=True, replay=True)
    alone = open_stream(make_model("llama"), tok, hparams)
    alone.apply(EDITS[:3])
    first, second = (open_stream(make_model("llama"), tok, hparams) for _ in range(2))
    first.apply(EDITS[3:6])
    second.apply(EDITS[:3])
    assert same(memories(alone), memories(second))


def test_edits_of_every_architecture(any_model: tuple[Any, str], tok: Any) -> None:
    model, parameter = any_model
    hparams = settings(parameter, n_iter=25, edit_lr=0.1, norm_constraint=None, optimizer="adam", mask_ratio=1.0)
    stream = open_stream(model, tok, hparams)
    (outcome,) = stream.apply(EDITS[:1])
    assert outcome.edit_losses[-1] < outcome.edit_losses[0] / 2
    target = tok(f"{EDITS[0].prompt} {EDITS[0].target}")["input_ids"][len(tok(EDITS[0].prompt)["input_ids"])]
    assert int(logits_of(model, tok, EDITS[0].prompt)[-1].argmax()) == target
