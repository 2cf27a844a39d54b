"""The lifelong protocol with an editor that is a table of words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from eval_helpers import NextWord, word_tokenizer

from easyedit_wise.evaluation.asking import Query
from easyedit_wise.evaluation.datasets import EditSet, Request, requests_of
from easyedit_wise.evaluation.final import collect_baseline, score_model
from easyedit_wise.evaluation.lifelong import RouteProbe, default_checkpoints, retention, run_stream, stops_of
from easyedit_wise.evaluation.records import FactRecord
from easyedit_wise.evaluation.routed import RoutedPrompt
from easyedit_wise.evaluation.scores import DELTA, summarise

BASE = {"a": "x", "b": "x", "c": "x", "u": "v", "n": "m"}
RECORDS = [
    FactRecord("a", "p", "a", ["z"], Query("u", "v"), source="one"),
    FactRecord("b", "q", "b", [], Query("u", "v"), source="two"),
    FactRecord("c", "r", "c", [], None, nearby=Query("n", "m"), source="one"),
]


class Forgetful:
    """Writes each edit into the table, and forgets the one before the last; the third also spoils "n"."""

    one_by_one = False
    use_cache = True

    def __init__(self, probe: bool = False) -> None:
        self.made: list[Request] = []
        self.route_probe: RouteProbe | None = self.probe if probe else None

    @property
    def model(self) -> Any:
        kept = {one["prompt"]: one["target_new"] for one in self.made[-2:]}
        return NextWord(BASE | kept | ({"n": "o"} if len(self.made) == 3 else {}), height=8.0).eval()

    def edit(self, requests: Sequence[Request], on_edit: Callable[[], None]) -> None:
        for request in requests:
            self.made.append(request)
            on_edit()

    def probe(self, prompts: Sequence[str]) -> list[RoutedPrompt]:
        made = [one["prompt"] for one in self.made]
        return [RoutedPrompt(f"m{made.index(p)}" if p in made else None, float(p in made), 0.5) for p in prompts]

    def holders(self) -> list[str] | None:
        return [f"m{i}" for i in range(len(self.made))]


@pytest.fixture(scope="module")
def tok() -> Any:
    return word_tokenizer()


def run(tok: Any, editor: Forgetful, checkpoints: Sequence[int], **options: Any) -> Any:
    edits = EditSet(RECORDS, requests_of(RECORDS))
    baseline = collect_baseline(NextWord(BASE, height=8.0).eval(), tok, RECORDS, max_new_tokens=1)
    return run_stream(editor, tok, edits, baseline, checkpoints, **options)


def test_each_checkpoint_scores_all_edits_so_far(tok: Any) -> None:
    edited: list[int] = []
    first, last = run(tok, Forgetful(), [2], on_edit=lambda: edited.append(1))
    assert len(edited) == 3
    assert (first.edits, last.edits) == (2, 3)
    assert {source: scores.reliability for source, scores in first.scores.items()} == {"one": 1.0, "two": 1.0}
    # The third edit made the editor forget the first, and spoilt the neighbour.
    assert last.scores["one"].reliability == 0.5
    assert last.scores["one"].edit_exact == 0.5
    assert last.scores["two"].reliability == 1.0
    assert (last.scores["one"].locality, last.scores["one"].nearby_kept) == (1.0, 0.0)
    assert first.scores["one"].nearby_kept is None
    assert [row.target for row in last.scores["one"].rows] == ["p", "r"]
    assert last.routing == {}


def test_retention_by_age(tok: Any) -> None:
    (last,) = run(tok, Forgetful(), [3])
    assert [(one.youngest, one.oldest, one.reliability) for one in last.retention] == [(0, 0, 1), (1, 1, 1), (2, 2, 0)]
    rows = [row for scores in last.scores.values() for row in scores.rows]
    bins = retention(rows, n_bins=2)
    assert [(one.youngest, one.oldest, one.n) for one in bins] == [(0, 1, 2), (2, 2, 1)]
    with pytest.raises(ValueError, match="got 0 and 10"):
        retention([])


def test_routing_is_scored_by_data_set_with_the_memories_that_hold_the_edits(tok: Any) -> None:
    (last,) = run(tok, Forgetful(probe=True), [])
    assert last.routing["one"].edits_right_memory == 1.0
    assert (last.routing["one"].rephrasings_fire, last.routing["one"].nearby_fire) == (0.0, 0.0)
    assert last.routing["one"].n_memories == 2
    assert last.routing["two"].rephrasings_fire is None
    assert last.routing["two"].auroc_edits_unrelated == 1.0


def test_result_is_strict_json(tok: Any) -> None:
    (last,) = run(tok, Forgetful(probe=True), [])
    written = json.loads(json.dumps(last.to_dict(), allow_nan=False))
    assert written["scores"]["one"]["rows"][0]["prompt"] == "a"
    assert written["seconds_per_edit"] == pytest.approx(written["edit_seconds"] / 3)
    assert "rows" not in last.to_dict(rows=False)["scores"]["one"]


def test_a_stream_goes_on_between_two_checkpoints(tok: Any) -> None:
    whole = run(tok, Forgetful(), [1, 2])
    editor, edited = Forgetful(), list[int]()
    editor.edit(requests_of(RECORDS)[:2], lambda: None)
    rest = run(tok, editor, [1, 2], made=2, made_seconds=100.0, scored=1, on_edit=lambda: edited.append(1))
    assert len(edited) == 1
    assert [one.edits for one in rest] == [2, 3]
    assert [one.scores for one in rest] == [one.scores for one in whole[1:]]
    assert all(100.0 <= one.edit_seconds < 200.0 for one in rest)
    for made, scored in ((2, 0), (0, 1), (3, 1)):
        with pytest.raises(ValueError, match=f"{made} edits are made, but the last checkpoint scored is {scored}"):
            run(tok, Forgetful(), [1, 2], made=made, scored=scored)


def test_checkpoints() -> None:
    assert default_checkpoints(1) == [1]
    assert default_checkpoints(100) == [1, 10, 100]
    assert default_checkpoints(800) == [1, 10, 100, 800]
    assert stops_of([10, 1, 10], 30) == [1, 10, 30]
    for bad in (0, 31):
        with pytest.raises(ValueError, match=f"checkpoint {bad} .* 1 to 30"):
            stops_of([bad], 30)


def test_long_answers_are_scored_by_likelihood_alone(tok: Any) -> None:
    record = FactRecord("a", "b c", "a", [], Query("u", "v"), ood="a b x", written=False)
    # "b" follows "a" with a probability near 1, "c" and "x" after "b" with that of any other word.
    model = NextWord({"a": "b"}, height=8.0).eval()
    baseline = collect_baseline(model, tok, [record])
    (row,) = baseline.scores.rows
    assert (row.edit_exact, row.edit_f1, row.edit_text, row.unrelated_same) == (None, None, "", None)
    likely = math.exp(8) / (math.exp(8) + 36)
    assert row.perplexity == pytest.approx(math.exp(-(math.log(likely) + math.log(1 / 37)) / 2), rel=1e-4)
    assert -math.log(likely) < DELTA < math.log(37)
    assert row.target_known == 0.5
    # EasyEdit counts all tokens after the first; y_ood begins behind the prompt.
    assert row.ood_tokens == 0.5
    assert row.ood_loss == pytest.approx(-(math.log(likely) + math.log(1 / 37)) / 2, rel=1e-4)
    assert baseline.scores.ood_items == 0.0
    known = summarise([replace(row, ood_loss=0.2), row])
    assert known.ood_items == 0.5
    # The prompt's own tokens do not count into the loss of y_ood.
    longer = replace(record, prompt="a b")
    (row,) = score_model(model, tok, [longer], collect_baseline(model, tok, [longer])).rows
    assert row.ood_loss == pytest.approx(math.log(37), rel=1e-4)


def test_perplexity_is_clipped_row_by_row(tok: Any) -> None:
    (row,) = collect_baseline(NextWord(BASE).eval(), tok, RECORDS[:1]).scores.rows
    scores = summarise([replace(row, perplexity=value) for value in (1.0, 3.0, 1e6)])
    assert scores.perplexity_clipped == pytest.approx((1 + 3 + 100) / 3)
    assert scores.perplexity_median == 3.0
    assert scores.perplexity == pytest.approx((1 + 3 + 1e6) / 3)
    with pytest.raises(ValueError, match="no rows"):
        summarise([])


def test_greedy_scores_beyond_exact(tok: Any) -> None:
    record = FactRecord("a", "c", "a", ["e", "b"], None)
    model = NextWord({"a": "b", "b": "c", "c": "d", "d": "d", "e": "d"}).eval()
    scores = collect_baseline(model, tok, [record], max_new_tokens=3).scores  # "a" is answered "b c d"
    assert (scores.edit_exact, scores.edit_contains, scores.edit_f1) == (0.0, 1.0, 2 * 1 / (3 + 1))
    # "d d d" and "c d d": one of two rephrasings.
    assert (scores.rephrasing_exact, scores.rephrasing_contains, scores.rephrasing_f1) == (0.5, 0.5, 0.25)
