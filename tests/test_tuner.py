"""The WISE layer inside real architectures: what is routed, what is not, and what attaching leaves behind."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYERS
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM
from tuner_helpers import (
    ALWAYS,
    NEVER,
    PROMPTS,
    batch,
    between,
    config_for,
    generate,
    inputs_of,
    logits,
    logits_with,
    memory,
    only_layer,
    score_alone,
    set_thresholds,
    with_memories,
)

from easyedit_wise import WiseConfig, attach, detach, edits_disabled, last_route
from easyedit_wise.routing import POOLINGS, pool, routing_activation, upstream_activation
from easyedit_wise.tuner.attach import check_layer, module_name_of
from easyedit_wise.tuner.hooks import install_hooks, remove_hooks
from easyedit_wise.tuner.memory import MERGED, MemoryState
from easyedit_wise.tuner.model import find_wise_layers
from easyedit_wise.tuner.padding import real_tokens
from easyedit_wise.tuner.route import Route

LLAMA = LAYERS["llama"]
DOWN = module_name_of(LLAMA)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def deltas(layer: Any, adapter_name: str = "default") -> list[Tensor]:
    return [state.delta_weight for state in layer.memories(adapter_name)]


# -- main memory and side memory --------------------------------------------------------------------


def test_what_is_not_routed_is_the_base_model_bit_for_bit(any_model: tuple[Any, str]) -> None:
    model, parameter = any_model
    inputs = batch(PROMPTS)
    base = logits(model, inputs)
    with_memories(model, parameter, NEVER, NEVER)
    assert torch.equal(logits(model, inputs), base)
    assert last_route(model).choice.tolist() == [-1] * 4


def test_a_fresh_memory_is_the_base_model_bit_for_bit(any_model: tuple[Any, str]) -> None:
    model, parameter = any_model
    inputs = batch(PROMPTS)
    base = logits(model, inputs)
    attach(model, config_for(parameter))
    assert torch.equal(logits(model, inputs), base)


def test_what_is_routed_is_base_plus_the_difference(any_model: tuple[Any, str]) -> None:
    model, parameter = any_model
    inputs = batch(PROMPTS)
    base, untouched = copy.deepcopy(model), logits(model, inputs)
    layer = with_memories(model, parameter, ALWAYS)
    expected = logits_with(base, parameter, deltas(layer)[0], inputs)
    assert torch.equal(logits(model, inputs), expected)
    assert not torch.allclose(expected, untouched, atol=0.1)


def test_each_row_of_a_batch_is_routed_by_itself(any_model: tuple[Any, str]) -> None:
    model, parameter = any_model
    inputs = batch(PROMPTS)
    base = copy.deepcopy(model)
    layer = with_memories(model, parameter, ALWAYS)
    scores = [score_alone(base, parameter, prompt, deltas(layer)[0]) for prompt in PROMPTS]
    low, high = sorted(scores)[1:3]
    set_thresholds(layer, between(low, high))
    mixed = logits(model, inputs)
    routed = torch.tensor([score >= high for score in scores])
    assert last_route(model).choice.tolist() == [0 if one else -1 for one in routed]
    # The same batch without WISE, and with dW on every row: each row equals its own, bit for bit.
    assert torch.equal(mixed[~routed], logits(base, inputs)[~routed])
    assert torch.equal(mixed[routed], logits_with(base, parameter, deltas(layer)[0], inputs)[routed])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_each_prompt_alone(any_model: tuple[Any, str], side: str) -> None:
    model, parameter = any_model
    base = copy.deepcopy(model)
    layer = with_memories(model, parameter, ALWAYS, ALWAYS)
    first = sorted(score_alone(base, parameter, prompt, deltas(layer)[0]) for prompt in PROMPTS)
    set_thresholds(layer, between(*first[1:3]), between(*first[2:4]))
    inputs = batch(PROMPTS, side)
    together = logits(model, inputs)
    route = last_route(model)
    assert len(set(route.choice.tolist())) > 1  # else nothing is tested
    for row, prompt in enumerate(PROMPTS):
        alone = logits(model, batch([prompt]))
        own = last_route(model)
        assert own.choice.tolist() == route.choice[row : row + 1].tolist()
        assert torch.allclose(own.scores[0], route.scores[row], rtol=1e-5)
        assert torch.allclose(alone[0], together[row][inputs["attention_mask"][row].bool()], atol=1e-3)
        for index, delta_weight in enumerate(deltas(layer)):
            expected = score_alone(base, parameter, prompt, delta_weight)
            assert float(own.scores[0, index]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_is_not_scored(llama: Any, side: str, pooling: str) -> None:
    with_memories(llama, LLAMA, ALWAYS, pooling=pooling)
    logits(llama, batch(PROMPTS, side, pad=1))
    scores = last_route(llama).scores
    logits(llama, batch(PROMPTS, side, pad=250))
    assert torch.equal(last_route(llama).scores, scores)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("score_activation", [None, "silu"])
def test_scores_follow_the_configuration(llama: Any, pooling: str, score_activation: str | None) -> None:
    inputs = batch(PROMPTS)
    activations = inputs_of(llama, LLAMA, inputs)
    layer = with_memories(llama, LLAMA, NEVER, pooling=pooling, score_activation=score_activation)
    logits(llama, inputs)
    base_output = layer.base_layer(activations)
    tokens = routing_activation(activations, deltas(layer)[0])
    if score_activation is not None:
        side_output = base_output + F.linear(activations, deltas(layer)[0])
        tokens = upstream_activation(base_output, side_output, score_activation)
    expected = pool(tokens, inputs["attention_mask"], pooling)
    assert torch.allclose(last_route(llama).scores[:, 0], expected, rtol=1e-5)


def test_long_prompts_are_scored_like_short_ones(llama: Any) -> None:
    """EasyEdit takes the maximum instead of the mean above 100 tokens."""
    prompt = [3 + (7 * index) % 390 for index in range(140)]
    base = copy.deepcopy(llama)
    layer = with_memories(llama, LLAMA, NEVER)
    logits(llama, batch([prompt]))
    expected = score_alone(base, LLAMA, prompt, deltas(layer)[0])
    assert float(last_route(llama).scores) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("epsilons", [(ALWAYS, ALWAYS), (ALWAYS, NEVER), (NEVER, ALWAYS), (NEVER, NEVER)])
def test_of_two_memories_the_most_active_one_above_its_own_threshold_answers(
    llama: Any, epsilons: tuple[float, float]
) -> None:
    inputs = batch(PROMPTS)
    base = copy.deepcopy(llama)
    layer = with_memories(llama, LLAMA, *epsilons)
    mixed = logits(llama, inputs)
    expected = []
    for row, prompt in enumerate(PROMPTS):
        scores = [score_alone(base, LLAMA, prompt, delta_weight) for delta_weight in deltas(layer)]
        above = [index for index in (0, 1) if scores[index] > epsilons[index]]
        choice = max(above, key=lambda index: scores[index], default=-1)
        expected.append(choice)
        own = logits(base, inputs) if choice < 0 else logits_with(base, LLAMA, deltas(layer)[choice], inputs)
        assert torch.equal(mixed[row], own[row])
    assert last_route(llama).choice.tolist() == expected


def test_a_memory_below_its_threshold_leaves_the_query_to_a_less_active_one(llama: Any) -> None:
    base = copy.deepcopy(llama)
    layer = with_memories(llama, LLAMA, ALWAYS, ALWAYS)
    scores = [score_alone(base, LLAMA, PROMPTS[0], delta_weight) for delta_weight in deltas(layer)]
    strong, weak = (0, 1) if scores[0] > scores[1] else (1, 0)
    epsilons = [0.0, 0.0]
    epsilons[strong], epsilons[weak] = scores[strong] * 1.01, scores[weak] * 0.99
    set_thresholds(layer, *epsilons)
    logits(llama, batch(PROMPTS[:1]))
    assert last_route(llama).choice.tolist() == [weak]


def tuned_to(base: Any, parameter: str, prompt: list[int], scale: float, d_out: int) -> Tensor:
    """A rank-one difference that this prompt's activations excite."""
    activations = inputs_of(base, parameter, batch([prompt]))[0]
    _, _, directions = torch.linalg.svd(activations)
    output = torch.randn(d_out, generator=torch.Generator().manual_seed(len(prompt)))
    return scale * torch.outer(output / output.norm(), directions[0])


