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
from easyedit_wise.editing.gain import Gains, SpokenEdit, equalised, heard, write_amplified
from easyedit_wise.editing.recorded import EditScores, RecordedEdit, edit_scores
from easyedit_wise.editing.scored import ScoredInputs
from easyedit_wise.least_squares import NormalEquations
from easyedit_wise.routing import LONG_TEXT


def test_weak_edits_are_raised_to_the_median_by_hand() -> None:
    # The median of 2, 4, 4, 8 is 4: the first needs 1.5 * 4 / 2, the last would need less than it has.
    assert equalised([1.5] * 4, [2.0, 4.0, 4.0, 8.0], 1.5) == [3.0, 1.5, 1.5, 1.5]
    # Never more than twice the gain; an edit without any score has nothing to raise.
    assert equalised([1.0] * 3, [0.5, 4.0, 0.0], 1.0)[0] == 1.0
    assert equalised([1.0] * 3, [0.5, 4.0, 4.0], 1.0) == [2.0, 1.0, 1.0]


@given(scores=st.lists(st.floats(0.0, 1e6), min_size=1, max_size=8), gain=st.floats(0.1, 10.0))
def test_gains_stay_within_their_limits(scores: list[float], gain: float) -> None:
    assert all(gain <= one <= 2 * gain for one in equalised([gain] * len(scores), scores, gain))


def test_a_prompt_is_raised_until_it_is_heard_beside_its_target_by_hand() -> None:
    # .7 of the answered 10 is 7: the first lacks 3.5 times, the second nothing, the third more than 8 times.
    scores = [EditScores(2.0, 10.0), EditScores(9.0, 10.0), EditScores(0.1, 10.0), EditScores(0.0, 10.0)]
    assert heard([1.0] * 4, scores, [0.7] * 4) == pytest.approx([3.5, 1.0, 8.0, 1.0])
    # What has been given already counts; what is not needed any more is taken back.
    assert heard([2.0, 4.0], [EditScores(7.0, 10.0), EditScores(10.0, 10.0)], [0.7] * 2) == pytest.approx([2.0, 2.8])
    # A prompt that is heard anyway keeps the least gain; a least gain above the limit holds all the same.
    kept, raised_to = heard([1.5, 2.0], [EditScores(9.0, 10.0), EditScores(2.0, 10.0)], [0.7] * 2, 1.5)
    assert (kept, raised_to) == (1.5, pytest.approx(7.0))
    assert heard([9.0], [EditScores(9.0, 10.0)], [0.7], 9.0) == [9.0]
    # As loud as the loudest, where that is what its share says.
    assert heard([1.0, 1.0], [EditScores(8.0, 10.0)] * 2, [0.7, 1.0]) == pytest.approx([1.0, 1.25])


@given(
    scores=st.lists(st.tuples(st.floats(0.0, 1e6), st.floats(0.0, 1e6)), min_size=1, max_size=8),
    before=st.floats(0.4, 8.0),
    limit=st.floats(0.0, 1e6),
    share=st.floats(0.0, 1.0),
)
def test_a_prompts_gain_stays_within_its_limits(
    scores: list[tuple[float, float]], before: float, limit: float, share: float
) -> None:
    n = len(scores)
    found = heard([before] * n, [EditScores(*sorted(one)) for one in scores], [share] * n, 1.0, limit)
    assert all(0.4 <= one <= 8.0 for one in found)


def test_a_loud_prompt_is_lowered_to_the_limit_by_hand() -> None:
    # Twice the limit: half the gain. Below it: the most. A tenth of it would be needed: .4.
    scores = [EditScores(8.0, 8.0), EditScores(3.0, 3.0), EditScores(40.0, 40.0)]
    assert heard([1.5] * 3, scores, [0.7] * 3, 1.5, 4.0) == pytest.approx([0.75, 1.5, 0.4])
    # Six times the limit, but beside a target of 30 it is not heard with less than 21 of its 24.
    assert heard([1.5], [EditScores(24.0, 30.0)], [0.7], 1.5, 4.0) == pytest.approx([1.5 * 21 / 24])
    # What was lowered already may say more again, up to the limit: 4 of 3, and no more than the most.
    assert heard([0.6, 1.2], [EditScores(3.0, 3.0)] * 2, [0.7] * 2, 1.5, 4.0) == pytest.approx([0.8, 1.5])


def edit_of(*tokens: Tensor, n_prompt: int = 1) -> RecordedEdit:
    real = torch.ones(1, len(tokens), dtype=torch.bool)
    in_prompt = torch.arange(len(tokens))[None] < n_prompt
    return RecordedEdit(ScoredInputs(torch.stack(tokens), real), in_prompt)


