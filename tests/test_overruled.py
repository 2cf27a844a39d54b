"""A prompt that is edited again: the last answer holds, in the same shard or in another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from editing_helpers import only_layer, settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_consolidated import ON
from torch import Tensor

from easyedit_wise.easyedit.apply import apply_wise_to_model
from easyedit_wise.editing.overruled import latest, overruled, standing, without_repeats
from easyedit_wise.editing.requests import EditRequest
from easyedit_wise.least_squares import NormalEquations
from easyedit_wise.persistence import load_edits, save_edits

PROMPT, OTHER = "The capital of France is", "The currency of India is"
FITTED: dict[str, Any] = {**ON, "consolidation": 1.0, "n_iter": 30, "edit_lr": 1.0}


def edits(*pairs: tuple[str, str]) -> list[EditRequest]:
    return [EditRequest(prompt, target) for prompt, target in pairs]


def asking(*targets: str) -> list[dict[str, Any]]:
    return [{"prompt": PROMPT, "target_new": target, "subject": "France"} for target in targets]


def loss(model: Any, tok: Any, target: str, prompt: str = PROMPT) -> float:
    ids = tok(f"{prompt} {target}", return_tensors="pt")["input_ids"]
    start = len(tok(prompt)["input_ids"])
    labels = ids.clone()
    labels[:, :start] = -100
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss)


def test_of_one_prompt_the_latest_edit_stands() -> None:
    first, other, again = edits((PROMPT, "Rome"), (OTHER, "yen"), (PROMPT, "Oslo"))
    assert latest([first, other, again]) == [again, other]
    assert standing([first, other], [again]) == [other]
    assert standing([first, other, again], edits(("Who?", "Ann"))) == [again, other]
    assert overruled([first, other, again], edits((PROMPT, "Bonn"))) == [first, again]
    assert without_repeats([first, other, again]) == [first, other]
    assert without_repeats([first, other]) == [first, other]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def test_what_was_to_be_quiet_can_be_taken_off_again() -> None:
    columns, some, others = torch.tensor([0, 2, 3]), random(5, 4, seed=0), random(9, 4, seed=1)
    without = NormalEquations.empty(columns, 2).silent_on(others, 1.0)
    taken_off = without.silent_on(some, 0.3).no_longer_silent_on(some, 0.3)
    torch.testing.assert_close(taken_off.quiet, without.quiet)


@hypothesis_settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), n_tokens=st.integers(1, 6), weight=st.floats(0.01, 1e4), scale=st.floats(1e-3, 1e3))
def test_no_more_is_taken_off_than_there_is(seed: int, n_tokens: int, weight: float, scale: float) -> None:
    """Tokens that were never added, as of edits that were not sampled: the problem can still be solved."""
    problem = NormalEquations.empty(torch.arange(4), 2).silent_on(random(3, 4, seed=seed), 1.0)
    never_added = scale * random(n_tokens, 4, seed=seed + 1)
    left = problem.no_longer_silent_on(never_added, weight)
    assert torch.isfinite(left.quiet_factor()).all()
    assert bool((left.quiet.diagonal() <= problem.quiet.diagonal() * (1 + 1e-5)).all())


def test_nothing_is_taken_off_for_tokens_that_the_columns_do_not_see() -> None:
    problem = NormalEquations.empty(torch.tensor([1]), 2).silent_on(torch.tensor([[0.0, 1.0]]), 1.0)
    assert torch.equal(problem.no_longer_silent_on(torch.tensor([[3.0, 0.0]]), 1.0).quiet, problem.quiet)


@pytest.mark.parametrize("one_call", [True, False])
@pytest.mark.parametrize("changes", [{}, {"save_freq": 1, "merge_freq": 1}, {"batch_size": 3}])
def test_the_last_answer_holds(llama: Any, tok: Any, changes: dict[str, Any], one_call: bool) -> None:
    targets, hparams = ("Rome", "Oslo", "Madrid"), settings(**FITTED | changes)
    for some in [asking(*targets)] if one_call else [asking(target) for target in targets]:
        apply_wise_to_model(llama, tok, some, hparams)
    losses = [loss(llama, tok, target) for target in targets]
    assert losses[-1] < min(losses[:-1]) * (0.5 if len(only_layer(llama).memories("default")) == 1 else 1.0)


def test_the_shards_other_edits_stay(llama: Any, tok: Any) -> None:
    hparams = settings(**FITTED | {"save_freq": 9, "merge_freq": 9, "mask_ratio": 1.0})
    other = {"prompt": OTHER, "target_new": "Lyon", "subject": "India"}
    unedited = loss(llama, tok, "Lyon", OTHER)
    apply_wise_to_model(llama, tok, [*asking("Rome"), other], hparams)
    before = loss(llama, tok, "Lyon", OTHER)
    apply_wise_to_model(llama, tok, asking("Oslo"), hparams)
    assert len(only_layer(llama).memories("default")) == 1
    assert loss(llama, tok, "Oslo") < 0.5 * loss(llama, tok, "Rome")
    assert loss(llama, tok, "Lyon", OTHER) < before + 0.1 * (unedited - before)


def test_the_last_answer_holds_after_loading(llama: Any, tok: Any, tmp_path: Path, make_model: Any) -> None:
    hparams = settings(**FITTED)
    apply_wise_to_model(llama, tok, asking("Rome"), hparams)
    loaded = make_model("llama")
    load_edits(loaded, save_edits(llama, tmp_path / "edits"))
    apply_wise_to_model(loaded, tok, asking("Oslo"), hparams)
    assert loss(loaded, tok, "Oslo") < 0.5 * loss(loaded, tok, "Rome")
