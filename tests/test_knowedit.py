"""KnowEdit's files: their fields, the nested lists of answers, and how the questions near an edit are scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from eval_helpers import NextWord, word_tokenizer

from easyedit_wise.evaluation.asking import Query
from easyedit_wise.evaluation.datasets import read_dataset, select
from easyedit_wise.evaluation.final import collect_baseline, score_model
from easyedit_wise.evaluation.records import FactRecord, Related


def entry(i: int, **changes: Any) -> dict[str, Any]:
    """A record as wiki_recent has them."""
    return {
        "subject": f"Lyon {i}",
        "prompt": f"The mayor of Lyon {i} is",
        "target_new": f"Ann {i}",
        "portability": {
            "Reasoning": [{"prompt": f"The party of Lyon {i}'s mayor is", "ground_truth": [["Greens", "The Greens"]]}],
            "Subject_Aliasing": [
                {"prompt": f"Lugdunum {i} is run by", "ground_truth": f"Ann {i}"},
                {"prompt": f"Not known of {i}", "ground_truth": [[], [" "]]},
            ],
        },
        "locality": {
            "Relation_Specificity": [{"prompt": f"The country of Lyon {i} is", "ground_truth": ["France", "Gaul"]}],
            "Forgetfulness": [{"prompt": [f"An earlier mayor of Lyon {i} is"], "ground_truth": [["Bob"], ["Eve", 7]]}],
        },
        **changes,
    }


def read(folder: Path, *entries: Any, name: str = "wiki_recent_test.json") -> list[FactRecord]:
    path = folder / name
    path.write_text(json.dumps(entries), encoding="utf-8")
    return read_dataset(path).records


def test_a_record_by_hand(tmp_path: Path) -> None:
    (record,) = read(tmp_path, entry(1))
    assert record == FactRecord(
        "The mayor of Lyon 1 is",
        "Ann 1",
        "Lyon 1",
        [],
        None,
        source="knowedit",
        related=[
            Related("Reasoning", "The party of Lyon 1's mayor is", ("Greens", "The Greens"), follows=True),
            Related("Subject_Aliasing", "Lugdunum 1 is run by", ("Ann 1",), follows=True),
            Related("Relation_Specificity", "The country of Lyon 1 is", ("France", "Gaul"), follows=False),
            Related("Forgetfulness", "An earlier mayor of Lyon 1 is", ("Bob", "Eve", "7"), follows=False),
        ],
    )


def test_other_forms_of_the_same(tmp_path: Path) -> None:
    questions = [{"prompt": "Asked", "ground_truth": "a"}]
    flat, bare, biography, paraphrased = read(
        tmp_path,
        entry(0, portability=questions, locality=questions),
        {key: value for key, value in entry(1).items() if key != "portability"} | {"locality": {}},
        {"concept": "Ann", "text": "Ann was", "labels": "a poet. She wrote.", "locality": {"Relation_Specificity": []}},
        entry(3, rephrase_prompt="Lyon 3's mayor is called"),
    )
    assert [(one.kind, one.follows) for one in flat.related] == [("portability", True), ("locality", False)]
    assert (bare.related, bare.written) == ([], True)
    assert (biography.subject, biography.prompt, biography.target) == ("Ann", "Ann was", "a poet. She wrote.")
    assert not biography.written
    assert paraphrased.rephrasings == ["Lyon 3's mayor is called"]


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"target_new": ""}, ["'target_new'", "not empty"]),
        ({"portability": "x"}, ["'portability' is 'x'", "lists of questions by kind"]),
        ({"portability": {"Reasoning": [{"prompt": "x"}]}}, ["portability, Reasoning, question 0", "'ground_truth'"]),
        ({"locality": {"Forgetfulness": [{"prompt": " ", "ground_truth": "x"}]}}, ["Forgetfulness", "'prompt'"]),
        ({"locality": [{"prompt": "x", "ground_truth": {"str": "y"}}]}, ["locality, question 0", "{'str': 'y'}"]),
        ({"rephrase": [3]}, ["rephrasings are [3]"]),
    ],
)
def test_what_is_malformed_is_named(tmp_path: Path, changes: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(ValueError, match=r"wiki_recent_test\.json, record 1 \(knowedit\)") as error:
        read(tmp_path, entry(0), entry(1, **changes))
    assert all(fragment in str(error.value) for fragment in fragments), error.value


def test_training_sees_only_locality_prompts_of_other_records(tmp_path: Path) -> None:
    read(tmp_path, *(entry(i) for i in range(4)))
    chosen = select(read_dataset(tmp_path / "wiki_recent_test.json"), 3, unrelated=[Query("far", "x")])
    assert [one["loc_prompt"] for one in chosen.requests] == [
        "The country of Lyon 3 is France",
        "An earlier mayor of Lyon 3 is Bob",
        "The country of Lyon 3 is France",
    ]
    assert {record.unrelated for record in chosen.records} == {Query("far", "x")}
    read(tmp_path, entry(9), name="wiki_recent_train.json")
    chosen = select(read_dataset(tmp_path / "wiki_recent_test.json"), 1)
    assert chosen.requests[0]["loc_prompt"] == "The country of Lyon 9 is France"


def test_questions_near_an_edit_are_scored() -> None:
    tok = word_tokenizer()
    before = {"b": "q", "e": "f", "f": "f", "h": "i", "k": "l", "m": "n"}
    after = before | {"b": "c", "e": "c", "h": "o"}  # the edit reaches "e", not "m", and spoils "h"
    record = FactRecord(
        "a b",
        "c",
        "a",
        [],
        Query("j", "k l"),
        related=[
            Related("Reasoning", "d e", ("c",), follows=True),
            Related("Subject_Aliasing", "m", ("d", "n"), follows=True),
            Related("Relation_Specificity", "h", ("i",), follows=False),
            Related("Relation_Specificity", "k", ("l",), follows=False),
        ],
    )
    baseline = collect_baseline(NextWord(before).eval(), tok, [record], max_new_tokens=1)
    assert (baseline.scores.portability, baseline.scores.nearby_kept) == (0.0, 1.0)
    scores = score_model(NextWord(after).eval(), tok, [record], baseline)
    assert scores.reliability == 1.0
    assert scores.portability == 0.5  # teacher-forced: the first answer of each
    assert scores.portability_contains == 1.0  # greedy: any answer
    assert (scores.nearby_kept, scores.nearby_same) == (0.5, 0.5)
    assert scores.by_kind == {"Reasoning": 1.0, "Subject_Aliasing": 0.0, "Relation_Specificity": 0.5}
    assert scores.rows[0].portability_texts == ["c", "n"]
    assert json.loads(json.dumps(scores.to_dict()))["by_kind"]["Reasoning"] == 1.0
