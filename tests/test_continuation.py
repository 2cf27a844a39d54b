"""How the unedited model goes on, and that a shard is quiet on it behind an answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import LAYERS
from editing_helpers import only_layer, requests, settings, stream_on
from test_consolidated import ON
from torch import nn

from easyedit_wise import apply_wise_to_model
from easyedit_wise.editing.continuation import continued, last_logits_only, likeliest
from easyedit_wise.editing.frozen_prefix import layer_input_of
from easyedit_wise.editing.requests import EditRequest, left_padded

FITTED: dict[str, Any] = {**ON, "consolidation": 1.0, "mask_ratio": 1.0}
ASKED = [EditRequest("The capital of France is", "Rome"), EditRequest("Water is made of", "pure gold")]


@pytest.mark.parametrize("architecture", list(LAYERS))
def test_with_padding_and_a_cache_it_is_what_each_text_gets_alone(make_model: Any, tok: Any, architecture: str) -> None:
    model = make_model(architecture)
    texts = [tok(text)["input_ids"] for text in ("The capital of France is", "Water", "The small town")]
    together = continued(model, *left_padded(tok, texts, torch.device("cpu")), 5, likeliest)
    for row, tokens in zip(together, texts, strict=True):
        expected = torch.tensor([tokens])
        with torch.no_grad():
            for _ in range(5):
                expected = torch.cat([expected, likeliest(model(expected).logits[:, -1])], dim=-1)
        assert row[len(row) - expected.shape[1] :].tolist() == expected[0].tolist()


def test_all_logits_but_the_last_are_spared_where_the_model_can() -> None:
    class Sparing(nn.Module):
        def forward(self, input_ids: Any, logits_to_keep: int = 0) -> Any:
            return SimpleNamespace(logits=input_ids, keep=logits_to_keep)

    assert last_logits_only(Sparing()) == {"logits_to_keep": 1}
    assert last_logits_only(nn.Linear(1, 1)) == {}


def test_what_follows_an_answer_begins_at_its_last_token(llama: Any, tok: Any) -> None:
    stream = stream_on(apply_wise_to_model(llama, tok, requests(1), settings(**FITTED | {"after_answer": 4}))[0])
    recorder = stream._recorder
    last = recorder.endings(ASKED)
    behind = recorder.after_answers(ASKED, last)
    assert behind.token_mask.sum(dim=-1).tolist() == [5, 5]
    for row, (request, ending) in enumerate(zip(ASKED, last, strict=True)):
        ids = torch.tensor([[*tok(f"{request.prompt} {request.target}")["input_ids"], ending]])
        with recorder.main_memory_only(), torch.no_grad():
            ids = continued(llama, ids, torch.ones_like(ids), 4, likeliest)
            inputs = layer_input_of(
                llama, only_layer(llama), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            )
        torch.testing.assert_close(behind.select(torch.tensor([row])).activations, inputs[0, -5:], atol=1e-5, rtol=0)


def test_a_shard_is_quiet_behind_its_answers(llama: Any, tok: Any) -> None:
    loud: dict[int, float] = {}
    asked = [{"prompt": one.prompt, "target_new": one.target} for one in ASKED[:1]]
    for count in (0, 6):
        model, restore = apply_wise_to_model(llama, tok, asked, settings(**FITTED | {"after_answer": count}))
        stream = stream_on(model)
        stream.use(tok, settings(**FITTED | {"after_answer": 6}))
        tokens = stream._recorder.after_answers(ASKED[:1], None).activations
        loud[count] = float((tokens @ only_layer(model).memories("default")[0].delta_weight.T).norm())
        restore()
    assert loud[6] < 0.8 * loud[0]
