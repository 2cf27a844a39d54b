"""Roads on which a call reaches an edited model: answered rightly, or refused before a token is (docs/serving.md)."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import LAYERS, build_model
from edited_model import Edited, N, decode
from peft import get_peft_model
from torch import Tensor
from transformers import (
    DataCollatorWithFlattening,
    DynamicCache,
    GenerationConfig,
    Mamba2Config,
    Mamba2ForCausalLM,
    StaticCache,
    pipeline,
)
from tuner_helpers import ALWAYS, PROMPTS, batch, config_for, generate, logits, memory, only_layer, set_thresholds

from easyedit_wise import attach, detach, edits_chosen, edits_disabled
from easyedit_wise.routing import LONG_TEXT
from easyedit_wise.tuner import find_wise_layers
from easyedit_wise.tuner.call import Call
from easyedit_wise.tuner.packed_rows import packed_by
from easyedit_wise.tuner.padding import real_by_ending

LLAMA = LAYERS["llama"]
ONE, OTHER = PROMPTS[1], PROMPTS[2]


def ids(*tokens: int) -> Tensor:
    return torch.tensor([list(tokens)])


@pytest.fixture(params=["in place", "peft"])
def served(request: pytest.FixtureRequest, llama: Any) -> Any:
    """A model whose one memory answers everything."""
    model = llama if request.param == "in place" else get_peft_model(llama, config_for(LLAMA, task_type="CAUSAL_LM"))
    if request.param == "in place":
        attach(model, config_for(LLAMA))
    set_thresholds(only_layer(model), ALWAYS)
    return model.eval()


# -- refused -----------------------------------------------------------------------------------------------

Ask = Callable[[], Any]


def packed(model: Any, **more: Any) -> Ask:
    return lambda: model(input_ids=ids(*ONE, *OTHER), **more)


def blocks(dtype: torch.dtype) -> Tensor:
    """The mask of two texts in a row, (1, 1, T, T)."""
    lower = [torch.ones(len(text), len(text)).tril().bool() for text in (ONE, OTHER)]
    allowed = torch.block_diag(*lower).bool()[None, None]
    return allowed if dtype == torch.bool else torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)


def flattened(model: Any) -> Ask:
    """What transformers' own collator makes of two texts, for training without padding."""
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, return_tensors="pt")
    inputs = dict(collator([{"input_ids": ONE}, {"input_ids": OTHER}]))
    del inputs["labels"], inputs["position_ids"]
    return lambda: model(**inputs)


def prefilled(model: Any, prompt: Sequence[int], off: bool = False, copied: bool = False) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    switched_off = off and find_wise_layers(model)
    with torch.no_grad(), edits_disabled(model) if switched_off else nullcontext():
        model(input_ids=ids(*prompt), past_key_values=cache)
    return copy.deepcopy(cache) if copied else cache


def second_turn(model: Any) -> Ask:
    cache = DynamicCache(config=model.config)
    said = model.generate(ids(*ONE), past_key_values=cache, max_new_tokens=3, min_new_tokens=3)
    turn = torch.cat([said, ids(*OTHER)], dim=-1)
    return lambda: model.generate(turn, attention_mask=torch.ones_like(turn), past_key_values=cache, max_new_tokens=3)


def only_new_tokens(model: Any) -> Ask:
    cache = prefilled(model, ONE)
    return lambda: model(input_ids=ids(*OTHER), past_key_values=cache)


def system_prompt(model: Any, copied: bool, n_new: int = 3) -> Ask:
    cache = prefilled(model, ONE, copied=copied)
    prompt = ids(*ONE, *OTHER[:n_new])
    return lambda: model.generate(prompt, past_key_values=cache, max_new_tokens=3)


def filled_while_off(model: Any) -> Ask:
    cache = prefilled(model, ONE, off=True)
    return lambda: model(input_ids=ids(21), past_key_values=cache)