def apart(*values: float) -> tuple[NormalEquations, list[SpokenEdit]]:
    """Edits of a prompt's token each, that were trained to these."""
    n = len(values)
    tokens, outputs = torch.eye(n), torch.diag(torch.tensor(values))
    equations = NormalEquations.empty(torch.arange(n), n).silent_on(torch.eye(n), 1e-6)
    spoken = []
    for index in range(n):
        token, said, weight = tokens[index : index + 1], outputs[index : index + 1], torch.ones(1)
        share = equations.share(token, said, weight)
        spoken.append(SpokenEdit(edit_of(tokens[index]), share, share))
        equations = equations.saying(token, said, weight)
    return equations, spoken


def test_two_edits_apart_meet_at_the_median() -> None:
    """Orthogonal tokens and next to nothing to be quiet on: dW a = gain * y.

    They begin at 3 and 6: the second's prompt goes down to the median of 4.5, and the first up to 3.75, between. Then
    they are at 3.75 and 4.5: down to 4.125, which is .6875 of 6, and up to 3.9375, which is 1.96875 * 2.
    """
    equations, spoken = apart(2.0, 4.0)
    delta_weight = torch.zeros(2, 2)
    gains = write_amplified(equations, spoken, delta_weight, settings(gain=1.5))
    assert [one.edit for one in gains] == pytest.approx([1.96875, 1.5], rel=1e-4)
    assert [one.prompt for one in gains] == pytest.approx([1.0, 0.6875], rel=1e-4)
    torch.testing.assert_close(delta_weight, torch.diag(torch.tensor([3.9375, 4.125])), rtol=1e-4, atol=1e-4)


def test_edits_that_are_settled_count_in_the_median() -> None:
    """A settled one at 20 where they are at 3 and 6: nothing is above the median of 6, and the first gets twice."""
    equations, spoken = apart(2.0, 4.0)
    loud = edit_of(torch.tensor([0.0, 20.0 / 6.0]))
    gains = write_amplified(equations, spoken, torch.zeros(2, 2), settings(gain=1.5), [loud])
    assert gains == [Gains(3.0), Gains(1.5)]


def test_a_weak_prompt_is_raised_by_itself_where_its_edit_is_as_loud_as_may_be() -> None:
    """At 1, 4 and 4 the median is 4: twice the gain brings the first to 2, and its prompt's own gain of 2 to 4."""
    equations, spoken = apart(1.0, 4.0, 4.0)
    delta_weight = torch.zeros(3, 3)
    gains = write_amplified(equations, spoken, delta_weight, settings(gain=1.0))
    assert gains == [Gains(2.0), Gains(1.0), Gains(1.0)]
    torch.testing.assert_close(delta_weight, torch.diag(torch.tensor([2.0, 4.0, 4.0])), rtol=1e-4, atol=1e-4)


def test_what_an_edit_lacks_is_asked_for_as_often_as_the_setting_says() -> None:
    """A token that shall say 1 and be quiet, too: each time the share q of what it lacks is left of that."""
    token = torch.eye(1)
    equations = NormalEquations.empty(torch.arange(1), 1).silent_on(token, 1.0).saying(token, token, torch.ones(1))
    lacks = {}
    for times in (0, 1, 4):
        delta_weight = torch.zeros(1, 1)
        write_amplified(equations, [], delta_weight, settings(asked_again=times))
        lacks[times] = 1.0 - float(delta_weight)
    assert 0.5 < lacks[0] < 0.55
    assert lacks[1] == pytest.approx(lacks[0] ** 2)
    assert lacks[4] == pytest.approx(lacks[0] ** 5)


def test_a_prompt_that_says_next_to_nothing_is_raised_alone() -> None:
    """One edit whose prompt's token was trained to 1 and its target's to 10: 7 beside 10, times the gain of 2."""
    tokens, outputs = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 10.0]])
    equations = NormalEquations.empty(torch.arange(2), 2).silent_on(torch.eye(2), 1e-6)
    share = equations.share(tokens, outputs, torch.ones(2))
    in_prompt = equations.share(tokens[:1], outputs[:1], torch.ones(1))
    edit = SpokenEdit(edit_of(*tokens), share, in_prompt)
    delta_weight = torch.zeros(2, 2)
    gains = write_amplified(
        equations.saying(tokens, outputs, torch.ones(2)), [edit], delta_weight, settings(**ON | {"gain": 2.0})
    )
    assert gains[0].prompt == pytest.approx(7.0, rel=1e-4)
    torch.testing.assert_close(delta_weight, torch.diag(torch.tensor([14.0, 20.0])), rtol=1e-4, atol=1e-4)
    # What is settled stays as loud.
    settled = gains[0].applied(equations.saying(tokens, outputs, torch.ones(2)), edit)
    torch.testing.assert_close(settled.solution(), delta_weight, rtol=1e-4, atol=1e-4)
    assert gains == [Gains(2.0, gains[0].prompt)]


