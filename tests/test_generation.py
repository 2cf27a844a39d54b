"""Routes through generation: decided by the prompt, kept while decoding, one for each row, beam, cache and thread."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import LAYERS
from edited_model import Edited, N, decode, decoding
from torch import Tensor
from transformers import DynamicCache, StoppingCriteriaList
from tuner_helpers import (
    ALWAYS,
    NEVER,
    PROMPTS,
    batch,
    generate,
    logits,
    logits_with,
    memory,
    score_alone,
    set_thresholds,
    share_out,
)

from easyedit_wise import last_route
from easyedit_wise.tuner.call import cache_length
from easyedit_wise.tuner.route import Route

LLAMA = LAYERS["llama"]


@pytest.fixture
def edited(any_model: tuple[Any, str]) -> Edited:
    return Edited(*any_model)


@pytest.fixture
def llama_edited(llama: Any) -> Edited:
    return Edited(llama, LLAMA)


# -- the prompt decides, once -------------------------------------------------------------------------


@pytest.mark.parametrize("hair", [-1e-3, 1e-3])
def test_the_prompts_route_is_kept_where_a_router_in_each_step_would_flip(edited: Edited, hair: float) -> None:
    flips_with_cache = flips_without = 0
    for prompt, score in zip(PROMPTS, edited.scores, strict=True):
        epsilon = score * (1 + hair)
        routed = hair < 0
        set_thresholds(edited.layer, epsilon)
        expected = edited.greedy(prompt, routed)
        for use_cache in (True, False):
            assert generate(edited.model, batch([prompt]), N, use_cache=use_cache) == [expected]
            assert last_route(edited.model).choice.tolist() == [0 if routed else -1]
        assert decode(edited.model, prompt) == expected
        # What a router in each step would do: with a cache it sees one token, without one all of them.
        tokens = edited.token_scores([*prompt, *expected[:-1]])
        alone = tokens[len(prompt) :] > epsilon
        together = tokens.cumsum(0)[len(prompt) :] / torch.arange(len(prompt) + 1, len(tokens) + 1) > epsilon
        flips_with_cache += int((alone != routed).any())
        flips_without += int((together != routed).any())
    assert flips_with_cache >= 2
    assert flips_without >= 1


def test_routed_generation_says_something_else(edited: Edited) -> None:
    """Else the comparisons in this file would hold without any routing."""
    for prompt in PROMPTS:
        assert edited.greedy(prompt, True) != edited.greedy(prompt, False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=["cached", "uncached", "static"],
)
def test_a_batch_of_different_routes_is_each_row_alone(edited: Edited, options: dict[str, Any]) -> None:
    routed = edited.split()
    assert sorted(routed) == [False, False, True, True]
    expected = [edited.greedy(prompt, one) for prompt, one in zip(PROMPTS, routed, strict=True)]
    assert generate(edited.model, batch(PROMPTS), N, **options) == expected
    assert last_route(edited.model).choice.tolist() == [0 if one else -1 for one in routed]
    assert torch.allclose(last_route(edited.model).scores[:, 0], torch.tensor(edited.scores), rtol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_that_pick_different_memories_keep_them(edited: Edited, use_cache: bool) -> None:
    """WISE-Retrieve while decoding."""
    states = share_out(edited.model)
    said = generate(edited.model, batch(PROMPTS), N, use_cache=use_cache)
    choice = last_route(edited.model).choice.tolist()
    assert len(set(choice)) >= 3
    for row, prompt in enumerate(PROMPTS):
        if choice[row] >= 0:
            edited.delta_weight = states[choice[row]].delta_weight
        assert said[row] == edited.greedy(prompt, choice[row] >= 0)


def test_a_batch_in_a_loop_is_each_row_alone(edited: Edited) -> None:
    routed = edited.split()
    *_, said = decoding(edited.model, PROMPTS)
    assert said == [edited.greedy(prompt, one) for prompt, one in zip(PROMPTS, routed, strict=True)]


def test_padding_that_generate_infers_is_left_out(llama_edited: Edited) -> None:
    routed = llama_edited.split()
    said = generate(llama_edited.model, {"input_ids": batch(PROMPTS)["input_ids"]}, N)
    assert said == [llama_edited.greedy(prompt, one) for prompt, one in zip(PROMPTS, routed, strict=True)]


def test_inputs_embeds_and_keyword_prompts_generate_the_same(llama_edited: Edited) -> None:
    routed = llama_edited.split()
    expected = [llama_edited.greedy(prompt, one) for prompt, one in zip(PROMPTS, routed, strict=True)]
    inputs = batch(PROMPTS)
    embeds = llama_edited.model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad():
        said = llama_edited.model.generate(
            inputs_embeds=embeds,
            attention_mask=inputs["attention_mask"],
            max_new_tokens=N,
            min_new_tokens=N,
            do_sample=False,
        )
        positional = llama_edited.model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=N, min_new_tokens=N
        )
    assert said[:, -N:].tolist() == expected
    assert positional[:, -N:].tolist() == expected


def test_a_loop_that_asks_for_tuples_keeps_its_route(llama_edited: Edited) -> None:
    for prompt, score in zip(PROMPTS, llama_edited.scores, strict=True):
        set_thresholds(llama_edited.layer, score * 0.999)
        assert decode(llama_edited.model, prompt, return_dict=False) == llama_edited.greedy(prompt, True)


@pytest.mark.parametrize("chunk", [9, 100])
def test_one_chunk_is_the_whole_prompt(llama_edited: Edited, chunk: int) -> None:
    routed = llama_edited.split()
    expected = [llama_edited.greedy(prompt, one, 3) for prompt, one in zip(PROMPTS, routed, strict=True)]
    assert generate(llama_edited.model, batch(PROMPTS), 3, prefill_chunk_size=chunk) == expected


@torch.no_grad()
def test_what_one_call_decided_a_later_one_leaves(llama_edited: Edited) -> None:
    """Read token by token: rows that begin in the first, second and third call; each ends before the next begins."""
    model, layer = llama_edited.model, llama_edited.layer
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([[5, 1, 1], [1, 9, 1], [1, 1, 40]])
    mask = (ids != 1).long()
    scores = []
    for start in range(3):
        model(input_ids=ids[:, start, None], attention_mask=mask[:, : start + 1], past_key_values=cache)
        scores.append(layer.last_route.scores[:, 0].tolist())
    first, second, third = scores
    assert first[0] > 0
    assert first[1:] == [0, 0]
    assert second[0] == first[0]
    assert second[1] > 0 == second[2]
    assert third[:2] == second[:2]
    assert third[2] > 0
    assert layer.last_route.decided is None


def test_a_second_generation_decides_anew(edited: Edited) -> None:
    routed = edited.split()
    rows = [routed.index(True), routed.index(False), routed.index(True)]
    for row in rows:
        assert generate(edited.model, batch([PROMPTS[row]]), N) == [edited.greedy(PROMPTS[row], routed[row])]


def test_guided_decoding_runs(llama_edited: Edited) -> None:
    """Guidance asks the model for the last token alone beside the prompt: it belongs to the same generation."""
    row = llama_edited.split().index(True)
    guided = generate(llama_edited.model, batch([PROMPTS[row]]), N, guidance_scale=1.5)
    assert guided == generate(llama_edited.model, batch([PROMPTS[row]]), N, guidance_scale=1.5, use_cache=False)
    assert torch.allclose(last_route(llama_edited.model).scores, torch.tensor([[llama_edited.scores[row]]]))


# In assisted generation the first call holds the prompt and a draft, the next ones several tokens each.
DRAFTS: dict[str, Callable[[Edited], dict[str, Any]]] = {
    "another model": lambda edited: {"assistant_model": edited.base},
    "an edited model": lambda edited: {"assistant_model": copy.deepcopy(edited.model)},
    "its own first layers": lambda edited: {"assistant_early_exit": 1},
    "the prompt": lambda edited: {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("drafter", DRAFTS)
@pytest.mark.parametrize("hair", [-1e-3, 1e-3])
def test_a_draft_is_not_the_prompt(llama_edited: Edited, drafter: str, hair: float) -> None:
    """The prompts begin to repeat themselves, so that there is something to look up."""
    prompts = [[*prompt, *prompt[:2]] for prompt in PROMPTS]
    for prompt in prompts:
        score = score_alone(llama_edited.base, LLAMA, prompt, llama_edited.delta_weight)
        set_thresholds(llama_edited.layer, score * (1 + hair))
        expected = llama_edited.greedy(prompt, hair < 0)
        options = DRAFTS[drafter](llama_edited)
        assert generate(llama_edited.model, batch([prompt]), N, **options) == [expected]
        assert last_route(llama_edited.model).choice.tolist() == [0 if hair < 0 else -1]


def test_an_exception_ends_the_generation(llama_edited: Edited) -> None:
    routed = llama_edited.split()
    row, other = routed.index(True), routed.index(False)

    def stop(*_: Any, **__: Any) -> bool:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        generate(llama_edited.model, batch([PROMPTS[row]]), N, stopping_criteria=StoppingCriteriaList([stop]))
    # Outside of a generation every call without a cache is a new query.
    assert torch.equal(
        logits(llama_edited.model, batch([PROMPTS[other]])), logits(llama_edited.base, batch([PROMPTS[other]]))
    )
    assert decode(llama_edited.model, PROMPTS[other]) == llama_edited.greedy(PROMPTS[other], False)


def test_a_generation_inside_another_is_its_own(llama_edited: Edited) -> None:
    """A stopping criterion that asks the same model about something else."""
    routed = llama_edited.split()
    row, other = routed.index(True), routed.index(False)
    inner = []

    def ask(input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        inner.append(generate(llama_edited.model, batch([PROMPTS[other]]), 2)[0])
        return torch.zeros(len(input_ids), dtype=torch.bool)

    said = generate(llama_edited.model, batch([PROMPTS[row]]), N, stopping_criteria=StoppingCriteriaList([ask]))
    assert said == [llama_edited.greedy(PROMPTS[row], True)]
    assert inner == [llama_edited.greedy(PROMPTS[other], False, 2)] * N


# -- beams and samples --------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_keep_the_route_of_their_prompt(edited: Edited, use_cache: bool) -> None:
    routed = edited.split()
    options = {"num_beams": 3, "num_return_sequences": 2, "use_cache": use_cache}
    together = generate(edited.model, batch(PROMPTS), N, **options)
    assert last_route(edited.model).choice.tolist() == [0 if one else -1 for one in routed for _ in range(3)]
    for row, prompt in enumerate(PROMPTS):
        set_thresholds(edited.layer, ALWAYS if routed[row] else NEVER)
        alone = generate(edited.model, batch([prompt]), N, **options)
        assert together[2 * row : 2 * row + 2] == alone
        # Beams do explore: they are not the greedy answer repeated.
        assert alone[0] != alone[1]
        if not routed[row]:
            assert alone == generate(edited.base, batch([prompt]), N, **options)


def test_samples_keep_the_route_of_their_prompt(edited: Edited) -> None:
    routed = edited.split()
    options = {"do_sample": True, "num_return_sequences": 3, "top_k": 20, "temperature": 2.0}

    def sample(model: Any, **more: Any) -> list[list[int]]:
        torch.manual_seed(7)
        return generate(model, batch(PROMPTS), N, **options, **more)

    said = sample(edited.model)
    assert last_route(edited.model).choice.tolist() == [0 if one else -1 for one in routed for _ in range(3)]
    assert said == sample(edited.model, use_cache=False)
    base = sample(edited.base)
    for row, one in enumerate(routed):
        rows = slice(3 * row, 3 * row + 3)
        # Rows share the random numbers of a step, so that an unrouted one draws what it draws in the base model.
        assert (said[rows] == base[rows]) is not one
        assert len({tuple(tokens) for tokens in said[rows]}) > 1


@torch.no_grad()
def test_a_sampling_loop_keeps_its_route(llama_edited: Edited) -> None:
    """Tokens far from greedy ones: the route still is the prompt's."""
    model, row = llama_edited.model, 1
    set_thresholds(llama_edited.layer, llama_edited.scores[row] * 0.999)
    tokens, cache = list(PROMPTS[row]), None
    for step in range(8):
        ids = torch.tensor([tokens if cache is None else tokens[-1:]])
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        expected = logits_with(llama_edited.base, LLAMA, llama_edited.delta_weight, batch([tokens]))
        assert torch.allclose(output.logits[0, -1], expected[0, -1], atol=1e-3)
        tokens.append(50 + 37 * step)