def test_rows_of_a_batch_pick_different_memories(any_model: tuple[Any, str]) -> None:
    """WISE-Retrieve: three memories, each of them made for one prompt, and a row for none of them."""
    model, parameter = any_model
    base = copy.deepcopy(model)
    layer = attach(model, config_for(parameter))
    states = [tuned_to(base, parameter, prompt, 3.0, layer.out_features) for prompt in PROMPTS]
    scores = torch.tensor([[score_alone(base, parameter, prompt, one) for one in states] for prompt in PROMPTS])
    # Each memory's threshold lies between its own prompt and the one before it in its own ranking.
    epsilons = [
        between(max(float(scores[row, index]) for row in range(4) if row != index), float(scores[index, index]))
        for index in range(3)
    ]
    order = [2, 0, 1]  # the memories' order is not the rows'
    layer.install("default", [MemoryState(MERGED, states[i], None, epsilons[i], 1) for i in order])
    inputs = batch(PROMPTS)
    mixed = logits(model, inputs)
    assert last_route(model).choice.tolist() == [1, 2, 0, -1]
    for row in range(3):
        assert torch.equal(mixed[row], logits_with(base, parameter, states[row], inputs)[row])
    assert torch.equal(mixed[3], logits(base, inputs)[3])


def test_equal_memories_are_no_conflict(llama: Any) -> None:
    """The route that is kept for decoding names the memory that answered."""
    layer = attach(llama, config_for(LLAMA))
    layer.install("default", [memory(layer, 0), memory(layer, 0)])
    assert torch.equal(logits(llama, batch(PROMPTS)), logits(llama, batch(PROMPTS)))
    assert set(last_route(llama).choice.tolist()) == {0}