def cut_back(model: Any) -> Ask:
    cache = prefilled(model, ONE)
    cache.crop(3 - len(ONE))
    return lambda: model(input_ids=ids(21), past_key_values=cache)


PACKED, CONTINUOUS = r"several texts into one row.*a row of its own", r"continuous batching.*generate\(\.\.\.\)"
CHUNKED, TURN = r"4 of the prompt's 9 tokens.*prefill_chunk_size out", r"new turn.*whole text.*without a cache"
UNROUTED = r"9 tokens that these edits did not route.*whole text.*without a cache"
RESTARTING = torch.tensor([[*range(len(ONE)), *range(len(OTHER))]])
FOUR_OF_NINE = GenerationConfig(prefill_chunk_size=4, max_new_tokens=3)
REFUSED: dict[str, tuple[str, Callable[[Any], Ask]]] = {
    "positions that restart": (PACKED, lambda m: packed(m, position_ids=RESTARTING)),
    "positions from two on": (PACKED, lambda m: packed(m, position_ids=RESTARTING + 2)),
    "a block-diagonal mask": (PACKED, lambda m: packed(m, attention_mask=blocks(torch.bool))),
    "an additive block-diagonal mask": (PACKED, lambda m: packed(m, attention_mask=blocks(torch.float))),
    "a mask that numbers texts": (PACKED, lambda m: packed(m, attention_mask=ids(*[1] * len(ONE), *[2] * len(OTHER)))),
    "cu_seq_lens_q": (PACKED, lambda m: packed(m, cu_seq_lens_q=torch.tensor([0, len(ONE), len(ONE) + len(OTHER)]))),
    "seq_idx": (PACKED, lambda m: packed(m, seq_idx=ids(*[0] * len(ONE), *[1] * len(OTHER)))),
    "the flattening collator": (PACKED, flattened),
    "packed prompts in generate": (
        PACKED,
        lambda m: lambda: m.generate(ids(*ONE, *OTHER), position_ids=RESTARTING, max_new_tokens=3),
    ),
    "generate_batch": (CONTINUOUS, lambda m: lambda: m.generate_batch(inputs=PROMPTS)),
    "a manager of requests": (CONTINUOUS, lambda m: lambda: m.init_continuous_batching()),
    "a paged generate": (CONTINUOUS, lambda m: lambda: m.generate(ids(*ONE), cache_implementation="paged")),
    "a paged cache": (CONTINUOUS, lambda m: lambda: m(input_ids=ids(*ONE), cache=object())),
    "chunks": (CHUNKED, lambda m: lambda: m.generate(**said_to(ONE), prefill_chunk_size=4, max_new_tokens=3)),
    "chunks by configuration": (CHUNKED, lambda m: lambda: m.generate(ids(*ONE), generation_config=FOUR_OF_NINE)),
    "chunks of a padded batch": (CHUNKED, lambda m: lambda: m.generate(**padded(), generation_config=FOUR_OF_NINE)),
    "a second turn": (TURN, second_turn),
    "only the new tokens": (TURN, only_new_tokens),
    "a system prompt's cache": (TURN, lambda m: system_prompt(m, copied=False)),
    "a system prompt's cache, one more token": (TURN, lambda m: system_prompt(m, copied=False, n_new=1)),
    "a copy of a system prompt's cache": (UNROUTED, lambda m: system_prompt(m, copied=True)),
    "filled while the edits were off": (UNROUTED, filled_while_off),
    "cut back into the prompt": ("cut back to 3 tokens, but a text of 9", cut_back),
}


def padded() -> dict[str, Tensor]:
    return {name: value for name, value in batch(PROMPTS).items() if name != "position_ids"}


