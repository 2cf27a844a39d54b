"""EasyEdit's data files: each format, what is refused, and which prompts may train an edit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easyedit_wise.evaluation.asking import Query
from easyedit_wise.evaluation.datasets import (
    EditSet,
    interleaved,
    irrelevant_prompts,
    read_dataset,
    requests_of,
    select,
    train_file,
    without_long_ones,
)
from easyedit_wise.evaluation.records import FactRecord

LOCALITY = ("locality_prompt", "locality_ground_truth")


def entry(kind: str, i: int) -> dict[str, Any]:
    """Record i of a file in one of the four formats, with a field that nobody reads."""
    if kind == "zsre":
        fields = {"src": f"Who is {i}?", "alt": f"Ann {i}", "rephrase": f"Name {i}", "loc": f"nq {i}", "loc_ans": "x"}
        return {**fields, "subject": str(i), "pred": "Bob", "cond": ""}
    fields = {"prompt": f"{kind} {i} is", "target_new": f"new {i}", "subject": f"{kind} {i}"}
    fields |= {"locality_prompt": f"{kind} far {i}", "locality_ground_truth": f"old {i}", "case_id": i}
    if kind == "counterfact":
        return fields | {"rephrase_prompt": f"they say {i} is", "ground_truth": "old"}
    if kind == "temporal":
        return fields | {"ood_rephrase": f"temporal {i} was once"}
    return fields


def write(folder: Path, kind: str, n: int, name: str | None = None) -> Path:
    path = folder / (name or f"{kind}-edit.json")
    path.write_text(json.dumps([entry(kind, i) for i in range(n)]), encoding="utf-8")
    return path


KINDS = ("zsre", "counterfact", "hallucination", "temporal")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_recognised_by_its_fields(tmp_path: Path, kind: str) -> None:
    dataset = read_dataset(write(tmp_path, kind, 2))
    assert dataset.format.name == kind
    assert [record.source for record in dataset.records] == [kind, kind]
    assert read_dataset(dataset.path, kind) == dataset


def test_each_format_by_hand(tmp_path: Path) -> None:
    record = {kind: read_dataset(write(tmp_path, kind, 2)).records[1] for kind in KINDS}
    assert record["zsre"] == FactRecord("Who is 1?", "Ann 1", "1", ["Name 1"], Query("nq 1", "x"), source="zsre")
    # CounterFact's locality prompt asks about a neighbour, so the far one has to come from elsewhere.
    assert record["counterfact"] == FactRecord(
        "counterfact 1 is",
        "new 1",
        "counterfact 1",
        ["they say 1 is"],
        None,
        nearby=Query("counterfact far 1", "old 1"),
        source="counterfact",
    )
    assert record["hallucination"] == FactRecord(
        "hallucination 1 is",
        "new 1",
        "hallucination 1",
        [],
        Query("hallucination far 1", "old 1"),
        written=False,
        source="hallucination",
    )
    assert record["temporal"].ood == "temporal 1 was once"
    assert (record["temporal"].rephrasings, record["temporal"].written) == ([], False)


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"rephrase": None}, ["record 1 (zsre)", "'rephrase'", "None"]),
        ({"loc_ans": "  "}, ["record 1 (zsre)", "'loc_ans'", "not empty"]),
        ({"alt": ["Ann"]}, ["record 1 (zsre)", "'alt'", "['Ann']"]),
    ],
)
def test_a_malformed_field_is_named(tmp_path: Path, change: dict[str, Any], fragments: list[str]) -> None:
    path = tmp_path / "zsre_mend_edit.json"
    path.write_text(json.dumps([entry("zsre", 0), entry("zsre", 1) | change]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"zsre_mend_edit\.json") as error:
        read_dataset(path)
    assert all(fragment in str(error.value) for fragment in fragments), error.value


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("[", "is not JSON"),
        ("{}", "a list of records, at least one"),
        ("[]", "a list of records, at least one"),
        ('[{"prompt": "x"}]', "none of the known formats (zsre, temporal, counterfact, knowedit, hallucination)"),
        ("[3]", "none of the known formats"),
    ],
)
def test_a_file_of_another_form(tmp_path: Path, text: str, fragment: str) -> None:
    path = tmp_path / "facts.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"facts\.json") as error:
        read_dataset(path)
    assert fragment in str(error.value)


def test_a_missing_field_and_a_record_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "edit.json"
    short = entry("temporal", 1)
    del short["ood_rephrase"]
    path.write_text(json.dumps([entry("temporal", 0), short]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"record 1 \(temporal\) has no field 'ood_rephrase'"):
        read_dataset(path)
    path.write_text(json.dumps([entry("temporal", 0), "text"]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"record 1 \(temporal\) is str"):
        read_dataset(path)
    with pytest.raises(ValueError, match="'zsrE' is no format"):
        read_dataset(path, "zsrE")


def test_seed_0_is_the_files_order_and_others_a_sample(tmp_path: Path) -> None:
    dataset = read_dataset(write(tmp_path, "zsre", 30))
    assert select(dataset, 4, start=2).records == dataset.records[2:6]
    one, same, other = (select(dataset, 10, start=2, seed=seed).records for seed in (1, 1, 2))
    assert one == same != other
    assert one != dataset.records[:10]
    assert len({record.prompt for record in one}) == 10
    # The whole file is sampled, whatever --start says.
    assert len(select(dataset, 30, start=2, seed=3).records) == 30


def test_too_many_edits(tmp_path: Path) -> None:
    dataset = read_dataset(write(tmp_path, "zsre", 5))
    with pytest.raises(ValueError, match=r"4 edits are wanted, but .* has 3 records from number 2 on"):
        select(dataset, 4, start=2)
    with pytest.raises(ValueError, match=r"6 edits are wanted, but .* has 5 records"):
        select(dataset, 6, seed=1)
    with pytest.raises(ValueError, match="at least one edit"):
        select(dataset, 0)


def test_irrelevant_prompts_come_from_the_train_file(tmp_path: Path) -> None:
    path = write(tmp_path, "temporal", 3)
    train = [entry("hallucination", i) | {"ood_rephrase": "x"} for i in range(2)]
    train[1]["locality_ground_truth"] = ""  # as in EasyEdit's own train files
    train.append(train[0] | {"locality_prompt": "temporal far 1"})  # one that an evaluated record is scored with
    (tmp_path / "temporal-train.json").write_text(json.dumps(train), encoding="utf-8")
    requests = select(read_dataset(path), 3).requests
    assert [one["loc_prompt"] for one in requests] == [
        "hallucination far 0 old 0",
        "hallucination far 1",
        "hallucination far 0 old 0",
    ]
    assert train_file(path) == tmp_path / "temporal-train.json"
    assert train_file(tmp_path / "zsre_mend_edit.json") is None


def test_without_a_train_file_other_records_give_them(tmp_path: Path) -> None:
    dataset = read_dataset(write(tmp_path, "zsre", 5, "zsre_mend_edit.json"))
    prompts = [one["loc_prompt"] for one in select(dataset, 2, start=1).requests]
    assert prompts == ["nq 3 x", "nq 4 x"]
    assert irrelevant_prompts(dataset, dataset.records[3], {"nq 0"}) == ["nq 4 x", "nq 1 x", "nq 2 x", "nq 3 x"]
    # All records are evaluated: there is none left.
    assert all("loc_prompt" not in one for one in select(dataset, 5).requests)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 12), seed=st.integers(0, 5))
def test_no_irrelevant_prompt_is_scored(tmp_path_factory: pytest.TempPathFactory, n: int, seed: int) -> None:
    path = write(tmp_path_factory.mktemp("data"), "counterfact", 12)
    chosen = select(read_dataset(path), n, seed=seed, unrelated=[Query("far", "x")])
    scored = {prompt for record in chosen.records for prompt in record.scored_prompts()}
    given_prompts = {request["loc_prompt"] for request in chosen.requests if "loc_prompt" in request}
    assert bool(given_prompts) == (n < 12)
    assert not any(one.startswith(f"{prompt} ") for one in given_prompts for prompt in scored)
    assert all(record.unrelated == Query("far", "x") for record in chosen.records)


def test_requests_repeat_a_short_list() -> None:
    records = [FactRecord(f"p{i}", "t", "s", [], None) for i in range(3)]
    assert [one["loc_prompt"] for one in requests_of(records, ["a", "b"])] == ["a", "b", "a"]
    assert requests_of(records)[0] == {"prompt": "p0", "target_new": "t", "ground_truth": "", "subject": "s"}


def test_only_hallucinations_are_cut(tmp_path: Path) -> None:
    def n_tokens(text: str) -> int:
        return 300 if "1" in text else 254

    cut = without_long_ones(read_dataset(write(tmp_path, "hallucination", 3)), n_tokens)
    assert [record.target for record in cut.records] == ["new 0", "new 2"]
    with pytest.raises(ValueError, match=r"has 2 records \(1 longer than 254 tokens\)"):
        select(cut, 3)
    whole = read_dataset(write(tmp_path, "zsre", 3))
    assert without_long_ones(whole, n_tokens) is whole


def test_interleaving_keeps_each_sets_order_and_drops_what_another_set_scores() -> None:
    def edit_set(name: str, irrelevant: str) -> EditSet:
        records = [FactRecord(f"{name} {i}", "t", name, [], Query(f"{name} far", "x"), source=name) for i in range(5)]
        return EditSet(records, requests_of(records, [irrelevant]))

    mixed = interleaved([edit_set("a", "b far x"), edit_set("b", "fine x")], seed=2)
    assert mixed == interleaved([edit_set("a", "b far x"), edit_set("b", "fine x")], seed=2)
    assert [one["prompt"] for one in mixed.requests] == [record.prompt for record in mixed.records]
    for name in "ab":
        assert [one.prompt for one in mixed.records if one.source == name] == [f"{name} {i}" for i in range(5)]
    assert [one.source for one in mixed.records] not in (list("aaaaabbbbb"), list("bbbbbaaaaa"))
    # "b far" is what b's records are scored with, so a's edits must not be trained with it.
    assert {one.get("loc_prompt") for one in mixed.requests} == {None, "fine x"}