def test_a_memory_that_overflows_does_not_answer(llama: Any) -> None:
    inputs = batch(PROMPTS)
    base = logits(llama, inputs)
    layer = attach(llama, config_for(LLAMA))
    broken = memory(layer, 0).delta_weight.clone()
    broken[0, 0] = torch.nan
    layer.install("default", [MemoryState(MERGED, broken, None, 0.0, 1)])
    assert torch.equal(logits(llama, inputs), base)


# -- ways to call -----------------------------------------------------------------------------------


def test_positional_arguments_are_understood(any_model: tuple[Any, str]) -> None:
    model, parameter = any_model
    layer = with_memories(model, parameter, ALWAYS)
    inputs = batch(PROMPTS)
    del inputs["position_ids"]
    by_name = logits(model, inputs)
    scores = layer.last_route.scores
    # In the order of the model's own forward, as far as the attention mask.
    parameters = list(inspect.signature(type(model).forward).parameters)[1:]
    positional = [inputs.get(name) for name in parameters[: parameters.index("attention_mask") + 1]]
    with torch.no_grad():
        assert torch.equal(model(*positional).logits, by_name)
        assert torch.equal(layer.last_route.scores, scores)
        assert torch.equal(model(positional[0], attention_mask=inputs["attention_mask"]).logits, by_name)
        assert torch.equal(layer.last_route.scores, scores)
        assert torch.equal(model(inputs["input_ids"]).logits, model(input_ids=inputs["input_ids"]).logits)


def test_inputs_embeds_are_routed_the_same(any_model: tuple[Any, str]) -> None:
    model, parameter = any_model
    layer = with_memories(model, parameter, ALWAYS)
    inputs = batch(PROMPTS)
    expected = logits(model, inputs)
    scores = layer.last_route.scores
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(logits(model, inputs | {"inputs_embeds": embeds}), expected)
    assert torch.equal(layer.last_route.scores, scores)


def test_a_mask_with_four_dimensions_tells_padding() -> None:
    # Two cached tokens and three new ones; row 0 has one padded token among the new ones.
    allowed = torch.tensor([[0, 1, 0, 0, 0], [0, 1, 0, 1, 0], [0, 1, 0, 1, 1]], dtype=torch.bool)
    full = torch.ones(3, 5, dtype=torch.bool).tril(2)
    mask = torch.stack([allowed, full]).unsqueeze(1)
    expected = [[False, True, True], [True, True, True]]
    assert real_tokens(mask, (2, 3), 2).tolist() == expected
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert real_tokens(additive, (2, 3), 2).tolist() == expected
    wider = F.pad(additive, (0, 4), value=torch.finfo(torch.float32).min)  # a static cache has room for more
    assert real_tokens({"full_attention": wider, "sliding_attention": None}, (2, 3), 2).tolist() == expected
    assert real_tokens(None, (2, 3), 2) is None
    assert real_tokens(mask, (2, 4), 2) is None


def test_a_layer_called_by_itself_takes_sequences_and_flat_tokens(llama: Any) -> None:
    layer = with_memories(llama, LLAMA, ALWAYS)
    values = torch.randn(3, 4, layer.in_features, generator=torch.Generator().manual_seed(0))
    expected = layer.base_layer(values) + F.linear(values, deltas(layer)[0])
    assert torch.allclose(layer(values), expected, atol=1e-6)
    assert layer.last_route.choice.shape == (3,)
    flat = values.reshape(12, -1)
    assert torch.allclose(layer(flat), expected.reshape(12, -1), atol=1e-6)
    assert layer.last_route.choice.shape == (12,)  # outside of a model, each row is a sequence of one token