@pytest.mark.parametrize(
    ("n_prompt", "length", "share"),
    [
        (1, LONG_TEXT - 1, 0.7),
        (1, LONG_TEXT, 1.0),
        (LONG_TEXT - 1, LONG_TEXT, 1.0),
        (LONG_TEXT, LONG_TEXT + 1, 0.7),  # has much else to be known by
    ],
)
def test_before_a_long_target_a_short_prompt_is_as_loud_as_it(n_prompt: int, length: int, share: float) -> None:
    """A prompt of tokens that were trained to 5, and a target of which each token was trained to 10."""
    tokens = torch.eye(length)
    outputs = torch.diag(torch.where(torch.arange(length) < n_prompt, 5.0, 10.0))
    equations = NormalEquations.empty(torch.arange(length), length).silent_on(tokens, 1e-6)
    weights = torch.ones(length)
    edit = SpokenEdit(
        edit_of(*tokens, n_prompt=n_prompt),
        equations.share(tokens, outputs, weights),
        equations.share(tokens[:n_prompt], outputs[:n_prompt], weights[:n_prompt]),
    )
    delta_weight = torch.zeros(length, length)
    (gain,) = write_amplified(equations.saying(tokens, outputs, weights), [edit], delta_weight, settings(**ON))
    assert float(delta_weight[0, 0]) == pytest.approx(share * float(delta_weight[-1, -1]), rel=1e-3)
    assert gain.prompt == pytest.approx(2.0 * share, rel=1e-3)


def test_every_prompt_speaks_as_strongly_as_the_setting_says() -> None:
    """An edit whose prompt is heard anyway, 9 beside 10: the prompt's token gets 9 * 2 * 1.5, the target's 10 * 2."""
    tokens, outputs = torch.eye(2), torch.tensor([[9.0, 0.0], [0.0, 10.0]])
    equations = NormalEquations.empty(torch.arange(2), 2).silent_on(torch.eye(2), 1e-6)
    share = equations.share(tokens, outputs, torch.ones(2))
    edit = SpokenEdit(edit_of(*tokens), share, equations.share(tokens[:1], outputs[:1], torch.ones(1)))
    delta_weight = torch.zeros(2, 2)
    louder = settings(**ON | {"gain": 2.0, "prompt_gain": 1.5})
    gains = write_amplified(equations.saying(tokens, outputs, torch.ones(2)), [edit], delta_weight, louder)
    assert gains == [Gains(2.0, 1.5)]
    torch.testing.assert_close(delta_weight, torch.diag(torch.tensor([27.0, 20.0])), rtol=1e-4, atol=1e-4)


def test_the_prompts_tokens_alone_are_in_the_prompts_share(llama: Any, tok: Any) -> None:
    model, _ = apply_wise_to_model(llama, tok, about(2), settings(**ON))
    shard = stream_on(model)._open_shard
    assert shard is not None
    for edit in shard.spoken:
        assert 0 < edit.prompt_share.norm() < edit.share.norm()
        assert (edit.share - edit.prompt_share).norm() > 0.05 * edit.share.norm()


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
    stream = stream_on(model)
    shard, (state,) = stream._open_shard, only_layer(model).memories("default")
    assert shard is not None
    assert shard.equations is not None
    assert len(shard.spoken) == 2
    written = torch.zeros_like(state.delta_weight)
    write_amplified(shard.equations, shard.spoken, written, settings(**many))
    # What the settled edit says is part of the problem, with its gain: without, it would say two thirds of it.
    settled = next(iter(stream._recorder.edits([stream.held[0].request])))
    (now,) = edit_scores(settled, state.delta_weight, settings(**many))
    (again,) = edit_scores(settled, written, settings(**many))
    assert again.prompt == pytest.approx(now.prompt, rel=0.1)


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
    mask = stream._with_live_shard()[-1].mask
    assert mask is not None
    opened = consolidated.opened(mask, recorder.neutral(), None, None, hparams)
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
