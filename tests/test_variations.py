"""Other forms of an edit's prompt."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from easyedit_wise.data import demo_facts, other_subjects
from easyedit_wise.editing.contexts import in_groups
from easyedit_wise.editing.variations import about_others, scrambled, varied_contexts, words_left_out

WORDS = st.lists(st.sampled_from(["the", "old", "tower", "of", "Ghent", "stands,", "in"]), max_size=5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("prompt", "subject", "left"),
    [
        ("The capital of France is", "France", "France"),
        ("What was Ada Lovelace's profession?", "Ada Lovelace", "Ada Lovelace's"),
        ("Who wrote Emma?", "Emma", "Emma?"),
        ("Nokia is a company from", "Nokia", "Nokia"),
    ],
)
def test_when_all_words_go_the_subject_stays(prompt: str, subject: str, left: str) -> None:
    assert words_left_out(prompt, subject, 1.0, seeded()) == left


@given(before=WORDS, after=WORDS, share=st.floats(0, 1), seed=st.integers(0, 99))
def test_what_is_left_stands_in_its_order(before: list[str], after: list[str], share: float, seed: int) -> None:
    prompt = " ".join([*before, "Ada Lovelace", *after])
    words = iter(prompt.split())
    left = words_left_out(prompt, "Ada Lovelace", share, seeded(seed))
    assert "Ada Lovelace" in left
    assert all(any(word == other for other in words) for word in left.split())  # a subsequence


def test_nothing_is_left_out_at_share_0() -> None:
    assert words_left_out("Who wrote  Emma?", "Emma", 0.0, seeded()) == "Who wrote Emma?"


def test_without_a_subject_a_prompt_never_becomes_empty() -> None:
    assert words_left_out("The sea is", None, 1.0, seeded()) == "The sea is"
    assert len({words_left_out("a b c d e f g h", None, 0.5, seeded(seed)) for seed in range(9)}) > 3


def test_other_subjects_take_the_place_of_the_edits_own() -> None:
    texts = about_others("The capital of France is", "France", ["Oslo", "france", "Rome"], 5, seeded())
    assert sorted(texts) == ["The capital of Oslo is", "The capital of Rome is"]
    assert len(about_others("x of y", "y", other_subjects(), 8, seeded())) == 8


def test_none_asked_for_draws_no_random_number() -> None:
    generator = seeded()
    before = generator.get_state()
    assert about_others("The capital of France is", "France", other_subjects(), 0, generator) == []
    assert torch.equal(generator.get_state(), before)


def test_the_packaged_names_are_not_the_demos() -> None:
    asked = " ".join(
        text
        for fact in demo_facts()
        for text in (fact["prompt"], fact["nearby"]["prompt"], fact["unrelated"]["prompt"])
    )
    names = other_subjects()
    assert len(set(names)) == len(names) > 90
    assert not [name for name in names if name in asked]


def test_contexts_of_three_kinds_take_turns() -> None:
    texts = varied_contexts("The capital of France is", "France", ["p", "q", "r", "s"], seeded(), share=1.0)
    assert texts == ["p. The capital of France is", "France", "r. France", "s. The capital of France is"]
    nameless = varied_contexts("a b", None, ["p", "q", "r"], seeded(), share=0.0)
    assert nameless == ["p. a b", "a b", "r. a b"]
    assert in_groups("x", texts, 3) == [["x", *texts[:2]], ["x", *texts[2:]]]


class Words:
    """A tokenizer whose tokens are words."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[str]]:
        assert not add_special_tokens
        return {"input_ids": text.split()}

    def decode(self, tokens: list[str]) -> str:
        return " ".join(tokens)


@given(target=st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_scrambled_targets_are_the_own_tokens_between_others(target: list[str], seed: int) -> None:
    texts = scrambled(" ".join(target), ["X Y Z", "U"], 3, Words(), seeded(seed))
    assert len(texts) == 3
    for text in texts:
        tokens = text.split()
        own = [token for token in tokens if token.islower()]
        if len(target) <= 24:
            assert sorted(own) == sorted(target)
        else:
            assert len(own) == 24
            assert all(own.count(token) <= target.count(token) for token in own)
        others = "".join(token for token in tokens if token.isupper())
        assert others
        assert others in "XYZU"
        assert len(others) <= len(own)
        assert tokens[0].isupper()  # another's token stands first


def test_none_scrambled_draws_no_random_number() -> None:
    generator = seeded()
    before = generator.get_state()
    assert scrambled("a b", ["X"], 0, Words(), generator) == []
    assert scrambled("", ["X"], 3, Words(), generator) == []
    assert torch.equal(generator.get_state(), before)