def test_a_plain_module_can_be_edited() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    values = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    base = model(values)
    layer = attach(model, WiseConfig(target_modules=["2"]))
    layer.install("default", [memory(layer, 0, epsilon=ALWAYS)])
    hidden = model[1](model[0](values))
    assert torch.allclose(model(values), base + F.linear(hidden, deltas(layer)[0]), atol=1e-6)
    detach(model)
    assert torch.equal(model(values), base)


def test_querying_changes_nothing_in_the_model(llama: Any) -> None:
    """EasyEdit's WISE appends to its memories and merges inside of forward."""
    layer = with_memories(llama, LLAMA, 1.0, 2.0)
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    logits(llama, batch(PROMPTS))
    generate(llama, batch(PROMPTS))
    after = llama.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert len(layer.memories("default")) == 2


def test_an_exception_inside_a_call_leaves_the_next_call_alone(llama: Any) -> None:
    layer = with_memories(llama, LLAMA, ALWAYS)
    inputs = batch(PROMPTS)
    expected, scores = logits(llama, inputs), layer.last_route.scores

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    for module in (layer, llama.model.layers[0], llama.lm_head):  # before, in and after the decision
        handle = module.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            logits(llama, batch(PROMPTS[:2], "right"))
        handle.remove()
        # Nothing of the broken call is left: neither its mask nor its shape.
        values = torch.randn(2, 9, layer.in_features, generator=torch.Generator().manual_seed(0))
        layer(values)
        expected_scores = routing_activation(values, deltas(layer)[0]).mean(dim=-1)
        assert torch.allclose(layer.last_route.scores[:, 0], expected_scores, rtol=1e-5)
        assert torch.equal(logits(llama, inputs), expected)
        assert torch.equal(layer.last_route.scores, scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_models(any_model: tuple[Any, str], dtype: torch.dtype) -> None:
    model, parameter = any_model
    model.to(dtype)
    inputs = batch(PROMPTS)
    base, untouched = copy.deepcopy(model), logits(model, inputs)
    layer = with_memories(model, parameter, NEVER)
    assert torch.equal(logits(model, inputs), untouched)
    set_thresholds(layer, ALWAYS)
    routed = logits(model, inputs)
    assert routed.dtype == dtype
    assert torch.equal(routed, logits_with(base, parameter, deltas(layer)[0], inputs))
    assert not torch.equal(routed, untouched)
    # Scores and thresholds are fp32 whatever the model is: dW a is not rounded to the model's dtype.
    activations = inputs_of(base, parameter, inputs).float()
    expected = pool(routing_activation(activations, deltas(layer)[0]), inputs["attention_mask"])
    assert last_route(model).scores.dtype == torch.float32
    assert torch.allclose(last_route(model).scores[:, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casting_the_model_does_not_round_thresholds(llama: Any, cast: str) -> None:
    epsilon = 1.0009765625001  # rounds to 1.0 in bf16, and to 1.0009765625 in fp32
    layer = with_memories(llama, LLAMA, epsilon)
    getattr(llama, cast)()
    assert layer.memories("default")[0].epsilon == float(torch.tensor(epsilon, dtype=torch.float32))
    layer.install("default", [layer.memories("default")[0].with_(weakest_edit=epsilon, weakest_answered=epsilon)])
    getattr(llama, cast)()
    (memory,) = layer.memories("default")
    assert memory.weakest_edit == memory.weakest_answered == memory.epsilon
    assert layer.wisemem_memories["default"][0].epsilon.dtype == torch.float32
    logits(llama, batch(PROMPTS))


def test_hooks_on_the_base_layer_still_fire(llama: Any) -> None:
    seen: list[str] = []
    llama.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: seen.append("before"))
    llama.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: seen.append("after"))
    with_memories(llama, LLAMA, ALWAYS)
    logits(llama, batch(PROMPTS))
    assert seen == ["before", "after"]


# -- reading back where a query went ----------------------------------------------------------------


def test_last_route_tells_which_memory_answered(llama: Any) -> None:
    base = copy.deepcopy(llama)
    layer = with_memories(llama, LLAMA, 0.5, NEVER)
    assert last_route(llama) is None
    logits(llama, batch(PROMPTS))
    route = last_route(llama)
    assert isinstance(route, Route)
    assert route.memories == ("default/0", "default/1")
    scores = [score_alone(base, LLAMA, PROMPTS[2], delta_weight) for delta_weight in deltas(layer)]
    expected = {"memory": "default/0", "score": pytest.approx(scores[0]), "epsilon": 0.5, "exact": True}
    assert route.describe(2) == expected
    set_thresholds(layer, NEVER, NEVER)
    logits(llama, batch(PROMPTS))
    expected = {"memory": "main", "score": pytest.approx(max(scores)), "epsilon": NEVER, "exact": True}
    assert last_route(llama).describe(2) == expected


def test_last_route_is_none_while_edits_are_off(llama: Any) -> None:
    with_memories(llama, LLAMA, ALWAYS)
    logits(llama, batch(PROMPTS))
    with edits_disabled(llama):
        assert last_route(llama) is None
        logits(llama, batch(PROMPTS[:1]))
    assert last_route(llama) is None  # the last query was answered without the router
    logits(llama, batch(PROMPTS[:1]))
    assert last_route(llama).choice.tolist() == [0]


def test_switching_edits_off_needs_edits(llama: Any) -> None:
    with pytest.raises(ValueError, match="carries no edits"), edits_disabled(llama):
        pass
    with pytest.raises(ValueError, match="carries no edits"):
        last_route(llama)


def test_edits_can_be_switched_off_and_on(any_model: tuple[Any, str]) -> None:
    model, parameter = any_model
    inputs = batch(PROMPTS)
    base, said = logits(model, inputs), generate(model, inputs)
    with_memories(model, parameter, ALWAYS)
    edited = logits(model, inputs)
    with edits_disabled(model):
        assert torch.equal(logits(model, inputs), base)
        assert generate(model, inputs) == said
        with edits_disabled(model):
            pass
        assert torch.equal(logits(model, inputs), base)
    assert torch.equal(logits(model, inputs), edited)
    with pytest.raises(RuntimeError, match="stop"), edits_disabled(model):
        raise RuntimeError("stop")
    assert torch.equal(logits(model, inputs), edited)
    assert generate(model, inputs) != said


# -- attach and detach ------------------------------------------------------------------------------


def traces(model: nn.Module) -> dict[str, Any]:
    """What attaching could leave behind, with the very objects."""
    return {
        "modules": {name: (id(module), type(module)) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            name: {key: list(value) for key, value in vars(module).items() if "hooks" in key}
            for name, module in model.named_modules()
        },
        "training": {name: module.training for name, module in model.named_modules()},
    }


def test_attach_and_detach_leave_no_trace(any_model: tuple[Any, str]) -> None:
    model, parameter = any_model
    model.get_input_embeddings().weight.requires_grad_(False)
    before, value = traces(model), {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(2):
        layer = with_memories(model, parameter, ALWAYS)
        assert model.get_submodule(module_name_of(parameter)) is layer
        assert not any(parameter.requires_grad for parameter in model.parameters())
        generate(model, batch(PROMPTS))
        detach(model)
        assert traces(model) == before
    assert all(torch.equal(p, value[name]) for name, p in model.named_parameters())
    assert not {"generate", "peft_config"} & vars(model).keys()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_detaching_a_model_without_edits_changes_nothing(llama: Any) -> None:
    before = traces(llama)
    detach(llama)
    assert traces(llama) == before


def test_the_users_own_hooks_and_generate_stay(llama: Any) -> None:
    calls: list[str] = []
    plain = type(llama).generate

    def own_generate(*args: Any, **kwargs: Any) -> Any:
        calls.append("own")
        return plain(llama, *args, **kwargs)

    llama.generate = own_generate
    handle = llama.register_forward_hook(lambda *_: None)
    with_memories(llama, LLAMA, ALWAYS)
    generate(llama, batch(PROMPTS))
    assert calls == ["own"]
    detach(llama)
    assert llama.generate is own_generate
    assert list(llama._forward_hooks) == [handle.id]


def test_a_generate_that_somebody_kept_works_after_detaching(llama: Any) -> None:
    inputs = batch(PROMPTS)
    said = generate(llama, inputs)
    with_memories(llama, LLAMA, ALWAYS)
    kept = llama.generate
    assert generate(llama, inputs) != said
    detach(llama)
    llama.generate = kept
    assert generate(llama, inputs) == said


def test_hooks_are_installed_once(llama: Any) -> None:
    layer = with_memories(llama, LLAMA, ALWAYS)
    install_hooks(llama, layer.routing_scope)
    assert len(llama._forward_hooks) == len(llama._forward_pre_hooks) == 1
    remove_hooks(llama)
    remove_hooks(llama)
    assert not llama._forward_hooks


def test_attaching_again_keeps_the_edits(llama: Any) -> None:
    layer = with_memories(llama, LLAMA, 1.0, 2.0)
    assert attach(llama, config_for(LLAMA)) is layer
    assert [state.epsilon for state in layer.memories("default")] == [1.0, 2.0]


def test_a_second_adapter_in_the_same_layer_is_welcome(llama: Any) -> None:
    with_memories(llama, LLAMA, 1.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        layer = attach(llama, config_for(LLAMA), "second")
    assert not said
    assert sorted(layer.wisemem_memories) == ["default", "second"]
    assert layer.active_adapters == ["second"]


def test_attach_keeps_a_copy_of_the_configuration(llama: Any, make_model: Callable[..., Any]) -> None:
    config = config_for(LLAMA)
    one, other = attach(llama, config), attach(make_model("llama"), config)
    one.install("default", [memory(one, 0), memory(one, 1)])
    assert config.memories == ["live"]
    assert other.wisemem_config["default"].memories == ["live"]
    assert llama.peft_config["default"].memories == ["merged", "merged"]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["layers.1.mlp.down_proj"]},
        {"target_modules": "model.layers.1.mlp.down_proj"},
        {"target_modules": r".*layers\.1\..*down_proj"},
        {"target_modules": ["down_proj"], "layers_to_transform": [1]},
        {"target_modules": ["down_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": [LLAMA]},  # EasyEdit's spelling
    ],
)
def test_a_layer_can_be_named_in_all_of_pefts_ways(llama: Any, config: dict[str, Any]) -> None:
    down = llama.model.layers[1].mlp.down_proj
    layer = attach(llama, WiseConfig(**config))
    assert llama.model.layers[1].mlp.down_proj is layer
    assert layer.base_layer is down
    assert attach(llama, WiseConfig(**config)) is layer


def late(values: dict[str, Any]) -> WiseConfig:
    """A configuration whose seed was changed behind its back, so that it fails in the middle of the injection."""
    config = WiseConfig(**{key: value for key, value in values.items() if key != "seed"})
    config.seed = values.get("seed", config.seed)
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["down_proj"]}, "exactly one layer, but 3 match: model.layers.0.mlp.down_proj"),
        ({"target_modules": ["q_proj", "k_proj"], "layers_to_transform": 1}, "exactly one layer, but 2 match"),
        ({"target_modules": None}, "exactly one layer, but None names none"),
        ({"target_modules": r".*nothing.*"}, "exactly one layer, but .*nothing.* names none"),
        ({"target_modules": ["model.layers.1.mlp.down"]}, r"does not exist.*model.layers\[0..2\].mlp.down_proj.weight"),
        ({"target_modules": ["model.layers.7.mlp.down_proj"]}, r"model.layers\[0..2\].mlp.down_proj.weight"),
        ({"target_modules": ["model.embed_tokens"]}, "Embedding, not a linear map"),
        ({"target_modules": ["model.norm"]}, "LlamaRMSNorm, not a linear map"),
        ({"target_modules": ["model.layers.1.mlp"]}, "LlamaMLP, not a linear map"),
        ({"target_modules": [DOWN], "seed": "many"}, "manual_seed"),
    ],
)
def test_a_layer_that_does_not_fit_leaves_the_model_alone(llama: Any, config: dict[str, Any], message: str) -> None:
    before = traces(llama)
    warnings.simplefilter("error")  # pytest puts the filters back
    with pytest.raises((ValueError, RuntimeError), match=message):
        attach(llama, late(config))
    assert traces(llama) == before


