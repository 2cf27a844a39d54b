"""What an open shard remembers: enough for rehearsal and epsilon, in a fixed amount of memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import LAYERS
from editing_helpers import FACTS, mean_score, settings
from torch import Tensor

import easyedit_wise.editing.open_shard as open_shard_module
from easyedit_wise import load_edits, save_edits
from easyedit_wise.calibration import calibrated_threshold, minimum_threshold
from easyedit_wise.data import neutral_prompts
from easyedit_wise.easyedit.apply import stream_of
from easyedit_wise.editing.open_shard import OpenShard
from easyedit_wise.editing.recorded import EditScores, RecordedEdit, edit_scores
from easyedit_wise.editing.requests import EditRequest
from easyedit_wise.editing.scored import ScoredInputs
from easyedit_wise.editing.thresholds import threshold

EDITS = [EditRequest(prompt, target) for prompt, target in FACTS]
IDENTITY = torch.eye(2)


def prompt_of(*tokens: tuple[float, float]) -> ScoredInputs:
    return ScoredInputs(torch.tensor(tokens), torch.ones(1, len(tokens), dtype=torch.bool))


def recorded(prompt: float, answered: float, irrelevant: float | None = None) -> RecordedEdit:
    """An edit of one prompt token and one target token that has these scores under dW = I."""
    target = 2 * answered - prompt  # so that the mean over both is ``answered``
    mask = torch.tensor([[True, False]])
    return RecordedEdit(
        prompt_of((prompt, 0.0), (0.0, target)), mask, None if irrelevant is None else prompt_of((irrelevant, 0.0))
    )


def test_scores_by_hand() -> None:
    scores = edit_scores([recorded(3.0, 4.0), recorded(8.0, 6.0, 1.5)], IDENTITY, settings())
    assert [(one.prompt, one.answered) for one in scores] == [pytest.approx((3.0, 4.0)), pytest.approx((8.0, 6.0))]
    assert scores[0].irrelevant is None
    assert scores[1].irrelevant == pytest.approx(1.5)
    assert [one.margin for one in scores] == [pytest.approx(3.0), pytest.approx(4.5)]
    assert edit_scores([], IDENTITY, settings()) == []


def test_the_edits_nearest_to_being_lost_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_shard_module, "WATCHED", 2)
    shard = OpenShard()
    hparams = settings()
    for score in (5.0, 9.0, 7.0, 3.0):
        shard, scores = shard.joined([recorded(score, score)], IDENTITY, hparams)
    assert sorted(one.prompt for one in scores) == pytest.approx([3.0, 5.0, 7.0, 9.0])
    assert [round(float(edit.answered.activations[0, 0])) for edit in shard.watched] == [5, 3]
    assert sorted(one.prompt for one in shard.others) == pytest.approx([7.0, 9.0])
    # Another dW: those that are watched are scored anew, the others count as they were.
    _, scores = shard.joined([recorded(1.0, 1.0)], 2 * IDENTITY, hparams)
    assert sorted(one.prompt for one in scores) == pytest.approx([2.0, 6.0, 7.0, 9.0, 10.0])


def test_rehearsal_keeps_a_sketch_of_a_fixed_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_shard_module, "SKETCH_ROWS", 8)
    generator = torch.Generator().manual_seed(0)
    shard, rows = OpenShard(), []
    for _ in range(5):
        tokens = torch.randn(3, 16, generator=generator)
        rows.append(tokens)
        edit = RecordedEdit(ScoredInputs(tokens, torch.ones(1, 3).bool()), torch.ones(1, 3).bool())
        shard, _ = shard.joined([edit], torch.eye(16), settings(rehearsal=0.1))
    assert shard.rehearsed is not None
    assert shard.rehearsed.rows.shape == (8, 16)
    assert shard.rehearsed.n_tokens == 15
    exact = torch.cat(rows)
    missing = torch.linalg.eigvalsh(exact.T @ exact - shard.rehearsed.rows.T @ shard.rehearsed.rows)
    assert missing.min() > -1e-3
    none, _ = OpenShard().joined([edit], torch.eye(16), settings(rehearsal=0.0))
    assert none.rehearsed is None


def test_thresholds_from_scores() -> None:
    scores = [EditScores(6.0, 5.0, 1.0), EditScores(4.0, 7.0)]
    neutral = ScoredInputs(torch.tensor([[2.0, 0.0], [0.5, 0.0]]), torch.eye(2).bool())
    paper = threshold(scores, neutral, IDENTITY, settings(act_ratio=0.5))
    assert paper == pytest.approx(minimum_threshold([4.0], 0.5))
    calibrated = threshold(scores, neutral, IDENTITY, settings(epsilon_position=0.25))
    assert calibrated == pytest.approx(calibrated_threshold([6, 5, 4, 7], [1.0, 2.0, 0.5], 0.25))
    assert calibrated == pytest.approx(2.5)  # a quarter of the way from 2 to 4
    with pytest.raises(ValueError, match="edit first"):
        threshold([], neutral, IDENTITY, settings())


def test_a_closed_shard_is_calibrated_on_all_its_edits(
    make_model: Any, tok: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more edits than are watched the threshold of the open shard is an estimate; that of a closed one is not."""
    monkeypatch.setattr(open_shard_module, "WATCHED", 1)
    base = make_model("llama")
    stream = stream_of(make_model("llama"), tok, settings(save_freq=4, merge_freq=8, n_iter=6))
    stream.apply(EDITS[:4])
    (state,) = stream.layer.memories("default")
    assert state.stage == "shard"

    def scores(prompts: Any) -> list[float]:
        return [mean_score(base, tok, LAYERS["llama"], state.delta_weight, prompt) for prompt in prompts]

    edits = scores([edit.prompt for edit in EDITS[:4]] + [f"{edit.prompt} {edit.target}" for edit in EDITS[:4]])
    assert state.epsilon == pytest.approx(calibrated_threshold(edits, scores(neutral_prompts())), rel=1e-3)


