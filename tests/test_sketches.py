"""Screening inside a model: sketches follow their memories, and decoding pays for routed rows only."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import LAYERS
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from tuner_helpers import (
    ALWAYS,
    NEVER,
    PROMPTS,
    batch,
    between,
    config_for,
    generate,
    logits,
    memory,
    only_layer,
    with_memories,
)

from easyedit_wise import WiseConfig, WiseLayer, attach, last_route
from easyedit_wise.routing import routing_activation
from easyedit_wise.tuner import router, sketches
from easyedit_wise.tuner.memory import MERGED
from easyedit_wise.tuner.route import Route

LLAMA = LAYERS["llama"]
D_IN, D_OUT = 24, 80


FAR = 40.0  # three times what the inputs score: ruled out by the sketches


def one_layer(*seeds: int, stage: str = MERGED) -> WiseLayer:
    """A layer by itself, wide enough to be screened; none of its memories answers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D_IN, D_OUT)).eval()
    layer = attach(model, WiseConfig(target_modules=["0"]))
    layer.install("default", [memory(layer, seed, FAR, stage=stage) for seed in seeds])
    return layer


def inputs() -> Tensor:
    return torch.randn(3, 20, D_IN, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def choice_of(layer: WiseLayer) -> list[int]:
    layer(inputs())
    assert layer.last_route is not None
    return layer.last_route.choice.tolist()


def sketched(layer: WiseLayer) -> bool:
    return layer._sketches._held != ()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The dW that were sketched since."""
    seen: list[Tensor] = []

    def sketch(delta_weight: Tensor, projection: Tensor) -> Tensor:
        seen.append(delta_weight)
        return projection @ delta_weight.float()

    monkeypatch.setattr(sketches, "sketch", sketch)
    return seen


# -- made once, and anew where a memory changed -------------------------------------------------------


def test_sketches_are_made_once(made: list[Tensor]) -> None:
    layer = one_layer(*range(6))
    assert not made  # not before they are needed
    first = choice_of(layer)
    assert choice_of(layer) == first
    assert len(made) == 6


def test_an_installed_memory_is_sketched_and_the_others_are_not(made: list[Tensor]) -> None:
    layer = one_layer(*range(6))
    choice_of(layer)
    states = [memory.state() for memory in layer._side_memories("default")]
    kept = [memory.delta_weight for memory in layer._side_memories("default")]
    large = memory(layer, 17, FAR, scale=3.0)
    made.clear()
    layer.install("default", [state.with_(delta_weight=dw) for state, dw in zip(states, kept, strict=True)] + [large])
    assert choice_of(layer) == [6, 6, 6]
    assert [one is large.delta_weight for one in made] == [True]
    layer.install("default", [large, *states])  # another order
    assert choice_of(layer) == [0, 0, 0]


@pytest.mark.parametrize("stage", ["merged", "live"])
def test_weights_that_are_loaded_in_place_are_seen(stage: str) -> None:
    layer = one_layer(*range(6), stage=stage)
    assert choice_of(layer) == [-1] * 3
    assert sketched(layer)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    state["wisemem_memories.default.4.delta_weight"] *= 20
    layer.load_state_dict(state)
    assert choice_of(layer) == [4] * 3


def test_a_write_and_a_swap_of_the_data_are_seen() -> None:
    layer = one_layer(*range(6))
    assert choice_of(layer) == [-1] * 3
    delta_weight = layer._side_memories("default")[4].delta_weight
    delta_weight.mul_(20)
    assert choice_of(layer) == [4] * 3
    delta_weight.data = delta_weight / 20
    assert choice_of(layer) == [-1] * 3
    delta_weight.data = 20 * delta_weight
    assert choice_of(layer) == [4] * 3


@pytest.mark.parametrize(
    "cast",
    [
        lambda layer: layer.half().float(),
        lambda layer: layer.double(),
        lambda layer: layer.to("cpu", torch.bfloat16).float(),
    ],
    ids=["half and back", "double", "bfloat16 and back"],
)
@pytest.mark.parametrize("stage", ["merged", "live"])
def test_a_cast_makes_them_anew(cast: Callable[[WiseLayer], Any], stage: str, made: list[Tensor]) -> None:
    layer = one_layer(*range(6), stage=stage)
    choice_of(layer)
    cast(layer)
    assert not sketched(layer)
    made.clear()
    with torch.no_grad():
        layer(inputs().to(layer.base_layer.weight.dtype))
    assert len(made) == 6


def test_copies_make_their_own(made: list[Tensor]) -> None:
    layer = one_layer(*range(6))
    assert choice_of(layer) == [-1] * 3
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not sketched(twin)
        made.clear()
        assert choice_of(twin) == [-1] * 3
        own = [memory.delta_weight for memory in twin._side_memories("default")]
        assert all(one is other for one, other in zip(made, own, strict=True))
        own[4].mul_(20)
        assert choice_of(twin) == [4] * 3
        assert choice_of(layer) == [-1] * 3


def test_sketches_are_neither_saved_nor_drawn_from_the_global_generator() -> None:
    layer = one_layer(*range(6))
    names, size, random = list(layer.state_dict()), len(pickle.dumps(layer)), torch.get_rng_state()
    choice_of(layer)
    assert sketched(layer)
    assert torch.equal(torch.get_rng_state(), random)
    layer.last_route = None
    assert list(layer.state_dict()) == names
    assert not [name for name, _ in layer.named_buffers() if "sketch" in name]
    assert len(pickle.dumps(layer)) < size + 2000  # some names more, no tensors


def test_a_model_decides_alike_in_every_process() -> None:
    first, second = one_layer(*range(6)), one_layer(*range(6))
    choice_of(first)
    torch.manual_seed(5)
    choice_of(second)
    assert torch.equal(first._sketches._held[0][1], second._sketches._held[0][1])


def test_a_memory_that_is_gone_is_not_kept_alive_nor_mistaken() -> None:
    layer = one_layer(*range(6))
    choice_of(layer)
    for seed in range(10, 40, 6):  # new tensors may get the ids and the addresses of old ones
        layer.install("default", [memory(layer, one) for one in range(seed, seed + 6)])
        choice_of(layer)
        fresh = one_layer(*range(seed, seed + 6))
        choice_of(fresh)
        assert torch.equal(layer._sketches._held[0][1], fresh._sketches._held[0][1])


def test_lists_that_take_turns_are_all_kept_and_none_too_long(made: list[Tensor]) -> None:
    """Several sets of edits in one layer, asked for one at a time or together."""
    cache = sketches.SketchCache()
    law, news = torch.randn(4, 80, 6), torch.randn(5, 80, 6)
    law, news = list(law.unbind()), list(news.unbind())
    for _ in range(2):
        for wanted in (law, news, law + news, news + law):
            stacked = cache.of(wanted)
            assert stacked is cache.of(wanted)
            fresh = sketches.SketchCache().of(wanted)
            assert torch.equal(stacked, fresh)
    assert len(made) == 9 + 2 * (4 + 5 + 9 + 9)  # each once here, and every time in a cache of its own
    held = len(cache._held)
    grown = list(law)
    for _ in range(20):  # a stream of edits appends
        grown.append(torch.randn(80, 6))
        cache.of(grown)
    assert len(cache._held) == held  # the grown list replaced the one that it began with
    news[0].add_(1.0)
    assert torch.equal(cache.of(news), sketches.SketchCache().of(news))
    del wanted
    made.clear()
    news.clear()
    cache.of(law)
    assert len(cache._held) == 2  # of lists with a memory that is gone, or was written to, nothing stays


def test_memories_made_in_inference_mode_are_scored_exactly() -> None:
    layer = one_layer(*range(6))
    expected = choice_of(layer)
    with torch.inference_mode():
        layer.install("default", [memory(layer, seed, FAR) for seed in range(6)])
    assert choice_of(layer) == expected
    assert layer.last_route.exact is None


def test_sketches_made_in_inference_mode_serve_outside_of_it() -> None:
    layer = one_layer(*range(6))
    with torch.inference_mode():
        layer(inputs())
    values = inputs().requires_grad_()
    layer(values).sum().backward()
    assert values.grad is not None


# -- whole models -------------------------------------------------------------------------------------


@pytest.fixture
def wide() -> Any:
    """A tiny Llama that is just wide enough."""
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def near_thresholds(model: Any, n_memories: int) -> WiseLayer:
    """Memories whose thresholds lie between the scores of the PROMPTS, so that these part."""
    layer = with_memories(model, LLAMA, *[NEVER] * n_memories)
    states = layer.memories("default")
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for prompt in PROMPTS:
        logits(model, batch([prompt]))
    handle.remove()
    scores = torch.tensor([[float(routing_activation(a, s.delta_weight).mean()) for s in states] for a in seen])
    epsilons = [between(*column.sort().values[-2:].tolist()) for column in scores.T]
    layer.install("default", [s.with_(epsilon=epsilon) for s, epsilon in zip(states, epsilons, strict=True)])
    return layer


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_a_generation_is_the_one_without_screening(
    wide: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = near_thresholds(wide, 12)
    said = generate(wide, batch(PROMPTS), **options)
    assert sketched(layer)
    choice = last_route(wide).choice.tolist()
    assert len(set(choice)) > 2
    monkeypatch.setattr(router, "SCREEN_FROM", 100)
    assert generate(wide, batch(PROMPTS), **options) == said
    assert last_route(wide).choice.tolist() == choice
    assert last_route(wide).exact is None


@torch.no_grad()
def test_rows_that_were_decided_before_keep_what_is_known_of_their_scores(wide: Any) -> None:
    layer = near_thresholds(wide, 12)
    states = layer.memories("default")  # half of them are farther away, where a later token may or may not need them
    layer.install("default", [s.with_(epsilon=s.epsilon * (1 + i % 2)) for i, s in enumerate(states)])
    would_flip = estimated = 0
    for step in range(16):
        later = 20 + 17 * step  # one more token of row 0, which was decided before; the first one of row 1
        ids = torch.tensor([[5, 6, later], [1, 1, 9]])
        mask = (ids != 1).long()
        cache = wide(input_ids=ids[:, :2], attention_mask=mask[:, :2], use_cache=True).past_key_values
        first = layer.last_route
        assert first.decided.tolist() == [True, False]
        wide(input_ids=ids[:, 2:], attention_mask=mask, past_key_values=cache)
        second = layer.last_route
        assert second is not first
        assert second.choice[0] == first.choice[0]
        assert torch.equal(second.scores[0], first.scores[0])
        exact = [torch.ones_like(r.scores).bool() if r.exact is None else r.exact for r in (first, second)]
        assert torch.equal(exact[0][0], exact[1][0])
        estimated += int((~exact[0][0]).sum())
        logits(wide, batch([[later]]))
        would_flip += bool(layer.last_route.choice[0] != first.choice[0])
    assert would_flip >= 2
    assert estimated >= 8


def test_unrouted_rows_are_the_base_model_bit_for_bit(wide: Any) -> None:
    expected = logits(wide, batch(PROMPTS))
    with_memories(wide, LLAMA, *[NEVER] * 5)
    assert torch.equal(logits(wide, batch(PROMPTS)), expected)
    assert last_route(wide).exact is not None  # screened


# -- decoding -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_decoding_takes_each_product_for_its_own_rows(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = with_memories(llama, LLAMA, ALWAYS, ALWAYS, NEVER)
    scores_of = logits(llama, batch(PROMPTS))  # fills last_route
    assert scores_of.isfinite().all()
    scores = last_route(llama).scores
    states = layer.memories("default")
    # Memory 0 answers the two rows that excite it most; memory 1 answers nobody.
    epsilon = between(*scores[:, 0].sort().values[1:3].tolist())
    layer.install("default", [states[0].with_(epsilon=epsilon), states[1].with_(epsilon=NEVER), states[2]])
    taken: list[int] = []
    product = type(layer)._product

    def counted(self: WiseLayer, x: Tensor, delta_weight: Tensor) -> Tensor:
        taken.append(x.shape[0])
        return product(self, x, delta_weight)

    monkeypatch.setattr(type(layer), "_product", counted)
    generate(llama, batch(PROMPTS), 4)
    assert taken == [4, 4, 4, 2, 2, 2]  # three at prefill, then one a step for two rows
    taken.clear()
    layer.install("default", [state.with_(epsilon=NEVER) for state in states])
    generate(llama, batch(PROMPTS), 4)
    assert taken == [4, 4, 4]
    taken.clear()
    layer.install("default", [states[0].with_(epsilon=ALWAYS)])
    generate(llama, batch(PROMPTS), 4)
    assert taken == [4, 4, 4, 4]


def test_the_memories_are_listed_anew_after_every_change(llama: Any) -> None:
    layer = with_memories(llama, LLAMA, NEVER)
    logits(llama, batch(PROMPTS))
    attach(llama, config_for(LLAMA), "second")
    layer.install("second", [memory(layer, 3), memory(layer, 4)])
    for adapters, names in [
        ("default", ("default/0",)),
        ("second", ("second/0", "second/1")),
        (["second", "default"], ("second/0", "second/1", "default/0")),
    ]:
        layer.set_adapter(adapters)
        logits(llama, batch(PROMPTS))
        assert last_route(llama).memories == names
    twin = copy.deepcopy(llama)
    only_layer(twin).install("second", [memory(layer, 5)])
    logits(twin, batch(PROMPTS))
    logits(llama, batch(PROMPTS))
    assert last_route(twin).memories == ("second/0", "default/0")
    assert last_route(llama).memories == ("second/0", "second/1", "default/0")
    layer.delete_adapter("second")
    logits(llama, batch(PROMPTS))
    assert last_route(llama).memories == ("default/0",)


def test_a_route_knows_its_rows_and_repeats_them_once() -> None:
    scores = torch.tensor([[2.0, 1.0], [1.0, 3.0], [2.0, 0.5]])
    exact = torch.tensor([[True, False], [True, True], [True, False]])
    route = Route(torch.tensor([0, 1, 0]), scores, torch.tensor([0.0, 0.0]), ("a", "b"), exact=exact)
    assert {index: rows.tolist() for index, rows in route.rows.items()} == {0: [0, 2], 1: [1]}
    twice = route.expand(6)
    assert {index: rows.tolist() for index, rows in twice.rows.items()} == {0: [0, 1, 4, 5], 1: [2, 3]}
    assert twice.exact.tolist() == exact.repeat_interleave(2, dim=0).tolist()
    assert route.expand(6) is twice
    everybody = Route(torch.tensor([1, 1]), scores[:2], torch.tensor([0.0, 0.0]), ("a", "b"))
    assert everybody.rows == {1: None}
    assert Route(torch.tensor([-1]), scores[:1], torch.tensor([0.0, 0.0]), ("a", "b")).rows == {}
    # All exact needs no saying.
    assert Route(torch.tensor([-1]), scores[:1], torch.zeros(2), ("a", "b"), exact=exact[1:2]).exact is None


def test_an_unrouted_row_reports_its_best_guess() -> None:
    exact = torch.tensor([[False, True], [False, True]])
    scores = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    route = Route(torch.tensor([-1, -1]), scores, torch.tensor([4.0, 5.0]), ("a", "b"), exact=exact)
    assert route.describe(0) == {"memory": "main", "score": 2.0, "epsilon": 4.0, "exact": False}
    assert route.describe(1) == {"memory": "main", "score": 3.0, "epsilon": 5.0, "exact": True}