@pytest.mark.parametrize(
    ("config", "adapter_name", "message"),
    [
        ({"target_modules": ["model.layers.2.mlp.down_proj"]}, "second", "edits are in model.layers.1.mlp.down_proj"),
        ({"target_modules": ["model.layers.2.mlp.down_proj"]}, "default", "edits are in model.layers.1.mlp.down_proj"),
        ({"target_modules": ["down_proj"]}, "second", "3 match"),
        ({"target_modules": [DOWN], "seed": "many"}, "second", "manual_seed"),
        ({"target_modules": [DOWN]}, "v1.0", "adapter_name is 'v1.0'"),
    ],
)
def test_a_second_adapter_that_does_not_fit_leaves_the_first(
    llama: Any, config: dict[str, Any], adapter_name: str, message: str
) -> None:
    with_memories(llama, LLAMA, ALWAYS)
    inputs = batch(PROMPTS)
    edited, before = logits(llama, inputs), traces(llama)
    with pytest.raises((ValueError, RuntimeError), match=message):
        attach(llama, late(config), adapter_name)
    assert traces(llama) == before
    assert list(llama.peft_config) == ["default"]
    assert torch.equal(logits(llama, inputs), edited)


def test_attaching_to_a_model_with_lora_is_an_error(llama: Any) -> None:
    wrapped = get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    for model in (wrapped, wrapped.base_model.model):
        before = traces(model)
        with pytest.raises(ValueError, match=r"carries the PEFT method.*LORA.*merge_and_unload"):
            attach(model, config_for(LLAMA))
        assert traces(model) == before


