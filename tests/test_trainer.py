"""One edit: what it may change, what it optimises, when it stops and how it fails."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build_model, build_tokenizer
from editing_helpers import settings
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor, nn

from easyedit_wise.editing.frozen_prefix import FrozenPrefix, layer_input_of
from easyedit_wise.editing.requests import EditRequest, TokenBatch, pair_batch, prompt_batch
from easyedit_wise.editing.scored import ScoredInputs
from easyedit_wise.editing.task import EditTask, RecordedContexts, Rehearsed, target_positions
from easyedit_wise.editing.trainer import EditDivergedError, EditOutcome, train_edit
from easyedit_wise.hparams import WISEHyperParams
from easyedit_wise.losses import routing_margin_loss, upstream_margin_loss
from easyedit_wise.sharding import random_mask

CPU = torch.device("cpu")
SHAPE = (32, 64)
PROMPTS = ["The capital of France is", "She said. The capital of France is", "is"]
IRRELEVANT = ["Water is made of", "Once upon a time there was a small town by the sea"]


class Edit:
    """A recorded edit on a tiny Llama, and its parts for computing things a second time."""

    def __init__(self) -> None:
        self.tok, self.model = build_tokenizer(), build_model("llama")
        self.model.requires_grad_(False)
        self.layer = self.model.model.layers[1].mlp.down_proj
        self.irrelevant = self.scored(IRRELEVANT)

    def contexts(self, prompts: list[str], target: str = "Rome by the sea") -> RecordedContexts:
        batch = pair_batch(self.tok, prompts, target, CPU)
        return RecordedContexts.of(batch, FrozenPrefix.record(self.model, self.layer, batch.model_inputs()))

    def scored(self, prompts: list[str]) -> ScoredInputs:
        batch = prompt_batch(self.tok, prompts, CPU)
        return ScoredInputs.from_padded(layer_input_of(self.model, self.layer, batch.model_inputs()), batch.prompt_mask)

    def task(self, *groups: list[str], **changes: Any) -> EditTask:
        return EditTask([self.contexts(group) for group in groups or (PROMPTS,)], self.irrelevant, **changes)


@pytest.fixture(scope="module")
def edit() -> Edit:
    return Edit()


ZERO = torch.zeros(SHAPE)
EVERYWHERE = torch.ones(SHAPE, dtype=torch.bool)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- what may change ------------------------------------------------------------------------------


@examples(max_examples=25, deadline=None)
@given(
    rho=st.sampled_from([0.01, 0.2, 0.5, 1.0]),
    optimizer=st.sampled_from(["sgd", "adam"]),
    weight_decay=st.sampled_from([0.0, 1e-5, 0.3]),
    norm_constraint=st.sampled_from([None, 0.01, 1.0]),
    seed=st.integers(0, 5),
    started=st.booleans(),
)
def test_nothing_outside_the_mask_ever_moves(
    rho: float, optimizer: str, weight_decay: float, norm_constraint: float | None, seed: int, started: bool
) -> None:
    edit = shared_edit()
    mask = random_mask(SHAPE, rho, seeded(seed))
    before = torch.randn(SHAPE, generator=seeded(seed)).mul_(0.05).mul_(mask) if started else ZERO.clone()
    given_delta = before.clone()
    hparams = settings(
        optimizer=optimizer, weight_decay=weight_decay, norm_constraint=norm_constraint, n_iter=3, edit_lr=0.1
    )
    outcome = train_edit(given_delta, mask, edit.task(), hparams)
    assert torch.equal(given_delta, before)
    after = outcome.delta_weight
    assert torch.count_nonzero(after[~mask]) == 0
    assert not torch.equal(after[mask], before[mask])
    if norm_constraint is not None:
        assert after.abs().max() <= norm_constraint
    assert not after.requires_grad
    assert len(outcome.losses) == len(outcome.edit_losses) == 3


def shared_edit(cache: list[Edit] = []) -> Edit:  # noqa: B006  # hypothesis and fixtures do not go together
    if not cache:
        cache.append(Edit())
    return cache[0]


@pytest.mark.parametrize("changes", [{"weight_decay": 0.3}, {"norm_constraint": 0.1}], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_not_even_entries_that_are_not_zero(edit: Edit, optimizer: str, changes: dict[str, Any]) -> None:
    # EasyEdit's fault 2: weight decay moved every entry outside the mask.
    mask = random_mask(SHAPE, 0.2, seeded())
    before = torch.randn(SHAPE, generator=seeded(1)).mul_(0.5)
    outcome = train_edit(before, mask, edit.task(), settings(optimizer=optimizer, n_iter=2, **changes))
    assert torch.equal(outcome.delta_weight[~mask], before[~mask])


def test_the_norm_constraint_is_what_holds_it_back(edit: Edit) -> None:
    free = train_edit(ZERO, EVERYWHERE, edit.task(), settings(norm_constraint=None, edit_lr=0.5))
    held = train_edit(ZERO, EVERYWHERE, edit.task(), settings(norm_constraint=0.03, edit_lr=0.5))
    assert free.delta_weight.abs().max() > 0.03
    assert held.delta_weight.abs().max() == pytest.approx(0.03)


def test_weight_decay_shrinks_inside_the_mask(edit: Edit) -> None:
    before = torch.full(SHAPE, 0.5)
    runs = [
        train_edit(
            before, EVERYWHERE, edit.task(), settings(optimizer="sgd", edit_lr=0.1, n_iter=1, weight_decay=decay)
        )
        for decay in (0.0, 0.5)
    ]
    torch.testing.assert_close(runs[0].delta_weight - runs[1].delta_weight, 0.1 * 0.5 * before)


def test_the_model_gets_no_gradients(edit: Edit) -> None:
    edit.model.requires_grad_(True)  # as after model.train() of somebody who fine-tunes beside editing
    try:
        train_edit(ZERO, EVERYWHERE, edit.task(), settings())
        assert all(parameter.grad is None for parameter in edit.model.parameters())
    finally:
        edit.model.requires_grad_(False)
        edit.model.zero_grad(set_to_none=True)


# -- what is optimised ----------------------------------------------------------------------------


def loss_by_definition(edit: Edit, delta_weight: Tensor, prompts: list[str], hparams: WISEHyperParams) -> Tensor:
    """L_edit + L_a with one full forward of each unpadded text, in plain loops over the equations."""
    edit_losses, edit_scores = [], []
    for prompt in prompts:
        batch = pair_batch(edit.tok, [prompt], "Rome by the sea", CPU)
        seen: list[Tensor] = []

        def add_side_memory(
            module: nn.Module, args: tuple[Tensor], output: Tensor, seen: list[Tensor] = seen
        ) -> Tensor:
            seen.append(F.linear(args[0], delta_weight))
            return output + seen[0]

        handle = edit.layer.register_forward_hook(add_side_memory)
        logits = edit.model(batch.input_ids).logits[0]
        handle.remove()
        n_prompt = int(batch.prompt_mask.sum())
        targets = batch.input_ids[0, n_prompt:]
        losses = F.cross_entropy(logits[n_prompt - 1 : -1], targets, reduction="none")
        weights = torch.ones(len(targets))
        weights[0] = hparams.first_token_weight
        edit_losses.append((losses * weights).sum() / weights.sum())
        edit_scores.append(
            torch.stack([(product.square().sum() + 1e-12).sqrt() for product in seen[0][0, :n_prompt]]).mean()
        )
    irrelevant = []
    for prompt in IRRELEVANT:
        ids = prompt_batch(edit.tok, [prompt], CPU)
        product = F.linear(layer_input_of(edit.model, edit.layer, ids.model_inputs()), delta_weight)[0]
        irrelevant.append((product.square().sum(dim=-1) + 1e-12).sqrt().mean())
    margin = sum(F.relu(score - hparams.alpha) for score in irrelevant) / len(irrelevant)
    margin = margin + sum(F.relu(hparams.beta - score) for score in edit_scores) / len(edit_scores)
    gaps = [F.relu(hparams.gamma - (e - i)) for e in edit_scores for i in irrelevant]
    return sum(edit_losses) / len(edit_losses) + margin + sum(gaps) / len(gaps)


@pytest.mark.parametrize("first_token_weight", [1.0, 3.0])
def test_the_first_step_is_eq_7_by_its_definition(edit: Edit, first_token_weight: float) -> None:
    hparams = settings(
        optimizer="sgd", edit_lr=0.2, n_iter=1, norm_constraint=None, first_token_weight=first_token_weight
    )
    mask = random_mask(SHAPE, 0.3, seeded())
    start = torch.randn(SHAPE, generator=seeded(1)).mul_(0.1).mul_(mask)
    outcome = train_edit(start, mask, edit.task(), hparams)
    leaf = start.clone().requires_grad_(True)
    loss = loss_by_definition(edit, leaf, PROMPTS, hparams)
    loss.backward()
    assert outcome.losses == pytest.approx([float(loss.detach())], rel=1e-5)
    torch.testing.assert_close(outcome.delta_weight, start - 0.2 * leaf.grad * mask, rtol=1e-4, atol=1e-6)


def test_the_edit_is_learned_and_scores_over_beta(edit: Edit) -> None:
    task = EditTask([edit.contexts(PROMPTS, "Rome")], edit.irrelevant)
    outcome = train_edit(ZERO, EVERYWHERE, task, settings(n_iter=30, edit_lr=0.1))
    assert outcome.edit_losses[-1] < 1.2
    assert outcome.edit_losses[0] > 6
    assert min(outcome.edit_scores) > settings().beta
    assert edit.irrelevant.scores(outcome.delta_weight, settings()).max() < min(outcome.edit_scores)


def test_a_fresh_shard_has_a_finite_gradient(edit: Edit) -> None:
    # All scores are exactly zero, where a plain norm has none.
    outcome = train_edit(ZERO, EVERYWHERE, edit.task(), settings(n_iter=2))
    assert outcome.delta_weight.isfinite().all()
    assert outcome.delta_weight.abs().max() > 0


def test_past_edits_and_earlier_ones_join_the_loss(edit: Edit) -> None:
    start = torch.randn(SHAPE, generator=seeded()).mul_(0.2)
    past, tokens = edit.scored(["She said that", "def add"]), torch.randn(5, 64, generator=seeded(2))
    earlier = Rehearsed(tokens, n_tokens=5)
    hparams = settings(n_iter=2, rehearsal=0.7)
    plain = train_edit(start, EVERYWHERE, edit.task(), hparams)
    replayed = train_edit(start, EVERYWHERE, edit.task(past=past), hparams)
    rehearsed = train_edit(start, EVERYWHERE, edit.task(earlier=earlier), hparams)
    hinge = F.relu(past.scores(start, hparams) - hparams.alpha).mean()
    assert hinge > 0
    assert replayed.losses[0] - plain.losses[0] == pytest.approx(float(hinge), rel=1e-4)
    # Rehearsal costs nothing before the first step, and then what the step did to earlier tokens.
    assert rehearsed.losses[0] == plain.losses[0]
    step = train_edit(start, EVERYWHERE, edit.task(), replace(hparams, n_iter=1)).delta_weight
    cost = 0.7 * ((step - start) @ tokens.T).square().sum(dim=0).mean()
    assert rehearsed.losses[1] - plain.losses[1] == pytest.approx(float(cost), rel=1e-3)
    unused = train_edit(start, EVERYWHERE, edit.task(earlier=earlier), replace(hparams, rehearsal=0.0))
    assert unused.losses == plain.losses


def test_eq_5_can_be_taken_over_violated_samples_only(edit: Edit) -> None:
    start = torch.randn(SHAPE, generator=seeded()).mul_(0.2)
    irrelevant, hparams = edit.irrelevant.scores(start, settings()), settings(n_iter=1, alpha=7.0, beta=9.0)
    assert irrelevant.min() < hparams.alpha < irrelevant.max()  # one of the two is violated
    plain = train_edit(start, EVERYWHERE, edit.task(), hparams)
    violated = train_edit(start, EVERYWHERE, edit.task(), replace(hparams, margin_over_violated=True))
    margins = [
        loss(torch.tensor(plain.edit_scores), irrelevant, hparams.alpha, hparams.beta, hparams.gamma)
        for loss in (routing_margin_loss, upstream_margin_loss)
    ]
    assert plain.losses[0] - plain.edit_losses[0] == pytest.approx(float(margins[0]), rel=1e-4)
    assert violated.losses[0] - violated.edit_losses[0] == pytest.approx(float(margins[1]), rel=1e-4)
    assert violated.losses != plain.losses


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_subject_routing(edit: Edit, pooling: str) -> None:
    request = EditRequest("The capital of France is", "Rome", subject="France")
    prompts = [request.prompt, f"She said. {request.prompt}"]
    batch = pair_batch(edit.tok, prompts, request.target, CPU, request)
    prefix = FrozenPrefix.record(edit.model, edit.layer, batch.model_inputs())
    padded = prefix.layer_input
    context = RecordedContexts.of(batch, prefix)
    task = EditTask([context], edit.irrelevant)
    start = torch.randn(SHAPE, generator=seeded()).mul_(0.2)
    hparams = settings(n_iter=1, pooling=pooling, subject_routing=True)
    tokens = F.linear(padded, start).norm(dim=-1)
    reduce = {"mean": torch.mean, "max": torch.max}[pooling]
    inside = torch.stack([reduce(tokens[row][batch.subject_mask[row]]) for row in range(2)])
    outside = torch.stack([reduce(tokens[row][batch.prompt_mask[row] & ~batch.subject_mask[row]]) for row in range(2)])
    whole = torch.stack([reduce(tokens[row][batch.prompt_mask[row]]) for row in range(2)])
    irrelevant = edit.irrelevant.scores(start, hparams)

    def margin(outcome: EditOutcome) -> float:
        return outcome.losses[0] - outcome.edit_losses[0]

    routed = train_edit(start, EVERYWHERE, task, hparams)
    expected = routing_margin_loss(inside, torch.cat([irrelevant, outside]), 0.1, 2.0, 1.0)
    assert routed.edit_scores == pytest.approx(inside.tolist(), rel=1e-4)
    assert margin(routed) == pytest.approx(float(expected), rel=1e-3)
    # Without the setting, or without a subject, the whole prompt counts and nothing of it is irrelevant.
    expected = routing_margin_loss(whole, irrelevant, 0.1, 2.0, 1.0)
    nameless = EditTask([replace(context, batch=replace(batch, subject_mask=None))], edit.irrelevant)
    for other in (
        train_edit(start, EVERYWHERE, task, replace(hparams, subject_routing=False)),
        train_edit(start, EVERYWHERE, nameless, hparams),
    ):
        assert other.edit_scores == pytest.approx(whole.tolist(), rel=1e-4)
        assert margin(other) == pytest.approx(float(expected), rel=1e-3)


def test_groups_of_contexts_take_turns(edit: Edit) -> None:
    groups = (["The capital of France is"], ["is"], ["She said that the capital of France is"])
    hparams = settings(n_iter=4, edit_lr=1e-7)
    alone = [train_edit(ZERO, EVERYWHERE, edit.task(group), hparams).edit_losses[0] for group in groups]
    assert len(set(alone)) == 3
    together = train_edit(ZERO, EVERYWHERE, edit.task(*groups), hparams)
    assert together.edit_losses == pytest.approx([*alone, alone[0]], rel=1e-4)


# -- which tokens are supervised ------------------------------------------------------------------


def test_target_positions(edit: Edit) -> None:
    batch = pair_batch(edit.tok, ["The capital of France is", "is"], "Rome by", CPU)
    (rows, columns), targets, is_first = target_positions(batch, settings())
    n_target = int(batch.target_mask[0].sum())
    assert rows.tolist() == [0] * n_target + [1] * n_target
    assert torch.equal(batch.input_ids[rows, columns + 1], targets)
    assert edit.tok.decode(targets[:n_target]).strip() == "Rome by"
    assert is_first.tolist() == ([True] + [False] * (n_target - 1)) * 2


def test_target_positions_of_prompt_and_label(edit: Edit) -> None:
    batch = pair_batch(edit.tok, ["The capital of France is", "is"], "Rome by", CPU)
    (rows, columns), targets, is_first = target_positions(batch, settings(objective_optimization="prompt_and_label"))
    for row in range(2):
        real = batch.input_ids[row][batch.attention_mask[row].bool()]
        assert targets[rows == row].tolist() == real[1:].tolist()  # all but the first token, which nothing predicts
        first = is_first[rows == row]
        assert int(first.sum()) == 1
        assert bool(first[int(batch.prompt_mask[row].sum()) - 1])
    assert batch.attention_mask[rows, columns].all()


def test_a_target_that_takes_the_whole_row() -> None:
    tokens = torch.tensor([[3, 4, 5]])
    mask = torch.ones_like(tokens).bool()
    batch = TokenBatch(tokens, mask.long(), ~mask, mask)
    (rows, columns), targets, is_first = target_positions(batch, settings())
    assert (rows.tolist(), columns.tolist(), targets.tolist()) == ([0, 0], [0, 1], [4, 5])
    assert not is_first.any()


# -- scores of stored prompts ---------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "max", "last"])
def test_stacked_prompts_score_as_they_do_alone(edit: Edit, pooling: str) -> None:
    delta = torch.randn(SHAPE, generator=seeded())
    hparams = settings(pooling=pooling)
    alone = [edit.scored([prompt]) for prompt in (*PROMPTS, *IRRELEVANT)]
    stacked = ScoredInputs.stack(alone)
    assert len(stacked) == 5
    expected = torch.cat([one.scores(delta, hparams) for one in alone])
    torch.testing.assert_close(stacked.scores(delta, hparams), expected, rtol=1e-5, atol=1e-6)
    picked = torch.tensor([4, 0])
    torch.testing.assert_close(stacked.select(picked).scores(delta, hparams), expected[picked], rtol=1e-5, atol=1e-6)


def test_a_stack_of_nothing() -> None:
    with pytest.raises(ValueError, match="no prompts to score"):
        ScoredInputs.stack([])


def test_easyedits_score_needs_the_base_output() -> None:
    product, base = torch.randn(2, 3, 4, generator=seeded()), torch.randn(2, 3, 4, generator=seeded(1))
    mask = torch.tensor([[True, True, True], [False, True, True]])
    inputs = ScoredInputs.from_padded(torch.zeros(2, 3, 1), mask, base)
    scores = inputs.pooled(product[mask], settings(score_activation="silu"))
    by_hand = (F.silu(base + product) - F.silu(base)).norm(dim=-1)
    torch.testing.assert_close(scores, torch.stack([by_hand[0].mean(), by_hand[1, 1:].mean()]))
    torch.testing.assert_close(inputs.pooled(product[mask], settings())[0], product[0].norm(dim=-1).mean())


# -- stopping and failing -------------------------------------------------------------------------


@pytest.mark.parametrize(("n_groups", "n_iterations"), [(1, 2), (3, 4)])
def test_it_stops_early_after_one_turn_of_small_and_steady_losses(edit: Edit, n_groups: int, n_iterations: int) -> None:
    task = edit.task(*[["The capital of France is"]] * n_groups)
    easy = settings(n_iter=9, early_stop_loss=1e6, early_stop_change=1e6)
    assert len(train_edit(ZERO, EVERYWHERE, task, easy).losses) == n_iterations
    for strict in (replace(easy, early_stop_loss=0.0), replace(easy, early_stop_change=0.0)):
        assert len(train_edit(ZERO, EVERYWHERE, task, strict).losses) == 9


def test_it_does_not_stop_while_one_group_still_lacks_something(edit: Edit) -> None:
    groups = (["The capital of France is"], ["is"])
    hparams = settings(n_iter=6, edit_lr=1e-7, early_stop_change=1e6)
    losses = [train_edit(ZERO, EVERYWHERE, edit.task(group), hparams).losses[0] for group in groups]
    between = replace(hparams, early_stop_loss=sum(losses) / 2)
    for order in (groups, groups[::-1]):
        assert len(train_edit(ZERO, EVERYWHERE, edit.task(*order), between).losses) == 6
    above = replace(hparams, early_stop_loss=max(losses) + 1.0)
    assert len(train_edit(ZERO, EVERYWHERE, edit.task(*groups), above).losses) == 3


def test_an_edit_that_holds_already_stops_soon(edit: Edit) -> None:
    task = EditTask([edit.contexts(PROMPTS, "Rome")], edit.irrelevant)
    hparams = settings(n_iter=60, edit_lr=0.05, optimizer="adam", early_stop_loss=3.5, early_stop_change=0.2)
    first = train_edit(ZERO, EVERYWHERE, task, hparams)
    assert 2 < len(first.losses) < 60
    assert first.losses[-1] <= 3.5
    assert len(train_edit(first.delta_weight, EVERYWHERE, task, hparams).losses) < len(first.losses)


def test_every_iteration_is_reported(edit: Edit) -> None:
    seen: list[tuple[int, float]] = []
    outcome = train_edit(
        ZERO, EVERYWHERE, edit.task(), settings(n_iter=3), on_iteration=lambda *step: seen.append(step)
    )
    assert seen == list(enumerate(outcome.losses))


def broken(edit: Edit, value: float) -> EditTask:
    activations = edit.irrelevant.activations.clone()
    activations[0, 0] = value
    return EditTask([edit.contexts(PROMPTS)], ScoredInputs(activations, edit.irrelevant.token_mask))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number(edit: Edit, value: float) -> None:
    start = torch.ones(SHAPE) * 0.1
    with pytest.raises(EditDivergedError) as caught:
        train_edit(start, EVERYWHERE, broken(edit, value), settings(n_iter=7), label="edit 3 ('a' -> 'b')")
    message = str(caught.value)
    assert f"the loss of edit 3 ('a' -> 'b') became {value}" in message
    assert "in iteration 1 of 7" in message
    assert "taken back" in message
    assert "Lower edit_lr (now 0.05)" in message
    assert torch.equal(start, torch.ones(SHAPE) * 0.1)


def test_a_step_that_is_too_large(edit: Edit) -> None:
    hparams = settings(optimizer="sgd", edit_lr=1e37, norm_constraint=None, n_iter=5)
    with pytest.raises(EditDivergedError, match=r"in iteration 2 of 5: .*Lower edit_lr \(now 1e\+37\)"):
        train_edit(ZERO, EVERYWHERE, edit.task(), hparams)


def test_the_last_step_is_checked_too(edit: Edit) -> None:
    # No loss is computed after it, so what it made must be looked at itself.
    task = broken(edit, 0.0)

    def poison(iteration: int, loss: float) -> None:
        if iteration == 2:  # the loss of the last iteration was fine, its gradient is not
            task.irrelevant.activations.data.fill_(float("nan"))

    with pytest.raises(EditDivergedError, match="edit 4"):
        train_edit(ZERO, EVERYWHERE, task, settings(n_iter=3), label="edit 4", on_iteration=poison)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_optimizer_is_the_one_that_is_named(edit: Edit, optimizer: str) -> None:
    hparams = settings(optimizer=optimizer, edit_lr=0.01, n_iter=1, norm_constraint=None)
    leaf = ZERO.clone().requires_grad_(True)
    loss_by_definition(edit, leaf, PROMPTS, hparams).backward()
    reference = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]([leaf], lr=0.01)
    reference.step()
    outcome = train_edit(ZERO, EVERYWHERE, edit.task(), hparams)
    assert leaf.grad is not None
    # Adam's first step is the sign of a gradient, and one that is all rounding has none.
    clear = leaf.grad.abs() > 1e-6
    assert clear.float().mean() > 0.9
    torch.testing.assert_close(outcome.delta_weight[clear], leaf.detach()[clear], rtol=1e-3, atol=1e-5)


def test_an_outcome_is_deterministic(edit: Edit) -> None:
    first, second = (train_edit(ZERO, EVERYWHERE, edit.task(), settings(n_iter=3)) for _ in range(2))
    assert torch.equal(first.delta_weight, second.delta_weight)
    assert first.losses == second.losses
