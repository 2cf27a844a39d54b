"""Rows of one batch that ask for different sets of edits: each is answered as if its set were the only one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from conftest import build_model
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    StoppingCriteriaList,
)
from tuner_helpers import ALWAYS, NEVER, PROMPTS, batch, between, generate, logits, memory, only_layer, set_thresholds

import easyedit_wise
from easyedit_wise import WiseConfig, attach, edits_chosen, edits_disabled, last_route, use_edits
from easyedit_wise.easyedit.probe import routed_prompt
from easyedit_wise.evaluation.routed import RoutedPrompt
from easyedit_wise.tuner import mixed, router, sketches
from easyedit_wise.tuner.asked import check_count, checked, of_rows
from easyedit_wise.tuner.memory import MemoryState, SideMemory
from easyedit_wise.tuner.router import Candidate

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

BASE = "__base__"
# Sets of edits that differ in all that a router can differ in; "news" is large enough to be screened.
SETS: dict[str, tuple[int, dict[str, Any]]] = {
    "law": (3, {}),
    "news": (6, {"relative_scores": True, "pooling": "max"}),
    "sport": (1, {"pooling": "last"}),
}
WIDE = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}
MIXES = [
    ["news", BASE, "law", "news"],
    ["law", "sport", "news", BASE],
    ["sport", "law", "law", "news"],
    ["news"] * 4,
    [BASE] * 4,
]
N = 5


def wide_model(architecture: str) -> Any:
    """Two layers, just wide enough to be screened."""
    common = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "initializer_range": 0.2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if architecture == "gpt2":
            return GPT2LMHeadModel(GPT2Config(n_embd=96, n_layer=2, n_head=4, n_positions=64, **common)).eval()
        config = LlamaConfig(
            hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, **common
        )
        return LlamaForCausalLM(config).eval()


def install_sets(model: Any) -> None:
    """Random memories for each set, with thresholds between what the PROMPTS score."""
    layer = only_layer(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router, "SCREEN_FROM", 100)
        for first, (name, (n_memories, _)) in enumerate(SETS.items()):
            states = [memory(layer, 10 * first + i, NEVER) for i in range(n_memories)]
            layer.install(name, states)
            layer.set_adapter(name, inference_mode=True)
            logits(model, batch(PROMPTS))
            columns = layer.last_route.scores.T.sort().values
            epsilons = [between(*column[-3 + i % 2 :][:2].tolist()) for i, column in enumerate(columns)]
            layer.install(name, [s.with_(epsilon=e) for s, e in zip(states, epsilons, strict=True)])


def config(model: Any, name: str) -> WiseConfig:
    target = WIDE["gpt2" if isinstance(model, GPT2LMHeadModel) else "llama"]
    return WiseConfig(target_modules=[target], task_type="CAUSAL_LM", **SETS[name][1])


class Mixed:
    """One model with three sets of edits, by PEFT or in place, behind one face."""

    def __init__(self, architecture: str, way: str) -> None:
        self.base = wide_model(architecture)
        self.way = way
        model = copy.deepcopy(self.base)
        first, *others = SETS
        if way == "peft":
            self.model: Any = get_peft_model(model, config(model, first), adapter_name=first)
            for name in others:
                self.model.add_adapter(name, config(model, name))
        else:
            self.model = model
            for name in SETS:
                attach(model, config(model, name), name)
        self.model.eval()
        install_sets(self.model)
        self.choose(first)

    def choose(self, name: str) -> None:
        if self.way == "peft":
            self.model.set_adapter(name)
        else:
            use_edits(self.model, name)

    @contextmanager
    def only(self, name: str) -> Iterator[None]:
        """One set alone, without any names in the call: what a mixed batch is compared with."""
        if name == BASE:
            with edits_disabled(self.model):
                yield
            return
        before = only_layer(self.model).active_adapters
        self.choose(name)
        yield
        self.choose(before[0])

    def logits(self, inputs: dict[str, Tensor], names: Sequence[str] | None, **more: Any) -> Tensor:
        with torch.no_grad():
            return self.output(inputs, names, **more).logits

    def output(self, inputs: dict[str, Tensor], names: Sequence[str] | None, **more: Any) -> Any:
        if names is None:
            return self.model(**inputs, **more)
        if self.way == "peft":
            return self.model(**inputs, adapter_names=names, **more)
        with edits_chosen(self.model, names):
            return self.model(**inputs, **more)

    def generate(self, inputs: dict[str, Tensor], names: Sequence[str] | None, **options: Any) -> list[list[int]]:
        if names is None:
            return generate(self.model, inputs, N, **options)
        if self.way == "peft":
            return generate(self.model, inputs, N, adapter_names=names, **options)
        with edits_chosen(self.model, names):
            return generate(self.model, inputs, N, **options)


@pytest.fixture(params=["llama-peft", "llama-in place", "gpt2-peft", "gpt2-in place"])
def served(request: pytest.FixtureRequest) -> Mixed:
    return Mixed(*request.param.split("-"))


@pytest.fixture(params=["peft", "in place"])
def llama_served(request: pytest.FixtureRequest) -> Mixed:
    return Mixed("llama", request.param)


def described(row: int) -> Callable[[Any], dict[str, Any]]:
    def of(model: Any) -> dict[str, Any]:
        route = last_route(model)
        return {"memory": "main", "score": None} if route is None else route.describe(row)

    return of


# -- each row is answered as by its set alone -------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mixed_batch_is_each_set_alone(served: Mixed, side: str) -> None:
    inputs = batch(PROMPTS, side)
    alone: dict[str, tuple[Tensor, list[dict[str, Any]]]] = {}
    for name in [*SETS, BASE]:
        with served.only(name):
            alone[name] = served.logits(inputs, None), [described(row)(served.model) for row in range(4)]
    # The sets say different things about most prompts, else nothing is tested.
    assert len({route["memory"] for _, routes in alone.values() for route in routes}) > 5
    for names in MIXES:
        together = served.logits(inputs, names)
        for row, name in enumerate(names):
            expected, routes = alone[name]
            own = inputs["attention_mask"][row].bool()
            assert torch.allclose(together[row][own], expected[row][own], atol=1e-3)
            route = described(row)(served.model)
            assert route["memory"] == routes[row]["memory"]
            if name != BASE:
                assert route["score"] == pytest.approx(routes[row]["score"], rel=1e-4)
                assert route["epsilon"] == routes[row]["epsilon"]
            if routes[row]["memory"] == "main":
                assert torch.equal(together[row], alone[BASE][0][row])
    assert torch.equal(served.logits(inputs, None), alone["law"][0])  # the active set is as it was


def test_what_is_not_edited_is_the_base_model_bit_for_bit(served: Mixed) -> None:
    inputs = batch(PROMPTS)
    expected = logits(served.base, inputs)
    together = served.logits(inputs, [BASE, "law", BASE, "news"])
    assert torch.equal(together[[0, 2]], expected[[0, 2]])
    assert torch.equal(served.logits(inputs, [BASE] * 4), expected)
    assert last_route(served.model) is None


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "uncached": {"use_cache": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams uncached": {"num_beams": 2, "use_cache": False},
    "samples": {"do_sample": True, "num_return_sequences": 3, "top_k": 20, "temperature": 2.0},
    "beam samples": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2, "temperature": 2.0},
    "static": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_mixed_generation_is_each_set_alone(served: Mixed, kind: str) -> None:
    options, inputs = OPTIONS[kind], batch(PROMPTS)
    n_said = options.get("num_return_sequences", 1)
    n_rows = max(options.get("num_beams", 1), n_said)

    def say(names: Sequence[str] | None) -> list[list[int]]:
        torch.manual_seed(3)
        return served.generate(inputs, names, **options)

    alone, chosen = {}, {}
    for name in [*SETS, BASE]:
        with served.only(name):
            alone[name] = say(None)
            route = last_route(served.model)
            chosen[name] = [described(row * n_rows)(served.model)["memory"] for row in range(4)]
            assert route is None or len(route.choice) == 4 * n_rows
    assert len({str(said) for said in alone.values()}) == 4
    for names in MIXES[:3]:
        together = say(names)
        for row, name in enumerate(names):
            assert together[n_said * row : n_said * (row + 1)] == alone[name][n_said * row : n_said * (row + 1)]
            for beam in range(n_rows):
                assert described(row * n_rows + beam)(served.model)["memory"] == chosen[name][row]


def test_beams_named_in_a_generation_config_go_with_their_prompt(llama_served: Mixed) -> None:
    """PEFT's own tuners look for num_beams in the call only."""
    settings = copy.deepcopy(llama_served.model.generation_config)
    settings.update(num_beams=3, max_new_tokens=N, min_new_tokens=N, do_sample=False)
    given = {key: value for key, value in batch(PROMPTS).items() if key != "position_ids"}
    names = MIXES[1]
    with edits_chosen(llama_served.model, names):
        said = llama_served.model.generate(**given, generation_config=settings)[:, -N:].tolist()
    assert said == llama_served.generate(batch(PROMPTS), names, num_beams=3)


