"""The masked entries as a vector: the same products and gradients as a dense matrix under a mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import easyedit_wise.editing.subspace as subspace_module
from easyedit_wise.editing.subspace import Subspace


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand() -> None:
    # dW = [[1, 2], [3, 4]], trained at (0, 1) and (1, 0). a = (1, 10): dW a = (21, 43).
    delta_weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    subspace = Subspace(delta_weight, torch.tensor([[False, True], [True, False]]))
    assert subspace.theta.tolist() == [2.0, 3.0]
    (product,) = subspace.products(torch.tensor([[1.0, 10.0]]))
    assert product.tolist() == [[21.0, 43.0]]
    # d(y_0 + 5 y_1): entry (0, 1) sees a_1 = 10, entry (1, 0) sees 5 a_0 = 5.
    (gradient,) = torch.autograd.grad((product * torch.tensor([1.0, 5.0])).sum(), subspace.theta)
    assert gradient.tolist() == [10.0, 5.0]
    with torch.no_grad():
        subspace.theta.copy_(torch.tensor([-1.0, -2.0]))
    assert torch.equal(subspace.matrix, delta_weight)  # until it is written
    subspace.write()
    assert subspace.matrix.tolist() == [[1.0, -1.0], [-2.0, 4.0]]
    assert delta_weight.tolist() == [[1.0, 2.0], [3.0, 4.0]]


@settings(max_examples=60, deadline=None)
@given(
    d_out=st.integers(1, 9),
    d_in=st.integers(1, 9),
    rho=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    rows=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    block=st.sampled_from([1, 7, 20, 1 << 20]),
    seed=st.integers(0, 99),
)
def test_equals_a_dense_matrix_under_a_mask(
    d_out: int, d_in: int, rho: float, rows: list[int], block: int, seed: int
) -> None:
    before, subspace_module._BLOCK = subspace_module._BLOCK, block
    try:
        delta_weight, mask = random(d_out, d_in, seed=seed), torch.rand(d_out, d_in) < rho
        activations = [random(n, d_in, seed=seed + index) for index, n in enumerate(rows)]
        subspace = Subspace(delta_weight, mask)
        dense = delta_weight.clone().requires_grad_(True)
        products, expected = subspace.products(*activations), [F.linear(a, dense) for a in activations]
        for product, wanted in zip(products, expected, strict=True):
            torch.testing.assert_close(product, wanted)
        (gradient,) = torch.autograd.grad(sum(p.square().sum() for p in products), subspace.theta)
        (full,) = torch.autograd.grad(sum(p.square().sum() for p in expected), dense)
        torch.testing.assert_close(gradient, full[mask], rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            subspace.theta.add_(1.0)
        subspace.write()
        assert torch.equal(subspace.matrix, torch.where(mask, delta_weight + 1.0, delta_weight))
    finally:
        subspace_module._BLOCK = before


def test_a_product_that_nothing_reads_adds_no_gradient() -> None:
    subspace = Subspace(random(3, 4), torch.ones(3, 4, dtype=torch.bool))
    a, b = random(2, 4, seed=1), random(5, 4, seed=2)
    used, _ = subspace.products(a, b)
    (gradient,) = torch.autograd.grad(used.sum(), subspace.theta)
    torch.testing.assert_close(gradient.view(3, 4), a.sum(dim=0).expand(3, 4))


def test_the_gradient_is_dense_for_one_block_of_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # What this file is for: no second matrix, not even for a moment.
    monkeypatch.setattr(subspace_module, "_BLOCK", 64 * 10)
    sizes: list[int] = []
    plain = torch.index_select

    def spy(values: Tensor, *args: object, **kwargs: object) -> Tensor:
        sizes.append(values.numel())
        return plain(values, *args, **kwargs)  # type: ignore[call-overload, no-any-return]

    subspace = Subspace(random(50, 64), torch.rand(50, 64) < 0.2)
    monkeypatch.setattr(torch, "index_select", spy)
    (product,) = subspace.products(random(3, 64))
    torch.autograd.grad(product.sum(), subspace.theta)
    assert sizes == [640] * 5
