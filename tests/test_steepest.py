"""Steepest descent in the least-squares norm: the kernel, the step, and what it trains to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from editing_helpers import only_layer, requests, settings
from torch import Tensor

from easyedit_wise.easyedit.apply import stream_of
from easyedit_wise.editing.open_shard import OpenShard
from easyedit_wise.editing.requests import EditRequest
from easyedit_wise.editing.steepest import SteepestOutcome, kernel, train_steepest
from easyedit_wise.editing.task import EditTask
from easyedit_wise.editing.trainer import EditDivergedError
from easyedit_wise.least_squares import NormalEquations

ON: dict[str, Any] = {
    "consolidation": 10.0,
    "optimizer": "steepest",
    "mask": "columns",
    "layer_units": True,
    "n_contexts": 3,
    "contexts_per_step": 2,
    "n_iter": 9,
    "lr_end": 0.1,
}


def test_the_kernel_by_hand() -> None:
    """K = diag(3, 1) + 0.05 * 2 I over columns 0 and 2 of three; a third column is not the shard's."""
    equations = NormalEquations.empty(torch.tensor([0, 2]), 1)
    equations = equations.silent_on(torch.tensor([[1.0, 9.0, 0.0]]), 3.0)
    equations = equations.silent_on(torch.tensor([[0.0, 9.0, 1.0]]), 1.0)
    tokens = torch.tensor([[1.0, 5.0, 0.0], [0.0, 5.0, 2.0], [1.0, 5.0, 1.0]])
    first, second = 1 / 3.1, 1 / 1.1
    expected = [[first, 0, first], [0, 4 * second, 2 * second], [first, 2 * second, first + second]]
    torch.testing.assert_close(kernel(tokens, equations), torch.tensor(expected))


def test_nothing_to_be_quiet_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="add some with silent_on"):
        kernel(torch.ones(1, 2), NormalEquations.empty(torch.arange(2), 1))


@pytest.fixture
def problem(llama: Any, tok: Any) -> tuple[EditTask, NormalEquations, Any]:
    """One edit of a tiny model, and the neutral prompts that it shall be quiet on."""
    hparams = settings(**ON)
    stream = stream_of(llama, tok, hparams)
    request = EditRequest.from_easyedit(requests(1)[0])
    task = stream._tasks.task([request], [None], [], OpenShard())
    layer = only_layer(llama)
    equations = NormalEquations.empty(torch.arange(layer.in_features), layer.out_features)
    return task, equations.silent_on(stream._recorder.neutral().activations.float(), 0.1), hparams


def trained(problem: tuple[EditTask, NormalEquations, Any], step: float, **changes: Any) -> SteepestOutcome:
    task, equations, _ = problem
    return train_steepest(equations, 32, task, settings(**ON | changes), step)


def test_the_first_step_changes_one_token_by_the_step_and_no_other_by_more(problem: Any) -> None:
    outputs = torch.cat(trained(problem, 0.7, n_iter=1).outputs)
    assert float(outputs.norm(dim=-1).max()) == pytest.approx(0.7, rel=1e-4)


def test_the_last_step_is_lr_end_of_the_first(problem: Any) -> None:
    n = len(problem[0].contexts) + 1  # the first group again
    before = torch.cat(trained(problem, 0.7, n_iter=n - 1, lr_end=1.0).outputs)
    after = torch.cat(trained(problem, 0.7, n_iter=n, lr_end=1.0).outputs)
    assert float((after - before).norm(dim=-1).max()) == pytest.approx(0.7, rel=1e-3)
    one, two = (torch.cat(trained(problem, 0.7, n_iter=k, lr_end=0.1).outputs) for k in (1, 2))
    assert float((two - one).norm(dim=-1).max()) == pytest.approx(0.07, rel=1e-3)


def test_the_loss_falls(problem: Any) -> None:
    outcome = trained(problem, 4.0, n_iter=18).losses
    groups = len(problem[0].contexts)
    assert sum(outcome.edit_losses[-groups:]) < 0.7 * sum(outcome.edit_losses[:groups])
    assert len(outcome.edit_scores) == problem[0].contexts[0].batch.input_ids.shape[0]


def test_what_it_trained_to_is_one_matrix_and_quiet(problem: Any) -> None:
    """All outputs come from one dW, and irrelevant tokens get less from it than from steps along the plain gradient."""
    task, equations, hparams = problem
    tokens = torch.cat([group.activations for group in task.contexts])
    plain = NormalEquations.empty(equations.columns, 32).silent_on(torch.eye(len(equations.columns)), 1.0)
    heard: list[float] = []
    for quiet in (equations, plain):
        outputs = torch.cat(train_steepest(quiet, 32, task, hparams, 0.5).outputs)
        delta_weight = torch.linalg.lstsq(tokens.double(), outputs.double(), driver="gelsd").solution.T.float()
        assert _relative(tokens @ delta_weight.T, outputs) < 1e-3
        heard.append(float(((delta_weight @ equations.quiet) * delta_weight).sum() / outputs.square().sum()))
    assert heard[0] < 0.9 * heard[1]


def test_an_edit_that_overflows_is_an_error(problem: Any) -> None:
    with pytest.raises(EditDivergedError, match="Lower edit_lr"):
        trained(problem, 1e38)


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())
