"""EasyEdit's arithmetic, switch by switch, by hand and without EasyEdit (``test_fidelity_upstream`` has it beside)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import LAYERS, build_model
from editing_helpers import requests, stream_on
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from easyedit_wise import WISEHyperParams, apply_wise_to_model, last_route
from easyedit_wise.easyedit_arithmetic import activation_of
from easyedit_wise.editing.contexts import FIXED_WORDS, context_groups, fixed_prefixes
from easyedit_wise.editing.loss_record import LossRecord
from easyedit_wise.editing.open_shard import OpenShard
from easyedit_wise.editing.padded_batch import padded_contexts, padded_irrelevant
from easyedit_wise.editing.shards import close_shard, with_epsilon_as_trained
from easyedit_wise.editing.task import EditTask, target_positions
from easyedit_wise.editing.trainer import EditDivergedError, train_edit
from easyedit_wise.editing.whole_matrix import WholeMatrix, base_weight
from easyedit_wise.losses import edit_loss
from easyedit_wise.tuner.memory import LIVE, MERGED, SHARD, MemoryState

CPU = torch.device("cpu")
PROMPTS = ["The capital of France is", "I said The capital of France is"]


def upstream(**changes: Any) -> WISEHyperParams:
    values = {"n_iter": 2, "edit_lr": 0.05, "act_margin": [0.1, 2.0, 1.0]}
    return WISEHyperParams.from_preset("upstream", [LAYERS["llama"]], **values | changes)


# -- the padded batch -----------------------------------------------------------------------------


def lengths(tok: Any, texts: list[str]) -> list[int]:
    return [len(tok(text)["input_ids"]) for text in texts]


@pytest.mark.parametrize(
    "irrelevant", ["Water", "Once upon a time there was a small town by the sea, and nobody", None]
)
def test_what_stands_behind_the_longest_prompt_is_the_target(tok: Any, irrelevant: str | None) -> None:
    batch = padded_contexts(tok, PROMPTS, "Lyon", irrelevant, CPU)
    full = lengths(tok, [f"{prompt} Lyon" for prompt in PROMPTS] + ([irrelevant] if irrelevant else []))
    n_supervised = max(full) - max(lengths(tok, PROMPTS))
    assert batch.input_ids.shape == (2, max(full))
    assert batch.prompt_mask.all()
    for row in range(2):
        # The last tokens of each row, as far as they are real ones.
        expected = min(n_supervised, full[row])
        assert batch.target_mask[row].tolist() == [False] * (max(full) - expected) + [True] * expected


def test_positions_begin_at_the_padding(tok: Any) -> None:
    batch = padded_contexts(tok, PROMPTS, "Lyon", None, CPU)
    assert set(batch.model_inputs()) == {"input_ids", "attention_mask"}
    assert not batch.attention_mask.bool().all()
    assert batch.counted_mask.all()


def test_a_row_whose_first_token_is_supervised_is_predicted_from_the_padding(tok: Any) -> None:
    irrelevant = "Once upon a time there was a small town by the sea, and nobody knew its name. " * 3
    batch = padded_contexts(tok, PROMPTS, "Lyon", irrelevant, CPU)
    (rows, columns), targets, _ = target_positions(batch, upstream())
    assert len(targets) == int(batch.target_mask.sum())
    first = batch.attention_mask[0].argmax()
    assert ((rows == 0) & (columns == first - 1)).any()


def test_the_irrelevant_prompt_is_padded_like_its_contexts(tok: Any) -> None:
    batch, row = (
        padded_contexts(tok, PROMPTS, "Lyon", "Water", CPU),
        padded_irrelevant(tok, PROMPTS, "Lyon", "Water", CPU),
    )
    assert row.input_ids.shape == (1, batch.input_ids.shape[1])
    assert row.counted_mask.all()
    assert int(row.attention_mask.sum()) == lengths(tok, ["Water"])[0]


def test_a_target_without_a_token_is_refused(tok: Any) -> None:
    with pytest.raises(ValueError, match="tokenises to nothing after 'The capital of France is'"):
        padded_contexts(_Deaf(tok), PROMPTS, "Lyon", None, CPU)


class _Deaf:
    """A tokenizer that does not see targets."""

    def __init__(self, tok: Any) -> None:
        self.tok, self.pad_token_id, self.eos_token_id = tok, tok.pad_token_id, tok.eos_token_id

    def __call__(self, text: str) -> Any:
        return self.tok(text.removesuffix(" Lyon"))


def test_a_target_of_one_token_has_half_its_loss() -> None:
    logits, targets = torch.randn(2, 5), torch.tensor([1, 3])
    plain = edit_loss(logits, targets, torch.tensor([0, 1]), torch.tensor([True, True]))
    assert edit_loss(logits, targets, torch.tensor([0, 1]), torch.tensor([True, True]), n_silent=1) == plain / 2


def test_scores_are_means_over_padding_and_target(tok: Any) -> None:
    model = build_model("llama")
    request = requests(1, loc_prompt="Water")[0]
    hparams = upstream(n_iter=2, score_activation=None)
    seen: list[Tensor] = []
    layer = model.model.layers[1].mlp.down_proj
    apply_wise_to_model(model, tok, [request], hparams)
    stream = stream_on(model)
    state = stream.layer.memories("default")[0]
    texts = context_groups(request["prompt"], stream._recorder.prefixes(), None, fixed=True)[0]
    batch = padded_contexts(tok, texts, request["target_new"], "Water", CPU)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), stream._recorder.main_memory_only():
        model(**batch.model_inputs())
    handle.remove()
    # By the definition, one more iteration under the dW that was learned.
    expected = (seen[0] @ state.delta_weight.T).norm(dim=-1).mean(dim=-1)
    edits = [held.request for held in stream.held]
    task = stream._tasks.task(edits, stream._tasks.own_irrelevant(edits), [], OpenShard())
    with stream._recorder.main_memory_only():
        again = train_edit(state.delta_weight, state.mask, task, upstream(n_iter=1, score_activation=None))
    torch.testing.assert_close(torch.tensor(again.edit_scores), expected, rtol=1e-4, atol=1e-5)
    assert len(again.edit_scores) == 11


# -- contexts -------------------------------------------------------------------------------------


def test_fixed_prefixes_are_greedy(tok: Any) -> None:
    model = build_model("llama")
    prefixes = fixed_prefixes(model, tok)
    assert len(prefixes) == 10
    for word, short, long in zip(FIXED_WORDS, prefixes[:5], prefixes[5:], strict=True):
        ids = tok(word)["input_ids"]
        made = model.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False, pad_token_id=0)[0]
        assert tok.decode(made, skip_special_tokens=True) == long
        assert tok.decode(made[: len(ids) + 5], skip_special_tokens=True) == short


def test_a_fixed_prefix_stands_before_a_space(tok: Any) -> None:
    assert context_groups("x", ["I am"], None, fixed=True) == [["x", "I am x"]]
    assert context_groups("x", ["I am"]) == [["x", "I am. x"]]


def test_fixed_and_sampled_prefixes_are_kept_apart(tok: Any) -> None:
    model = build_model("llama")
    apply_wise_to_model(model, tok, requests(1), upstream())
    recorder = stream_on(model)._recorder
    fixed = recorder.prefixes()
    recorder.hparams = upstream(fixed_contexts=False)
    assert recorder.prefixes() != fixed
    recorder.hparams = upstream(n_contexts=3, seed=9)
    assert recorder.prefixes() == fixed


# -- the whole matrix -----------------------------------------------------------------------------


def test_everything_decays_and_only_the_mask_learns() -> None:
    torch.manual_seed(0)
    weight, mask = torch.randn(3, 4), torch.rand(3, 4) < 0.5
    whole = WholeMatrix(torch.zeros(3, 4), mask, weight)
    optimizer = torch.optim.SGD([whole.theta], lr=0.5, weight_decay=0.1)
    (product,) = whole.products(torch.ones(1, 4))
    whole.theta.grad = whole.masked(torch.autograd.grad(product.sum(), [whole.theta])[0])
    optimizer.step()
    whole.write()
    expected = -0.5 * (0.1 * weight + mask.float())
    torch.testing.assert_close(whole.matrix, expected)
    whole.clamp(0.01)
    whole.write()
    assert float(whole.matrix.abs().max()) <= 0.01 + 1e-6


def test_products_are_those_of_the_difference() -> None:
    torch.manual_seed(0)
    weight, delta, a = torch.randn(3, 4), torch.randn(3, 4), torch.randn(5, 4)
    whole = WholeMatrix(delta, torch.ones(3, 4, dtype=torch.bool), weight)
    torch.testing.assert_close(whole.products(a, a[:2])[0], a @ delta.T, rtol=1e-5, atol=1e-5)
    assert whole.matrix is not delta


def test_base_weight_of_linear_and_conv1d() -> None:
    linear, conv = nn.Linear(4, 3), Conv1D(3, 4)
    assert torch.equal(base_weight(linear), linear.weight)
    assert torch.equal(base_weight(conv), conv.weight.T)
    assert base_weight(nn.Linear(4, 3).bfloat16()).dtype == torch.float32
    with pytest.raises(
        ValueError, match="Embedding, which has no plain matrix to decay: set decay_whole_matrix: false"
    ):
        base_weight(nn.Embedding(4, 3))


def test_an_edit_that_fails_leaves_a_shard_that_decays_everywhere_as_it_was(tok: Any) -> None:
    model = build_model("llama")
    edits = requests(2, loc_prompt="Water")
    apply_wise_to_model(model, tok, edits[:1], upstream())
    before = stream_on(model).layer.memories("default")[0].delta_weight.clone()
    mask = stream_on(model).layer.memories("default")[0].mask
    assert mask is not None
    assert before[~mask].any()  # it did decay outside the mask
    with pytest.raises(EditDivergedError):
        apply_wise_to_model(model, tok, edits[1:], upstream(edit_lr=1e38, norm_constraint=None, n_iter=4))
    assert torch.equal(stream_on(model).layer.memories("default")[0].delta_weight, before)


def test_training_asks_for_the_matrix_that_decays() -> None:
    task = EditTask([], None)  # type: ignore[arg-type]  # refused before any of it is read
    with pytest.raises(ValueError, match="the task has no base_weight"):
        train_edit(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool), task, upstream())


# -- stop, threshold, merge -----------------------------------------------------------------------


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_patience_adds_iterations_after_the_loss_has_settled(patience: int) -> None:
    record = LossRecord(20, 1, 0.02, 1e-4, CPU, patience=patience)
    made = 0
    for loss in (1.0, 0.01, 0.01, *[5.0] * 10):  # settled at the third, whatever comes then
        record.add(torch.tensor(loss), torch.tensor(0.0))
        made += 1
        if record.stopped():
            break
    assert made == 3 + patience


def memory(stage: str, epsilon: float, n_edits: int = 1, value: float = 1.0) -> MemoryState:
    mask = torch.ones(1, 2, dtype=torch.bool) if stage == LIVE else None
    return MemoryState(stage, torch.tensor([[value, 1.0]]), mask, epsilon, n_edits)


def test_epsilon_as_trained_is_a_running_minimum() -> None:
    states = [memory(MERGED, 3.0), memory(SHARD, 3.0), memory(LIVE, 5.0, n_edits=2)]
    each = with_epsilon_as_trained(states, [8.0, 6.0], 1, upstream(act_ratio=0.5, retrieve=True))
    assert [state.epsilon for state in each] == [3.0, 3.0, 3.0]
    each = with_epsilon_as_trained(states, [20.0], 1, upstream(act_ratio=0.5, retrieve=True))
    assert [state.epsilon for state in each] == [3.0, 3.0, 5.0]
    # A new shard's epsilon of 0 stands for none yet; in WISE-Merge one threshold holds for all.
    fresh = [*states[:2], memory(LIVE, 0.0)]
    assert [s.epsilon for s in with_epsilon_as_trained(fresh, [20.0], 0, upstream(act_ratio=0.5, retrieve=True))][
        2
    ] == 10
    shared = with_epsilon_as_trained(fresh, [4.0], 0, upstream(act_ratio=0.5, retrieve=False))
    assert [state.epsilon for state in shared] == [2.0, 2.0, 2.0]


def test_a_merge_keeps_the_least_epsilon_as_trained() -> None:
    states = [memory(SHARD, 3.0), memory(LIVE, 2.0)]
    (merged,) = close_shard(states, upstream(save_freq=1, merge_freq=2), torch.Generator()).states
    assert merged.epsilon == 2.0


@pytest.mark.parametrize(
    ("easyedit_merge", "expected"), [(True, 0.6 * 1 + 0.2 * 4 + 0.2 * 6), (False, 0.8 * 1 + 0.1 * 4 + 0.1 * 6)]
)
def test_later_merges_weigh_the_earlier_memory(easyedit_merge: bool, expected: float) -> None:
    # Eight edits in the earlier memory and one in each shard. By edits they weigh .8, .1, .1; in EasyEdit .6, .2, .2.
    states = [memory(MERGED, 1.0, 8), memory(SHARD, 1.0, 1, 4.0), memory(LIVE, 1.0, 1, 6.0)]
    hparams = upstream(
        save_freq=1, merge_freq=2, retrieve=False, easyedit_merge=easyedit_merge, densities=1.0, merge_alg="ties"
    )
    (merged,) = close_shard(states, hparams, torch.Generator()).states
    assert float(merged.delta_weight[0, 0]) == pytest.approx(expected)


# -- the model's activation -----------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "name"), [("llama", "silu"), ("gpt2", "gelu_new")])
def test_the_activation_is_the_models(tok: Any, architecture: str, name: str) -> None:
    model = build_model(architecture)
    assert activation_of(model) == name
    hparams = WISEHyperParams.from_preset("upstream", [LAYERS[architecture]], n_iter=1)
    apply_wise_to_model(model, tok, requests(1), hparams)
    assert hparams.score_activation == "model"
    (config,) = stream_on(model).layer.wisemem_config.values()
    assert config.score_activation == stream_on(model).hparams.score_activation == name
    apply_wise_to_model(model, tok, requests(2)[1:], hparams)  # the same settings go on with the stream


def test_a_model_that_names_no_activation() -> None:
    with pytest.raises(ValueError, match="configuration of Linear names no activation function: name one"):
        activation_of(nn.Linear(2, 2))


def test_an_upstream_edit_answers_its_prompt_and_can_be_taken_back(tok: Any) -> None:
    model, untouched = build_model("llama"), build_model("llama")
    _, restore = apply_wise_to_model(model, tok, requests(1, loc_prompt="Water"), upstream(n_iter=8, act_ratio=0.01))
    query = tok(requests(1)[0]["prompt"], return_tensors="pt")
    with torch.no_grad():
        model(**query)
        route = last_route(model)
        assert route is not None
        assert route.describe()["memory"] == "default/0"
        assert not math.isclose(route.describe()["epsilon"], 0.0)
        restore()
        assert torch.equal(model(**query).logits, untouched(**query).logits)
