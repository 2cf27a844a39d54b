"""Edit requests and their tokens, with tokenizers of several habits."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from conftest import SENTENCES, build_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from easyedit_wise.editing.requests import (
    EditRequest,
    continued,
    encode_pair,
    left_padded,
    pair_batch,
    prompt_batch,
    related,
    subject_tokens,
)

CPU = torch.device("cpu")
WORDS = sorted({word for sentence in SENTENCES for word in sentence.split()})


class Characters:
    """One token a character, numbered by code point; what is not ASCII is dropped."""

    pad_token_id = None
    eos_token_id = None

    def __init__(self, joined: dict[str, int] | None = None) -> None:
        self.joined = joined or {}

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        if text in self.joined:
            return {"input_ids": [self.joined[text]]}
        return {"input_ids": [ord(character) for character in text if character.isascii() and character != " "]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def with_special_tokens(template: str) -> Any:
    """The tests' tokenizer, putting its special tokens around every text."""
    tok = build_tokenizer()
    tok.add_special_tokens({"bos_token": "<pad>"})  # another id than eos, to tell the two apart
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<eos>", 0), ("<pad>", 1)]
    )
    return tok


# -- requests -------------------------------------------------------------------------------------


def test_from_easyedits_request() -> None:
    request = EditRequest.from_easyedit(
        {
            "prompt": "The capital of France is",
            "target_new": " Rome ",
            "ground_truth": "Paris",
            "subject": "France",
            "loc_prompt": "Water is",
            "rephrase_prompt": "France's capital is",
            "portability": {},
            "locality": {"neighborhood": {"prompt": "x", "ground_truth": "y"}},
        }
    )
    assert request == EditRequest("The capital of France is", "Rome", "France", "Water is")


@pytest.mark.parametrize("absent", [{}, {"subject": None, "loc_prompt": None}, {"subject": "", "loc_prompt": " "}])
def test_subject_and_loc_prompt_may_be_missing(absent: dict[str, Any]) -> None:
    assert EditRequest.from_easyedit({"prompt": "a", "target_new": "b", **absent}) == EditRequest("a", "b")


@pytest.mark.parametrize(
    ("request_dict", "fragments"),
    [
        ({"target_new": "Rome"}, ["no 'prompt'", "target_new"]),
        ({"prompt": "France"}, ["no 'target_new'", "it has prompt"]),
        ({}, ["no 'prompt'", "nothing"]),
        ({"prompt": "", "target_new": "Rome"}, ["prompt is ''", "non-empty"]),
        ({"prompt": " \n", "target_new": "Rome"}, ["prompt is ' \\n'", "non-empty"]),
        ({"prompt": "France", "target_new": ""}, ["target_new is ''", "non-empty"]),
        ({"prompt": "France", "target_new": "\t "}, ["target_new is ''", "non-empty"]),
        ({"prompt": "France", "target_new": None}, ["target_new is None"]),
        ({"prompt": ["France"], "target_new": "Rome"}, ["prompt is ['France']"]),
        ({"prompt": "France is", "target_new": "x", "subject": "Spain"}, ["'Spain'", "does not occur", "'France is'"]),
        ({"prompt": "France is", "target_new": "x", "subject": "france"}, ["'france'", "spelled there"]),
        ({"prompt": "France is", "target_new": "x", "subject": 3}, ["subject 3", "does not occur"]),
        ({"prompt": "France is", "target_new": "x", "loc_prompt": ["y"]}, ["loc_prompt is ['y']", "a text"]),
        ("a text", ["'a text'", "must be a dict"]),
        (None, ["None", "must be a dict"]),
    ],
)
def test_a_request_that_does_not_fit(request_dict: Any, fragments: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the fragments are the match
        EditRequest.from_easyedit(request_dict)
    message = str(caught.value)
    assert "\n" not in message
    assert all(fragment in message for fragment in fragments), message


# -- a prompt and its target ----------------------------------------------------------------------


@given(
    prompt=st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join),
    target=st.lists(st.sampled_from([*WORDS, "Zürich", "42"]), min_size=1, max_size=3).map(" ".join),
    gap=st.sampled_from(["", " ", "\n"]),
)
def test_encode_pair_reads_the_text_as_a_whole(prompt: str, target: str, gap: str) -> None:
    tok = build_tokenizer_once()
    tokens, n_prompt = encode_pair(tok, prompt + gap, target)
    text = prompt + (gap or " ") + target
    assert tokens == tok(text)["input_ids"]
    alone = tok(prompt + gap)["input_ids"]
    assert tokens[:n_prompt] == alone[:n_prompt]
    assert n_prompt == len(alone) or tokens[n_prompt] != alone[n_prompt]
    assert tok.decode(tokens[n_prompt:]).strip() == target.strip()


