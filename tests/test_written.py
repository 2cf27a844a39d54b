"""Texts that the model writes, and the spread of the layer's inputs over them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import LAYERS
from editing_helpers import settings, stream_on
from torch import nn

from easyedit_wise import apply_wise_to_model
from easyedit_wise.calibration import calibrated_threshold
from easyedit_wise.editing.recorded import edit_scores
from easyedit_wise.editing.scored import ScoredInputs
from easyedit_wise.editing.written import WrittenText, spread, written_tokens


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Counting(nn.Module):
    """Says that the next token is one more; ``cached``: whether it hands out a cache."""

    def __init__(self, cached: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.cached = cached
        self.lengths: list[int] = []

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past_key_values: Any, use_cache: bool
    ) -> Any:
        self.lengths.append(input_ids.shape[1])
        assert use_cache
        logits = torch.nn.functional.one_hot((input_ids + 1) % 10, 10) * 100.0
        seen = attention_mask.shape[1]
        assert (past_key_values or 0) in (0, seen - 1)
        return SimpleNamespace(logits=logits, past_key_values=seen if self.cached else None)


@pytest.mark.parametrize(("cached", "lengths"), [(True, [1, 1, 1]), (False, [1, 2, 3])])
def test_a_cache_is_used_where_there_is_one(cached: bool, lengths: list[int]) -> None:
    model = Counting(cached)
    tok = SimpleNamespace(bos_token_id=None, eos_token_id=3, all_special_ids=[3])
    assert written_tokens(model, tok, 2, 4, seeded()).tolist() == [[3, 4, 5, 6]] * 2
    assert model.lengths == lengths


def test_texts_come_from_the_generator_alone(any_model: Any, tok: Any) -> None:
    model = any_model[0]
    state = torch.get_rng_state()
    first = written_tokens(model, tok, 3, 6, seeded(1))
    assert first.shape == (3, 6)
    assert torch.equal(first, written_tokens(model, tok, 3, 6, seeded(1)))
    assert not torch.equal(first, written_tokens(model, tok, 3, 6, seeded(2)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not set(first[:, 1:].flatten().tolist()) & set(tok.all_special_ids)


def test_every_token_counts_as_the_middle_one() -> None:
    """Norms 1, 2 and 1000: all become 2."""
    tokens = torch.tensor([[1.0, 0.0], [0.0, 2.0], [600.0, 800.0]])
    expected = (torch.tensor([[4.0, 0.0], [0.0, 0.0]]) + torch.diag(torch.tensor([0.0, 4.0]))) / 3
    expected += 4 * torch.tensor([[0.36, 0.48], [0.48, 0.64]]) / 3
    torch.testing.assert_close(spread(tokens), expected)
    assert not spread(torch.zeros(2, 3)).any()


def test_texts_stay_with_the_model_and_activations_do_not(llama: Any, tok: Any) -> None:
    hparams = settings(LAYERS["llama"], n_iter=2, consolidation=100.0, mask="columns", optimizer="steepest",
                       layer_units=True, relative_scores=True, written=500.0, n_contexts=1)  # fmt: skip
    request = [{"prompt": "The capital of France is", "target_new": "Rome"}]
    model, restore = apply_wise_to_model(llama, tok, request, hparams)
    recorder = stream_on(model)._recorder
    before = recorder.written()
    assert recorder.written() is before  # once a stream
    texts = dict(llama.__dict__["_wise_written"])
    restore()
    assert list(llama.__dict__["_wise_written"]) == list(texts)
    with torch.no_grad():
        next(llama.parameters()).mul_(2.0)  # the embedding: another method may do so between two streams
    model, _ = apply_wise_to_model(llama, tok, request, hparams)
    assert not torch.equal(stream_on(model)._recorder.written().spread, before.spread)
    assert [value is texts[key] for key, value in llama.__dict__["_wise_written"].items()] == [True]


def test_a_shard_is_quieter_on_text_at_large(llama: Any, tok: Any) -> None:
    """With a very large weight on it, hardly anything is left of what dW says there."""
    loud = []
    for weight in (0.0, 1e7):
        hparams = settings(LAYERS["llama"], n_iter=3, consolidation=10.0, mask="columns", optimizer="steepest",
                           layer_units=True, relative_scores=True, written=weight, n_contexts=1)  # fmt: skip
        request = [{"prompt": "The capital of France is", "target_new": "Rome"}]
        model, restore = apply_wise_to_model(llama, tok, request, hparams)
        stream = stream_on(model)
        (state,) = stream.layer.memories(stream.adapter_name)
        moments = stream._recorder.written().spread
        loud.append(float((state.delta_weight @ moments * state.delta_weight).sum() / moments.trace()))
        restore()
    assert loud[1] < 0.01 * loud[0]


@pytest.mark.parametrize("weight", [0.0, 500.0])
def test_epsilon_is_set_from_what_no_shard_was_made_quiet_on(llama: Any, tok: Any, weight: float) -> None:
    hparams = settings(LAYERS["llama"], n_iter=3, consolidation=10.0, mask="columns", optimizer="steepest",
                       layer_units=True, relative_scores=True, written=weight, n_contexts=1)  # fmt: skip
    request = [{"prompt": "The capital of France is", "target_new": "Rome"}]
    stream = stream_on(apply_wise_to_model(llama, tok, request, hparams)[0])
    recorder = stream._recorder
    neutral, texts = recorder.unseen()
    assert len(neutral) == len(recorder.neutral()) // 2
    assert (texts is not None) == (weight > 0)
    (state,) = stream.layer.memories(stream.adapter_name)
    (recorded,) = next(iter(recorder.edits([stream.held[0].request])))
    loudest = float(neutral.scores(state.delta_weight, hparams).max())
    if texts is not None:  # of 32 texts one may be about the edit
        assert len(texts) == 32
        loudest = max(loudest, sorted(texts.scores(state.delta_weight, hparams).tolist())[-2])
    (score,) = edit_scores([recorded], state.delta_weight, hparams)
    edit = min(score.prompt, score.answered)
    assert state.epsilon == pytest.approx(calibrated_threshold([edit], [loudest], hparams.epsilon_position), rel=1e-4)


def test_one_half_is_learned_and_the_other_held_out() -> None:
    """Texts 0 and 2 have the inputs 1 and 3, texts 1 and 3 have 2 and 4, all of norm 1 but for the sign."""
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    text = WrittenText.of(ScoredInputs(inputs, torch.ones(4, 1, dtype=torch.bool)))
    assert text.spread.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert text.held_out.activations.tolist() == [[0.0, 1.0], [0.0, -1.0]]
    assert text.held_out.activations.dtype == torch.bfloat16