def test_padding_that_generate_infers_and_positional_prompts(llama_served: Mixed) -> None:
    names, inputs = MIXES[0], batch(PROMPTS)
    expected = llama_served.generate(inputs, names)
    with edits_chosen(llama_served.model, names):
        said = llama_served.model.generate(inputs["input_ids"], max_new_tokens=N, min_new_tokens=N, do_sample=False)
    assert said[:, -N:].tolist() == expected


@torch.no_grad()
def test_a_loop_of_ones_own_names_the_sets_in_every_call(llama_served: Mixed) -> None:
    names, given = MIXES[1], batch(PROMPTS)
    expected = llama_served.generate(given, names)
    ids, mask, cache = given["input_ids"], given["attention_mask"], DynamicCache(config=llama_served.base.config)
    said = torch.zeros(4, 0, dtype=torch.long)
    for step in range(N):
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        output = llama_served.output(inputs, names, past_key_values=cache, use_cache=True)
        if step == 0:
            decided = last_route(llama_served.model)
        assert last_route(llama_served.model) is decided
        scores = output.logits[:, -1]
        scores[:, 0] = -torch.inf
        ids = scores.argmax(dim=-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=-1)
        said = torch.cat([said, ids], dim=-1)
    assert said.tolist() == expected
    # The same memories, asked for by other rows: a route of other names is not followed.
    inputs = {"input_ids": ids, "attention_mask": mask}
    for others in ([names[i] for i in (1, 0, 2, 3)], None):
        with pytest.raises(ValueError, match=r"among other edits.*without a cache"):
            llama_served.output(inputs, others, past_key_values=cache)