def test_loaded_edits_are_rehearsed_and_keep_counting(make_model: Any, tok: Any, tmp_path: Any) -> None:
    hparams = settings(rehearsal=0.1, save_freq=9, merge_freq=9)
    edited = make_model("llama")
    stream_of(edited, tok, hparams).apply(EDITS[:3])
    save_edits(edited, tmp_path / "edits")
    loaded = make_model("llama")
    load_edits(loaded, tmp_path / "edits", tok=tok, hparams=hparams)
    stream, original = stream_of(loaded, tok, hparams), stream_of(edited, tok, hparams)
    assert stream.snapshot().open_shard is None
    outcomes = [one.apply(EDITS[3:4])[0] for one in (stream, original)]
    assert outcomes[0].losses == pytest.approx(outcomes[1].losses, rel=1e-3)
    shards = [one.snapshot().open_shard for one in (stream, original)]
    assert all(shard is not None and shard.n_tokens == shards[0].n_tokens > 0 for shard in shards)
    epsilon = [one.layer.memories("default")[0].epsilon for one in (stream, original)]
    assert epsilon[0] == pytest.approx(epsilon[1], rel=1e-3)


def test_a_failed_edit_leaves_the_shard_as_it_was(llama: Any, tok: Any) -> None:
    stream = stream_of(llama, tok, settings(rehearsal=0.1))
    stream.apply(EDITS[:2])
    before = stream.snapshot().open_shard
    stream.use(tok, replace(settings(rehearsal=0.1), optimizer="sgd", edit_lr=1e37, norm_constraint=None, n_iter=5))
    with pytest.raises(RuntimeError, match="taken back"):
        stream.apply(EDITS[2:3])
    assert stream.snapshot().open_shard is before


def test_the_recorded_tensors_are_not_views(llama: Any, tok: Any) -> None:
    stream = stream_of(llama, tok, settings(n_contexts=5))
    stream.apply(EDITS[:1])
    shard = stream.snapshot().open_shard
    assert shard is not None
    activations: Tensor = shard.watched[0].answered.activations
    assert activations.untyped_storage().nbytes() == activations.numel() * 4