def test_attaching_after_lora_was_merged_works(llama: Any) -> None:
    merged = get_peft_model(llama, LoraConfig(target_modules=["q_proj"])).merge_and_unload()
    with_memories(merged, LLAMA, ALWAYS)
    logits(merged, batch(PROMPTS))
    assert last_route(merged).choice.tolist() == [0] * 4


@pytest.mark.parametrize("architecture", list(LAYERS))
def test_check_layer_names_what_fits(make_model: Callable[..., Any], architecture: str) -> None:
    model, parameter = make_model(architecture), LAYERS[architecture]
    assert check_layer(model, parameter) == module_name_of(parameter)
    fitting = parameter.replace("[1]", "[0..2]")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="does not exist in this model") as error:
            check_layer(model, parameter.replace("[1]", "[9]"))
    assert fitting in str(error.value)
    with pytest.raises(ValueError, match="Embedding, not a linear map"):
        check_layer(model, next(name for name, m in model.named_modules() if isinstance(m, nn.Embedding)) + ".weight")


# -- copies -----------------------------------------------------------------------------------------


def test_a_deep_copy_is_independent(any_model: tuple[Any, str]) -> None:
    model, parameter = any_model
    inputs = batch(PROMPTS)
    base_said = generate(model, inputs)
    layer = with_memories(model, parameter, ALWAYS)
    said = generate(model, inputs)
    copied = copy.deepcopy(model)
    twin = only_layer(copied)
    assert twin is not layer
    assert twin.routing_scope is not layer.routing_scope
    assert generate(copied, inputs) == said != base_said
    # The copy's hooks feed the copy's scope: padding is left out there too.
    assert torch.allclose(twin.last_route.scores, layer.last_route.scores)
    set_thresholds(twin, NEVER)
    layer.last_route = None
    assert generate(copied, inputs) == base_said
    assert layer.last_route is None  # the copy's generate ran the copy
    assert generate(model, inputs) == said
    detach(model)
    assert generate(model, inputs) == base_said
    set_thresholds(twin, ALWAYS)
    assert generate(copied, inputs) == said
    detach(copied)
    assert generate(copied, inputs) == base_said
    assert not find_wise_layers(copied)


