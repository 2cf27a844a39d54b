"""Thresholds of further memories, and of the first ones once there are many."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS
from editing_helpers import only_layer, settings
from test_consolidated import ON
from test_journal import closed, edited, memories

from easyedit_wise import calibration
from easyedit_wise.easyedit.apply import apply_wise_to_model, stream_of
from easyedit_wise.editing.recorded import EditScores
from easyedit_wise.editing.requests import EditRequest
from easyedit_wise.editing.scored import ScoredInputs
from easyedit_wise.editing.thresholds import stricter, threshold
from easyedit_wise.journal.forgetting import forget
from easyedit_wise.tuner.memory import LIVE, MERGED, MemoryState

EACH_ALONE = ON | {"save_freq": 1, "merge_freq": 1}
FIRST, SECOND = "Madrid", "Oslo"


def asked(n: int) -> list[dict[str, Any]]:
    return [{"prompt": f"The town number {i} is", "target_new": (FIRST, SECOND)[i % 2]} for i in range(11, 11 + n)]


def of(epsilon: float, weakest: float, stage: str = MERGED) -> MemoryState:
    mask = torch.ones(1, 1, dtype=torch.bool) if stage == LIVE else None
    return MemoryState(stage, torch.zeros(1, 1), mask, epsilon, 1, weakest)


@pytest.mark.parametrize(
    ("n_earlier", "of_the_gap"),
    [(0, 0.75), (1, 0.75 * 2**-0.4), (2, 0.75 * 3**-0.2), (31, 0.75 / 2)],  # quiet on names from the third on
)
def test_memories_that_are_quiet_on_unfinished_names_are_laxer(n_earlier: int, of_the_gap: float) -> None:
    neutral = ScoredInputs(torch.tensor([[2.0, 0.0], [0.5, 0.0]]), torch.eye(2).bool())
    changes = ON | {"unfinished_names": 1.0, "unfinished_names_after": 2, "epsilon_position": 0.25}
    hparams = settings(LAYERS["llama"], **changes | {"relative_scores": False})
    scores, eye = [EditScores(4.0, 7.0)], torch.eye(2)
    epsilon = threshold(scores, neutral, eye, hparams, n_earlier, names_are_known=True)
    assert epsilon == pytest.approx(4.0 - of_the_gap * (4.0 - 2.0))
    # One that cannot be quiet on names that it does not know is as strict as any.
    epsilon = threshold(scores, neutral, eye, hparams, n_earlier)
    assert epsilon == pytest.approx(4.0 - 0.75 * (1 + n_earlier) ** -0.4 * (4.0 - 2.0))


def test_the_first_memories_grow_stricter() -> None:
    states = [of(1.0, 3.0) for _ in range(14)]
    calibrated = settings(retrieve=True)
    assert stricter(states[:12], 11, calibrated) == states[:12]
    grown = stricter(states[:13], 12, calibrated)  # two fifths of the three beyond ten: as the second
    assert grown[0].epsilon == pytest.approx(3.0 - 2.0 * 2**-0.4)
    assert grown[1:] == states[1:13]
    assert stricter(states, 13, calibrated) == states  # they are already
    # An open shard is none of them yet, and what EasyEdit's and the paper's rule gave stays.
    assert stricter([*states[:12], of(1.0, 3.0, LIVE)], 11, calibrated)[:12] == states[:12]
    assert stricter(states, 12, settings(act_ratio=0.88, retrieve=True)) == states
    assert stricter(states, 12, settings(retrieve=False)) == states


@pytest.mark.parametrize(("answered", "side"), [(1.5, 1.5), (3.5, 3.0), (math.inf, 3.0)])
def test_no_memory_grows_stricter_than_its_edits_bear(answered: float, side: float) -> None:
    """With a long target behind it, a prompt that scored by its loudest token scores by its two loudest."""
    first = replace(of(1.0, 3.0), weakest_answered=answered)
    for n_memories in (13, 200):
        grown = stricter([first] * n_memories, 1, settings(retrieve=True))[0]
        was_of = {13: 2, 200: 77}[n_memories]
        assert grown.epsilon == pytest.approx(side - (side - 1.0) * was_of**-0.4)
        assert 1.0 < grown.epsilon < min(3.0, answered)
    lost = replace(of(1.0, 3.0), weakest_answered=0.8)  # already: it overlaps with unrelated prompts
    assert stricter([lost] * 20, 1, settings(retrieve=True))[0] == lost


def test_in_a_stream(llama: Any, tok: Any) -> None:
    stream = stream_of(llama, tok, settings(**EACH_ALONE))
    requests = [EditRequest.from_easyedit(one) for one in asked(13)]
    stream.apply(requests[:12])
    layer = only_layer(llama)
    before = layer.memories("default")
    stream.apply(requests[12:])
    after = layer.memories("default")
    assert before[0].epsilon < before[0].weakest_edit
    assert after[0].epsilon == pytest.approx(
        before[0].weakest_edit - (before[0].weakest_edit - before[0].epsilon) * 2**-0.4
    )
    assert after[0].epsilon > before[0].epsilon
    assert [one.epsilon for one in after[1:12]] == [one.epsilon for one in before[1:]]


def test_a_memory_that_is_made_again_is_as_strict_as_it_was(
    llama: Any, tok: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_FEW_MEMORIES", 1)
    changes = ON | {"save_freq": 2, "merge_freq": 2}
    closed(edited(llama, tok, tmp_path, asked(11), **changes))  # five memories, and one edit in an open shard
    model = copy.deepcopy(llama)
    forget(model, tok, tmp_path, 1, exactly=False)
    lone, _ = apply_wise_to_model(llama, tok, asked(2)[1:], settings(**changes), copy=True)
    stream = only_layer(lone).edit_stream
    stream.close_memory()
    (alone,) = only_layer(lone).memories("default")
    again = only_layer(model).memories("default")[0]
    assert torch.equal(again.delta_weight, alone.delta_weight)
    assert again.weakest_edit == alone.weakest_edit
    assert again.epsilon == pytest.approx(alone.weakest_edit - (alone.weakest_edit - alone.epsilon) * 2**-0.4)
    assert len(memories(model)) == 6
