"""A side memory as a least-squares problem."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from easyedit_wise.least_squares import _RIDGE, NormalEquations


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand() -> None:
    # One column: dW = w y a / (w a^2 + v u^2 + ridge * v u^2) with a = 2, y = 3, w = 0.5, u = 1, v = 4.
    problem = NormalEquations.empty(torch.tensor([1]), d_out=1)
    problem = problem.saying(torch.tensor([[9.0, 2.0]]), torch.tensor([[3.0]]), torch.tensor([0.5]))
    problem = problem.silent_on(torch.tensor([[7.0, 1.0]]), weight=4.0)
    expected = 0.5 * 3 * 2 / (0.5 * 4 + 4 + _RIDGE * 4)
    torch.testing.assert_close(problem.solution(), torch.tensor([[expected]]))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(1, 6), d_out=st.integers(1, 4))
def test_no_other_matrix_fits_better(seed: int, n: int, d_out: int) -> None:
    columns = torch.randperm(8, generator=torch.Generator().manual_seed(seed))[:n]
    tokens, outputs = random(5, 8, seed=seed), random(5, d_out, seed=seed + 1)
    weights, silent = random(5, seed=seed + 2).abs() + 0.1, random(9, 8, seed=seed + 3)
    problem = NormalEquations.empty(columns, d_out).saying(tokens, outputs, weights).silent_on(silent, 0.3)
    ridge = _RIDGE * float((0.3 * silent[:, columns].square().sum(0)).mean())

    def loss(delta: Tensor) -> float:
        wrong = (tokens[:, columns] @ delta.T - outputs).square().sum(-1) * weights
        loud = 0.3 * (silent[:, columns] @ delta.T).square().sum()
        return float(wrong.sum() + loud + ridge * delta.square().sum())

    solution = problem.solution()
    for step in range(6):
        assert loss(solution) <= loss(solution + 0.01 * random(d_out, n, seed=seed + 10 + step)) + 1e-5


def test_feedback_by_hand() -> None:
    """One column, a = 1, y = 3, quiet side 1 without ridge to speak of: 3/2 first, then (3 + 3 - 3/2)/2."""
    problem = NormalEquations.empty(torch.tensor([0]), d_out=1)
    problem = problem.saying(torch.tensor([[1.0]]), torch.tensor([[3.0]]), torch.tensor([1.0]))
    problem = problem.silent_on(torch.tensor([[1.0]]), weight=1 / (1 + _RIDGE))
    torch.testing.assert_close(problem.solution(), torch.tensor([[1.5]]))
    torch.testing.assert_close(problem.solution(feedback=1), torch.tensor([[2.25]]))
    torch.testing.assert_close(problem.solution(feedback=40), torch.tensor([[3.0]]))


def test_more_tokens_take_no_more_memory_and_their_order_does_not_matter() -> None:
    def problem(parts: list[int]) -> NormalEquations:
        made = NormalEquations.empty(torch.arange(4), 3).silent_on(random(6, 4, seed=9), 1.0)
        for seed in parts:
            made = made.saying(random(5, 4, seed=seed), random(5, 3, seed=seed + 50), torch.ones(5))
        return made

    one, many, other = problem([1]), problem([1, 2, 3]), problem([3, 1, 2])
    assert [t.shape for t in (one.edits, one.outputs)] == [t.shape for t in (many.edits, many.outputs)]
    torch.testing.assert_close(many.solution(), other.solution())


def test_it_is_immutable() -> None:
    problem = NormalEquations.empty(torch.arange(3), 2).silent_on(torch.eye(3), 1.0)
    problem.saying(torch.ones(1, 3), torch.ones(1, 2), torch.ones(1))
    assert not problem.edits.any()
    assert not problem.outputs.any()
    assert not problem.solution().any()


def test_without_anything_to_be_quiet_on_there_is_no_scale() -> None:
    with pytest.raises(ValueError, match="no irrelevant tokens"):
        NormalEquations.empty(torch.arange(3), 2).solution()
