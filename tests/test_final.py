import json
import math
from dataclasses import replace

import pytest
from eval_helpers import NextWord, records, tiny_llama, word_tokenizer

from easyedit_wise.data import demo_facts
from easyedit_wise.evaluation.asking import Query, greedy_answers, teacher_forced
from easyedit_wise.evaluation.final import FactRecord, collect_baseline, score_model

BEFORE = {"b": "q", "d": "p", "e": "f", "f": "f", "h": "q", "j": "k", "k": "l", "m": "n", "n": "n", "z": "q"}
# The edits put "c d" after "b" and "i" after "h". They reach the rephrasing "x b" but not "y z", spoil
# the nearby "m", and change of the unrelated "j" -> "k l" the second token only.
AFTER = BEFORE | {"b": "c", "c": "d", "h": "i", "m": "o", "k": "r"}


@pytest.fixture(scope="module")
def tok():
    return word_tokenizer()


@pytest.fixture(scope="module")
def baseline(tok):
    return collect_baseline(NextWord(BEFORE).eval(), tok, records(), max_new_tokens=2)


@pytest.fixture(scope="module")
def scores(tok, baseline):
    return score_model(NextWord(AFTER).eval(), tok, records(), baseline)


def test_baseline_scores_the_unedited_model(baseline):
    scores = baseline.scores
    assert scores.reliability == 0.0
    assert scores.edit_exact == 0.0
    # A model agrees with itself.
    assert (scores.locality, scores.nearby_kept, scores.unrelated_same, scores.nearby_same) == (1, 1, 1, 1)
    assert [row.unrelated_text for row in scores.rows] == ["f f", "k l"]


def test_final_scores_by_hand(scores):
    assert scores.reliability == 1.0
    # "x b" predicts both tokens of "c d". "y z" predicts q, but after the given "c" it predicts "d".
    assert scores.generalisation == pytest.approx((1.0 + 0.5) / 2)
    assert scores.locality == pytest.approx((1.0 + 0.5) / 2)
    assert scores.nearby_kept == 0.0
    assert scores.edit_exact == 1.0
    assert scores.rephrasing_exact == 0.5
    assert scores.unrelated_same == 0.5
    assert scores.nearby_same == 0.0


def test_rows_by_hand(scores):
    first, second = scores.rows
    assert (first.prompt, first.target, first.edit_text) == ("a b", "c d", "c d")
    assert first.rephrasing_texts[0] == "c d"
    assert (first.generalisation, first.rephrasing_exact) == (0.75, 0.5)
    assert (first.locality, first.unrelated_same, first.unrelated_text) == (1.0, True, "f f")
    assert (first.nearby_kept, first.nearby_same, first.nearby_text) == (None, None, None)
    assert (second.generalisation, second.rephrasing_exact, second.rephrasing_texts) == (None, None, [])
    assert (second.locality, second.unrelated_same) == (0.5, False)
    assert (second.nearby_kept, second.nearby_same) == (0.0, False)
    assert second.edit_exact is True


def test_each_rephrasing_counts_once(tok):
    # Three rephrasings with 1, 0.5 and 0 of their tokens right; a mean of the rows would be 0.375.
    uneven = [records()[0], replace(records()[1], rephrasings=["z"])]
    scores = collect_baseline(NextWord(AFTER).eval(), tok, uneven, max_new_tokens=2).scores
    assert scores.generalisation == pytest.approx(1.5 / 3)
    assert scores.rephrasing_exact == pytest.approx(1 / 3)
    assert [row.generalisation for row in scores.rows] == [0.75, 0.0]


def test_to_dict_is_strict_json(scores):
    result = scores.to_dict()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["reliability"] == 1.0
    assert result["rows"][1]["nearby_kept"] == 0.0
    endless = replace(scores, perplexity=math.inf)
    assert endless.to_dict()["perplexity"] is None


def test_means_are_none_without_such_prompts(tok):
    bare = [FactRecord("a b", "c", "a", [], Query("e", "f"))]
    scores = collect_baseline(NextWord(BEFORE).eval(), tok, bare).scores
    assert scores.generalisation is None
    assert scores.rephrasing_exact is None
    assert scores.nearby_kept is None
    assert scores.nearby_same is None


def test_agrees_with_the_metrics_on_a_real_architecture(tok):
    model = tiny_llama()
    scores = collect_baseline(model, tok, records(), max_new_tokens=4, batch_size=3).scores
    for record, row in zip(records(), scores.rows, strict=True):
        (prediction,) = teacher_forced(model, tok, [Query(record.prompt, record.target)])
        assert row.reliability == prediction.accuracy
        assert row.perplexity == pytest.approx(prediction.perplexity, rel=1e-3)
        assert [row.edit_text] == greedy_answers(model, tok, [record.prompt], 4)


def test_wrong_records_are_refused(tok, baseline):
    model = NextWord(AFTER).eval()
    with pytest.raises(ValueError, match="no records"):
        collect_baseline(model, tok, [])
    with pytest.raises(ValueError, match="other records"):
        score_model(model, tok, records()[::-1], baseline)
    changed = [replace(records()[0], rephrasings=["x b"]), records()[1]]
    with pytest.raises(ValueError, match="other records"):
        score_model(model, tok, changed, baseline)


def test_record_from_a_fact():
    fact = demo_facts()[0]
    record = FactRecord.from_dict(fact)
    assert (record.prompt, record.target) == ("The capital of France is", "Lyon")
    assert record.nearby == Query("The capital of Germany is", "Berlin")
    del fact["nearby"]
    assert FactRecord.from_dict(fact).nearby is None
    del fact["subject"]
    with pytest.raises(ValueError, match="'The capital of France is' has no 'subject'"):
        FactRecord.from_dict(fact)
