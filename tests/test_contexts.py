"""The prefix augmentation."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from editing_helpers import SpyTokenizer, requests, settings

from easyedit_wise import apply_wise_to_model
from easyedit_wise.editing.contexts import context_groups, generate_prefixes
from easyedit_wise.wording import as_chat

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("n_contexts", "length"), [(4, 6), (1, 1), (10, 3)])
def test_number_and_length(llama: Any, tok: Any, n_contexts: int, length: int) -> None:
    spy = SpyTokenizer(tok)
    prefixes = generate_prefixes(llama, spy, n_contexts, length, seeded(0))
    assert len(prefixes) == n_contexts
    assert all(prefixes)
    # Blank texts are decoded a second time, by their last token only.
    tokens = [ids for ids in spy.decoded if len(ids) == length][:n_contexts]
    assert len(tokens) == n_contexts
    assert not {token for ids in tokens for token in ids} & set(tok.all_special_ids)


def test_none_are_made_without_calling_the_model(tok: Any) -> None:
    def never(**kwargs: Any) -> None:
        raise AssertionError

    assert generate_prefixes(never, tok, 0, 10, seeded(0)) == []  # type: ignore[arg-type]  # no model at all


def test_the_generator_alone_decides(any_model: tuple[Any, str], tok: Any) -> None:
    model, _ = any_model
    first = generate_prefixes(model, tok, 4, 5, seeded(1))
    torch.manual_seed(99)
    assert generate_prefixes(model, tok, 4, 5, seeded(1)) == first
    assert generate_prefixes(model, tok, 4, 5, seeded(2)) != first
    assert len(set(first)) > 1  # the contexts of one edit differ from each other


def test_the_global_generators_stay_where_they_are(llama: Any, tok: Any) -> None:
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    generate_prefixes(llama, tok, 3, 4, seeded(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before[1:]


@torch.no_grad()
def test_they_come_from_the_model(llama: Any, tok: Any) -> None:
    # Among one candidate there is nothing to draw: it is the model's own greedy continuation of nothing.
    spy = SpyTokenizer(tok)
    generate_prefixes(llama, spy, 2, 5, seeded(0), top_k=1)
    ids = torch.tensor([[tok.bos_token_id]])
    for _ in range(5):
        logits = llama(input_ids=ids).logits[0, -1]
        logits[tok.all_special_ids] = -torch.inf
        ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
    assert spy.decoded[:2] == [ids[0, 1:].tolist()] * 2


def test_special_tokens_are_never_sampled(llama: Any, tok: Any) -> None:
    # This model would like to say nothing else.
    llama.lm_head.register_forward_hook(
        lambda module, args, output: output.index_add(
            -1, torch.tensor(tok.all_special_ids), torch.full((*output.shape[:-1], len(tok.all_special_ids)), 100.0)
        )
    )
    spy = SpyTokenizer(tok)
    assert all(generate_prefixes(llama, spy, 3, 4, seeded(0)))
    assert not {token for ids in spy.decoded for token in ids} & set(tok.all_special_ids)


def test_a_tokenizer_without_bos_and_eos(llama: Any, tok: Any) -> None:
    class Bare(SpyTokenizer):
        bos_token_id = eos_token_id = None
        all_special_ids: tuple[int, ...] = ()

    assert len(generate_prefixes(llama, Bare(tok), 2, 3, seeded(0))) == 2


def test_a_stream_makes_them_once(llama: Any, tok: Any) -> None:
    spy = SpyTokenizer(tok)
    hparams = settings(n_contexts=2, context_length=3)
    apply_wise_to_model(llama, spy, requests(3), hparams)
    made = list(spy.decoded)
    assert len([ids for ids in made if len(ids) == 3]) == 2
    apply_wise_to_model(llama, spy, requests(1), hparams)
    assert spy.decoded == made


def test_a_stream_with_other_settings_makes_others(llama: Any, tok: Any) -> None:
    spy = SpyTokenizer(tok)
    apply_wise_to_model(llama, spy, requests(1), settings(n_contexts=2, context_length=3))
    apply_wise_to_model(llama, spy, requests(1), settings(n_contexts=4, context_length=5))
    assert len([ids for ids in spy.decoded if len(ids) == 5]) == 4


def test_two_models_have_contexts_of_their_own(make_model: Any, tok: Any) -> None:
    # EasyEdit keeps them in a module global: the second model of a process got the first one's.
    made = []
    for seed in (0, 1):
        spy = SpyTokenizer(tok)
        apply_wise_to_model(make_model("llama", seed=seed), spy, requests(1), settings(n_contexts=3, context_length=4))
        made.append(spy.decoded)
    assert all(made)
    assert made[0] != made[1]


# -- groups ---------------------------------------------------------------------------------------

PREFIXES = ["p1", "p2", "p3", "p4", "p5"]


def test_one_group_of_all() -> None:
    expected = [["x", "p1. x", "p2. x", "p3. x", "p4. x", "p5. x"]]
    assert context_groups("x", PREFIXES) == expected
    assert context_groups("x", PREFIXES, 6) == expected
    assert context_groups("x", PREFIXES, 100) == expected


@pytest.mark.parametrize(("size", "sizes"), [(2, [2] * 5), (3, [3, 3, 2]), (4, [4, 3]), (5, [5, 2])])
def test_groups_share_the_plain_prompt_and_split_the_rest(size: int, sizes: list[int]) -> None:
    groups = context_groups("x", PREFIXES, size)
    assert [len(group) for group in groups] == sizes
    assert all(group[0] == "x" for group in groups)
    assert [text for group in groups for text in group[1:]] == [f"{prefix}. x" for prefix in PREFIXES]


def test_groups_of_one_take_turns() -> None:
    assert context_groups("x", ["p", "q"], 1) == [["x"], ["p. x"], ["q. x"]]


@pytest.mark.parametrize("size", [None, 1, 4])
def test_no_prefixes_leave_the_plain_prompt(size: int | None) -> None:
    assert context_groups("x", [], size) == [["x"]]


# -- chats ----------------------------------------------------------------------------------------


def test_as_chat(tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tok, "chat_template", TEMPLATE)
    assert as_chat(tok, "Hello") == "<user>Hello<a>"


def test_as_chat_needs_a_template(tok: Any) -> None:
    with pytest.raises(ValueError, match=r"use_chat_template is on, .*no chat template: switch it off"):
        as_chat(tok, "Hello")


def test_every_text_of_an_edit_is_a_chat(llama: Any, tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tok, "chat_template", TEMPLATE)
    spy = SpyTokenizer(tok)
    apply_wise_to_model(llama, spy, requests(2, loc_prompt="Oslo is"), settings(use_chat_template=True, n_contexts=2))
    assert "<user>The capital of France is<a>" in spy.encoded
    assert "<user>Oslo is<a>" in spy.encoded
    assert all(
        text.startswith("<user>") and text.removesuffix(" Rome").removesuffix(" the euro").endswith("<a>")
        for text in spy.encoded
    )


def test_an_edit_without_the_template_it_needs_changes_nothing(llama: Any, tok: Any) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        apply_wise_to_model(llama, tok, requests(1), settings(use_chat_template=True))
    assert not hasattr(llama, "peft_config")