def test_a_pickled_model_comes_back_edited(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_memories(llama, LLAMA, ALWAYS)
    inputs = batch(PROMPTS)
    said = generate(llama, inputs)
    stored = pickle.dumps(llama)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # as in a new process
    loaded = pickle.loads(stored)
    handle = loaded.register_forward_pre_hook(lambda *_: None)
    assert generate(loaded, inputs) == said
    handle.remove()
    assert generate(loaded, inputs) == said
    assert torch.allclose(only_layer(loaded).last_route.scores, only_layer(llama).last_route.scores)


def test_save_pretrained_of_an_edited_model_saves_what_can_be_loaded(
    make_model: Callable[..., Any], tmp_path: Any
) -> None:
    """Without care, transformers would write a checkpoint in which the edited layer's own weight has another name."""
    make_model("llama").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with_memories(model, LLAMA, 1.0, ALWAYS, base_model_name_or_path=str(tmp_path / "base"))
    inputs = batch(PROMPTS)
    edited = logits(model, inputs)
    model.save_pretrained(tmp_path / "edited")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "edited"), inputs), edited)
    detach(model)
    base = logits(model, inputs)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), inputs), base)


# -- training through PEFT, and several layers --------------------------------------------------------


def test_under_train_the_live_memory_answers_everything_inside_its_mask(llama: Any) -> None:
    inputs = batch(PROMPTS)
    base = copy.deepcopy(llama)
    layer = attach(llama, config_for(LLAMA))
    live = memory(layer, 0, epsilon=NEVER, stage="live")
    layer.install("default", [memory(layer, 1, epsilon=NEVER), live])
    layer.set_adapter("default", inference_mode=False)
    assert [name for name, p in llama.named_parameters() if p.requires_grad] == [
        f"{DOWN}.wisemem_memories.default.1.delta_weight"
    ]
    # In eval mode, which the new layer takes from the model, the router decides.
    assert torch.equal(logits(llama, inputs), logits(base, inputs))
    llama.train()
    output = llama(**inputs).logits
    assert torch.equal(output, logits_with(base, LLAMA, live.delta_weight * live.mask, inputs))
    output.sum().backward()
    gradients = {name: p.grad for name, p in llama.named_parameters() if p.grad is not None}
    assert list(gradients) == [f"{DOWN}.wisemem_memories.default.1.delta_weight"]
    (gradient,) = gradients.values()
    assert not gradient[~live.mask].any()
    assert gradient[live.mask].count_nonzero() > 0.9 * live.mask.sum()


