"""How loudly a memory answers: the largest multiple of its dW that its edits bear."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from editing_helpers import only_layer, settings, stream_on
from hypothesis import given
from hypothesis import strategies as st
from test_consolidated import ON, about

from easyedit_wise.easyedit.apply import apply_wise_to_model
from easyedit_wise.editing import level as level_module
from easyedit_wise.editing.held import HeldEdit
from easyedit_wise.editing.level import LEVELS, bearable_level, level_losses, loudest_bearable, recorded_answers
from easyedit_wise.editing.recorded import edit_scores
from easyedit_wise.editing.requests import EditRequest
from easyedit_wise.persistence import load_edits, save_edits

LEVELLED: dict[str, Any] = {**ON, "level_limit": 3.0, "norm_constraint": None}


def test_the_loudest_level_that_the_edits_bear_by_hand() -> None:
    losses = torch.tensor([[0.30, 0.20], [0.00, 0.0100], [0.00, 0.0118], [0.00, 0.50]])  # means .25, .0050, .0059, .25
    assert loudest_bearable(losses, (0.5, 1.0, 1.5, 2.0)) == 1.5
    # One that is lost at every level has no say, whatever its loss.
    lost = torch.tensor([[1.5], [3.0], [9.0], [40.0]])
    assert loudest_bearable(torch.cat([losses, lost], dim=1), (0.5, 1.0, 1.5, 2.0)) == 1.5
    # Nor has one that overflows more than one that is lost; where nothing differs, the loudest is taken.
    assert loudest_bearable(torch.tensor([[0.0, 0.1], [0.0, float("nan")]]), (1.0, 2.0)) == 1.0
    assert loudest_bearable(torch.zeros(2, 3), (1.0, 2.0)) == 2.0
    with pytest.raises(ValueError, match="at least one level and one edit"):
        loudest_bearable(torch.zeros(2, 0), (1.0, 2.0))


@given(
    rows=st.lists(st.lists(st.floats(0.0, 5.0), min_size=3, max_size=3), min_size=1, max_size=5),
    raised=st.floats(0.0, 5.0),
)
def test_a_loss_that_rises_with_the_level_never_makes_it_louder(rows: list[list[float]], raised: float) -> None:
    losses, levels = torch.tensor(rows, dtype=torch.float64).T, (0.5, 1.0, 2.0)
    chosen = loudest_bearable(losses, levels)
    worse = losses + raised * torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)[:, None]
    assert loudest_bearable(worse, levels) <= chosen


def test_the_losses_are_those_of_the_model_with_so_much_of_the_memory(llama: Any, tok: Any) -> None:
    model, _ = apply_wise_to_model(llama, tok, about(2), settings(**ON))
    stream, layer = stream_on(model), only_layer(model)
    requests = [held.request for held in stream.held]
    delta_weight = layer.memories("default")[0].delta_weight.clone()
    contexts = stream._recorder.contexts([[one.prompt] for one in requests], requests)
    with stream._recorder.main_memory_only():
        found = level_losses(contexts, delta_weight, (0.0, 1.0, 2.0), stream.hparams)
    base = layer.get_base_layer()
    for row, level in enumerate((0.0, 1.0, 2.0)):
        plain = copy.deepcopy(base.weight.data)
        base.weight.data += level * delta_weight
        for index, request in enumerate(requests):
            prompt, whole = (tok(text)["input_ids"] for text in (request.prompt, f"{request.prompt} {request.target}"))
            with stream._recorder.main_memory_only(), torch.no_grad():
                logits = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(dim=-1)
            wanted = -sum(logits[at - 1, whole[at]] for at in range(len(prompt), len(whole)))
            torch.testing.assert_close(found[row, index], wanted / (len(whole) - len(prompt)), rtol=1e-3, atol=1e-4)
        base.weight.data = plain


def test_many_tokens_are_asked_in_several_forwards_with_the_same_result(llama: Any, tok: Any) -> None:
    model, _ = apply_wise_to_model(llama, tok, about(3), settings(**ON))
    stream = stream_on(model)
    requests, recorder = [held.request for held in stream.held], stream._recorder
    delta_weight = only_layer(model).memories("default")[0].delta_weight
    found, forwards = set(), []
    for tokens in (None, 4):
        recorder.hparams.context_tokens = tokens
        with recorder.main_memory_only():
            answers = recorded_answers(recorder, requests)
            found.add(bearable_level(answers, delta_weight, recorder.hparams, 2.0))
        forwards.append(len(answers))
    assert forwards == [1, 3]
    assert len(found) == 1
    assert found <= set(LEVELS)


def test_a_level_scales_scores_and_thresholds_alike(llama: Any, tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It decides how far an answer goes, and nothing about what is answered; nor does it add up from edit to edit."""
    found = []
    for level in (1.0, 2.0):
        monkeypatch.setattr(level_module, "bearable_level", lambda *_, level=level: level)
        model, restore = apply_wise_to_model(llama, tok, about(3), settings(**LEVELLED))
        (state,) = only_layer(model).memories("default")
        found.append((state.delta_weight.clone(), state.epsilon, state.weakest_edit))
        restore()
    torch.testing.assert_close(found[1][0], 2.0 * found[0][0], rtol=1e-4, atol=1e-6)
    assert found[1][1:] == pytest.approx([2.0 * one for one in found[0][1:]], rel=1e-4)