@pytest.mark.parametrize("architecture", ["qwen2", "opt", "gpt_neox"])
def test_other_architectures(architecture: str) -> None:
    """OPT flattens its rows before the layer."""
    targets = {"qwen2": "down_proj", "opt": "fc2", "gpt_neox": "dense_4h_to_h"}
    base = build_model(architecture)
    model = get_peft_model(copy.deepcopy(base), WiseConfig(target_modules=[targets[architecture]])).eval()
    model.add_adapter("other", WiseConfig(target_modules=[targets[architecture]]))
    for seed, layer in enumerate(easyedit_wise.tuner.find_wise_layers(model).values()):
        layer.install("default", [memory(layer, seed)])
        layer.install("other", [memory(layer, 50 + seed)])
    inputs = batch(PROMPTS)
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = generate(model, inputs)
    expected[BASE] = generate(base, inputs)
    names = ["other", BASE, "default", "other"]
    said = generate(model, inputs, adapter_names=names)
    assert said == [expected[name][row] for row, name in enumerate(names)]
    assert len({str(value) for value in expected.values()}) == 3


# -- one name for every row, several sets at once ----------------------------------------------------------


def test_one_name_serves_a_batch_of_any_size(served: Mixed) -> None:
    for rows in (slice(0, 4), slice(1, 3)):
        inputs = batch(PROMPTS[rows])
        with served.only("news"):
            expected = served.logits(inputs, None)
        assert torch.equal(served.logits(inputs, "news"), expected)
        assert last_route(served.model).asked == ("news",) * len(PROMPTS[rows])
        assert torch.equal(served.logits(inputs, BASE), logits(served.base, inputs))