def build_tokenizer_once(cache: list[Any] = []) -> Any:  # noqa: B006  # hypothesis forbids function-scoped fixtures
    if not cache:
        cache.append(build_tokenizer())
    return cache[0]


def test_a_space_that_joins_the_target_belongs_to_the_target(tok: Any) -> None:
    tokens, n_prompt = encode_pair(tok, "The capital of France is ", "Paris")
    alone = tok("The capital of France is ")["input_ids"]
    assert tok.decode(alone[-1:]) == " "
    assert n_prompt == len(alone) - 1
    assert tok.decode(tokens[n_prompt:]) == " Paris"


class Merging(Characters):
    """Makes one token, 999, of a colon and the character behind it."""

    is_fast = True

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        matches = list(re.finditer(": *[^ ]|[^ ]", text))
        ids = [ord(match[0]) if len(match[0]) == 1 else 999 for match in matches]
        return {"input_ids": ids, "offset_mapping": [match.span() for match in matches]}


def test_tokens_that_merge_across_the_boundary() -> None:
    assert Merging()("is:")["input_ids"] == [ord("i"), ord("s"), ord(":")]
    tokens, n_prompt = encode_pair(Merging(), "is:", "ab")
    assert tokens == [ord("i"), ord("s"), 999, ord("b")]
    assert n_prompt == 2  # no other tokens read as the text: the colon is gone, and the merged token is the target's


@pytest.mark.parametrize(
    ("template", "bos", "eos"),
    [("<pad> $A", [1], []), ("$A <eos>", [], [0]), ("<pad> $A <eos>", [1], [0]), ("$A", [], [])],
)
def test_tokenizers_that_add_special_tokens(tok: Any, template: str, bos: list[int], eos: list[int]) -> None:
    special = with_special_tokens(template)
    assert special("Water")["input_ids"] == [*bos, *tok("Water")["input_ids"], *eos]
    plain_tokens, plain_n = encode_pair(tok, "The capital of France is", "Rome")
    tokens, n_prompt = encode_pair(special, "The capital of France is", "Rome")
    assert tokens == bos + plain_tokens  # no eos inside the target: the model shall not learn to stop there
    assert n_prompt == len(bos) + plain_n


def test_a_target_that_is_the_eos_token_is_kept_by_a_tokenizer_that_adds_none(tok: Any) -> None:
    tokens, n_prompt = encode_pair(tok, "The end", "<eos>")
    assert tokens[n_prompt:][-1] == tok.eos_token_id


@pytest.mark.parametrize("target", ["ÄÖ", "東京"])
def test_a_target_that_tokenises_to_nothing(target: str) -> None:
    with pytest.raises(ValueError, match=rf"the target '{target}' tokenises to nothing after the prompt 'abc'"):
        encode_pair(Characters(), "abc", target)


def test_a_prompt_of_which_nothing_is_left() -> None:
    with pytest.raises(ValueError, match="no token of the prompt '東京' is left before the target 'x'"):
        encode_pair(Characters(), "東京", "x")
    with pytest.raises(ValueError, match="no token of the prompt 'New' is left"):
        encode_pair(Characters({"New": 1000, "New York": 1001}), "New", "York")


# -- batches --------------------------------------------------------------------------------------