# -- caches -------------------------------------------------------------------------------------------


def test_interleaved_caches_keep_their_own_routes(edited: Edited) -> None:
    routed = edited.split()
    loops = [decoding(edited.model, [prompt]) for prompt in PROMPTS]
    last = [[], [], [], []]
    for _ in range(N):
        for row, loop in enumerate(loops):
            (last[row],) = next(loop)
        generate(edited.model, batch([PROMPTS[1]]), 2)  # a generation in between leaves them alone
    assert last == [edited.greedy(prompt, one) for prompt, one in zip(PROMPTS, routed, strict=True)]


@torch.no_grad()
def test_a_cache_with_other_rows_is_refused(llama_edited: Edited) -> None:
    model, layer = llama_edited.model, llama_edited.layer
    set_thresholds(layer, ALWAYS)
    inputs = batch([prompt[:3] for prompt in PROMPTS])
    cache = model(**inputs, use_cache=True).past_key_values
    decided = layer.last_route
    step = torch.tensor([[21], [22], [23], [24]])
    model(input_ids=step, past_key_values=cache)
    assert layer.last_route is decided  # followed
    cache.batch_select_indices(torch.tensor([0, 2, 3]))
    with pytest.raises(ValueError, match=r"for other rows.*without a cache"):
        model(input_ids=step[:3], past_key_values=cache)


