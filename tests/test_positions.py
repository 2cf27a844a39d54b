"""Models that have positions for few tokens: what is put beside an edit is cut, what is asked for is not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import LAYERS, build_model, build_tokenizer
from editing_helpers import SpyTokenizer, only_layer, settings, stream_on, traces
from peft import LoraConfig, get_peft_model
from torch import Tensor

import easyedit_wise.editing.recorder as recorder_module
from easyedit_wise import WISEHyperParams, apply_wise_to_model, last_route
from easyedit_wise.easyedit.covariance import second_moments_of_samples, second_moments_of_texts
from easyedit_wise.editing.contexts import behind
from easyedit_wise.editing.continuation import continued, likeliest, with_room
from easyedit_wise.editing.requests import EditRequest, left_padded
from easyedit_wise.evaluation.asking import Query, TextTooLongError, greedy_answers, predict_texts, teacher_forced
from easyedit_wise.evaluation.final import FactRecord, collect_baseline
from easyedit_wise.journal.calls import close_journal, resume
from easyedit_wise.journal.journal import Journal
from easyedit_wise.positions import position_limit, shortened
from easyedit_wise.tuner.memory import MemoryState

N = 40
COMMON = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
OF_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, **COMMON}
OF_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": N,
    **COMMON,
}
OF_OPT = {"ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32, **COMMON}


def of(name: str, **config: Any) -> Callable[[], Any]:
    """A model by the beginning of its classes' names."""
    suffix = "LMHeadModel" if hasattr(transformers, f"{name}LMHeadModel") else "ForCausalLM"
    classes = getattr(transformers, f"{name}{suffix}"), getattr(transformers, f"{name}Config")
    return lambda: classes[0](classes[1](**config)).eval()


LIMITED = {
    "gpt2": of("GPT2", n_positions=N, **OF_GPT),
    "opt": of("OPT", hidden_size=32, num_hidden_layers=2, max_position_embeddings=N, **OF_OPT),
    "gptj": of("GPTJ", n_positions=N, rotary_dim=4, **OF_GPT),
    "codegen": of("CodeGen", n_positions=N, n_ctx=N, rotary_dim=4, **OF_GPT),
    "gpt_bigcode": of("GPTBigCode", n_positions=N, **OF_GPT),
    "biogpt": of("BioGpt", **OF_LLAMA),
    "openai": of("OpenAIGPT", n_positions=N, **OF_GPT),
    "ctrl": of("CTRL", n_positions=N, dff=64, **OF_GPT),
    "mpt": of("Mpt", d_model=32, n_layers=2, n_heads=4, max_seq_len=N, **COMMON),
}
UNLIMITED = {
    "llama": of("Llama", num_key_value_heads=2, **OF_LLAMA),
    "mistral": of("Mistral", num_key_value_heads=2, sliding_window=16, **OF_LLAMA),
    "gpt_neox": of("GPTNeoX", **OF_LLAMA),
    "bloom": of("Bloom", hidden_size=32, n_layer=2, n_head=4, **COMMON),
    "xglm": of("XGLM", d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, max_position_embeddings=N, **COMMON),
}


@torch.no_grad()
def reads(model: Any, n_tokens: int) -> bool:
    ids = torch.arange(n_tokens)[None] % 300 + 2
    try:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", list(LIMITED))
def test_the_limit_is_what_the_model_reads(name: str) -> None:
    model = LIMITED[name]()
    assert position_limit(model) == N
    assert reads(model, N)
    assert not reads(model, N + 1)


@pytest.mark.parametrize("name", list(UNLIMITED))
def test_computed_positions_and_windows_are_no_limit(name: str) -> None:
    model = UNLIMITED[name]()
    assert position_limit(model) is None
    assert reads(model, 3 * N)


