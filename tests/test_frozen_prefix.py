"""Recording what precedes the side memory: a replay is a full forward, at a part of its price."""

from __future__ import annotations

import re
from collections import Counter, UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import LAYERS
from editing_helpers import traces
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM

from easyedit_wise.editing.frozen_prefix import FrozenPrefix, layer_input_of
from easyedit_wise.editing.replay_plan import ReplayPlan
from easyedit_wise.editing.requests import pair_batch
from easyedit_wise.tuner.attach import module_name_of

PROMPTS = ["The capital of France is", "She said that it rained. The capital of France is", "is"]


def module_at(model: nn.Module, parameter: str, depth: int = 1) -> nn.Module:
    """The value matrix of another layer than the one that LAYERS names."""
    return model.get_submodule(re.sub(r"\.1\.", f".{depth}.", module_name_of(parameter)))


def inputs_for(tok: Any, prompts: list[str] = PROMPTS) -> dict[str, Tensor]:
    return pair_batch(tok, prompts, "Rome", torch.device("cpu")).model_inputs()


def forward_with(model: nn.Module, layer: nn.Module, inputs: dict[str, Tensor], layer_output: Tensor) -> Tensor:
    """Logits of a full forward in which a hook replaces the layer's output."""
    handle = layer.register_forward_hook(lambda module, args, output: layer_output.reshape(output.shape))
    try:
        return model(**inputs).logits
    finally:
        handle.remove()


def relative(difference: Tensor, reference: Tensor) -> float:
    return float(difference.abs().max() / reference.abs().max())