@torch.no_grad()
def test_a_repeated_cache_repeats_its_routes(llama_edited: Edited) -> None:
    """Prefill once, then branch: two rows become six, as beams do."""
    model, layer = llama_edited.model, llama_edited.layer
    routed = llama_edited.split()
    rows = [routed.index(True), routed.index(False)]
    prompts = [PROMPTS[row] for row in rows]
    inputs = batch(prompts)
    cache = model(**inputs, use_cache=True).past_key_values
    decided = layer.last_route
    cache.batch_repeat_interleave(3)
    mask = torch.cat([inputs["attention_mask"].repeat_interleave(3, dim=0), torch.ones(6, 1, dtype=torch.long)], dim=-1)
    step = torch.tensor([[21], [22], [23], [24], [25], [26]])
    positions = mask.sum(dim=-1, keepdim=True) - 1
    output = model(input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    assert layer.last_route is decided
    for row in range(6):
        tokens = batch([[*prompts[row // 3], int(step[row])]])
        if row < 3:
            expected = logits_with(llama_edited.base, LLAMA, llama_edited.delta_weight, tokens)
        else:
            expected = logits(llama_edited.base, tokens)
        assert torch.allclose(output[row, -1], expected[0, -1], atol=1e-3)


@torch.no_grad()
def test_an_emptied_cache_decides_anew(llama_edited: Edited) -> None:
    model, routed = llama_edited.model, llama_edited.split()
    cache = DynamicCache(config=model.config)
    for row, prompt in enumerate(PROMPTS):
        model(input_ids=torch.tensor([prompt]), past_key_values=cache, use_cache=True)
        assert last_route(model).choice.tolist() == [0 if routed[row] else -1]
        cache.crop(-cache.get_seq_length())
        assert cache.get_seq_length() == 0


@torch.no_grad()
@pytest.mark.parametrize("hair", [-1e-3, 1e-3])
def test_a_generation_goes_on_with_its_cache(llama_edited: Edited, hair: float) -> None:
    """What was said last is the one token that the cache lacks."""
    model, n_flips = llama_edited.model, 0
    for prompt, score in zip(PROMPTS, llama_edited.scores, strict=True):
        set_thresholds(llama_edited.layer, score * (1 + hair))
        expected = llama_edited.greedy(prompt, hair < 0)
        options = {"past_key_values": DynamicCache(config=model.config), "max_new_tokens": 3, "min_new_tokens": 3}
        first = model.generate(torch.tensor([prompt]), do_sample=False, **options)
        second = model.generate(first, do_sample=False, **options)
        assert second[0, len(prompt) :].tolist() == expected
        n_flips += (float(llama_edited.token_scores([*prompt, *expected])[len(prompt) + 2]) > score) != (hair < 0)
    assert n_flips


@torch.no_grad()
def test_a_cache_under_the_name_of_transformers_5_24_keeps_its_route(llama_edited: Edited) -> None:
    """There the argument is ``cache``; this release's models ignore it, so the scope alone is asked."""
    layer, scope = llama_edited.layer, llama_edited.layer.routing_scope
    llama_edited.split()
    cache = llama_edited.model(input_ids=torch.tensor([PROMPTS[0]]), use_cache=True).past_key_values
    decided = layer.last_route
    enter = next(iter(llama_edited.model._forward_pre_hooks.values()))
    enter(llama_edited.model, (), {"input_ids": torch.tensor([[21]]), "cache": cache})
    assert scope.held_route(layer, 1) is decided
    scope.end(None)


@torch.no_grad()
def test_memories_that_changed_since_are_refused(llama_edited: Edited) -> None:
    model, layer = llama_edited.model, llama_edited.layer
    output = model(input_ids=torch.tensor([PROMPTS[0]]), use_cache=True)
    layer.install("default", [memory(layer, 0, NEVER), memory(layer, 1, ALWAYS)])
    with pytest.raises(ValueError, match=r"among other edits.*without a cache.*edits_disabled\(model\)"):
        model(input_ids=torch.tensor([[21]]), past_key_values=output.past_key_values)


def test_routes_die_with_their_cache(llama_edited: Edited) -> None:
    scope = llama_edited.layer.routing_scope
    with torch.no_grad():
        output = llama_edited.model(input_ids=torch.tensor([PROMPTS[0]]), use_cache=True)
    assert len(scope._by_cache) == 1
    del output
    assert len(scope._by_cache) == 0


def test_cache_length_of_caches_and_tuples() -> None:
    assert cache_length(None) == 0
    assert cache_length(DynamicCache()) == 0
    assert cache_length(()) == 0
    assert cache_length(((torch.zeros(2, 4, 7, 8), torch.zeros(2, 4, 7, 8)),)) == 7


def test_a_route_expands_to_multiples_only() -> None:
    route = Route(torch.tensor([0, -1]), torch.tensor([[2.0], [1.0]]), torch.tensor([1.5]), ("default/0",))
    assert route.active == (0,)
    assert route.expand(2) is route
    assert route.expand(6).choice.tolist() == [0, 0, 0, -1, -1, -1]
    assert route.expand(6).scores.tolist() == [[2.0]] * 3 + [[1.0]] * 3
    assert route.expand(3) is None
    assert route.expand(1) is None
    assert route.decided is None


def test_a_route_knows_which_rows_are_still_to_be_decided() -> None:
    scores, epsilon = torch.tensor([[2.0], [0.0]]), torch.tensor([1.5])
    route = Route(torch.tensor([0, -1]), scores, epsilon, ("default/0",), decided=torch.tensor([True, False]))
    assert route.expand(4).decided.tolist() == [True, True, False, False]
    assert Route(route.choice, scores, epsilon, route.memories, decided=torch.tensor([True, True])).decided is None


# -- threads ------------------------------------------------------------------------------------------


def test_threads_on_one_model_do_not_meet(llama_edited: Edited) -> None:
    """Both threads wait for each other after every token, so each generates in the middle of the other's."""
    routed = llama_edited.split()
    expected = [llama_edited.greedy(prompt, one) for prompt, one in zip(PROMPTS, routed, strict=True)]
    barrier = threading.Barrier(2, timeout=20)
    said: dict[int, list[list[int]]] = {}
    errors: list[BaseException] = []

    def wait(input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        barrier.wait()
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def serve(worker: int, rows: list[int]) -> None:
        try:
            inputs = batch([PROMPTS[row] for row in rows])
            criteria = StoppingCriteriaList([wait])
            said[worker] = generate(llama_edited.model, inputs, N, stopping_criteria=criteria)
        except BaseException as error:
            barrier.abort()
            errors.append(error)

    for one, other in [([0], [1]), ([2, 3], [1, 0]), ([0, 1, 2], [3])]:
        threads = [threading.Thread(target=serve, args=(i, rows)) for i, rows in enumerate((one, other))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert said == {0: [expected[row] for row in one], 1: [expected[row] for row in other]}