def test_a_trained_shard_never_leaves_its_mask(llama: Any) -> None:
    layer = attach(llama, config_for(LLAMA, mask_ratio=0.3))
    layer.set_adapter("default", inference_mode=False)
    mask = layer.memories("default")[0].mask
    assert 0.25 < float(mask.float().mean()) < 0.35
    llama.train()
    parameters = [p for p in llama.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5, weight_decay=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        llama(**batch(PROMPTS), labels=batch(PROMPTS)["input_ids"]).loss.backward()
        optimizer.step()
    delta_weight = layer.memories("default")[0].delta_weight
    assert delta_weight[mask].any()
    assert not delta_weight[~mask].any()


def test_the_mask_comes_from_the_seed_alone(make_model: Callable[..., Any]) -> None:
    def mask(seed: int) -> Tensor:
        torch.manual_seed(torch.initial_seed() + 1)
        return attach(make_model("llama"), config_for(LLAMA, seed=seed)).memories("default")[0].mask

    assert torch.equal(mask(1), mask(1))
    assert not torch.equal(mask(1), mask(2))


def test_several_layers_route_on_their_own(llama: Any) -> None:
    """PEFT may wrap more layers than the one that WISE edits; each holds its own decision."""
    inputs = batch(PROMPTS)
    base, untouched = copy.deepcopy(llama), logits(llama, inputs)
    inject_adapter_in_model(WiseConfig(target_modules=["down_proj"]), llama)
    layers = find_wise_layers(llama)
    assert len(layers) == 3
    assert len({id(layer.routing_scope) for layer in layers.values()}) == 1
    for epsilon, layer in zip((NEVER, ALWAYS, NEVER), layers.values(), strict=True):
        layer.install("default", [memory(layer, 0, epsilon)])
    only_second = logits_with(base, LLAMA, deltas(layers[DOWN])[0], inputs)
    assert torch.equal(logits(llama, inputs), only_second)
    assert [layer.last_route.choice.tolist() for layer in layers.values()] == [[-1] * 4, [0] * 4, [-1] * 4]
    said = generate(llama, inputs)
    assert said == generate(llama, inputs, use_cache=False) != generate(base, inputs)
    detach(llama)
    assert torch.equal(logits(llama, inputs), untouched)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_ratio": 0.0}, r"mask_ratio \(rho\) is 0.0"),
        ({"mask_ratio": 1.5}, r"mask_ratio \(rho\) is 1.5"),
        ({"pooling": "median"}, "pooling is 'median': choose one of mean, max, last, loudest"),
        ({"memories": ["live", "melted"]}, "'melted'.*live, shard, merged"),
    ],
)
def test_configuration_errors_name_value_and_limit(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WiseConfig(target_modules=["x"], **values)


def test_a_live_memory_needs_its_mask(llama: Any) -> None:
    layer = attach(llama, config_for(LLAMA))
    with pytest.raises(ValueError, match="needs the mask"):
        layer.install("default", [MemoryState("live", torch.zeros(32, 64), None, 0.0, 0)])


def test_installing_does_not_write_to_the_old_states(llama: Any) -> None:
    layer = with_memories(llama, LLAMA, 1.0)
    before = layer.memories("default")
    kept = before[0].delta_weight.clone()
    layer.install("default", [memory(layer, 5), memory(layer, 6)])
    assert torch.equal(before[0].delta_weight, kept)
    layer.install("default", before)
    assert layer.memories("default")[0].delta_weight.data_ptr() == before[0].delta_weight.data_ptr()
    assert llama.peft_config["default"].memories == ["merged"]


def test_one_difference_stands_for_one_memory_only(llama: Any) -> None:
    layer = with_memories(llama, LLAMA, 1.0)
    assert torch.equal(layer.get_delta_weight("default"), deltas(layer)[0])
    set_thresholds(layer, 1.0, 2.0)
    with pytest.raises(ValueError, match="has 2 side memories"):
        layer.get_delta_weight("default")
    assert repr(layer).startswith("wise.WiseLayer")
    assert "stage=merged, d_in=64, d_out=32, edits=1" in repr(layer)
