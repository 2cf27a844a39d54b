"""The losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor

from easyedit_wise.losses import edit_loss, rehearsal_loss, replay_loss, routing_margin_loss, upstream_margin_loss

SCORES = st.lists(st.floats(min_value=0.0, max_value=40.0, width=32), min_size=1, max_size=6)

# Three positions, two tokens. Token losses: log 2 for equal logits; logits (0, log 3) give the
# probabilities 1/4 and 3/4, so target 1 costs log 4/3 and target 0 costs log 4.
LOGITS = tensor([[0.0, 0.0], [0.0, math.log(3.0)], [0.0, math.log(3.0)]])
TARGETS = tensor([0, 1, 0])
LOG2, LOG43, LOG4 = math.log(2.0), math.log(4.0 / 3.0), math.log(4.0)


def test_edit_loss_is_a_mean_over_tokens_then_over_sequences() -> None:
    # Sequence 0 has the first two positions, sequence 1 the third: ((log 2 + log 4/3) / 2 + log 4) / 2.
    loss = edit_loss(LOGITS, TARGETS, tensor([0, 0, 1]), tensor([True, False, True]))
    assert loss.item() == pytest.approx(((LOG2 + LOG43) / 2 + LOG4) / 2, abs=1e-6)


def test_edit_loss_with_a_heavier_first_token() -> None:
    # Weights 3 1 and 3: ((3 log 2 + log 4/3) / 4 + 3 log 4 / 3) / 2.
    loss = edit_loss(LOGITS, TARGETS, tensor([0, 0, 1]), tensor([True, False, True]), first_token_weight=3.0)
    assert loss.item() == pytest.approx(((3 * LOG2 + LOG43) / 4 + LOG4) / 2, abs=1e-6)


def test_edit_loss_does_not_depend_on_the_order_of_positions() -> None:
    order = tensor([2, 0, 1])
    ids, first = tensor([0, 0, 1]), tensor([True, False, True])
    shuffled = edit_loss(LOGITS[order], TARGETS[order], ids[order], first[order], 2.0)
    assert shuffled.item() == pytest.approx(edit_loss(LOGITS, TARGETS, ids, first, 2.0).item(), abs=1e-6)


def test_a_sequence_without_positions_does_not_count() -> None:
    # As sequences 0 and 1 above; nothing is known of sequence 1 here, and the third position is sequence 2's.
    loss = edit_loss(LOGITS, TARGETS, tensor([0, 0, 2]), tensor([True, False, True]))
    assert loss.item() == pytest.approx(((LOG2 + LOG43) / 2 + LOG4) / 2, abs=1e-6)


def test_edit_loss_is_computed_in_fp32() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    targets, ids = torch.arange(5), torch.zeros(5, dtype=torch.long)
    loss = edit_loss(logits, targets, ids, ids == 1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(F.cross_entropy(logits.float(), targets).item(), abs=1e-6)


def test_edit_loss_gradient_is_the_softmax_minus_the_target() -> None:
    logits = tensor([[0.0, math.log(3.0)]], requires_grad=True)
    edit_loss(logits, tensor([0]), tensor([0]), tensor([True])).backward()
    assert torch.allclose(logits.grad, tensor([[0.25 - 1.0, 0.75]]), atol=1e-6)


@given(st.floats(min_value=0.1, max_value=10.0))
@settings(max_examples=20, deadline=None)
def test_the_first_tokens_weight_is_relative(weight: float) -> None:
    """With one token in each sequence there is nothing to weigh it against."""
    ids, first = tensor([0, 1, 2]), tensor([True, True, True])
    weighed, plain = edit_loss(LOGITS, TARGETS, ids, first, weight), edit_loss(LOGITS, TARGETS, ids, first)
    assert weighed.item() == pytest.approx(plain.item(), rel=1e-5)


# -- Eq. 5 ----------------------------------------------------------------------------------------

ALPHA, BETA, GAMMA = 5.0, 20.0, 10.0
EDITS, IRRELEVANT = tensor([24.0, 14.0]), tensor([2.0, 8.0, 5.0])


def test_routing_margin_loss_by_hand() -> None:
    # irrelevant above 5: 0, 3, 0 -> 3 / 3 = 1
    # edits below 20: 0, 6 -> 3
    # gaps below 10, all 6 pairs: 24 - (2, 8, 5) = 22, 16, 19 -> 0 0 0; 14 - (2, 8, 5) = 12, 6, 9 -> 0 4 1: 5 / 6
    loss = routing_margin_loss(EDITS, IRRELEVANT, ALPHA, BETA, GAMMA)
    assert loss.item() == pytest.approx(1 + 3 + 5 / 6, abs=1e-6)


def test_upstream_margin_loss_averages_over_violations_only() -> None:
    # The same violations: 3; 6; (4 + 1) / 2.
    loss = upstream_margin_loss(EDITS, IRRELEVANT, ALPHA, BETA, GAMMA)
    assert loss.item() == pytest.approx(3 + 6 + 2.5, abs=1e-6)


@pytest.mark.parametrize("margin_loss", [routing_margin_loss, upstream_margin_loss])
def test_margin_losses_are_zero_and_flat_where_every_margin_holds(margin_loss) -> None:
    edits = tensor([30.0, 21.0], requires_grad=True)
    irrelevant = tensor([1.0, 4.0], requires_grad=True)
    loss = margin_loss(edits, irrelevant, ALPHA, BETA, GAMMA)
    assert loss.item() == 0
    loss.backward()
    assert not edits.grad.any()
    assert not irrelevant.grad.any()


@pytest.mark.parametrize("margin_loss", [routing_margin_loss, upstream_margin_loss])
def test_margin_losses_push_edits_up_and_irrelevant_prompts_down(margin_loss) -> None:
    edits, irrelevant = EDITS.clone().requires_grad_(), IRRELEVANT.clone().requires_grad_()
    margin_loss(edits, irrelevant, ALPHA, BETA, GAMMA).backward()
    assert edits.grad[1] < 0  # violates beta and gamma
    assert edits.grad[0] == 0  # violates nothing
    assert irrelevant.grad[1] > 0


@given(SCORES, SCORES)
@settings(max_examples=60, deadline=None)
def test_routing_margin_loss_is_the_definition(edits: list[float], irrelevant: list[float]) -> None:
    expected = (
        sum(max(0.0, score - ALPHA) for score in irrelevant) / len(irrelevant)
        + sum(max(0.0, BETA - score) for score in edits) / len(edits)
        + sum(max(0.0, GAMMA - (e - i)) for e in edits for i in irrelevant) / (len(edits) * len(irrelevant))
    )
    loss = routing_margin_loss(tensor(edits), tensor(irrelevant), ALPHA, BETA, GAMMA)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    # A mean over fewer samples of the same violations is never smaller.
    upstream = upstream_margin_loss(tensor(edits), tensor(irrelevant), ALPHA, BETA, GAMMA)
    assert upstream.item() >= loss.item() - 1e-3


def test_replay_loss_by_hand() -> None:
    # Above 5: 0, 2, 4 -> 6 / 3.
    assert replay_loss(tensor([5.0, 7.0, 9.0]), ALPHA).item() == 2.0
    assert replay_loss(tensor([1.0, 4.9]), ALPHA).item() == 0.0


def test_rehearsal_loss_by_hand() -> None:
    # dW - dW_0 = [[1, 0], [0, 2]]; a = (1, 1): (1, 2), squares 5; a = (3, 0): (3, 0), squares 9. Mean 7.
    delta_weight, reference = tensor([[2.0, 1.0], [1.0, 2.0]]), tensor([[1.0, 1.0], [1.0, 0.0]])
    activations = tensor([[1.0, 1.0], [3.0, 0.0]])
    product, before = activations @ delta_weight.T, activations @ reference.T
    assert rehearsal_loss(product, before, 2).item() == 7.0
    assert rehearsal_loss(product, before, 4).item() == 3.5  # two rows that stand for four tokens
    assert rehearsal_loss(before, before, 2).item() == 0.0


def test_rehearsal_loss_allows_what_earlier_tokens_do_not_see() -> None:
    """A change in directions that no earlier token has is free, in value and in gradient."""
    changed: Tensor = tensor([[0.0, 0.0, 5.0], [0.0, 0.0, -7.0]], requires_grad=True)
    loss = rehearsal_loss(tensor([[1.0, 2.0, 0.0]]) @ changed.T, torch.zeros(1, 2), 1)
    loss.backward()
    assert loss.item() == 0
    assert not changed.grad.any()
