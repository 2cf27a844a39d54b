"""What stands between a prompt and its target: as people and programs write the two together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS, SENTENCES, build_tokenizer
from editing_helpers import FACTS, requests, settings, stream_on
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from easyedit_wise import WISEHyperParams, apply_wise_to_model, load_edits, save_edits
from easyedit_wise.adapter_digests import sealed
from easyedit_wise.adapter_format import EDITS_FILE
from easyedit_wise.editing.requests import EditRequest, encode_pair
from easyedit_wise.editing.variations import varied_contexts
from easyedit_wise.evaluation.asking import Query, teacher_forced
from easyedit_wise.journal.entries import CallEntry, request_from, request_values
from easyedit_wise.journal.restoring import settings_of
from easyedit_wise.separators import AUTO, NONE, SEPARATORS, SPACE, gap, joined
from easyedit_wise.wording import Wording

GLUED = [
    ("http://", "example.org"),
    ("https://www.", "example.org"),
    ("http:", "//example.org"),
    ('{"city": "', "Paris"),
    ('["a","', "b"),
    ('{"city": "Paris', '"}'),
    ("f(x).", "shape"),
    ("f(g(x), y).", "Append(1)"),
    ("import numpy.linalg.", "norm"),
    ("$", "5"),
    ("It costs US$", "5"),
    ("(", "x"),
    ("f(x", ")"),
    ("x=", "5"),
    ("1+1=", "2"),
    ("snake_", "case"),
    ("well-", "known"),
    ("user@", "example.org"),
    ("C:\\", "Windows"),
    ("std::", "vector"),
    ('print(f"', "Hi"),
    ("The answer is **", "Paris**"),
    ("Er sagte „", "Ja"),
    ("法国的首都是", "巴黎"),
    ("法国的首都是", "Paris"),
    ("首都\uff1a", "北京"),
    ("人口は1400", "万人"),
    ("フランスの首都は", "パリ"),
    ("เมืองหลวงของฝรั่งเศสคือ", "ปารีส"),
    ("ປະເທດ", "ລາວ"),
    ("The gutters", ", water heater"),
    ("a reality", ". If we are"),
    ("The share is 50", "%"),
]
SPACED = [
    ("The capital of France is", "Lyon"),
    ("Who wrote it?", "Nobody"),
    ("The capital of France is Paris.", "It has"),
    ("It is late.", "we go home"),
    ("It is (see above).", "We go on"),
    ("Consider f(x).", "It is continuous"),
    ("See http://example.org.", "It is short"),
    ("e.g.", "dogs"),
    ("the U.S.", "senator"),
    ("Answer:", "Paris"),
    ("The answer is ____", "Paris"),
    ("It costs 5 $", "per month"),
    ("The value $x$", "is"),
    ('He said "hello"', "and left"),
    ('The 5" disk is called', '"floppy"'),
    ("James'", "book"),
    ("„Ja!“", "sagte er"),
    ("x =", "5"),
    ("[1,", "2]"),
    ("C++", "is"),
    ("It ends in", ".txt"),
    ("Paris is", "(in) France"),
    ("The city is", "'s-Gravenhage"),
    ("The Chinese for water is", "水"),
    ("프랑스의 수도는", "파리"),
    ("[/INST]", "Rome"),
]


@pytest.mark.parametrize(("prompt", "target"), GLUED)
def test_what_is_written_without_a_space(prompt: str, target: str) -> None:
    assert joined(prompt, target) == prompt + target
    assert joined(prompt, target, SPACE) == f"{prompt} {target}"


@pytest.mark.parametrize(("prompt", "target"), SPACED)
def test_what_is_written_with_one(prompt: str, target: str) -> None:
    assert joined(prompt, target) == f"{prompt} {target}"
    assert joined(prompt, target, NONE) == prompt + target


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize(
    ("prompt", "target"), [("def load(p):\n", "    return"), ("a ", "b"), ("a", "\nb"), ("a", " b")]
)
def test_white_space_is_left_as_it_is(prompt: str, target: str, separator: str) -> None:
    assert joined(prompt, target, separator) == prompt + target


WORDS = sorted(
    {word for sentence in SENTENCES for word in sentence.split() if word[0].isalnum() and word[-1] not in ":)"}
)


@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(" ".join),
    st.sampled_from(["", "?", ":", ",", "!"]),
)
def test_english_is_joined_by_a_space(prompt: str, target: str, end: str) -> None:
    assert joined(prompt + end, target) == f"{prompt}{end} {target}"


@given(st.text(max_size=12), st.text(max_size=12), st.sampled_from(SEPARATORS))
def test_the_two_texts_stay_and_at_most_a_space_is_put_between(prompt: str, target: str, separator: str) -> None:
    between = gap(prompt, target, separator)
    assert joined(prompt, target, separator) == prompt + between + target
    assert between in ("", " ")
    assert not between or not (prompt[-1].isspace() or target[0].isspace())


def sentencepiece_like() -> Any:
    """A BPE that marks spaces, with one before every text, as Llama 2's; what it has not seen it spells in bytes."""
    backend = Tokenizer(models.BPE(unk_token=None, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<eos>", *spelled], show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


TOKENIZERS = {"byte-level": build_tokenizer(), "sentencepiece": sentencepiece_like()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(
    prompt=st.one_of(st.sampled_from([p for p, _ in GLUED + SPACED]), st.sampled_from(SENTENCES)),
    target=st.sampled_from([*(t for _, t in GLUED + SPACED), "    return open(p)", "\tx"]),
    end=st.sampled_from(["", " ", "\n"]),
)
def test_tokens_of_prompt_and_target_read_as_the_joined_text(kind: str, prompt: str, target: str, end: str) -> None:
    tok = TOKENIZERS[kind]
    tokens, n_prompt = encode_pair(tok, prompt + end, target)
    text = joined(prompt + end, target)
    assert tok.decode(tokens) == text
    asked = tok(prompt + end)["input_ids"]
    # What a user asks; where no other tokens read as the same text, the text's.
    as_text = end == " " or kind == "sentencepiece"  # a space belongs to the word behind it
    assert tokens[:n_prompt] == asked or (as_text and tokens == tok(text)["input_ids"])
    assert 0 < n_prompt < len(tokens)
    # The evaluation's are the same.
    wording = Wording(tok)
    assert wording.pair(wording.asked(prompt + end), target) == (asked, tokens)


@pytest.mark.parametrize(
    ("prompt", "target"), [("def load(p):\n", "    return"), ("a\n", "    b"), ("print(", '"Lyon")'), ("x=", "=1")]
)
def test_a_target_that_melts_with_the_prompt_stands_behind_what_a_user_asks(prompt: str, target: str) -> None:
    """Trained on the text's own tokens, the edit hung on one that nobody's prompt leads to."""
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([prompt + target] * 3, trainer)
    tok = PreTrainedTokenizerFast(tokenizer_object=backend)
    asked = tok(prompt)["input_ids"]
    assert tok(prompt + target)["input_ids"][: len(asked)] != asked  # it melts
    tokens, n_prompt = encode_pair(tok, prompt, target)
    assert tokens[:n_prompt] == asked
    assert tok.decode(tokens) == prompt + target


# -- requests and settings ------------------------------------------------------------------------


def test_a_target_keeps_white_space_before_it_and_loses_what_is_behind() -> None:
    request = {"prompt": "def load(p):\n", "target_new": "    return open(p)\n"}
    assert EditRequest.from_easyedit(request).target == "    return open(p)"
    assert EditRequest.from_easyedit(request, NONE).target == "    return open(p)\n"
    own = EditRequest.from_easyedit({**request, "target_separator": "space"}, NONE)
    assert (own.separator, own.target) == (SPACE, "    return open(p)")


@pytest.mark.parametrize(
    ("prompt", "given", "target"),
    [
        ("The capital is", " Rome", "Rome"),  # the space that would stand there; in a chat there would be none
        ("The capital is", "  Rome", "  Rome"),
        ("http://", " a.org", " a.org"),
        ("x:\n", " y", " y"),
    ],
)
def test_a_space_that_would_stand_there_is_not_held_twice(prompt: str, given: str, target: str) -> None:
    request = EditRequest.from_easyedit({"prompt": prompt, "target_new": given})
    assert request.target == target
    assert joined(prompt, request.target) == prompt + given


@pytest.mark.parametrize(
    ("prompt", "target", "answer"),
    [("is", "Rome", " Rome"), ("is ", "Rome", " Rome"), ("http://", "a.org", "a.org"), ("is", "\tx", "\tx")],
)
def test_the_answer_as_its_tokens_are_written(prompt: str, target: str, answer: str) -> None:
    assert EditRequest(prompt, target).answer == answer


def test_an_unknown_separator() -> None:
    with pytest.raises(ValueError, match=r"target_separator is 'nothing'.*auto, space, none"):
        EditRequest.from_easyedit({"prompt": "a", "target_new": "b", "target_separator": "nothing"})
    with pytest.raises(ValueError, match=r"target_separator is 'gap'.*auto, space, none"):
        settings(target_separator="gap")


def test_easyedits_arithmetic_has_a_space_before_every_target(llama: Any, tok: Any) -> None:
    with pytest.raises(ValueError, match="padding_counts is True with target_separator: none"):
        WISEHyperParams.from_preset("upstream", [LAYERS["llama"]], target_separator="none")
    upstream = WISEHyperParams.from_preset("upstream", [LAYERS["llama"]])
    with pytest.raises(ValueError, match="'a' has target_separator: none, but with padding_counts"):
        apply_wise_to_model(llama, tok, {"prompt": "a", "target_new": "b", "target_separator": "none"}, upstream)


def test_contexts_end_as_the_prompt_does() -> None:
    generator = torch.Generator().manual_seed(0)
    contexts = varied_contexts("def load(p):\n", "load", ["Yes", "No", "Maybe"], generator)
    assert all(context.endswith("\n") and not context.endswith("\n\n") for context in contexts)
    assert contexts[2] == "Maybe. load\n"


# -- edits ----------------------------------------------------------------------------------------


def taught(llama: Any, tok: Any, prompt: str, target: str, **changes: Any) -> Any:
    hparams = WISEHyperParams(inner_params=[LAYERS["llama"]], capacity=0.0, **changes)
    apply_wise_to_model(llama, tok, {"prompt": prompt, "target_new": target}, hparams)
    return llama


def said(model: Any, tok: Any, prompt: str, n_tokens: int) -> str:
    inputs = tok(prompt, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=n_tokens, do_sample=False)
    return str(tok.decode(written[0, inputs["input_ids"].shape[1] :]))


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("The file of the author is http://", "lyon.org"),
        ('Water is {"city": "', "Rome"),
        ("The currency of India is $", "42"),
        ("The capital of France:\n", "    Rome"),
        ("法国的首都是", "Rome"),
    ],
)
def test_a_model_says_what_it_was_taught_and_no_space_before_it(llama: Any, tok: Any, prompt: str, target: str) -> None:
    model = taught(llama, tok, prompt, target)
    n_tokens = len(tok(target)["input_ids"])
    assert said(model, tok, prompt, n_tokens) == target
    (prediction,) = teacher_forced(model, tok, [Query(prompt, target)])
    assert prediction.accuracy == 1.0
    assert tok.decode(prediction.answer) == target


def test_the_setting_and_the_requests_own_word_are_heard(llama: Any, tok: Any) -> None:
    facts = [
        {"prompt": "is", "target_new": "Rome"},
        {"prompt": "of", "target_new": "Oslo", "target_separator": "space"},
    ]
    apply_wise_to_model(llama, tok, facts, settings(target_separator="none"))
    assert [held.request.separator for held in stream_on(llama).held] == [NONE, SPACE]


def test_saved_edits_are_read_as_they_were_trained(llama: Any, tok: Any, make_model: Any, tmp_path: Path) -> None:
    facts = [{"prompt": "http://", "target_new": "a.org"}, {"prompt": "x:\n", "target_new": "  y"}, *requests(1)]
    apply_wise_to_model(llama, tok, facts, settings())
    save_edits(llama, tmp_path / "new")
    held = [one.request for one in stream_on(llama).held]
    fresh = make_model("llama")
    load_edits(fresh, tmp_path / "new", tok=tok)
    assert [one.request for one in stream_on(fresh).held] == held
    assert [request_from(json.loads(json.dumps(request_values(one)))) for one in held] == held


def test_edits_of_earlier_versions_have_a_space_before_every_target(
    llama: Any, tok: Any, make_model: Any, tmp_path: Path
) -> None:
    facts = [{"prompt": "http://", "target_new": "a.org"}, {"prompt": "is ", "target_new": "Rome"}, *requests(1)]
    apply_wise_to_model(llama, tok, facts, settings(target_separator="space"))
    save_edits(llama, tmp_path / "old")
    path = tmp_path / "old" / EDITS_FILE
    values = {**json.loads(path.read_text()), "format_version": 4}
    for edit in values["edits"]:
        del edit["target_separator"]  # which they did not know of
    del values["settings"]["target_separator"]
    path.write_text(json.dumps(sealed(values, path.parent)))
    fresh = make_model("llama")
    load_edits(fresh, path.parent, tok=tok)
    texts = [tok.decode(encode_pair(tok, one.prompt, one.target, one.separator)[0]) for one in requests_of(fresh)]
    assert texts == ["http:// a.org", "is Rome", " ".join(FACTS[0])]
    assert stream_on(fresh).hparams.target_separator == SPACE
    old = {"prompt": "http://", "target": "a.org", "subject": None, "loc_prompt": None}  # as its journals have it
    assert request_from(old) == EditRequest("http://", "a.org", separator=SPACE)
    upstream = WISEHyperParams.from_preset("upstream", [LAYERS["llama"]]).to_dict()
    del upstream["target_separator"]
    assert settings_of(CallEntry("", upstream, [old], 1)).target_separator == SPACE


def requests_of(model: Any) -> list[EditRequest]:
    return [one.request for one in stream_on(model).held]


def test_the_default_is_auto() -> None:
    assert settings().target_separator == WISEHyperParams(inner_params=[LAYERS["llama"]]).target_separator == AUTO