def test_a_level_is_one_of_those_up_to_the_limit(llama: Any, tok: Any) -> None:
    scale = {}
    for limit in (0.0, 0.5, 2.0):
        model, restore = apply_wise_to_model(llama, tok, about(2), settings(**LEVELLED | {"level_limit": limit}))
        scale[limit] = float(only_layer(model).memories("default")[0].delta_weight.norm())
        restore()
    assert scale[0.5] == pytest.approx(0.5 * scale[0.0], rel=1e-4)
    assert any(scale[2.0] == pytest.approx(level * scale[0.0], rel=1e-4) for level in LEVELS)


def test_a_level_keeps_to_the_norm_constraint(llama: Any, tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(level_module, "bearable_level", lambda *_: 2.0)
    largest = {}
    for limit in (None, 0.01):
        model, restore = apply_wise_to_model(llama, tok, about(2), settings(**LEVELLED | {"norm_constraint": limit}))
        largest[limit] = float(only_layer(model).memories("default")[0].delta_weight.abs().max())
        restore()
    assert largest[None] > 0.01
    assert largest[0.01] == pytest.approx(0.01)


def test_what_a_shard_answers_are_the_latest_edits_and_what_it_inherited(llama: Any, tok: Any) -> None:
    model, _ = apply_wise_to_model(llama, tok, about(1), settings(**ON))
    one, again, longer = (EditRequest(*pair) for pair in (("A b is", "c"), ("A b is", "d"), ("A b is e f", "g")))
    maker = stream_on(model)._tasks
    assert maker.answered_by([one, again], []) == [again]
    assert maker.answered_by([one, again], [HeldEdit(longer, 0), HeldEdit(one, 0)]) == [longer, again]


def test_a_loaded_shards_loud_edits_raise_the_next_one(llama: Any, tok: Any, tmp_path: Path) -> None:
    """The file has them at their level; an edit made as if there were none would be too quiet beside them."""
    hparams, scores = settings(**ON), {}
    for level in (1.0, 4.0):
        loud, loaded = copy.deepcopy(llama), copy.deepcopy(llama)
        apply_wise_to_model(loud, tok, about(2), hparams)
        (state,) = only_layer(loud).memories("default")
        only_layer(loud).install("default", [state.with_(delta_weight=level * state.delta_weight)])
        save_edits(loud, tmp_path / str(level))
        load_edits(loaded, tmp_path / str(level))
        apply_wise_to_model(loaded, tok, about(3)[2:], hparams)
        ((edit,),) = stream_on(loaded)._recorder.edits([stream_on(loaded).held[2].request])
        (found,) = edit_scores([edit], only_layer(loaded).memories("default")[0].delta_weight, hparams)
        scores[level] = found.prompt
    assert scores[4.0] > 1.3 * scores[1.0]
