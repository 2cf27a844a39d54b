"""The real SmolLM2-135M-Instruct: what tiny random models cannot show. Skipped where its package is absent."""

from __future__ import annotations

import json

import pytest
import torch

from easyedit_wise import (
    WISEHyperParams,
    apply_wise_to_model,
    edits_disabled,
    last_route,
    load_edits,
    save_edits,
)
from easyedit_wise.data import demo_facts
from easyedit_wise.evaluation.asking import greedy_answers
from easyedit_wise.evaluation.final import FactRecord, collect_baseline, score_model
from easyedit_wise.evaluation.smollm2 import find_gguf, smollm2_checkpoint

pytestmark = pytest.mark.slow

N_FACTS = 4


def fresh_model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2_checkpoint(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tok():
    from transformers import AutoTokenizer

    try:
        find_gguf()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return AutoTokenizer.from_pretrained(smollm2_checkpoint())


@pytest.fixture(scope="module")
def edited(tok):
    """(model, records, baseline): N_FACTS of the demo's facts, two shards, one merge."""
    model = fresh_model()
    facts = demo_facts()[:N_FACTS]
    records = [FactRecord.from_dict(fact) for fact in facts]
    baseline = collect_baseline(model, tok, records)
    hparams = WISEHyperParams.from_hparams("smollm2-135m")
    hparams.save_freq, hparams.merge_freq = N_FACTS // 2, N_FACTS
    apply_wise_to_model(model, tok, facts, hparams)
    return model, records, baseline


def test_edits_hold_and_nothing_else_changes(edited, tok):
    model, records, baseline = edited
    scores = score_model(model, tok, records, baseline)
    assert baseline.scores.edit_exact == 0.0
    assert scores.edit_exact == 1.0
    assert scores.reliability >= 0.95
    assert scores.locality == 1.0
    assert scores.unrelated_same == 1.0


def test_switched_off_it_is_the_base_model(edited, tok):
    model, records, _ = edited
    prompts = [record.prompt for record in records]
    with edits_disabled(model):
        off = greedy_answers(model, tok, prompts, 8)
    assert off == greedy_answers(fresh_model(), tok, prompts, 8)
    assert off != greedy_answers(model, tok, prompts, 8)


def test_cached_and_uncached_generation_agree(edited, tok):
    model, records, _ = edited
    prompts = [*(record.prompt for record in records), *(record.unrelated.prompt for record in records)]
    assert greedy_answers(model, tok, prompts, 10) == greedy_answers(model, tok, prompts, 10, use_cache=False)


def test_a_batch_routes_each_row_as_alone(edited, tok):
    model, records, _ = edited
    prompts = [p for record in records for p in (record.prompt, *record.rephrasings, record.unrelated.prompt)]
    tok.padding_side = "left"
    with torch.no_grad():
        model(**tok(prompts, return_tensors="pt", padding=True))
        together = last_route(model).choice.tolist()
        alone = []
        for prompt in prompts:
            model(**tok(prompt, return_tensors="pt"))
            alone += last_route(model).choice.tolist()
    assert together == alone
    assert set(together) == {-1, 0}


def test_saved_edits_answer_the_same_in_a_fresh_model(edited, tok, tmp_path):
    model, records, _ = edited
    folder = save_edits(model, tmp_path / "edits")
    assert len(json.loads((folder / "wise_edits.json").read_text())["edits"]) == N_FACTS
    fresh = fresh_model()
    load_edits(fresh, folder)
    prompts = [record.prompt for record in records]
    assert greedy_answers(fresh, tok, prompts, 10) == greedy_answers(model, tok, prompts, 10)


def test_a_fact_that_is_edited_again_has_its_last_answer(tok):
    """Each edit has a memory of its own, and all score high on the prompt, the first one highest."""
    hparams = WISEHyperParams.from_hparams("smollm2-135m")
    hparams.save_freq = hparams.merge_freq = 1
    hparams.written = 0.0
    model, fact = fresh_model(), {"prompt": "The capital of Peru is", "subject": "Peru"}
    for target in ("Toronto", "Oslo", "Madrid", "Lagos", "Lyon"):
        apply_wise_to_model(model, tok, [{**fact, "target_new": target}], hparams)
        assert greedy_answers(model, tok, [fact["prompt"]], 4)[0].strip().startswith(target)
