"""Where an edit's name stands, and where it is not finished yet."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from editing_helpers import settings
from hypothesis import given
from hypothesis import strategies as st
from test_consolidated import ON
from test_requests import Characters

from easyedit_wise.easyedit.apply import apply_wise_to_model, stream_of
from easyedit_wise.editing import stream as stream_module
from easyedit_wise.editing.consolidated import with_irrelevant, with_trained
from easyedit_wise.editing.names import NameTokens, name_tokens, names_known
from easyedit_wise.editing.open_shard import OpenShard
from easyedit_wise.editing.recorder import plain_edits
from easyedit_wise.editing.requests import EditRequest, pair_batch
from easyedit_wise.editing.shards import settings_after
from easyedit_wise.editing.steepest import kernel, train_steepest
from easyedit_wise.least_squares import NormalEquations
from easyedit_wise.routing import LONG_TEXT
from easyedit_wise.tuner.memory import MemoryState
from easyedit_wise.tuner.model import find_wise_layers

CPU = torch.device("cpu")
NAMED = EditRequest("Who wrote Zürich 42 in Lyon?", "nobody", subject="Zürich 42")


class Pieces:
    """A tokenizer whose tokens are up to three letters or digits, with the space before them, or one other sign."""

    is_fast = True

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"offset_mapping": [found.span() for found in re.finditer(r" ?\w{1,3}| ?[^\w\s]", text)]}


def unfinished(text: str, subject: str | None) -> list[str]:
    offsets = Pieces()(text)["offset_mapping"]
    return [text[slice(*offsets[place])] for place in name_tokens(Pieces(), text, subject).unfinished]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Alexander Edler", [" Ale", " Edl"]),
        ("Edler", [" Edl"]),  # its "er" is the name's last
        ("Ann", []),
        ("HD 1809024", [" HD", " 180", "902"]),  # a number that goes on could go on otherwise
        ("U-270", [" U", "-"]),
        ("Jo (a+b)", [" Jo", " (", "a", "+", "b"]),  # no pattern
    ],
)
def test_the_beginnings_of_words_and_numbers_that_go_on(name: str, expected: list[str]) -> None:
    assert unfinished(f"Who is {name}", name) == expected


def test_wherever_the_name_stands_and_in_whatever_case() -> None:
    text = "edler is who? So is Edler"
    assert unfinished(text, "Edler") == ["edl", " Edl"]
    offsets = Pieces()(text)["offset_mapping"]
    own = [text[slice(*offsets[place])] for place in name_tokens(Pieces(), text, "Edler").own]
    assert own == ["edl", "er", " Edl", "er"]


@pytest.mark.parametrize("subject", [None, "", "Paris", "?"])
def test_where_nothing_is_unfinished(tok: Any, subject: str | None) -> None:
    assert unfinished("Who wrote Lyon?", subject) == []
    assert name_tokens(Characters(), "Who wrote Lyon?", "Lyon") == NameTokens()  # knows no offsets


@given(st.text("ab Zü42?", min_size=1, max_size=8).filter(str.strip), st.text("ab Zü42?", max_size=8))
def test_the_last_token_of_a_name_is_never_among_them(tok: Any, subject: str, before: str) -> None:
    text = before + subject
    found = name_tokens(tok, text, subject)
    assert found.unfinished == sorted(found.unfinished)
    assert set(found.unfinished) <= set(found.own)
    assert len(tok(text)["input_ids"]) - 1 not in found.unfinished


def test_a_batch_marks_them_in_every_context(tok: Any) -> None:
    texts = [NAMED.prompt, f"So. {NAMED.prompt}", "So. Zürich 42", "Nothing of it"]
    batch = pair_batch(tok, texts, NAMED.target, CPU, NAMED)
    assert batch.unfinished_mask is not None
    marked = [batch.input_ids[row][batch.unfinished_mask[row]] for row in range(4)]
    for row, text in enumerate(texts):
        ids = torch.tensor(tok(text)["input_ids"])
        assert torch.equal(marked[row], ids[name_tokens(tok, text, NAMED.subject).unfinished])
    assert [len(one) > 0 for one in marked] == [True, True, True, False]
    assert not (batch.unfinished_mask & ~batch.prompt_mask).any()
    unnamed = pair_batch(tok, texts, NAMED.target, CPU, replace(NAMED, subject=None))
    assert unnamed.unfinished_mask is None
    assert unnamed.beside_mask is None


def test_a_batch_marks_what_stands_beside_the_name_but_for_what_predicts_the_target(tok: Any) -> None:
    texts = [NAMED.prompt, f"So. {NAMED.prompt}", "So. Zürich 42", "Nothing of it"]
    batch = pair_batch(tok, texts, NAMED.target, CPU, NAMED)
    assert batch.beside_mask is not None
    for row, text in enumerate(texts[:3]):
        name, last = name_tokens(tok, text, NAMED.subject).own, len(tok(text)["input_ids"]) - 1
        expected = [place for place in range(last) if place not in name]
        first = int(batch.prompt_mask[row].nonzero()[0])
        assert (batch.beside_mask[row].nonzero().squeeze(-1) - first).tolist() == expected
    assert not batch.beside_mask[3].any()  # without the name nothing is known to be beside it


def test_a_long_text_is_known_by_more_than_its_name(tok: Any) -> None:
    def n_beside(n_words: int) -> int:
        request = EditRequest("Zürich" + " 7" * n_words, "nobody", subject="Zürich")
        assert len(tok(request.prompt)["input_ids"]) == n_name + 2 * n_words
        # Its contexts have more tokens, and are no longer texts for that.
        batch = pair_batch(tok, [f"So, so. {request.prompt}"], request.target, CPU, request)
        assert batch.beside_mask is not None
        assert batch.unfinished_mask is not None
        assert batch.unfinished_mask.any()
        return int(batch.beside_mask.sum())

    n_name = len(tok("Zürich")["input_ids"])
    most = (LONG_TEXT - 1 - n_name) // 2
    assert n_beside(most) > 2 * most  # but for the last one, and those of the prefix
    assert n_beside(most + 1) == 0


def test_each_is_quiet_with_the_weight_of_a_prompts_token_and_says_nothing(llama: Any, tok: Any) -> None:
    hparams = settings(
        **ON
        | {
            "unfinished_names": 0.5,
            "unfinished_names_after": 0,
            "mask_ratio": 1.0,
            "n_contexts": 1,
            "contexts_per_step": None,
        }
    )
    stream = stream_of(llama, tok, hparams)
    task = stream._tasks.task([NAMED], [None], [], OpenShard())
    (group,) = task.contexts
    assert 0 < int(group.unfinished.sum()) < len(group.activations)
    empty = NormalEquations.empty(torch.arange(stream.layer.in_features), stream.layer.out_features)
    quiet = with_irrelevant(empty, replace(task, about_others=None), [], hparams).quiet
    # 3 for a token of the plain prompt, .3 of that in another context, and half of either is asked for.
    weights = torch.where(group.row == 0, 1.5, 0.45)[group.unfinished]
    tokens = group.activations[group.unfinished]
    torch.testing.assert_close(quiet, (tokens * weights[:, None]).T @ tokens)

    recorded = plain_edits(group, [None], False)
    outputs = torch.ones(len(group.activations), stream.layer.out_features)
    said, (spoken,) = with_trained(empty, task, [outputs], recorded, hparams)
    assert not torch.equal(said.edits, with_trained(empty, task, [outputs], recorded, settings(**ON))[0].edits)
    assert int(group.beside.sum()) > 0
    where = ~group.unfinished & ~group.beside
    others = torch.where(group.in_prompt, 3.0, 1.0) * torch.where(group.row == 0, 1.0, 0.3)
    kept = group.activations[where]
    torch.testing.assert_close(said.edits, (kept * others[where, None]).T @ kept)
    torch.testing.assert_close(spoken.share, said.outputs)


def test_words_beside_the_name_are_not_trained_to_say_anything(llama: Any, tok: Any) -> None:
    """dW a of every token is then a combination of k_st over the other tokens t."""
    on = {"unfinished_names": 1.0, "unfinished_names_after": 0, "mask_ratio": 1.0, "n_iter": 3}
    hparams = settings(**ON | on | {"n_contexts": 1, "contexts_per_step": None})
    stream = stream_of(llama, tok, hparams)
    task = stream._tasks.task([NAMED], [None], [], OpenShard())
    (group,) = task.contexts
    empty = NormalEquations.empty(torch.arange(stream.layer.in_features), stream.layer.out_features)
    quiet = with_irrelevant(empty, task, [], hparams)
    rows = kernel(group.activations, quiet)[:, ~group.beside]
    assert rows.shape[1] < min(rows.shape[0], stream.layer.out_features)

    def not_of_them(weight: float) -> float:
        one = replace(hparams, unfinished_names=weight)
        (outputs,) = train_steepest(quiet, stream.layer.out_features, task, one, 0.1).outputs
        return float((outputs - rows @ torch.linalg.lstsq(rows, outputs).solution).norm() / outputs.norm())

    assert not_of_them(1.0) < 1e-4
    assert not_of_them(0.0) > 1e-2


def test_a_memory_is_not_active_at_the_beginning_of_a_name(llama: Any, tok: Any) -> None:
    """What tells its edit from others is the finished name: at its beginning any other may follow."""

    def share_at_the_beginning(weight: float) -> float:
        asked = [{"prompt": NAMED.prompt, "target_new": NAMED.target, "subject": NAMED.subject}]
        changes = {"unfinished_names": weight, "unfinished_names_after": 0, "mask_ratio": 1.0, "n_iter": 20}
        hparams = settings(**ON | changes)
        model, restore = apply_wise_to_model(llama, tok, asked, hparams)
        (layer,) = find_wise_layers(model).values()
        recorder = layer.edit_stream._recorder
        (state,) = layer.memories("default")
        tokens = recorder.scored([NAMED.prompt]).activations.float()
        scores = (tokens @ state.delta_weight.T).norm(dim=-1) / tokens.norm(dim=-1)
        places = name_tokens(tok, NAMED.prompt, NAMED.subject).unfinished
        restore()
        return float(scores[places].max() / scores.max())

    assert share_at_the_beginning(1.0) < 0.5 * share_at_the_beginning(0.0)


def test_only_memories_after_so_many_others(llama: Any, tok: Any) -> None:
    asked = [{"prompt": f"Zürich {n} is", "target_new": "Lyon", "subject": f"Zürich {n}"} for n in (142, 305, 761)]

    def memories(**changes: Any) -> list[MemoryState]:
        hparams = settings(**ON | {"save_freq": 1, "merge_freq": 1, "mask_ratio": 1.0} | changes)
        model, restore = apply_wise_to_model(llama, tok, asked, hparams)
        (layer,) = find_wise_layers(model).values()
        states = layer.memories("default")
        restore()
        return states

    without = memories(unfinished_names=0.0, unfinished_names_after=1)
    later = memories(unfinished_names=1.0, unfinished_names_after=1)
    assert torch.equal(later[0].delta_weight, without[0].delta_weight)
    assert later[0].epsilon == without[0].epsilon
    for place in (1, 2):
        assert not torch.equal(later[place].delta_weight, without[place].delta_weight)


def test_a_long_prompt_has_quiet_names_in_every_memory() -> None:
    hparams = settings(**ON | {"unfinished_names": 0.5, "unfinished_names_after": 2})
    found = {
        (n_earlier, n_tokens): settings_after(hparams, n_earlier, n_tokens).unfinished_names
        for n_earlier in (1, 2)
        for n_tokens in (LONG_TEXT - 1, LONG_TEXT)
    }
    assert found == {(1, LONG_TEXT - 1): 0.0, (1, LONG_TEXT): 0.5, (2, LONG_TEXT - 1): 0.5, (2, LONG_TEXT): 0.5}


def test_the_shortest_prompt_of_a_batch_decides_whether_names_are_quiet(
    llama: Any, tok: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(stream_module, "settings_after", lambda hparams, _, n: seen.append(n) or hparams)
    asked = [{"prompt": prompt, "target_new": "Lyon"} for prompt in ("Zürich is", "Zürich is a town in the north of")]
    apply_wise_to_model(llama, tok, asked, settings(**ON | {"batch_size": 2, "n_iter": 1}))
    assert seen == [len(tok("Zürich is")["input_ids"])]


def test_edits_that_do_not_say_what_they_are_about_are_as_without_it(llama: Any, tok: Any) -> None:
    def memories(weight: float) -> list[MemoryState]:
        asked = [{"prompt": f"Zürich {n} is", "target_new": "Lyon"} for n in (142, 305, 761)]
        changes = {"unfinished_names": weight, "unfinished_names_after": 0, "mask_ratio": 1.0, "n_iter": 4}
        changes |= {"save_freq": 1, "merge_freq": 1}
        model, restore = apply_wise_to_model(llama, tok, asked, settings(**ON | changes))
        (layer,) = find_wise_layers(model).values()
        states = layer.memories("default")
        restore()
        return states

    on, off = memories(1.0), memories(0.0)
    assert len(on) == 3
    for one, other in zip(on, off, strict=True):
        assert torch.equal(one.delta_weight, other.delta_weight)
        assert one.epsilon == other.epsilon  # as strict as any: it is as loud on names as any


def test_whether_names_are_known(tok: Any) -> None:
    assert names_known(tok, ["Zürich", "Lyon"])
    assert not names_known(tok, ["Zürich", None])
    assert not names_known(Characters(), ["Zürich"])  # knows no offsets


@pytest.mark.parametrize("value", [-1, 0.5, True, None])
def test_a_number_of_memories_out_of_range(value: Any) -> None:
    with pytest.raises(ValueError, match=r"unfinished_names_after is .*whole number"):
        settings(**ON | {"unfinished_names_after": value})


@pytest.mark.parametrize("value", [-1.0, float("nan"), "much", True])
def test_a_weight_out_of_range(value: Any) -> None:
    with pytest.raises(ValueError, match=r"unfinished_names is .*at least 0"):
        settings(**ON | {"unfinished_names": value})


def test_without_consolidation_there_is_nothing_to_be_quiet_in() -> None:
    with pytest.raises(ValueError, match=r"unfinished_names is 1\.0 without consolidation"):
        settings(unfinished_names=1.0)