def test_all_sets_can_be_routed_among_together(llama_served: Mixed) -> None:
    inputs, model = batch(PROMPTS), llama_served.model
    use_edits(model, ["law", "news", "sport"])
    llama_served.logits(inputs, None)
    route = last_route(model)
    assert route.memories == tuple(f"{name}/{i}" for name, (n, _) in SETS.items() for i in range(n))
    assert route.asked is None
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "wisemem" in name]
    use_edits(model, ["sport", "law"])
    llama_served.logits(inputs, None)
    assert last_route(model).memories == ("sport/0", "law/0", "law/1", "law/2")
    with edits_chosen(model, "news"):  # loaded, not active
        llama_served.logits(inputs, None)
        assert {name.split("/")[0] for name in last_route(model).memories} == {"news"}
    use_edits(model, "law")
    with llama_served.only("law"):
        expected = llama_served.logits(inputs, None)
    assert torch.equal(llama_served.logits(inputs, None), expected)


def test_of_two_sets_together_the_most_active_memory_answers(llama_served: Mixed) -> None:
    model, layer = llama_served.model, only_layer(llama_served.model)
    set_thresholds(layer, ALWAYS, adapter_name="law")
    layer.install("sport", [memory(layer, 7, ALWAYS, scale=0.6)])
    inputs = batch(PROMPTS)
    use_edits(model, ["law", "sport"])
    llama_served.logits(inputs, None)
    assert [last_route(model).describe(row)["memory"] for row in range(4)] == ["sport/0"] * 4


# -- off is off, names inside names -------------------------------------------------------------------------


def test_switched_off_wins_over_names(served: Mixed) -> None:
    inputs = batch(PROMPTS)
    expected, said = logits(served.base, inputs), generate(served.base, inputs, N)
    with edits_disabled(served.model):
        assert torch.equal(served.logits(inputs, MIXES[0]), expected)
        assert served.generate(inputs, MIXES[0]) == said
    if served.way == "peft":
        with served.model.disable_adapter():
            assert torch.equal(served.logits(inputs, MIXES[0]), expected)
    assert not torch.equal(served.logits(inputs, MIXES[0]), expected)


def test_the_inner_names_count_and_the_outer_ones_come_back(llama_served: Mixed) -> None:
    model, inputs = llama_served.model, batch(PROMPTS)
    with edits_chosen(model, "news"):
        with edits_chosen(model, MIXES[1]):
            logits(model, inputs)
            assert last_route(model).asked == tuple(MIXES[1])
        with pytest.raises(RuntimeError, match="stop"), edits_chosen(model, "sport"):
            raise RuntimeError("stop")
        logits(model, inputs)
        assert last_route(model).asked == ("news",) * 4
    logits(model, inputs)
    assert last_route(model).asked is None