def test_a_wrapper_and_an_adapter_do_not_hide_the_limit(tok: Any) -> None:
    wrapped = get_peft_model(LIMITED["gpt2"](), LoraConfig(target_modules=["wpe", "c_proj"], r=2))
    assert position_limit(wrapped) == N

    class Editor(torch.nn.Module):  # as EasyEdit's GRACE: a config that is no model's
        def __init__(self) -> None:
            super().__init__()
            self.config = object()
            self.model = LIMITED["opt"]()

    assert position_limit(Editor()) == N
    assert position_limit(torch.nn.Linear(2, 2)) is None


def test_the_positions_of_an_images_patches_are_no_limit() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.LlamaConfig(num_key_value_heads=2, **OF_LLAMA)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(image_size=32, patch_size=8, **vision),
            text_config=text,
            image_token_index=5,
        )
    ).eval()
    assert any("position_embedding" in name for name, _ in model.named_modules())
    assert position_limit(model) is None
    assert reads(model, 3 * N)


def by_words(text: str) -> int:
    return len(text.split())


def test_a_text_is_cut_at_its_beginning() -> None:
    text = "one two three four five"
    assert shortened(text, lambda one: by_words(one) - 5) == text
    assert shortened(text, lambda one: by_words(one) - 2) == "four five"
    assert shortened("abcdef", lambda one: len(one) - 4) == "cdef"
    assert shortened("ab cd ", lambda one: len(one) - 4) == "cd "
    assert shortened(text, lambda one: 1) == ""


def test_a_prefix_gives_way_and_the_prompt_stays() -> None:
    assert behind("p q", "x y", excess=lambda text: by_words(text) - 4) == "p q. x y"
    assert behind("p q", "x y", excess=lambda text: by_words(text) - 3) == "q. x y"
    assert behind("p q", "x y", fixed=True, excess=lambda text: by_words(text) - 3) == "q x y"
    assert behind("p q", "x y", excess=lambda text: by_words(text) - 2) == "x y"
    assert behind("p q", "x y", excess=lambda text: 9) == "x y"
    assert behind("", "x y") == ". x y"


# -- what the model writes -------------------------------------------------------------------------


def test_what_a_model_writes_ends_with_its_positions(tok: Any) -> None:
    model = LIMITED["gpt2"]()
    texts = [list(range(5, 5 + length)) for length in (N, N - 3, 9)]
    ids, mask = left_padded(tok, texts, torch.device("cpu"))
    made = continued(model, ids, mask, 6, likeliest, limit=N)
    room = with_room(mask, 6, N)
    assert made.shape == room.shape == (3, N + 6)
    assert room.sum(dim=-1).tolist() == [N, N, 15]
    for row, text in enumerate(texts):
        alone = continued(model, torch.tensor([text]), torch.ones(1, len(text), dtype=torch.long), 6, likeliest, N)
        assert alone.shape[1] == min(N, len(text) + 6)
        assert made[row][room[row].bool()].tolist() == alone[0].tolist()
    unlimited = UNLIMITED["llama"]()
    assert torch.equal(
        continued(unlimited, ids, mask, 6, likeliest), continued(unlimited, ids, mask, 6, likeliest, limit=1000)
    )


# -- edits ----------------------------------------------------------------------------------------

SMALL = {
    "gpt2": lambda n: of("GPT2", n_positions=n, initializer_range=0.2, **{**OF_GPT, "n_layer": 3})(),
    "opt": lambda n: of(
        "OPT", hidden_size=32, num_hidden_layers=3, max_position_embeddings=n, init_std=0.2, **OF_OPT
    )(),
    "gptj": lambda n: of("GPTJ", n_positions=n, rotary_dim=4, initializer_range=0.2, **{**OF_GPT, "n_layer": 3})(),
}
INNER = {**LAYERS, "gptj": "transformer.h[1].mlp.fc_out.weight"}


