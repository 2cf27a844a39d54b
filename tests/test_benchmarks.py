"""The benchmarks' own instruments: what they count, and that EasyEdit's WISE runs as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import LAYERS, build_model
from editing_helpers import requests
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import live_tensor_bytes, peak_memory, prefixes_of, use_prefixes
from benchmarks.floor import Iteration, iteration_flops
from benchmarks.workload import load_facts
from easyedit_wise.easyedit.upstream import load_upstream, why_not
from easyedit_wise.editing.contexts import context_groups


def test_peak_memory_sees_a_temporary_and_what_backward_keeps():
    weight = torch.randn(500, 500, requires_grad=True)
    inputs = torch.randn(1000, 500)

    def temporary() -> None:
        large = torch.empty(25_000_000)
        del large
        torch.empty(1000)

    assert peak_memory(temporary).tensors == 100_000_000
    held = 4 * 1000 * 500
    peak = peak_memory(lambda: (inputs @ weight).exp().sin().sum().backward()).tensors
    assert 2 * held <= peak <= 5 * held


def test_live_tensor_bytes_counts_shared_storage_once():
    before = live_tensor_bytes()
    kept = torch.zeros(1_000_000)
    views = [kept[:10], kept.view(1000, 1000)]
    assert live_tensor_bytes() - before == 4_000_000
    del views


def test_floor_equals_the_counted_products_of_a_replayed_iteration():
    model = build_model("llama", n_layers=4)
    layer = 1
    length, n_targets, n_scored = 9, 2, 5
    delta = torch.zeros(32, 64, requires_grad=True)
    scored = torch.randn(n_scored, 64)
    rotary = model.model.rotary_emb(torch.zeros(1, length, 32), torch.arange(length)[None])
    counter = FlopCounterMode(display=False)
    activations, base = torch.randn(1, length, 64), torch.randn(1, length, 32)
    with counter:
        hidden = base + activations @ delta.T
        for block in model.model.layers[layer + 1 :]:
            output = block(hidden, position_embeddings=rotary)
            hidden = output[0] if isinstance(output, tuple) else output
        loss = model.lm_head(hidden[:, -n_targets - 1 : -1]).logsumexp(-1).sum() + (scored @ delta.T).sum()
        torch.autograd.grad(loss, [delta])
    counted = iteration_flops(model.config, layer, Iteration([length], n_targets, n_scored))
    products: Any = counter.get_flop_counts()["Global"]
    linear = sum(flops for operator, flops in products.items() if "attention" not in str(operator))
    assert linear == sum(flops for part, flops in counted.items() if part != "attention")
    assert counted["attention"] == 12 * 2 * 32 * (length * (length + 1) // 2)


def test_both_engines_can_be_given_the_same_contexts():
    model = build_model("llama")
    texts = ["Once upon", "a {brace}"]
    templates = use_prefixes(model, texts)
    assert [template.format("The capital is") for template in templates] == context_groups("The capital is", texts)[0]
    assert model.__dict__["_wise_prefixes"]["any key"] == texts
    assert prefixes_of(["{}", "I am {}"]) == ["I am"]


def test_irrelevant_prompts_of_the_requests_are_not_scored():
    records, made = load_facts(5)
    for record, request in zip(records, made, strict=True):
        assert request["loc_prompt"] != record.unrelated.prompt


def test_without_a_checkout_the_reason_is_given(monkeypatch, tmp_path):
    monkeypatch.delenv("EASYEDIT_HOME", raising=False)
    assert load_upstream() is None
    assert "EASYEDIT_HOME is not set" in str(why_not())
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path))
    assert load_upstream() is None
    assert "not a checkout" in str(why_not())


@pytest.mark.upstream
@pytest.mark.skipif(why_not() is not None, reason="EASYEDIT_HOME names no checkout of EasyEdit")
def test_upstream_trains_a_stream_and_gives_the_model_back(llama, tok, capsys):
    upstream = load_upstream()
    assert upstream is not None
    before = {name: (id(value), value.detach().clone()) for name, value in llama.named_parameters()}
    padding = tok.padding_side, tok.pad_token
    settings = upstream.settings(inner_params=[LAYERS["llama"]], n_iter=3, edit_lr=0.5, act_margin=[0.1, 2.0, 1.0])
    assert len(upstream.context_templates(llama, tok)) == 11
    for request in requests(3, loc_prompt="Once upon a time there was"):
        wrapper = upstream.edit(llama, tok, [request], settings)
    adapter = wrapper.get_adapter_layer()
    assert adapter.editing_total_cnt == 3
    assert not adapter.new_weight.equal(adapter.weight)
    assert [len(timing.marks) for timing in upstream.timings] == [3, 3, 3]
    assert capsys.readouterr().out == ""
    upstream.restore()
    assert {name: id(value) for name, value in llama.named_parameters()} == {n: i for n, (i, _) in before.items()}
    assert all(torch.equal(value, before[name][1]) for name, value in llama.named_parameters())
    assert all(parameter.requires_grad for parameter in llama.parameters())
    assert (tok.padding_side, tok.pad_token) == padding