# -- a replay equals a full forward ---------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 2], ids=["first", "middle", "last"])
def test_a_replay_is_a_full_forward(any_model: tuple[Any, str], tok: Any, depth: int) -> None:
    model, parameter = any_model
    layer, inputs = module_at(model, parameter, depth), inputs_for(tok)
    assert not inputs["attention_mask"].all()  # the rows are padded
    prefix = FrozenPrefix.record(model, layer, inputs)
    shape = (*inputs["input_ids"].shape, -1)
    assert prefix.layer_input.shape[:2] == prefix.layer_output.shape[:2] == shape[:2]
    with torch.no_grad():
        assert torch.equal(prefix.replay(prefix.layer_output), model(**inputs).logits)

    real = inputs["attention_mask"].bool()
    weights = torch.randn(int(real.sum()), 400, generator=torch.Generator().manual_seed(0))
    changed = prefix.layer_output + torch.randn(prefix.layer_output.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for run in (prefix.replay, lambda value: forward_with(model, layer, inputs, value)):
        leaf = changed.clone().requires_grad_(True)
        logits = run(leaf)[real]
        loss = (logits.log_softmax(dim=-1) * weights).sum()
        results.append((logits.detach(), loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    (logits, loss, gradient), (full_logits, full_loss, full_gradient) = results
    assert relative(logits - full_logits, full_logits) < 1e-5
    assert relative(loss - full_loss, full_loss) < 1e-5
    assert full_gradient.abs().max() > 0.1
    assert relative(gradient - full_gradient, full_gradient) < 1e-5


def test_it_records_the_layers_input_and_output(any_model: tuple[Any, str], tok: Any) -> None:
    model, parameter = any_model
    layer, inputs = module_at(model, parameter), inputs_for(tok)
    prefix = FrozenPrefix.record(model, layer, inputs)
    torch.testing.assert_close(layer(prefix.layer_input), prefix.layer_output)
    assert torch.equal(layer_input_of(model, layer, inputs), prefix.layer_input)
    assert not prefix.layer_input.requires_grad
    assert not prefix.layer_output.requires_grad


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["batch", "one row"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_logits_at_some_positions(any_model: tuple[Any, str], tok: Any, prompts: list[str], count: int) -> None:
    model, parameter = any_model
    inputs = inputs_for(tok, prompts)
    prefix = FrozenPrefix.record(model, module_at(model, parameter), inputs)
    n_rows, length = inputs["input_ids"].shape
    rows = torch.arange(count) % n_rows
    columns = length - 1 - torch.arange(count)
    leaf = prefix.layer_output.clone().requires_grad_(True)
    full = prefix.replay(leaf)[rows, columns]
    some = prefix.replay(leaf, (rows, columns))
    assert some.shape == (count, 400)
    torch.testing.assert_close(some, full, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(logits.square().sum(), leaf)[0] for logits in (some, full)]
    assert relative(gradients[0] - gradients[1], gradients[1]) < 1e-5


def test_only_the_wanted_positions_are_projected(llama: Any, tok: Any) -> None:
    prefix = FrozenPrefix.record(llama, module_at(llama, LAYERS["llama"]), inputs_for(tok))
    shapes: list[torch.Size] = []
    llama.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    prefix.replay(prefix.layer_output, (torch.tensor([0, 2]), torch.tensor([7, 7])))
    assert shapes == [(1, 2, 400)]


# -- what runs and what does not ------------------------------------------------------------------


def counted(model: nn.Module) -> Counter[str]:
    """How often each module's own code (its class's forward) runs from now on."""
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, args, output, name=name: calls.update([name]))
    return calls


def test_a_replay_runs_no_layer_before_the_side_memory(any_model: tuple[Any, str], tok: Any) -> None:
    model, parameter = any_model
    layer, inputs = module_at(model, parameter, 2), inputs_for(tok)
    prefix = FrozenPrefix.record(model, layer, inputs)
    attention = ("q_proj", "v_proj", "c_attn", "query_key_value")
    calls = counted(model)
    prefix.replay(prefix.layer_output)
    assert not [name for name in calls if re.search(r"\.[012]\.", name) and name.endswith(attention)]
    calls.clear()
    model(**inputs)
    assert len([name for name in calls if name.endswith(attention)]) >= 3  # they do run in a full forward


def test_layer_input_of_stops_at_the_layer(any_model: tuple[Any, str], tok: Any) -> None:
    model, parameter = any_model
    layer = module_at(model, parameter)
    calls = counted(model)
    activations = layer_input_of(model, layer, inputs_for(tok))
    assert calls
    assert not [name for name in calls if re.search(r"\.2\.", name) or "lm_head" in name or "embed_out" in name]
    assert calls[module_name_of(parameter)] == 0  # not even the layer itself
    assert activations.shape == (*inputs_for(tok)["input_ids"].shape, layer_in_features(layer))


def layer_in_features(layer: nn.Module) -> int:
    return layer.in_features if hasattr(layer, "in_features") else layer.nx


# -- it leaves no trace ---------------------------------------------------------------------------


def test_no_trace_is_left(any_model: tuple[Any, str], tok: Any) -> None:
    model, parameter = any_model
    layer, inputs = module_at(model, parameter), inputs_for(tok)
    before, logits = traces(model), model(**inputs).logits
    prefix = FrozenPrefix.record(model, layer, inputs)
    prefix.replay(prefix.layer_output)
    prefix.replay(prefix.layer_output, (torch.tensor([0]), torch.tensor([1])))
    layer_input_of(model, layer, inputs)
    assert traces(model) == before
    assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("culprit", ["lm_head", "model.layers.2.mlp", "model.layers.0.mlp"])
def test_no_trace_is_left_after_an_exception(llama: Any, tok: Any, culprit: str) -> None:
    layer, inputs = module_at(llama, LAYERS["llama"]), inputs_for(tok)
    prefix = FrozenPrefix.record(llama, layer, inputs)

    def interrupt(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    llama.get_submodule(culprit).register_forward_pre_hook(interrupt)
    before = traces(llama)
    with pytest.raises(KeyboardInterrupt):
        FrozenPrefix.record(llama, layer, inputs)
    if culprit != "model.layers.0.mlp":  # a replay does not come by there
        for positions in (None, (torch.tensor([0]), torch.tensor([1]))):
            with pytest.raises(KeyboardInterrupt):
                prefix.replay(prefix.layer_output, positions)
    else:
        with pytest.raises(KeyboardInterrupt):
            layer_input_of(llama, layer, inputs)
    assert traces(llama) == before


def test_a_forward_that_somebody_put_on_a_module_is_put_back(llama: Any, tok: Any) -> None:
    # As accelerate does it: the module's own forward behind a wrapper in its __dict__.
    layer, inputs = module_at(llama, LAYERS["llama"]), inputs_for(tok)
    wrapped = {}
    for name in ("model.layers.0", "model.layers.1.mlp.down_proj"):
        module = llama.get_submodule(name)
        wrapped[name] = module.forward = lambda *args, own=module.forward, **kwargs: own(*args, **kwargs)
    prefix = FrozenPrefix.record(llama, layer, inputs)
    prefix.replay(prefix.layer_output)
    assert all(llama.get_submodule(name).__dict__["forward"] is forward for name, forward in wrapped.items())


# -- models that do unusual things ----------------------------------------------------------------


class Toy(nn.Module):
    """Two branches around the layer to edit; a subclass changes one step of it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.first = nn.Linear(8, 8)
        self.shared = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        self.up = nn.Linear(8, 12)
        self.layer = nn.Linear(12, 8)
        self.head = nn.Linear(8, 20)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.body(self.embed(input_ids))))

    def body(self, h: Tensor) -> Tensor:
        h = h + self.first(h)
        return h + self.layer(self.up(h).relu())


class Shared(Toy):
    """A module before the layer that runs after it once more."""

    def body(self, h: Tensor) -> Tensor:
        h = h + self.shared(self.first(h))
        h = h + self.layer(self.up(h).relu())
        return h + self.shared(h)


class Repeated(Toy):
    """A module that runs twice before the layer, on different inputs."""

    def body(self, h: Tensor) -> Tensor:
        h = self.first(self.first(h))
        return h + self.layer(self.up(h).relu())


class InPlace(Toy):
    """In-place code on what recorded modules, and the layer itself, gave out."""

    def body(self, h: Tensor) -> Tensor:
        residual = self.first(h)
        residual += h
        out = self.layer(self.up(residual).relu())
        out += residual
        out.mul_(2.0)
        return out


class Keyword(Toy):
    """The layer gets its input by name."""

    def body(self, h: Tensor) -> Tensor:
        return h + self.layer(input=self.up(h).relu())


class Pieces(nn.Module):
    """Gives its output in all the containers that a module may use."""

    def forward(self, h: Tensor) -> Any:
        return (h * 2, [h * 3, None], {"a": h * 5, 7: "text"})


class Containers(Toy):
    """A module whose output is nested, and which the model goes on with in place."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = Pieces()

    def body(self, h: Tensor) -> Tensor:
        two, (three, _), rest = self.pieces(h)
        two += three
        rest["a"] += two
        return self.layer(self.up(rest.pop("a")).relu()) + two


class Remembers(nn.Module):
    """Leaves what it computes in mappings that it is handed, by position and by name, for a later module."""

    def forward(self, h: Tensor, seen: dict[str, Any], latest: UserDict[str, Any]) -> Tensor:
        seen["twice"], latest["all"] = h * 2, (h * 3, [h * 5])
        return h + 1


class Handing(Toy):
    """A module behind the layer reads what one before it left in a mapping, as in Gemma 3n, and goes on in place."""

    def __init__(self) -> None:
        super().__init__()
        self.remembers = Remembers()

    def body(self, h: Tensor) -> Tensor:
        seen: dict[str, Any] = {"before": h}
        latest: UserDict[str, Any] = UserDict(all=0)
        h = self.remembers(h, seen, latest=latest)
        h = h + self.layer(self.up(h).relu())
        three, (five,) = latest["all"]
        three += seen["twice"] + seen["before"]
        return h + three * five


class NoProjection(Toy):
    """The head is named as the projection, but its weight is used without calling it."""

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.body(self.embed(input_ids)) @ self.head.weight.T)


class FlatTokens(Toy):
    """The projection sees a flat list of tokens."""

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        h = self.body(self.embed(input_ids))
        return SimpleNamespace(logits=self.head(h.flatten(0, 1)).view(*input_ids.shape, -1))


TOKENS = {"input_ids": torch.arange(15).reshape(3, 5)}


@pytest.mark.parametrize(
    "kind",
    [Toy, Shared, Repeated, InPlace, Keyword, Containers, Handing, NoProjection, FlatTokens],
    ids=lambda k: k.__name__,
)
def test_unusual_models(kind: type[Toy]) -> None:
    model = kind()
    prefix = FrozenPrefix.record(model, model.layer, TOKENS)
    full = model(**TOKENS).logits
    torch.testing.assert_close(model.layer(prefix.layer_input), prefix.layer_output)
    positions = (torch.tensor([0, 2, 2]), torch.tensor([4, 1, 3]))
    for _ in range(3):  # the second replay finds the recording as the first one did
        torch.testing.assert_close(prefix.replay(prefix.layer_output), full)
        torch.testing.assert_close(prefix.replay(prefix.layer_output, positions), full[positions])
    leaf = torch.randn(prefix.layer_output.shape, generator=torch.Generator().manual_seed(3)).requires_grad_(True)
    reference = leaf.detach().clone().requires_grad_(True)
    prefix.replay(leaf).square().sum().backward()
    forward_with(model, model.layer, TOKENS, reference * 1.0).square().sum().backward()
    torch.testing.assert_close(leaf.grad, reference.grad)
    assert torch.equal(layer_input_of(model, model.layer, TOKENS), prefix.layer_input)


def test_a_replay_does_not_write_to_the_callers_tensor() -> None:
    model = InPlace()
    prefix = FrozenPrefix.record(model, model.layer, TOKENS)
    given = torch.ones_like(prefix.layer_output)
    prefix.replay(given)
    assert torch.equal(given, torch.ones_like(given))


def test_a_model_that_adds_to_the_layers_output_in_place(tok: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        common = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}
        config = FalconConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, parallel_attn=True, **common)
        model = FalconForCausalLM(config).eval()
    layer, inputs = model.transformer.h[1].mlp.dense_4h_to_h, inputs_for(tok)
    prefix = FrozenPrefix.record(model, layer, inputs)
    torch.testing.assert_close(layer(prefix.layer_input), prefix.layer_output)
    torch.testing.assert_close(prefix.replay(prefix.layer_output), model(**inputs).logits)


class Never(Toy):
    """The layer is there but takes no part."""

    def body(self, h: Tensor) -> Tensor:
        return self.first(h)


class Twice(Toy):
    """The layer runs twice in one forward."""

    def body(self, h: Tensor) -> Tensor:
        return super().body(super().body(h))


@pytest.mark.parametrize(("kind", "times"), [(Never, 0), (Twice, 2)])
def test_a_layer_that_does_not_run_once(kind: type[Toy], times: int) -> None:
    model = kind()
    with pytest.raises(ValueError, match=rf"ran {times} times in one forward .* choose a layer of the decoder stack"):
        FrozenPrefix.record(model, model.layer, TOKENS)


def test_layer_input_of_a_layer_that_is_never_reached() -> None:
    model = Never()
    with pytest.raises(ValueError, match="does not reach the layer to edit: choose a layer of the decoder stack"):
        layer_input_of(model, model.layer, TOKENS)
    assert not model.layer._forward_pre_hooks


# -- what a recording need not keep ---------------------------------------------------------------


class Skipping(Toy):
    """Layers in a row of which a late one reads an early output: a long skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        generator = torch.Generator().manual_seed(5)
        for parameter in self.rows.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def body(self, h: Tensor) -> Tensor:
        kept = []
        for row in self.rows:
            h = row(h)
            kept.append(h)
        out = self.layer(self.up(h).relu())
        return out + kept[1] + h


class ReadsTheMean(Toy):
    """Later code reads an early output without passing it on: as a number that decides what is done."""

    def body(self, h: Tensor) -> Tensor:
        first = self.first(h)
        out = self.layer(self.up(h).relu())
        return out if bool(first.sum() > -1e9) else out * 2


def test_what_nothing_reads_is_not_kept(any_model: tuple[Any, str], tok: Any) -> None:
    model, parameter = any_model
    layer, inputs = module_at(model, parameter, 2), inputs_for(tok)
    plan = ReplayPlan.of(model, layer, inputs)
    names = {id(module): name for name, module in model.named_modules()}
    skipped = [names[id(module)] for module in plan.modules if id(module) in plan.unread]
    kept = [names[id(module)] for module in plan.modules if id(module) not in plan.unread]
    assert any(re.search(r"\.0$", name) for name in skipped)  # the first decoder layer: the second one is read
    assert any(re.search(r"\.1$", name) for name in kept)
    assert not set(skipped) & set(kept)


def test_a_recording_grows_with_what_is_read_not_with_the_layers_before(make_model: Any, tok: Any) -> None:
    sizes = []
    for n_layers in (3, 9):
        model = make_model("llama", n_layers=n_layers)
        layer = model.model.layers[n_layers - 1].mlp.down_proj
        prefix = FrozenPrefix.record(model, layer, inputs_for(tok))
        storages = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for _, answers in prefix._answers
            for output in (answer.output for answer in answers)
            for value in (output if isinstance(output, tuple) else (output,))
            if isinstance(value, Tensor)
        }
        sizes.append(sum(storages.values()))
    assert sizes[1] < sizes[0] * 1.1


def test_a_long_skip_connection_is_kept() -> None:
    model = Skipping()
    plan = ReplayPlan.of(model, model.layer, TOKENS)
    read = {module for module in plan.modules if id(module) not in plan.unread}
    assert [index for index, row in enumerate(model.rows) if row in read] == [1, 4]


@pytest.mark.parametrize("kind", [Skipping, ReadsTheMean, InPlace, Repeated], ids=lambda k: k.__name__)
def test_a_plan_serves_other_batches_too(kind: type[Toy]) -> None:
    model = kind()
    plan = ReplayPlan.of(model, model.layer, TOKENS)
    other = {"input_ids": torch.tensor([[7, 3, 9, 9, 1, 0, 4], [2, 2, 8, 19, 5, 6, 11]])}
    prefix = FrozenPrefix.record(model, model.layer, other, plan)
    given = torch.randn(prefix.layer_output.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(prefix.replay(given), forward_with(model, model.layer, other, given))


def test_a_recording_with_a_plan_stops_at_the_layer(llama: Any, tok: Any) -> None:
    layer, inputs = module_at(llama, LAYERS["llama"]), inputs_for(tok)
    plan = ReplayPlan.of(llama, layer, inputs)
    calls = counted(llama)
    FrozenPrefix.record(llama, layer, inputs, plan)
    assert calls["model.layers.1.mlp.down_proj"] == 1
    assert not [name for name in calls if ".2." in name or "lm_head" in name]


def test_the_layers_input_can_be_taken_once(llama: Any, tok: Any) -> None:
    prefix = FrozenPrefix.record(llama, module_at(llama, LAYERS["llama"]), inputs_for(tok))
    logits = prefix.replay(prefix.layer_output)
    assert prefix.take_layer_input().shape[-1] == 64
    assert prefix.layer_input is None
    assert torch.equal(prefix.replay(prefix.layer_output), logits)
    with pytest.raises(ValueError, match="taken from this recording before"):
        prefix.take_layer_input()
