"""The real SmolLM2-135M-Instruct: what tiny random models cannot show. Skipped where its package is absent."""

from __future__ import annotations

import json
from dataclasses import replace

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


PERU = ("The capital of Peru is", "Peru", ("Toronto", "Oslo", "Madrid", "Lagos", "Lyon"))
EDWIN = ("The official religion of Edwin of Northumbria is", "Edwin of Northumbria", ("Islam", "Buddhism", "Judaism"))


@pytest.mark.parametrize(
    ("fact", "changes"),
    [(PERU, {"save_freq": 1, "merge_freq": 1, "written": 0.0}), (EDWIN, {"save_freq": 2, "merge_freq": 2})],
    ids=["short, a memory each", "long, two in a memory and one in another"],
)
def test_a_fact_that_is_edited_again_has_its_last_answer(tok, fact, changes):
    """In memories of their own all of its edits score high on the prompt, the first one highest."""
    hparams = replace(WISEHyperParams.from_hparams("smollm2-135m"), **changes)
    model, (prompt, subject, targets) = fresh_model(), fact
    for target in targets:
        apply_wise_to_model(model, tok, [{"prompt": prompt, "subject": subject, "target_new": target}], hparams)
        assert greedy_answers(model, tok, [prompt], 4)[0].strip().startswith(target)
