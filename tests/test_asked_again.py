"""How often a memory's problem is asked for what its edits lack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from editing_helpers import only_layer, settings
from hypothesis import given
from hypothesis import strategies as st
from test_consolidated import ON, about
from torch import Tensor

from easyedit_wise.easyedit.apply import apply_wise_to_model
from easyedit_wise.editing import asked_again as asked_again_module
from easyedit_wise.editing.asked_again import fewest_needed, write_what_is_needed
from easyedit_wise.editing.open_shard import OpenShard
from easyedit_wise.least_squares import NormalEquations


def test_the_fewest_times_that_the_edits_need_by_hand() -> None:
    losses = torch.tensor([[0.4, 0.2], [0.1, 0.0118], [0.1, 0.00], [0.09, 0.00]])  # means .3, .0559, .05, .045
    assert fewest_needed(losses, (1, 2, 4, 8)) == 4
    assert fewest_needed(losses[:3], (1, 2, 4)) == 2
    # One that is lost however often it is asked for has no say, whatever its loss, nor has one that overflows.
    for lost in ([5.0, 9.0, 40.0, 4.0], [float("nan"), 4.0, 8.0, 5.0]):
        assert fewest_needed(torch.cat([losses, torch.tensor(lost)[:, None]], dim=1), (1, 2, 4, 8)) == 2
    assert fewest_needed(torch.zeros(2, 3), (1, 2)) == 1
    with pytest.raises(ValueError, match="at least one time and one edit"):
        fewest_needed(torch.zeros(2, 0), (1, 2))


@given(
    rows=st.lists(st.lists(st.floats(0.0, 5.0), min_size=3, max_size=3), min_size=1, max_size=5),
    raised=st.floats(0.0, 5.0),
)
def test_a_loss_that_rises_with_asking_is_never_asked_for_more_often(rows: list[list[float]], raised: float) -> None:
    losses, times = torch.tensor(rows, dtype=torch.float64).T, (1, 2, 4)
    chosen = fewest_needed(losses, times)
    worse = losses + raised * torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)[:, None]
    assert fewest_needed(worse, times) <= chosen


@pytest.mark.parametrize(
    ("enough", "limit", "tried", "kept"),
    [
        (0.0, 8, [1], 1),  # nothing is lacking
        (3.0, 8, [1, 2, 4], 4),  # until it is said
        (5.0, 6, [1, 2, 4, 6], 6),  # the limit need not be a power of two
        (100.0, 8, [1, 2, 4, 8], 1),  # no use
        (100.0, 1, [], 1),  # never looked at
        (100.0, 0, [], 1),
    ],
)
def test_a_shard_is_asked_until_its_edits_are_said(
    enough: float, limit: int, tried: list[int], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that shall say 1 and be quiet, too: after ``times`` times 1 - q^(times + 1) of it is said."""
    token = torch.eye(1)
    problem = NormalEquations.empty(torch.arange(1), 1).silent_on(token, 1.0).saying(token, token, torch.ones(1))
    shares = {times: float(problem.solution(feedback=times)) for times in (1, 2, 4, 6, 8)}
    seen: list[int] = []

    def losses(_answers: Any, delta_weight: Tensor, levels: Any, _hparams: Any) -> Tensor:
        assert levels == (1.0,)
        seen.append(min(shares, key=lambda times: abs(shares[times] - float(delta_weight))))
        return torch.tensor([[0.01, 0.0 if seen[-1] >= enough else 2.0]])

    monkeypatch.setattr(asked_again_module, "answer_losses", losses)
    delta_weight = torch.zeros(1, 1)
    shard = write_what_is_needed(
        OpenShard(equations=problem), delta_weight, [], settings(**ON | {"asked_again_limit": limit})
    )
    assert seen == tried
    assert float(delta_weight) == pytest.approx(shares[kept])
    assert shard.equations is problem


def test_more_of_a_shards_edits_is_said_where_they_lack_something(
    llama: Any, tok: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real losses of real edits: asked for to the limit, they are no larger, and dW is another."""
    for name, value in (("_LACKS", 0.0), ("_SLACK", 0.0), ("_LOST", 100.0)):
        monkeypatch.setattr(asked_again_module, name, value)
    found: dict[int, list[Tensor]] = {}
    losses = asked_again_module.answer_losses

    def listened(*args: Any) -> Tensor:
        found[limit].append(losses(*args))
        return found[limit][-1]

    monkeypatch.setattr(asked_again_module, "answer_losses", listened)
    written = {}
    for limit in (1, 4):
        found[limit] = []
        model, restore = apply_wise_to_model(llama, tok, about(2), settings(**ON | {"asked_again_limit": limit}))
        written[limit] = only_layer(model).memories("default")[0].delta_weight.clone()
        restore()
    assert found[1] == []
    assert [len(one[0]) for one in found[4]] == [1, 1, 1, 2, 2, 2]  # two edits, each asked for 1, 2 and 4 times
    assert found[4][-1].mean() < found[4][-3].mean()
    assert not torch.allclose(written[1], written[4])
