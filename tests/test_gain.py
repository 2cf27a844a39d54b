"""How strongly the edits of one shard speak."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from editing_helpers import only_layer, settings, stream_on
from hypothesis import given
from hypothesis import strategies as st
from test_consolidated import ON, about
from torch import Tensor

from easyedit_wise.easyedit.apply import apply_wise_to_model
from easyedit_wise.editing import consolidated
from easyedit_wise.editing.gain import SpokenEdit, equalised, write_amplified
from easyedit_wise.editing.recorded import RecordedEdit, edit_scores
from easyedit_wise.editing.scored import ScoredInputs
from easyedit_wise.least_squares import NormalEquations


def test_weak_edits_are_raised_to_the_median_by_hand() -> None:
    # The median of 2, 4, 4, 8 is 4: the first needs 1.5 * 4 / 2, the last would need less than it has.
    assert equalised([1.5] * 4, [2.0, 4.0, 4.0, 8.0], 1.5) == [3.0, 1.5, 1.5, 1.5]
    # Never more than twice the gain; an edit without any score has nothing to raise.
    assert equalised([1.0] * 3, [0.5, 4.0, 0.0], 1.0)[0] == 1.0
    assert equalised([1.0] * 3, [0.5, 4.0, 4.0], 1.0) == [2.0, 1.0, 1.0]


@given(scores=st.lists(st.floats(0.0, 1e6), min_size=1, max_size=8), gain=st.floats(0.1, 10.0))
def test_gains_stay_within_their_limits(scores: list[float], gain: float) -> None:
    assert all(gain <= one <= 2 * gain for one in equalised([gain] * len(scores), scores, gain))


def edit_of(token: Tensor) -> RecordedEdit:
    return RecordedEdit(ScoredInputs(token[None], torch.ones(1, 1, dtype=torch.bool)), torch.ones(1, 1).bool())


def test_two_edits_apart_get_what_they_lack() -> None:
    """Orthogonal tokens and next to nothing to be quiet on: dW a = gain * y.

    They begin at 3 and 6, whose median is 4.5: gain 2.25. Then they are at 4.5 and 6: gain 2.25 * 5.25 / 4.5.
    """
    tokens, outputs = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    equations = NormalEquations.empty(torch.arange(2), 2).silent_on(torch.eye(2), 1e-6)
    spoken = []
    for index in range(2):
        token, said, weight = tokens[index : index + 1], outputs[index : index + 1], torch.ones(1)
        spoken.append(SpokenEdit(edit_of(tokens[index]), equations.share(token, said, weight)))
        equations = equations.saying(token, said, weight)
    delta_weight = torch.zeros(2, 2)
    gains = write_amplified(equations, spoken, delta_weight, settings(gain=1.5))
    assert gains == pytest.approx([2.625, 1.5], rel=1e-4)
    torch.testing.assert_close(delta_weight, torch.diag(torch.tensor([5.25, 6.0])), rtol=1e-4, atol=1e-4)


def test_the_gain_of_a_streams_edits(llama: Any, tok: Any) -> None:
    """Twice the gain, twice dW; and the weaker of two edits comes nearer to the other."""
    scores: dict[float, list[float]] = {}
    matrices: dict[float, Tensor] = {}
    for gain in (1.0, 2.0):
        model, restore = apply_wise_to_model(
            llama, tok, about(2), settings(**ON | {"gain": gain, "norm_constraint": None})
        )
        shard, (state,) = stream_on(model)._open_shard, only_layer(model).memories("default")
        assert shard is not None
        assert len(shard.spoken) == 2
        matrices[gain] = state.delta_weight.clone()
        recorded = [edit.recorded for edit in shard.spoken]
        scores[gain] = [one.prompt for one in edit_scores(recorded, state.delta_weight, settings(**ON))]
        assert shard.equations is not None
        as_trained = torch.zeros_like(state.delta_weight)
        as_trained[:, shard.equations.columns] = shard.equations.solution()
        before = [one.prompt for one in edit_scores(recorded, as_trained, settings(**ON))]
        assert max(scores[gain]) / min(scores[gain]) < max(before) / min(before)
        restore()
    torch.testing.assert_close(matrices[2.0], 2 * matrices[1.0], rtol=1e-3, atol=1e-5)


def test_of_many_edits_the_earliest_keep_their_gain(llama: Any, tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consolidated, "WATCHED", 2)
    many = ON | {"gain": 1.5, "save_freq": 4, "merge_freq": 4}
    model, _ = apply_wise_to_model(llama, tok, about(3), settings(**many))
    shard, (state,) = stream_on(model)._open_shard, only_layer(model).memories("default")
    assert shard is not None
    assert shard.equations is not None
    assert len(shard.spoken) == 2
    equations = shard.equations
    written = torch.zeros_like(state.delta_weight)
    write_amplified(equations, shard.spoken, written, settings(**many))
    # What the settled edit says is part of the problem, with its gain.
    assert (written - state.delta_weight).norm() < 0.1 * state.delta_weight.norm()


def test_the_next_shard_is_quiet_on_earlier_edits_and_their_irrelevant_prompts(llama: Any, tok: Any) -> None:
    asked = [{**one, "loc_prompt": f"The number of planets is {index}"} for index, one in enumerate(about(4))]
    hparams = settings(**ON)
    model, _ = apply_wise_to_model(llama, tok, asked, hparams)
    stream = stream_on(model)
    shard = stream._open_shard
    assert shard is not None
    assert shard.equations is not None
    recorder, columns = stream._recorder, shard.equations.columns
    expected = torch.zeros(only_layer(model).in_features, only_layer(model).in_features)
    for some in recorder.edits([held.request for held in stream.held[:3]]):
        for edit in some:
            assert edit.irrelevant is not None
            expected += 0.3 * edit.answered.activations.T @ edit.answered.activations
            expected += edit.irrelevant.activations.T @ edit.irrelevant.activations
    opened = consolidated.opened(stream._with_live_shard()[-1].mask, recorder.neutral(), None, hparams)  # type: ignore[arg-type]  # has one
    own = consolidated.with_irrelevant(
        opened,
        stream._tasks.task([stream.held[3].request], [None], [], shard),
        stream._tasks.own_irrelevant([stream.held[3].request]),
        hparams,
    )
    found = shard.equations.quiet - own.quiet
    # The prompts about other subjects are drawn anew, so they differ; the rest is the sum.
    difference = (found - expected[columns[:, None], columns]).norm() / found.norm()
    assert difference < 0.5
