"""What PEFT's own generic tests ask of every method, for WISE, on tiny models of several architectures."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import LAYERS, build_model
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from tuner_helpers import PROMPTS, batch, config_for, generate, logits, memory, only_layer, set_thresholds

from easyedit_wise import WiseConfig, WiseLayer, attach, edits_chosen, last_route, use_edits
from easyedit_wise.tuner.adapter_tensors import tensor_name
from easyedit_wise.tuner.memory import SCORES, SideMemory
from easyedit_wise.tuner.model import find_wise_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]


class MLP(nn.Module):
    """No transformer: rows of numbers, each a sequence of one token."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.lin0(x).relu())


class Case:
    """A model, the name of its layer, and how to ask it."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture
        self.target = "lin0" if architecture == "mlp" else LAYERS[architecture]

    def model(self) -> Any:
        if self.architecture != "mlp":
            return build_model(self.architecture)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return MLP().eval()

    def config(self, **changes: Any) -> WiseConfig:
        task = None if self.architecture == "mlp" else "CAUSAL_LM"
        return config_for(self.target, task_type=task, **changes)

    def wrapped(self, name: str = "default", **changes: Any) -> PeftModel:
        return get_peft_model(self.model(), self.config(**changes), adapter_name=name)

    def output(self, model: Any) -> Tensor:
        if self.architecture != "mlp":
            return model(**batch(PROMPTS)).logits
        return model(torch.randn(6, 10, generator=torch.Generator().manual_seed(1)))

    @torch.no_grad()
    def ask(self, model: Any) -> Tensor:
        return self.output(model)


@pytest.fixture(params=[*LAYERS, "mlp"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


# -- init_weights -------------------------------------------------------------------------------------------


def test_a_new_adapter_is_the_base_model_or_a_random_one(case: Case) -> None:
    base = case.ask(case.model())
    assert torch.equal(case.ask(case.wrapped()), base)
    random = case.wrapped(init_weights=False)
    assert not torch.allclose(case.ask(random), base, atol=1e-3)
    assert bool((last_route(random).choice == 0).all())
    side = only_layer(random).wisemem_memories["default"][0]
    assert side.delta_weight[side.mask].any()
    assert not side.delta_weight[~side.mask].any()
    with random.disable_adapter():
        assert torch.equal(case.ask(random), base)


def test_random_weights_come_from_seed_and_name(case: Case) -> None:
    state = torch.get_rng_state()

    def drawn(name: str = "default", **changes: Any) -> SideMemory:
        return only_layer(case.wrapped(name, init_weights=False, **changes)).wisemem_memories[name][0]

    one = drawn()
    assert torch.equal(one.delta_weight, drawn().delta_weight)
    assert not torch.equal(one.delta_weight, drawn("other").delta_weight)
    assert not torch.equal(one.delta_weight, drawn(seed=1).delta_weight)
    closed = only_layer(case.wrapped(init_weights=False, memories=["merged", "live"])).memories("default")
    assert bool((closed[0].delta_weight != 0).all())
    assert torch.equal(torch.get_rng_state(), state)


# -- training ------------------------------------------------------------------------------------------------


def test_training_moves_the_adapter_and_nothing_else(case: Case) -> None:
    model = case.wrapped()
    assert trainable(model) == [name for name, _ in model.named_parameters() if "wisemem_" in name]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        case.output(model).square().mean().backward()
        optimizer.step()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == trainable(model)


def test_in_eval_mode_only_routed_rows_have_a_gradient(case: Case) -> None:
    """A fresh memory answers nobody, so that there is nothing to differentiate outside of train()."""
    assert not case.output(case.wrapped().eval()).requires_grad
    model = case.wrapped(init_weights=False).eval()
    case.output(model).square().mean().backward()
    (gradient,) = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradient.any()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("architecture", list(LAYERS))
def test_gradient_checkpointing_gives_the_same_gradient(architecture: str, reentrant: bool) -> None:
    case = Case(architecture)
    gradients = []
    for checkpointing in (False, True):
        model = case.wrapped(init_weights=False).train()
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with torch.random.fork_rng():
            torch.manual_seed(0)  # dropout
            case.output(model).square().mean().backward()
        gradients += [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients[0].any()
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


# -- state dicts and dtypes ------------------------------------------------------------------------------------


def test_a_whole_state_dict_goes_round(case: Case) -> None:
    one, other = case.wrapped(init_weights=False), case.wrapped(init_weights=False, seed=7)
    assert not torch.equal(case.ask(one), case.ask(other))
    result = other.load_state_dict(one.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(case.ask(one), case.ask(other))


def test_an_adapters_state_dict_goes_round_under_another_name(case: Case) -> None:
    one, other = case.wrapped("a", init_weights=False), case.wrapped("b")
    state = get_peft_model_state_dict(one, adapter_name="a")
    names = {tensor_name(key).rpartition(".")[2] for key in state}  # of dW and of the mask there are parts
    assert names == {"delta_weight", "mask", "n_edits", *SCORES}
    assert not set_peft_model_state_dict(other, state, adapter_name="b").unexpected_keys
    assert torch.equal(case.ask(one), case.ask(other))


def test_an_adapter_injected_without_memory_is_filled_by_its_state(case: Case) -> None:
    one, other = case.wrapped("a", init_weights=False), case.model()
    inject_adapter_in_model(case.config(), other, "b", low_cpu_mem_usage=True)
    layer = only_layer(other)
    assert layer.wisemem_memories["b"][0].delta_weight.device.type == "meta"
    state = get_peft_model_state_dict(one, adapter_name="a")
    set_peft_model_state_dict(other, state, adapter_name="b", low_cpu_mem_usage=True)
    assert layer.wisemem_memories["b"][0].delta_weight.device.type == "cpu"
    assert torch.equal(case.ask(other.eval()), case.ask(one.eval()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_base_in_half_precision_keeps_the_adapter_in_fp32(case: Case, dtype: torch.dtype, autocast: bool) -> None:
    """A memory rounded to bf16 would lie on the other side of some thresholds."""
    model = case.model().to(dtype)
    peft_model = get_peft_model(model, case.config(init_weights=False), autocast_adapter_dtype=autocast).eval()
    floating = {v.dtype for n, v in peft_model.state_dict().items() if "wisemem_" in n and v.is_floating_point()}
    assert floating == {torch.float32}
    if case.architecture != "mlp":
        assert case.ask(peft_model).dtype == dtype
        assert len(generate(peft_model, batch(PROMPTS), 2)) == 4


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
def test_a_cast_of_the_whole_model_works(case: Case, cast: str) -> None:
    if case.architecture == "mlp":
        pytest.skip("it is asked in fp32")
    model = getattr(case.wrapped(init_weights=False).eval(), cast)()
    assert case.ask(model).isfinite().all()
    assert only_layer(model).wisemem_memories["default"][0].epsilon.dtype == torch.float32


# -- several adapters -------------------------------------------------------------------------------------------


def tensors_of(layer: WiseLayer, name: str) -> list[weakref.ReferenceType[Tensor]]:
    memories = layer.wisemem_memories[name]
    return [weakref.ref(tensor) for tensor in (*memories.parameters(), *memories.buffers())]


def alive(references: list[weakref.ReferenceType[Tensor]]) -> int:
    gc.collect()
    return sum(reference() is not None for reference in references)


@pytest.mark.parametrize("which", ["active", "inactive"])
def test_of_a_deleted_adapter_no_tensor_stays(case: Case, which: str) -> None:
    model = case.wrapped("first", init_weights=False).eval()
    base = case.ask(case.model())
    first = case.ask(model)
    model.add_adapter("second", case.config(init_weights=False, memories=["merged"] * 4 + ["live"]))
    model.set_adapter("second")
    second = case.ask(model)
    assert len({str(value) for value in (base, first, second)}) == 3
    if which == "inactive":
        model.set_adapter("first")
        case.ask(model)
    layer = only_layer(model)
    references = tensors_of(layer, "second")
    assert alive(references) == len(references) == 5 * (2 + len(SCORES)) + 1
    if which == "active":
        with pytest.warns(UserWarning, match="second was active which is now deleted"):
            model.delete_adapter("second")
    else:
        model.delete_adapter("second")
    assert alive(references) == 0
    assert model.active_adapters == ["first"]
    assert list(model.peft_config) == list(layer.wisemem_config) == list(layer.wisemem_memories) == ["first"]
    assert layer.last_route is None
    assert torch.equal(case.ask(model), first)
    assert last_route(model).memories == ("first/0",)
    with pytest.raises(ValueError, match="nowhere"):
        model.delete_adapter("nowhere")
    model.delete_adapter("first")  # after the last one PEFT's wrapper cannot be called, only taken off
    assert torch.equal(case.ask(model.unload()), base)


def test_deleting_an_adapter_of_a_frozen_model_leaves_it_frozen(case: Case) -> None:
    model = case.model().requires_grad_(False)
    for name in ("one", "two"):
        layer = attach(model, case.config(init_weights=False), name)
    with pytest.warns(UserWarning, match="two was active"):
        layer.delete_adapter("two")
    assert layer.active_adapters == ["one"]
    assert trainable(model) == []


def test_of_an_adapter_that_was_replaced_no_tensor_stays(case: Case) -> None:
    model = case.model()
    layer = attach(model, case.config(init_weights=False), "one")
    attach(model, case.config(init_weights=False), "two")
    for names in ("one", "two", ["one", "two"]):
        use_edits(model, names)
        case.ask(model)
    references = tensors_of(layer, "two")
    layer.install("two", [memory(layer, 0)])
    assert alive(references) == 0
    assert list(layer._listed) == []


def test_an_edit_stream_goes_with_its_adapter(case: Case) -> None:
    class Stream:
        adapter_name = "two"

    model = case.model()
    layer = attach(model, case.config(), "one")
    attach(model, case.config(), "two")
    layer.edit_stream = stream = Stream()
    layer.delete_adapter("one")
    assert layer.edit_stream is stream
    layer.delete_adapter("two")
    assert layer.edit_streams == {}
    assert layer.edit_stream is None


def test_unloading_with_several_adapters_gives_the_base_model(case: Case) -> None:
    model = case.model()
    base, modules = case.ask(model), {name: id(module) for name, module in model.named_modules()}
    attributes = set(vars(model))
    peft_model = get_peft_model(model, case.config(init_weights=False), adapter_name="first")
    peft_model.add_adapter("second", case.config(init_weights=False))
    case.ask(peft_model)
    if case.architecture != "mlp":
        generate(peft_model, batch(PROMPTS), 2, adapter_names=["first", "second", "__base__", "first"])
    unloaded = peft_model.unload()
    assert unloaded is model
    assert torch.equal(case.ask(model), base)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert set(vars(model)) == attributes
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_copy_has_its_own_adapters(case: Case) -> None:
    for model in (case.wrapped(init_weights=False), case.model()):
        if not isinstance(model, PeftModel):
            attach(model, case.config(init_weights=False))
        said = case.ask(model)
        twin = copy.deepcopy(model)
        layer = only_layer(twin)
        assert layer.routing_scope is not only_layer(model).routing_scope
        set_thresholds(layer, float("inf"))
        with edits_chosen(twin, "default"):
            assert torch.equal(case.ask(model), said)  # the scope of names is the copy's own, too
            assert torch.equal(case.ask(twin), case.ask(case.model()))
        layer.delete_adapter("default")
        assert torch.equal(case.ask(model), said)


def test_the_status_functions_know_wise(case: Case) -> None:
    model = case.wrapped("one")
    model.add_adapter("two", case.config())
    status = model.get_model_status()
    assert (status.adapter_model_type, status.peft_types) == ("WiseModel", {"one": "WISE", "two": "WISE"})
    assert (status.active_adapters, status.available_adapters) == (["one"], ["one", "two"])
    assert (status.enabled, status.merged_adapters) == (True, [])
    assert status.requires_grad == {"one": True, "two": False}
    assert status.trainable_params == only_layer(model).wisemem_memories["one"][0].delta_weight.numel()
    (layer,) = model.get_layer_status()
    assert layer.module_type == "wise.WiseLayer"
    assert "wise.WiseLayer" in str(model)
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


def test_gradients_are_switched_by_adapter(case: Case) -> None:
    model = case.wrapped("one")
    model.add_adapter("two", case.config())
    model.set_requires_grad("one", False)
    assert trainable(model) == []
    model.set_requires_grad(["one", "two"])
    assert len(trainable(model)) == 2
    model.set_adapter("two", inference_mode=True)
    assert trainable(model) == []


# -- which modules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"target_modules": r".*\.[02]\.mlp\.down_proj"}, [0, 2]),
        ({"target_modules": ["down_proj"], "exclude_modules": ["model.layers.1.mlp.down_proj"]}, [0, 2]),
        ({"target_modules": ["down_proj"], "exclude_modules": r".*layers\.0.*"}, [1, 2]),
        ({"target_modules": ["down_proj"], "layers_to_transform": [1]}, [1]),
        ({"target_modules": ["down_proj"], "layers_to_transform": 2, "layers_pattern": "layers"}, [2]),
        ({"target_modules": ["layers.0.mlp.down_proj"]}, [0]),
    ],
)
def test_pefts_ways_to_name_modules(config: dict[str, Any], layers: list[int]) -> None:
    model = get_peft_model(build_model("llama"), WiseConfig(**config))
    assert list(find_wise_layers(model)) == [f"base_model.model.model.layers.{i}.mlp.down_proj" for i in layers]


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern", "bias", "r", "target_parameters"])
def test_what_does_not_apply_is_no_setting(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        WiseConfig(**{name: None})


# -- what PEFT does that routing excludes -----------------------------------------------------------------------------


def test_merging_is_refused_everywhere_and_changes_nothing(case: Case) -> None:
    model = case.wrapped(init_weights=False).eval()
    before = case.ask(model)
    layer = only_layer(model)
    calls: list[Callable[[], Any]] = [
        model.merge_and_unload,
        lambda: model.merge_and_unload(safe_merge=True),
        model.merge_adapter,
        lambda: model.merge_adapter(["default"]),
        lambda: layer.merge(safe_merge=True),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"answer every query.*unload\(\)|unload\(\).*answer every query"):
            call()
    model.unmerge_adapter()
    assert layer.merged is False
    assert torch.equal(case.ask(model), before)


def test_other_methods_stay_out() -> None:
    model = get_peft_model(build_model("llama"), config_for(LAYERS["llama"]))
    with pytest.raises(ValueError, match=r"different peft types|Cannot combine"):
        model.add_adapter("another", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(build_model("llama"), config_for(LAYERS["llama"]), mixed=True)


# -- transformers' own functions ------------------------------------------------------------------------------------


def test_transformers_functions_with_several_adapters(llama: Any) -> None:
    base = logits(llama, batch(PROMPTS))
    said = {}
    for name in ("one", "two"):
        llama.add_adapter(config_for(LAYERS["llama"], init_weights=False), adapter_name=name)
        said[name] = logits(llama, batch(PROMPTS))
    llama.eval()
    assert not torch.equal(said["one"], said["two"])
    assert llama.active_adapters() == ["two"]
    llama.set_adapter("one")
    assert torch.equal(logits(llama, batch(PROMPTS)), said["one"])
    llama.set_adapter(["one", "two"])
    logits(llama, batch(PROMPTS))
    assert last_route(llama).memories == ("one/0", "two/0")
    assert set(map(tensor_name, llama.get_adapter_state_dict("two"))) == {
        f"model.layers.1.mlp.down_proj.wisemem_memories.0.{part}"
        for part in ("delta_weight", "mask", "n_edits", *SCORES)
    }
    with edits_chosen(llama, ["one", "__base__", "two", "two"]):
        mixed = logits(llama, batch(PROMPTS))
    assert torch.allclose(mixed[0], said["one"][0], atol=1e-4)
    assert torch.equal(mixed[1], base[1])
    assert torch.allclose(mixed[2:], said["two"][2:], atol=1e-4)
    llama.disable_adapters()
    assert torch.equal(logits(llama, batch(PROMPTS)), base)
    llama.enable_adapters()
    references = tensors_of(only_layer(llama), "one")
    llama.delete_adapter("one")
    assert alive(references) == 0
    assert llama.active_adapters() == ["two"]
    assert torch.equal(logits(llama, batch(PROMPTS)), said["two"])
    llama.delete_adapter("two")
    assert torch.equal(logits(llama, batch(PROMPTS)), base)