def small(architecture: str, n_positions: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SMALL[architecture](n_positions)


def hparams_of(preset: str, architecture: str, **changes: Any) -> WISEHyperParams:
    parameter = INNER[architecture]
    if preset == "paper":
        return settings(parameter, n_contexts=3, context_length=10, act_ratio=0.9, **changes)
    few = {"n_iter": 3} if preset == "upstream" else {"n_iter": 3, "n_contexts": 6, "save_freq": 2, "merge_freq": 2}
    return WISEHyperParams.from_preset(preset, [parameter], **few, **changes)


def of_length(tok: Any, n_tokens: int, target: str = "Rome") -> dict[str, Any]:
    """A request of so many tokens, prompt and target."""
    prompt = "The capital of France is"
    words = cycle(("by", "the", "sea", "and", "town", "in", "the", "old", "book"))
    while len(tok(f"{prompt} {target}")["input_ids"]) < n_tokens:
        prompt = f"{next(words)} {prompt}"
    while len(tok(f"{prompt} {target}")["input_ids"]) > n_tokens:
        prompt = prompt[1:].lstrip()
    assert len(tok(f"{prompt} {target}")["input_ids"]) == n_tokens
    return {"prompt": prompt, "target_new": target, "subject": "France"}


def memories(model: Any) -> list[MemoryState]:
    return only_layer(model).memories("default")


def same(one: Any, other: Any) -> bool:
    pairs = zip(memories(one), memories(other), strict=True)
    return all(torch.equal(a.delta_weight, b.delta_weight) and a.epsilon == b.epsilon for a, b in pairs)


def fires(model: Any, tok: Any, prompt: str) -> bool:
    with torch.no_grad():
        model(input_ids=torch.tensor([tok(prompt)["input_ids"]]))
    route = last_route(model)
    return route is not None and int(route.choice[0]) >= 0


@pytest.mark.parametrize("preset", ["default", "margin", "paper", "upstream"])
@pytest.mark.parametrize(("architecture", "n_positions"), [("gpt2", 48), ("gpt2", 128), ("opt", 48), ("opt", 128)])
def test_edits_of_any_length_that_the_model_can_read(
    architecture: str, n_positions: int, preset: str, tok: Any
) -> None:
    model = small(architecture, n_positions)
    lengths = [12, n_positions - 14, n_positions - 1, n_positions]
    asked = [of_length(tok, length) for length in lengths]
    asked[1]["loc_prompt"] = of_length(tok, n_positions + 30, "Oslo")["prompt"]
    apply_wise_to_model(model, tok, asked, hparams_of(preset, architecture))
    assert len(stream_on(model).held) == len(asked)
    for state in memories(model):
        assert bool(state.delta_weight.isfinite().all())
        assert bool(state.delta_weight.any())
    if preset == "default":
        assert all(fires(model, tok, one["prompt"]) for one in asked)


def test_rotary_tables_are_kept_to_as_well(tok: Any) -> None:
    model = small("gptj", 48)
    apply_wise_to_model(model, tok, [of_length(tok, 48), of_length(tok, 20)], hparams_of("default", "gptj"))
    assert len(stream_on(model).held) == 2


@pytest.mark.parametrize("preset", ["default", "margin"])
def test_edits_of_different_lengths_in_one_batch(preset: str, tok: Any) -> None:
    asked = [of_length(tok, 48), of_length(tok, 12, "Oslo"), of_length(tok, 47, "Lyon"), of_length(tok, 30, "Madrid")]
    model = small("gpt2", 48)
    apply_wise_to_model(model, tok, asked, hparams_of(preset, "gpt2", batch_size=2))
    assert len(stream_on(model).held) == 4


@pytest.mark.parametrize("preset", ["default", "paper", "upstream"])
def test_prompt_and_target_that_the_model_cannot_read_are_one_clear_error(
    preset: str, tok: Any, tmp_path: Path
) -> None:
    model = small("gpt2", 48)
    before = traces(model)
    asked = [of_length(tok, 20), of_length(tok, 49)]
    wanted = r"the prompt '.*' and its target 'Rome' are 49 tokens, but this model has positions for 48: shorten"
    hparams = hparams_of(preset, "gpt2", journal=str(tmp_path / "journal"))
    with pytest.raises(ValueError, match=wanted):
        apply_wise_to_model(model, tok, asked, hparams)
    assert traces(model) == before
    with Journal(tmp_path / "journal") as journal:
        assert journal.calls() == journal.edits() == []
    apply_wise_to_model(model, tok, asked[:1], hparams_of(preset, "gpt2"))
    held = [one.with_(delta_weight=one.delta_weight.clone()) for one in memories(model)]
    with pytest.raises(ValueError, match=wanted):
        apply_wise_to_model(model, tok, asked, hparams_of(preset, "gpt2"))
    for one, other in zip(memories(model), held, strict=True):
        assert torch.equal(one.delta_weight, other.delta_weight)
    assert len(stream_on(model).held) == 1


def test_a_journal_goes_on_on_a_model_with_few_positions(tok: Any, tmp_path: Path) -> None:
    asked = [of_length(tok, length, target) for length, target in ((48, "Rome"), (20, "Oslo"), (47, "Lyon"))]
    hparams = hparams_of("default", "gpt2", journal=str(tmp_path / "journal"))
    model, resumed = small("gpt2", 48), small("gpt2", 48)
    apply_wise_to_model(model, tok, asked, hparams)
    close_journal(model)
    resume(resumed, tok, tmp_path / "journal")
    close_journal(resumed)
    assert same(model, resumed)


@pytest.mark.parametrize("preset", ["default", "upstream"])
def test_of_an_irrelevant_prompt_the_end_counts(preset: str, tok: Any) -> None:
    """What cannot be asked as a whole is cut as all other texts that an edit is quiet on."""
    long = of_length(tok, 90, "Oslo")["prompt"]
    end = shortened(long, lambda text: len(tok(text)["input_ids"]) - 48)
    assert end != long
    made = []
    for irrelevant in (long, end):
        made.append(small("gpt2", 48))
        asked = {**of_length(tok, 20), "loc_prompt": irrelevant}
        apply_wise_to_model(made[-1], tok, [asked], hparams_of(preset, "gpt2"))
    assert same(*made)


def test_a_chat_template_stays_whole(tok: Any) -> None:
    chatty = build_tokenizer()
    chatty.chat_template = "<<{% for message in messages %}{{ message['content'] }}{% endfor %}>>"
    model = small("gpt2", 48)
    hparams = hparams_of("default", "gpt2", use_chat_template=True)
    asked = {**of_length(tok, 30), "loc_prompt": of_length(tok, 90, "Oslo")["prompt"]}
    apply_wise_to_model(model, chatty, [asked], hparams)
    room = stream_on(model)._recorder.room
    assert room.of("short") == "<<short>>"
    cut = room.of(asked["loc_prompt"])
    assert 40 < len(tok(cut)["input_ids"]) <= 48
    assert cut.startswith("<<")
    assert cut.endswith("The capital of France is>>")


def test_a_prefix_is_cut_and_every_context_holds_its_edit(tok: Any) -> None:
    spy, model = SpyTokenizer(tok), small("gpt2", 48)
    asked = of_length(tok, 40)
    apply_wise_to_model(model, spy, [asked], hparams_of("paper", "gpt2"))
    recorder = stream_on(model)._recorder
    request = EditRequest.from_easyedit(asked)
    contexts = [text.removesuffix(" Rome") for text in spy.encoded if text.endswith(f"{request.prompt} Rome")]
    fitting = {one for one in contexts if len(tok(f"{one} Rome")["input_ids"]) <= 48}
    prefixes = recorder.prefixes()
    cut = [one.removesuffix(f". {request.prompt}") for one in fitting if one != request.prompt]
    assert any(prefix.endswith(one) and prefix != one for one in cut for prefix in prefixes)
    group = recorder.contexts([[request.prompt, f"{cut[0]}. {request.prompt}"]], [request]).batch
    assert int(group.attention_mask.sum(dim=-1).max()) <= 48
    assert group.target_mask.sum(dim=-1).unique().numel() == 1


def test_where_nothing_has_to_be_cut_a_limit_changes_nothing(tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [of_length(tok, 12), of_length(tok, 30, "Oslo")]
    made = [build_model("gpt2") for _ in range(2)]
    apply_wise_to_model(made[0], tok, asked, hparams_of("default", "gpt2", batch_size=2))
    monkeypatch.setattr(recorder_module, "position_limit", lambda model: None)
    apply_wise_to_model(made[1], tok, asked, hparams_of("default", "gpt2", batch_size=2))
    assert same(*made)


def test_beyond_max_position_embeddings_a_rotary_model_is_edited_as_ever(tok: Any) -> None:
    asked = [of_length(tok, 70), of_length(tok, 12, "Oslo")]
    made = []
    for n_positions in (N, 512):
        made.append(build_model("llama"))
        made[-1].config.max_position_embeddings = n_positions
        apply_wise_to_model(made[-1], tok, asked, hparams_of("default", "llama"))
    assert same(*made)


def test_other_editors_statistics_are_taken_of_texts_that_the_model_can_read(tok: Any) -> None:
    model, module = LIMITED["gpt2"](), "transformer.h.1.mlp.c_proj"
    _, n_sampled = second_moments_of_samples(model, tok, [module])
    assert n_sampled == 128 * N
    text = of_length(tok, 3 * N + 7)["prompt"]
    _, n_read = second_moments_of_texts(model, tok, [module], [text])
    assert n_read == len(tok(text)["input_ids"])


# -- evaluation -----------------------------------------------------------------------------------


def record(tok: Any, n_tokens: int) -> FactRecord:
    asked = of_length(tok, n_tokens)
    return FactRecord(asked["prompt"], asked["target_new"], "France", ["Rome is"], Query("Water is", "gold"))


def test_a_record_that_the_model_cannot_read_is_named(tok: Any) -> None:
    model = LIMITED["gpt2"]()
    records = [record(tok, N), record(tok, N + 1)]
    collect_baseline(model, tok, records[:1])
    wanted = rf"Record 2 \('.*' -> 'Rome'\): The text '.*', .* {N + 1} tokens, .* positions for {N}: shorten"
    with pytest.raises(ValueError, match=wanted):
        collect_baseline(model, tok, records)
    with pytest.raises(TextTooLongError, match=f"has {N + 2} tokens"):
        teacher_forced(model, tok, [Query(of_length(tok, N + 2)["prompt"], "Rome")])
    long = of_length(tok, 2 * N)["prompt"]
    for ask in (greedy_answers, predict_texts):
        with pytest.raises(TextTooLongError, match=f"positions for {N}"):
            ask(model, tok, ["short one", long])
    assert predict_texts(UNLIMITED["llama"](), tok, [long])


def test_an_answer_ends_with_the_models_positions(tok: Any) -> None:
    model = LIMITED["gpt2"]()
    model.generation_config.eos_token_id = 399  # what ends an answer is the limit
    prompts = [of_length(tok, length)["prompt"] for length in (20, N + 1, N - 2, 21)]
    together = greedy_answers(model, tok, prompts, max_new_tokens=9)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = tok(prompt)["input_ids"]
        expected: list[int] = []
        while len(expected) < 9 and len(ids) <= N:
            with torch.no_grad():
                expected.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            ids = [*ids, expected[-1]]
        assert answer == tok.decode(expected, skip_special_tokens=True)


def test_the_tensor_is_cut_with_the_text(tok: Any) -> None:
    """What stands behind a full text's limit is no token of it."""
    mask: Tensor = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert with_room(mask, 2, 4).tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert with_room(mask, 2, None).tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