def test_left_padding() -> None:
    class Pad:
        pad_token_id = 7
        eos_token_id = 0

    ids, mask = left_padded(Pad(), [[1, 2, 3], [4]], CPU)
    assert ids.tolist() == [[1, 2, 3], [7, 7, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(("pad", "eos", "filling"), [(7, 3, 7), (None, 3, 3), (None, None, 0), (0, 3, 0)])
def test_what_padding_is_made_of(pad: int | None, eos: int | None, filling: int) -> None:
    tok = Characters()
    tok.pad_token_id, tok.eos_token_id = pad, eos
    assert left_padded(tok, [[1], [1, 2]], CPU)[0].tolist() == [[filling, 1], [1, 2]]


def test_pair_batch_marks_prompt_target_and_padding(tok: Any) -> None:
    prompts = ["The capital of France is", "She said. The capital of France is", "is"]
    batch = pair_batch(tok, prompts, "Rome", CPU)
    length = batch.input_ids.shape[1]
    for row, prompt in enumerate(prompts):
        tokens, n_prompt = encode_pair(tok, prompt, "Rome")
        n_pad, n_target = length - len(tokens), len(tokens) - n_prompt
        assert batch.input_ids[row].tolist() == [tok.pad_token_id] * n_pad + tokens
        assert batch.attention_mask[row].tolist() == [0] * n_pad + [1] * len(tokens)
        assert batch.prompt_mask[row].tolist() == [False] * n_pad + [True] * n_prompt + [False] * n_target
        assert batch.target_mask[row].tolist() == [False] * (n_pad + n_prompt) + [True] * n_target
    # EasyEdit's fault 3: with padding, tokens of the prompt or the padding were supervised.
    assert batch.target_mask.sum(dim=1).unique().numel() == 1
    assert tok.decode(batch.input_ids[2][batch.target_mask[2]]).strip() == "Rome"


def test_pad_and_prompt_tokens_are_told_apart_by_place_not_by_id(tok: Any) -> None:
    # The prompt itself holds the token that padding is made of.
    batch = pair_batch(tok, ["a<pad>b", "a longer prompt than that one"], "c", CPU)
    assert tok.pad_token_id in batch.input_ids[0][batch.prompt_mask[0]]
    assert batch.prompt_mask[0].sum() == len(tok("a<pad>b")["input_ids"])


# -- the subject ----------------------------------------------------------------------------------

ABOUT_FRANCE = EditRequest("The capital of France is", "Rome", subject="France")


@pytest.mark.parametrize("template", ["$A", "<pad> $A", "<pad> $A <eos>"])
def test_the_subjects_tokens(template: str) -> None:
    special = with_special_tokens(template)
    texts = ["The capital of France is", "About France. The capital of France is", "<user>The capital of France is<a>"]
    batch = pair_batch(special, texts, "Rome", CPU, ABOUT_FRANCE)
    assert batch.subject_mask is not None
    for row, text in enumerate(texts):
        marked = batch.input_ids[row][batch.subject_mask[row]]
        assert special.decode(marked).strip() == "France"
        # The one in the request's own prompt, not the one in a prefix.
        (position,) = batch.subject_mask[row].nonzero().flatten().tolist()[:1]
        before = special.decode(batch.input_ids[row][:position], skip_special_tokens=True)
        assert before.strip() == text[: text.rindex("France")].strip()
    assert not (batch.subject_mask & ~batch.prompt_mask).any()


def test_a_subject_of_several_tokens(tok: Any) -> None:
    request = EditRequest("Who wrote Zürich 42 in Lyon?", "nobody", subject="Zürich 42")
    positions = subject_tokens(tok, request.prompt, request)
    ids = tok(request.prompt)["input_ids"]
    assert len(positions) > 2
    assert tok.decode([ids[position] for position in positions]).strip() == "Zürich 42"


def test_a_subject_that_ends_the_prompt_does_not_reach_into_the_target(tok: Any) -> None:
    request = EditRequest("The currency of India", "euro", subject="India")
    batch = pair_batch(tok, [request.prompt, f"So. {request.prompt}"], request.target, CPU, request)
    assert not (batch.subject_mask & batch.target_mask).any()
    assert batch.subject_mask.any(dim=1).all()


def test_a_subject_whose_last_token_merges_with_the_target() -> None:
    request = EditRequest("is:", "ab", subject="s:")
    batch = pair_batch(Merging(), ["is:"], "ab", CPU, request)
    assert batch.subject_mask.tolist() == [[False, True, False, False]]
    assert batch.target_mask.tolist() == [[False, False, True, True]]


def test_where_the_subject_cannot_be_told(tok: Any) -> None:
    without = EditRequest("The capital of France is", "Rome")
    assert subject_tokens(tok, without.prompt, without) == []
    assert subject_tokens(tok, "Another text", ABOUT_FRANCE) == []
    assert subject_tokens(Characters(), ABOUT_FRANCE.prompt, ABOUT_FRANCE) == []  # knows no offsets
    for spelled, request in ((tok, None), (tok, without), (Characters(), ABOUT_FRANCE)):
        assert pair_batch(spelled, ["The capital of France is"], "Rome", CPU, request).subject_mask is None
    # All contexts or none: a batch in which only some rows know it would be scored in two ways.
    assert pair_batch(tok, [ABOUT_FRANCE.prompt, "Another text"], "Rome", CPU, ABOUT_FRANCE).subject_mask is None


# -- batches of prompts ---------------------------------------------------------------------------


def test_prompt_batch_has_no_target(tok: Any) -> None:
    batch = prompt_batch(tok, ["Water", "The capital of France is"], CPU)
    assert torch.equal(batch.prompt_mask, batch.attention_mask.bool())
    assert not batch.target_mask.any()
    assert batch.target_mask.shape == batch.input_ids.shape


def test_prompt_batch_refuses_a_prompt_without_tokens() -> None:
    with pytest.raises(ValueError, match="the prompt '東京' tokenises to nothing"):
        prompt_batch(Characters(), ["abc", "東京"], CPU)


def test_positions_start_at_the_first_real_token(tok: Any) -> None:
    batch = pair_batch(tok, ["The capital of France is", "is"], "Rome", CPU)
    positions = batch.model_inputs()["position_ids"]
    for row in range(2):
        real = batch.attention_mask[row].bool()
        assert positions[row][real].tolist() == list(range(int(real.sum())))
        assert positions[row][~real].tolist() == [0] * int((~real).sum())


@torch.no_grad()
def test_a_padded_batch_gives_each_row_what_it_gives_alone(any_model: tuple[Any, str], tok: Any) -> None:
    model, _ = any_model
    prompts = ["The capital of France is", "is", "She said that the weather would be fine. The capital of France is"]
    together = pair_batch(tok, prompts, "Rome", CPU)
    logits = model(**together.model_inputs()).logits
    for row, prompt in enumerate(prompts):
        alone = pair_batch(tok, [prompt], "Rome", CPU)
        real = together.attention_mask[row].bool()
        torch.testing.assert_close(logits[row][real], model(**alone.model_inputs()).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_own_padding_side_counts_for_nothing_and_stays(tok: Any, side: str) -> None:
    other = copy.deepcopy(tok)
    other.padding_side = side
    prompts = ["The capital of France is", "is"]
    mine, reference = pair_batch(other, prompts, "Rome", CPU), pair_batch(tok, prompts, "Rome", CPU)
    assert torch.equal(mine.input_ids, reference.input_ids)
    assert torch.equal(mine.attention_mask, reference.attention_mask)
    assert torch.equal(prompt_batch(other, prompts, CPU).input_ids, prompt_batch(tok, prompts, CPU).input_ids)
    assert other.padding_side == side


def test_related_edits_share_a_subject_and_no_beginning() -> None:
    paris = EditRequest("Paris lies on", "the Po", "Paris")
    others = [
        EditRequest("The mayor of PARIS is", "Ann", "PARIS"),  # the same subject
        EditRequest("Rome lies on", "the Elbe", "Rome"),
        EditRequest("Paris lies", "low"),  # what the prompt goes on from
        EditRequest("Paris lies on", "the Rhine", "Paris"),  # the same fact again
        EditRequest("Paris lies on the Po. It is", "old", "Paris"),  # goes on from this one
        EditRequest("The twin of Paris is", "Bonn", "Paris"),
    ]
    assert related(paris, others, 9) == [others[0], others[5]]
    assert related(paris, others, 1) == [others[5]]
    assert related(EditRequest("Paris lies on", "the Po"), others, 9) == []
    assert related(paris, [], 9) == []


@pytest.mark.parametrize(
    ("one", "other", "continued_"),
    [
        ("Paris lies on", "Paris lies on the Po. It is", True),
        ("Paris lies on", "Paris lies", True),
        ("Paris lies on", "Paris lies on", False),  # the same fact again
        ("Paris lies on", "Paris is", False),
    ],
)
def test_one_prompt_goes_on_from_the_other(one: str, other: str, continued_: bool) -> None:
    assert continued(one, other) == continued(other, one) == continued_