def test_a_module_that_is_saved_whole_follows_the_names() -> None:
    model = wide_model("llama")
    base = copy.deepcopy(model)
    peft_model = get_peft_model(
        model, WiseConfig(target_modules=[WIDE["llama"]], task_type="CAUSAL_LM", modules_to_save=["lm_head"]), "law"
    ).eval()
    peft_model.add_adapter("news", WiseConfig(target_modules=[WIDE["llama"]], task_type="CAUSAL_LM"))
    with torch.no_grad():
        peft_model.base_model.model.lm_head.modules_to_save["law"].weight.add_(0.5)
    inputs = batch(PROMPTS)
    names = ["law", BASE, "news", "law"]
    expected = logits(base, inputs)
    with torch.no_grad():
        together = peft_model(**inputs, adapter_names=names).logits
        assert torch.allclose(together[1:3], expected[1:3], atol=1e-5)
        own = peft_model(**inputs).logits
        assert torch.allclose(together[[0, 3]], own[[0, 3]], atol=1e-5)
        assert not torch.allclose(own, expected, atol=0.1)
    said = generate(peft_model, inputs, adapter_names=names, num_beams=2)
    assert said[1] == generate(base, inputs, num_beams=2)[1]
    assert torch.equal(logits(peft_model, inputs), own)  # no hook stays
    assert not peft_model.base_model.model.lm_head._forward_pre_hooks


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["law", "laws", BASE, "law"], ValueError, "non-existing adapter.*'laws'.*did you mean 'law'.*law, news"),
        ("nowhere", ValueError, "non-existing adapter.*'nowhere'.*law, news, sport"),
        ([], ValueError, "empty"),
        (["law"] * 3, ValueError, "3 adapter names for 4 rows"),
        (["law"] * 8, ValueError, "8 adapter names for 4 rows"),
        (["law", "news"], ValueError, "2 adapter names for 4 rows"),
        (["law", 3, BASE, "law"], TypeError, "a list with a name for each row"),
        (3, TypeError, "a list with a name for each row|not iterable"),  # PEFT looks at them first
    ],
)
def test_names_that_do_not_fit_are_refused_before_anything_runs(
    llama_served: Mixed, names: Any, error: type[Exception], message: str
) -> None:
    inputs = batch(PROMPTS)
    ran: list[nn.Module] = []
    first = llama_served.model.get_submodule(
        ("base_model.model." if llama_served.way == "peft" else "") + "model.embed_tokens"
    )
    first.register_forward_hook(lambda module, *_: ran.append(module))
    with pytest.raises(error, match=message):
        llama_served.logits(inputs, names)
    for options in ({}, {"num_beams": 2}):
        with pytest.raises(error, match=message):
            llama_served.generate(inputs, names, **options)
    assert not ran
    expected = llama_served.logits(inputs, None)  # nothing stays of it
    assert last_route(llama_served.model).asked is None
    with llama_served.only("law"):
        assert torch.equal(llama_served.logits(inputs, None), expected)


def test_a_model_in_training_mode_takes_no_names(llama_served: Mixed) -> None:
    llama_served.model.train()
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        llama_served.logits(batch(PROMPTS), MIXES[0])


def test_a_model_without_edits_has_nothing_to_choose() -> None:
    with pytest.raises(ValueError, match="carries no edits"), edits_chosen(wide_model("llama"), "law"):
        pass
    with pytest.raises(ValueError, match="carries no edits"):
        use_edits(wide_model("llama"), "law")


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["law", "law"], ValueError, "named twice"),
        ([BASE], ValueError, "edits_disabled"),
        (["law", "lore"], ValueError, "'lore'"),
        ([], ValueError, "empty"),
        (None, TypeError, "a list with a name"),
    ],
)
def test_sets_that_cannot_be_used_are_refused(
    llama_served: Mixed, names: Any, error: type[Exception], message: str
) -> None:
    before = list(only_layer(llama_served.model).active_adapters)
    with pytest.raises(error, match=message):
        use_edits(llama_served.model, names)
    assert list(only_layer(llama_served.model).active_adapters) == before


def test_a_layer_by_itself_counts_its_rows() -> None:
    """A module without input_ids: the layer is the first that knows how many rows there are."""
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    base = copy.deepcopy(model)
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    layer = attach(model, WiseConfig(target_modules=["2"]), "one")
    attach(model, WiseConfig(target_modules=["2"]), "two")
    layer.install("one", [memory(layer, 0)])
    layer.install("two", [memory(layer, 1)])
    expected = {BASE: base(values)}
    for name in ("one", "two"):
        use_edits(model, name)
        expected[name] = model(values)
    names = ["two", BASE, "one"]
    with edits_chosen(model, names):
        together = model(values)
        with pytest.raises(ValueError, match="3 adapter names for 2 rows"):
            model(values[:2])
        with pytest.raises(ValueError, match="3 adapter names for 6 rows"):
            model(values.repeat(2, 1))
    for row, name in enumerate(names):
        assert torch.allclose(together[row], expected[name][row])