def said_to(prompt: Sequence[int]) -> dict[str, Tensor]:
    return {"input_ids": ids(*prompt), "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}


@pytest.mark.parametrize("road", REFUSED)
@torch.no_grad()
def test_what_would_be_answered_wrongly_is_refused_before_anything_runs(served: Any, road: str) -> None:
    message, prepare = REFUSED[road]
    ask = prepare(served)
    ran: list[Any] = []
    served.get_input_embeddings().register_forward_hook(lambda module, *_: ran.append(module))
    with pytest.raises(ValueError, match=f"(?s){message}.*edits_disabled"):
        ask()
    assert not ran
    # Nothing stays of it: the next question is answered as ever.
    assert generate(served, batch([ONE]), N) == generate(copy.deepcopy(served), batch([ONE]), N)


# Without edits there is nothing to answer wrongly. (Continuous batching takes a minute on a CPU.)
@pytest.mark.parametrize("road", [road for road, (message, _) in REFUSED.items() if message is not CONTINUOUS])
@torch.no_grad()
def test_with_the_edits_off_the_same_is_the_base_models(llama: Any, road: str) -> None:
    _, prepare = REFUSED[road]
    expected = prepare(copy.deepcopy(llama))()
    attach(llama, config_for(LLAMA))
    set_thresholds(only_layer(llama), ALWAYS)
    with edits_disabled(llama):
        said = prepare(llama)()
    assert torch.equal(*(one if isinstance(one, Tensor) else one.logits for one in (said, expected)))


def test_continuous_batching_is_as_it_was_without_edits(llama: Any) -> None:
    attach(llama, config_for(LLAMA))
    set_thresholds(only_layer(llama), ALWAYS)
    with edits_disabled(llama):
        assert type(llama.init_continuous_batching()).__name__ == "ContinuousBatchingManager"
    copied = pickle.loads(pickle.dumps(copy.deepcopy(llama)))
    with pytest.raises(ValueError, match="continuous batching"):
        copied.init_continuous_batching()
    set_thresholds(only_layer(copied))  # no memories: nothing can be answered wrongly
    assert copied.init_continuous_batching() is not None
    detach(llama)
    assert "init_continuous_batching" not in llama.__dict__
    assert not [name for name in llama.__dict__ if "wise" in name]


def test_a_model_in_training_takes_packed_rows(llama: Any) -> None:
    """There the live memory answers everything."""
    model = get_peft_model(llama, config_for(LLAMA, task_type="CAUSAL_LM")).train()
    packed(model, position_ids=RESTARTING)()


@pytest.mark.parametrize("names", [["other"], "__base__"])
@torch.no_grad()
def test_other_names_than_a_cache_was_routed_by_are_refused(llama: Any, names: Any) -> None:
    for name in ("default", "other"):
        attach(llama, config_for(LLAMA), name)
        only_layer(llama).install(name, [memory(only_layer(llama), 0, ALWAYS)])
    with edits_chosen(llama, "default"):
        cache = prefilled(llama, ONE)
        step = llama(input_ids=ids(21), past_key_values=cache).logits
    if names == "__base__":  # the unedited model has no route that could be wrong
        assert not torch.equal(llama(input_ids=ids(21), past_key_values=cache, adapter_names=names).logits, step)
        return
    with pytest.raises(ValueError, match=r"among other edits.*without a cache"):
        llama(input_ids=ids(21), past_key_values=cache, adapter_names=names)


# -- right ---------------------------------------------------------------------------------------------------


@pytest.fixture
def llama_edited(llama: Any) -> Edited:
    return Edited(llama, LLAMA)


@pytest.mark.parametrize("hair", [-1e-3, 1e-3])
@torch.no_grad()
def test_a_static_cache_filled_by_hand_keeps_its_route(llama_edited: Edited, hair: float) -> None:
    model = llama_edited.model
    for prompt, score in zip(PROMPTS, llama_edited.scores, strict=True):
        set_thresholds(llama_edited.layer, score * (1 + hair))
        cache, tokens, said = StaticCache(model.config, max_cache_len=32), list(prompt), []
        for step in range(N):
            positions = torch.arange(len(prompt) + step)[-len(tokens) :]
            output = model(input_ids=ids(*tokens), position_ids=positions[None], past_key_values=cache)
            output.logits[0, -1, 0] = -torch.inf
            tokens = [int(output.logits[0, -1].argmax())]
            said += tokens
        assert said == llama_edited.greedy(prompt, hair < 0) == decode(model, prompt)


def test_a_pipeline_answers_each_prompt_as_alone(llama: Any, tok: Any) -> None:
    texts = ["The capital of France is", "Water is made of hydrogen and", "Once upon a time there was a small town by"]
    prompts = [tok(text)["input_ids"] for text in texts]
    edited = Edited(llama, LLAMA)
    scores = [float(edited.token_scores(prompt).mean()) for prompt in prompts]
    set_thresholds(edited.layer, sorted(scores)[1] * 0.999)
    routed = [score >= sorted(scores)[1] for score in scores]
    asked = pipeline("text-generation", model=edited.model, tokenizer=tok, batch_size=3)
    options = {"max_new_tokens": N, "min_new_tokens": N, "do_sample": False, "return_tensors": True}
    for row, (said,) in enumerate(asked(texts, **options)):
        assert said["generated_token_ids"][-N:] == edited.greedy(prompts[row], routed[row])
    assert sorted(routed) == [False, True, True]


@pytest.mark.parametrize("pooling", ["loudest", "mean", "last"])
@pytest.mark.parametrize("pad", [0, 1])
@torch.no_grad()
def test_a_batch_without_a_mask_is_scored_as_each_row_alone(pad: int, pooling: str) -> None:
    """As lm-evaluation-harness asks: padded on the right, with id 0, from some 32 tokens on."""
    model = build_model("llama")
    layer = attach(model, config_for(LLAMA, pooling=pooling, relative_scores=True))
    set_thresholds(layer, ALWAYS)
    texts = [*PROMPTS, [7 + step % 300 for step in range(LONG_TEXT + 8)]]
    alone, scores = [], []
    for text in texts:
        alone.append(model(input_ids=ids(*text)).logits[0])
        scores.append(float(layer.last_route.scores))
    length = max(map(len, texts))
    together = torch.tensor([text + [pad] * (length - len(text)) for text in texts])
    set_thresholds(layer, sorted(scores)[2] * 1.001)  # some rows are routed
    expected = [model(input_ids=ids(*text)).logits[0] for text in texts]
    output = model(input_ids=together).logits
    assert layer.last_route.scores[:, 0].tolist() == pytest.approx(scores, rel=1e-4)
    assert sorted(set(layer.last_route.choice.tolist())) == [-1, 0]
    for row, text in enumerate(texts):
        assert torch.allclose(output[row, : len(text)], expected[row], atol=1e-4)
    # Something else than what counts padding as text.
    given = {"input_ids": together, "attention_mask": torch.ones_like(together)}
    model(**given)
    assert layer.last_route.scores[:, 0].tolist() != pytest.approx(scores, rel=1e-4)


def test_what_counts_as_padding_without_a_mask() -> None:
    rows = torch.tensor([[5, 0, 6, 7], [5, 6, 0, 0], [0, 0, 0, 0], [5, 2, 2, 2]])
    real = real_by_ending(rows, {0, 2})
    assert real.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert real_by_ending(rows[1:2], {0}) is None
    assert real_by_ending(rows, set()) is None


@torch.no_grad()
def test_an_ending_is_text_in_a_single_row_and_in_generate(llama_edited: Edited) -> None:
    """A mask of ones given to generate does not reach the model; 0 is "!" in GPT-2's vocabulary."""
    model, layer = llama_edited.model, llama_edited.layer
    texts = [[5, 6, 0, 0], [9, 10, 11, 0]]
    scores = []
    for text in texts:
        logits(model, {"input_ids": ids(*text)})
        scores.append(float(layer.last_route.scores))
        assert scores[-1] == pytest.approx(float(llama_edited.token_scores(text).mean()), rel=1e-4)
    mask = torch.ones(2, 4, dtype=torch.long)
    model.generate(torch.tensor(texts), attention_mask=mask, max_new_tokens=2)
    assert layer.last_route.scores[:, 0].tolist() == pytest.approx(scores, rel=1e-4)


def causal(n_tokens: int, n_padding: int = 0, window: int | None = None, chunk: int | None = None) -> Tensor:
    mask = torch.ones(1, 1, n_tokens, n_tokens, dtype=torch.bool).tril()
    mask[..., :n_padding] = False
    places = torch.arange(n_tokens)
    if chunk is not None:
        mask &= places[:, None] // chunk == places // chunk
    return mask if window is None else mask.triu(1 - window)


def positions(*rows: Sequence[int]) -> Call:
    return Call(shape=(len(rows), len(rows[0])), position_ids=torch.tensor(rows))


@pytest.mark.parametrize(
    "call",
    [
        positions([0, 1, 2, 3, 4]),
        positions([0, 0, 0, 1, 2]),  # padding on the left, as ours
        positions([1, 1, 0, 1, 2]),  # as transformers numbers it
        positions([1, 0, 1, 2, 3]),
        positions([0, 1, 2, 2, 2]),  # on the right
        positions([0, 1, 2, 1, 1], [0, 1, 2, 3, 4]),
        positions([0, 1, 2, 7, 8]),  # a gap is no beginning
        positions([5, 6, 7, 8, 9]),
        positions([0, 1]),
        Call(shape=(1, 6), position_ids=torch.tensor([[[0, 1, 2, 1, 2, 3]]] * 3)),  # a picture's three
        Call(shape=(2, 3), borders={"cu_seq_lens_q": torch.tensor([0, 3, 6])}),  # a text in each of two rows
        Call(shape=(1, 3), borders={"seq_idx": torch.zeros(1, 3)}),
        Call(shape=None),
        Call(shape=(1, 5), attention_mask=torch.tensor([[0, 0, 1, 1, 1]])),
        Call(shape=(1, 5), attention_mask=causal(5, n_padding=2)),
        Call(shape=(1, 5), attention_mask=causal(5, window=2)),
        Call(shape=(1, 5), attention_mask={"full_attention": causal(5), "chunked_attention": causal(5, chunk=2)}),
        Call(shape=(1, 5), attention_mask={"full_attention": None, "chunked_attention": causal(5, chunk=2)}),
    ],
)
def test_what_is_no_packed_row(call: Call) -> None:
    assert packed_by(call) is None


def test_what_is_a_packed_row_beside_a_picture() -> None:
    """Qwen-VL gives the text's own positions before the picture's three."""
    rows = torch.tensor([[[0, 1, 2, 0, 1, 2]], *[[[0, 1, 2, 3, 4, 5]]] * 3])
    assert packed_by(Call(shape=(1, 6), position_ids=rows)) == "position_ids that start again within a row"
    assert packed_by(Call(shape=(1, 6), position_ids=rows.flip(0))) is None


@torch.no_grad()
def test_a_state_space_models_loop_keeps_its_route() -> None:
    """Its cache is called cache_params, and counts no tokens."""
    config = Mamba2Config(
        vocab_size=400, hidden_size=32, state_size=8, num_hidden_layers=3, num_heads=4, head_dim=16, n_groups=1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mamba2ForCausalLM(config).eval()
    layer = attach(model, config_for("backbone.layers[1].mixer.out_proj.weight"))
    set_thresholds(layer, ALWAYS)
    output = model(input_ids=ids(*ONE), use_cache=True)
    decided = layer.last_route
    model(input_ids=ids(21), cache_params=output.cache_params, use_cache=True)
    assert layer.last_route is decided
    with pytest.raises(ValueError, match=TURN):
        model(input_ids=ids(21, 22), cache_params=output.cache_params, use_cache=True)
    assert generate(model, {"input_ids": ids(*ONE)}, N)[0][:1] == [int(output.logits[0, -1].argmax())]
