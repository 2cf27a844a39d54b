"""Steps that do not depend on the size of the loss, their schedule, and their unit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import LAYERS
from editing_helpers import FACTS, layer_input, settings
from torch import Tensor

from easyedit_wise.data import neutral_prompts
from easyedit_wise.easyedit.apply import stream_of
from easyedit_wise.editing.layer_units import LayerUnits
from easyedit_wise.editing.optimizers import Lion, optimizer_for
from easyedit_wise.editing.requests import EditRequest

EDITS = [EditRequest(prompt, target) for prompt, target in FACTS]


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, requires_grad=True)


def test_lion_by_hand() -> None:
    theta = leaf(1.0, 1.0, 1.0)
    optimizer = Lion([theta], lr=0.1, betas=(0.5, 0.75))
    theta.grad = torch.tensor([4.0, -8.0, 0.0])
    optimizer.step()
    assert theta.tolist() == pytest.approx([0.9, 1.1, 1.0])  # the sign only; m = g / 4 = (1, -2, 0)
    theta.grad = torch.tensor([-0.5, 4.0, 1.0])
    optimizer.step()  # directions m / 2 + g / 2 = (0.25, 1, 0.5); m = 3/4 m + 1/4 g = (0.625, -0.5, 0.25)
    assert theta.tolist() == pytest.approx([0.8, 1.0, 0.9])
    assert optimizer.state[theta]["momentum"].tolist() == pytest.approx([0.625, -0.5, 0.25])


def test_lion_decays_and_skips_what_has_no_gradient() -> None:
    decayed, left = leaf(2.0), leaf(3.0)
    optimizer = Lion([decayed, left], lr=0.1, weight_decay=0.5)
    decayed.grad = torch.zeros(1)
    optimizer.step()
    assert decayed.item() == pytest.approx(2.0 * 0.95)
    assert left.item() == 3.0
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)


def test_the_schedule_ends_where_it_should() -> None:
    optimizer, schedule = optimizer_for(leaf(0.0), settings(edit_lr=0.4, lr_end=0.25, n_iter=4))
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])
    optimizer, _ = optimizer_for(leaf(0.0), settings(edit_lr=0.4, n_iter=1, lr_end=0.25))
    assert optimizer.param_groups[0]["lr"] == 0.4


def test_units_by_hand() -> None:
    # Outputs (3, 4) and (0, 15): norms 5 and 15, mean 10. Inputs |a|_1 = 6 and 2, mean 4.
    units = LayerUnits.of(torch.tensor([[-1.0, 5.0], [2.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 15.0]]))
    assert units == LayerUnits(10.0, 4.0, 2)
    assert units.score == pytest.approx(10 / 64)
    # A component has the size 10 / sqrt(2); a step eta of rho of the entries changes it by eta * 0.5 * 4.
    assert units.step(0.2, rho=0.5) == pytest.approx(0.2 * (10 / 2**0.5) / 2)
    assert LayerUnits(1.0, 0.0, 1).step(0.1, 0.5) > 0  # a dead layer is no division by zero


@pytest.mark.parametrize("optimizer", ["adam", "lion"])
def test_in_layer_units_a_rescaled_layer_trains_the_same(make_model: Any, tok: Any, optimizer: str) -> None:
    """W_v scaled by 8 and what reads its output by 1/8: the same model, in other units."""
    hparams = settings(
        optimizer=optimizer, layer_units=True, edit_lr=0.05, lr_end=0.5, n_iter=6, norm_constraint=None,
        alpha=5.0, beta=20.0, gamma=10.0, rehearsal=0.1,
    )  # fmt: skip
    losses, epsilons, hidden = [], [], []
    for scale in (1.0, 8.0):
        model = make_model("llama")
        with torch.no_grad():
            # The layer's output goes into the residual stream: only a scaled copy of it is read.
            model.model.layers[1].mlp.down_proj.weight.mul_(scale)
            model.model.layers[1].mlp.register_forward_hook(lambda module, args, output, s=scale: output / s)
        stream = stream_of(model, tok, hparams)
        outcomes = stream.apply(EDITS[:2])
        losses.append([value for outcome in outcomes for value in outcome.losses])
        epsilons.append(stream.layer.memories("default")[0].epsilon)
        hidden.append(stream.layer.memories("default")[0].delta_weight)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert epsilons[1] == pytest.approx(8 * epsilons[0], rel=1e-2)
    torch.testing.assert_close(hidden[1] / 8, hidden[0], rtol=1e-2, atol=1e-4)
    absolute = replace(hparams, layer_units=False)
    first = stream_of(make_model("llama"), tok, absolute).apply(EDITS[:1])[0]
    assert first.losses != pytest.approx(losses[0][: len(first.losses)], rel=1e-3)


def test_the_units_are_those_of_the_neutral_prompts(make_model: Any, tok: Any) -> None:
    base = make_model("llama")
    units = stream_of(make_model("llama"), tok, settings())._recorder.units()
    tokens = torch.cat([layer_input(base, tok, LAYERS["llama"], prompt) for prompt in neutral_prompts()])
    output = base.model.layers[1].mlp.down_proj(tokens).detach()
    assert units.output_norm == pytest.approx(float(output.norm(dim=-1).mean()), rel=1e-4)
    assert units.input_norm == pytest.approx(float(tokens.abs().sum(dim=-1).mean()), rel=1e-4)
    assert units.d_out == 32


@pytest.mark.parametrize("lr_end", [0.0, -0.1, 1.5, True, "a"])
def test_an_end_that_is_none(lr_end: Any) -> None:
    with pytest.raises(ValueError, match=r"lr_end is .* outside"):
        settings(lr_end=lr_end)