# -- names by themselves --------------------------------------------------------------------------------------


def test_names_are_checked_and_repeated() -> None:
    assert checked("a", ["a", "b"], training=False) == "a"
    assert checked(["b", BASE], ["a", "b"], training=False) == ("b", BASE)
    assert of_rows("a", 3) == ("a", "a", "a")
    assert of_rows(("a", "b"), 2) == ("a", "b")
    assert of_rows(("a", "b"), 6, repeated=True) == ("a", "a", "a", "b", "b", "b")
    for n_rows, repeated in [(4, False), (3, True), (1, True), (0, True)]:
        with pytest.raises(ValueError, match=f"2 adapter names for {n_rows} rows"):
            check_count(("a", "b"), n_rows, repeated)


def test_a_row_for_which_there_are_no_memories_stays_in_the_main_memory() -> None:
    """PEFT may put adapters into different layers."""
    delta = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    candidates = [Candidate("a/0", SideMemory(MemoryState("merged", delta, None, ALWAYS, 1)), WiseConfig())]
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    base_output = torch.zeros(2, 5, 3)
    route, result = mixed.decide_mixed(x, base_output, candidates, ("a", "b"), torch.nn.functional.linear)
    assert route.choice.tolist() == [0, -1]
    assert torch.equal(result[1], base_output[1])
    assert route.own(1) == []
    assert route.describe(1) == {"memory": "main", "score": None, "epsilon": None, "exact": True}


# -- threads --------------------------------------------------------------------------------------------------


def test_threads_ask_one_model_for_different_sets(llama_served: Mixed) -> None:
    """Each waits for the other after every token, so each decodes in the middle of the other's generation."""
    work = [(PROMPTS[:2], ["news", BASE]), (PROMPTS[2:], "law"), ([PROMPTS[3]], None)]
    expected = [llama_served.generate(batch(prompts), names) for prompts, names in work]
    barrier = threading.Barrier(len(work), timeout=20)
    said: dict[int, list[list[int]]] = {}
    errors: list[BaseException] = []

    def wait(input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        barrier.wait()
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def serve(worker: int) -> None:
        prompts, names = work[worker]
        # Beside others that choose, one that means the active set says so.
        meant = edits_chosen(llama_served.model, None) if names is None else nullcontext()
        try:
            criteria = StoppingCriteriaList([wait])
            with meant:
                said[worker] = llama_served.generate(batch(prompts), names, stopping_criteria=criteria)
        except BaseException as error:
            barrier.abort()
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(worker,)) for worker in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [said[worker] for worker in range(len(work))] == expected
    assert len({str(one) for one in said.values()}) == 3


def test_screened_sets_are_not_sketched_again_when_they_take_turns(
    llama_served: Mixed, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Tensor] = []
    original = sketches.sketch
    monkeypatch.setattr(sketches, "sketch", lambda *args: made.append(args[0]) or original(*args))
    only_layer(llama_served.model)._sketches.clear()
    for names in ("news", MIXES[0], "law", "news", MIXES[2]):
        llama_served.logits(batch(PROMPTS), names)
    assert len(made) == SETS["news"][0]


def test_the_evaluation_reads_a_mixed_route_row_by_row(llama_served: Mixed) -> None:
    """Of a row that no memory answers it names the nearest of its own set's."""
    names = ["law", BASE, "sport", "news"]
    for epsilon in (NEVER, ALWAYS):
        for name in SETS:
            layer = only_layer(llama_served.model)
            layer.install(name, [state.with_(epsilon=epsilon) for state in layer.memories(name)])
        llama_served.logits(batch(PROMPTS), names)
        route = last_route(llama_served.model)
        routed = [routed_prompt(route, row) for row in range(4)]
        assert routed[1] == RoutedPrompt(None, 0.0, 0.0)
        for row in (0, 2, 3):
            memories = [route.memories[index] for index in route.own(row)]
            assert len(memories) == SETS[names[row]][0]
            assert routed[row].memory in ([None] if epsilon == NEVER else memories)
            assert routed[row].score in route.scores[row, route.own(row)].tolist()
