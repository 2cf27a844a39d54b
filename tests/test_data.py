import json
import re
from importlib.resources import files
from itertools import combinations

import pytest

from easyedit_wise.data import demo_facts, neutral_prompts
from easyedit_wise.evaluation.final import FactRecord

FACTS = demo_facts()
KEYS = {"prompt", "target_new", "ground_truth", "subject", "rephrasings", "unrelated", "nearby"}
# Words that any sentence may share with a fact.
COMMON = frozenset(
    re.findall(
        r"\w+",
        "a an and answer are as at be by called can come comes does for from has he his in is it its no not "
        "of on or question than that the they to was were what which who with without",
    )
)


def words(text):
    return set(re.findall(r"\w+", text.casefold())) - COMMON


def own_prompts(fact):
    return [fact["prompt"], *fact["rephrasings"]]


def all_prompts(fact):
    return [*own_prompts(fact), fact["unrelated"]["prompt"], fact["nearby"]["prompt"]]


def test_there_are_fourteen_facts():
    assert len(FACTS) == 14


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact["subject"])
def test_fact_is_well_formed(fact):
    assert set(fact) == KEYS
    assert fact["subject"] in fact["prompt"]
    assert len(fact["rephrasings"]) == len(set(fact["rephrasings"])) == 2
    assert fact["target_new"] != fact["ground_truth"]
    assert 1 <= len(fact["target_new"].split()) <= 3
    texts = [*all_prompts(fact), fact["target_new"], fact["unrelated"]["answer"], fact["nearby"]["answer"]]
    for text in texts:
        assert text == text.strip()
        assert text
    # An answer that stands in its own prompt would make a copying model look edited.
    for prompt in own_prompts(fact):
        assert not words(fact["target_new"]) <= words(prompt)


def test_rephrasings_differ_from_the_edit_prompt_and_from_each_other():
    for fact in FACTS:
        for one, other in combinations(own_prompts(fact), 2):
            assert one.casefold() != other.casefold(), (one, other)
            assert not one.startswith(other), (one, other)


def test_no_prompt_and_no_target_occurs_twice():
    prompts = [prompt for fact in FACTS for prompt in all_prompts(fact)]
    assert len(prompts) == len({prompt.casefold() for prompt in prompts})
    assert len({fact["subject"] for fact in FACTS}) == len({fact["target_new"] for fact in FACTS}) == len(FACTS)


def test_edits_leave_nearby_and_unrelated_answers_right():
    subjects = [fact["subject"].casefold() for fact in FACTS]
    for fact in FACTS:
        for kept in (fact["nearby"], fact["unrelated"]):
            assert not any(subject in kept["prompt"].casefold() for subject in subjects)
            assert kept["answer"] != fact["target_new"]


def test_unrelated_prompts_share_no_word_with_any_edit():
    edited = {word for fact in FACTS for prompt in own_prompts(fact) for word in words(prompt)}
    edited |= {word for fact in FACTS for word in words(f"{fact['target_new']} {fact['ground_truth']}")}
    for fact in FACTS:
        assert not words(fact["unrelated"]["prompt"]) & edited


def test_facts_are_fresh_copies():
    demo_facts()[0]["prompt"] = "changed"
    assert demo_facts()[0]["prompt"] != "changed"


def test_facts_make_records():
    assert [FactRecord.from_dict(fact).target for fact in FACTS] == [fact["target_new"] for fact in FACTS]


def test_neutral_prompts():
    prompts = neutral_prompts()
    assert len(prompts) == len(set(prompts)) == 146
    assert all(prompt.strip() for prompt in prompts)
    # Diverse in form: short and long ones, questions, code, dialogues of several lines.
    assert min(map(len, prompts)) < 30
    assert max(map(len, prompts)) > 120
    assert sum(prompt.endswith("?") for prompt in prompts) >= 8
    assert sum("\n" in prompt for prompt in prompts) >= 5
    # The forms in which questions are put to a model: of a text that asks, not only the question mark is the end.
    for form in ("trivia question: ", "Question: ", "Q: ", "User: ", "### Question", "exam question: "):
        places = [index for index, prompt in enumerate(prompts) if prompt.startswith(form)]
        assert {index % 2 for index in places} == {0, 1}, form  # in both halves: what is made quiet, and what tests it


def test_neutral_prompts_are_about_none_of_the_facts():
    named = {word for fact in FACTS for word in words(f"{fact['subject']} {fact['target_new']}")}
    named |= {word for fact in FACTS for word in words(fact["nearby"]["answer"])}
    for prompt in neutral_prompts():
        assert not words(prompt) & named, prompt


def test_files_are_plain_json_inside_the_package():
    folder = files("easyedit_wise.data")
    for name in ("demo_facts.json", "neutral_prompts.json"):
        assert isinstance(json.loads(folder.joinpath(name).read_text(encoding="utf-8")), list)
