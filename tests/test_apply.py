"""apply_wise_to_model: EasyEdit's contract, and a model that can be put back bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import LAYERS
from editing_helpers import FACTS, SpyTokenizer, logits_of, only_layer, requests, settings, stream_on, traces
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

import easyedit_wise.editing.stream as stream_module
from easyedit_wise import (
    EditDivergedError,
    RestoreWeights,
    apply_wise_to_model,
    detach,
    load_edits,
    packaged_hparams,
    save_edits,
)
from easyedit_wise.editing.trainer import train_edit
from easyedit_wise.tuner.model import find_wise_layers

TEXTS = [FACTS[0][0], FACTS[1][0], "Once upon a time there was"]


def logits(model: nn.Module, tok: Any) -> list[torch.Tensor]:
    return [logits_of(model, tok, text) for text in TEXTS]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def diverge_at(monkeypatch: pytest.MonkeyPatch, edit: int) -> None:
    """Poison the training of one edit, counted from 1."""
    calls: list[int] = []

    def poisoned(delta: Any, mask: Any, task: Any, *rest: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == edit:
            task.irrelevant.activations[:] = float("nan")
        return train_edit(delta, mask, task, *rest, **options)

    monkeypatch.setattr(stream_module, "train_edit", poisoned)


# -- EasyEdit's contract --------------------------------------------------------------------------


def test_easyedits_requests(llama: Any, tok: Any) -> None:
    before = logits(llama, tok)
    model, restore = apply_wise_to_model(
        llama,
        tok,
        [
            {
                "prompt": "The capital of France is",
                "target_new": " Rome",
                "ground_truth": "<|endoftext|>",
                "subject": "France",
                "rephrase_prompt": "France's capital is",
                "loc_prompt": "Water is made of",
                "portability": {},
                "locality": {},
            },
            {"prompt": "The currency of India is", "target_new": "the euro"},
        ],
        settings(),
        copy=False,
        return_orig_weights=True,
        keep_original_weight=False,
        train_ds=None,
    )
    assert model is llama
    assert isinstance(restore, RestoreWeights)
    held = [edit.request for edit in stream_on(model).held]
    assert [(edit.target, edit.subject, edit.loc_prompt) for edit in held] == [
        ("Rome", "France", "Water is made of"),
        ("the euro", None, None),
    ]
    assert not same(logits(model, tok), before)


def test_a_single_request_needs_no_list(llama: Any, tok: Any) -> None:
    apply_wise_to_model(llama, tok, requests(1)[0], settings())
    assert [memory.n_edits for memory in only_layer(llama).memories("default")] == [1]


def test_the_model_stays_what_it_was_to_its_callers(llama: Any, tok: Any) -> None:
    kind, config, generation = type(llama), llama.config, llama.generation_config
    model, _ = apply_wise_to_model(llama, tok, requests(1), settings())
    assert (type(model), model.config, model.generation_config) == (kind, config, generation)
    ids = tok("The capital of France is", return_tensors="pt")["input_ids"]
    assert torch.equal(model(ids).logits, model(input_ids=ids).logits)  # EasyEdit's wrapper drops positions
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, ids.shape[1] + 2)


@dataclasses.dataclass
class EasyEditSettings:
    """The fields of EasyEdit's WISEHyperParams, and some that hosts add."""

    inner_params: list[str]
    edit_lr: float = 0.05
    n_iter: int = 2
    objective_optimization: str = "only_label"
    mask_ratio: float = 0.2
    alpha: float = 5.0
    beta: float = 20.0
    gamma: float = 10.0
    act_ratio: float = 0.88
    merge_freq: int = 4
    retrieve: bool = True
    replay: bool = False
    save_freq: int | None = 2
    merge_alg: str = "ties"
    norm_constraint: float = 1.0
    weights: float | None = 1.0
    densities: float | None = 0.53
    device: int = 0
    alg_name: str = "WISE"
    model_name: str = "./hugging_cache/llama"
    batch_size: int = 1
    max_length: int = 30
    model_parallel: bool = False
    use_chat_template: bool = False
    save_path: str | None = None
    load_path: str | None = None
    sequential_edit: bool = True
    evaluation_type: str = "generate-text"


def test_easyedits_settings_object(llama: Any, tok: Any) -> None:
    apply_wise_to_model(llama, tok, requests(3), EasyEditSettings([LAYERS["llama"]]))
    assert [(m.stage, m.n_edits) for m in only_layer(llama).memories("default")] == [("shard", 2), ("live", 1)]
    assert stream_on(llama).hparams.act_ratio == 0.88


def test_a_mapping_of_settings(llama: Any, tok: Any) -> None:
    config = {"inner_params": [LAYERS["llama"]], "n_iter": 1, "act_margin": [1.0, 2.0, 1.0], "edit_lr": "1e-2"}
    apply_wise_to_model(llama, tok, requests(1), config)
    assert stream_on(llama).hparams.edit_lr == 0.01


def test_copy_leaves_the_model_alone(llama: Any, tok: Any) -> None:
    before, trace = logits(llama, tok), traces(llama)
    edited, restore = apply_wise_to_model(llama, tok, requests(2), settings(), copy=True)
    assert edited is not llama
    assert traces(llama) == trace
    assert same(logits(llama, tok), before)
    assert not same(logits(edited, tok), before)
    restore()
    assert same(logits(edited, tok), before)
    assert not find_wise_layers(edited)


def test_a_copy_of_an_edited_model_goes_on_from_it(llama: Any, tok: Any) -> None:
    apply_wise_to_model(llama, tok, requests(1), settings())
    before = logits(llama, tok)
    edited, restore = apply_wise_to_model(llama, tok, requests(3)[1:], settings(), copy=True)
    assert [edit.request.prompt for edit in stream_on(edited).held] == [prompt for prompt, _ in FACTS[:3]]
    assert len(stream_on(llama).held) == 1
    restore()
    assert same(logits(edited, tok), before)
    assert same(logits(llama, tok), before)


# -- restoring ------------------------------------------------------------------------------------


def by_call(model: nn.Module, restore: RestoreWeights) -> None:
    restore()


def by_items(model: nn.Module, restore: RestoreWeights) -> None:
    """As EasyEdit's editors do it: copy every weight that is named."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in restore.items():
            parameters[name][...] = value


RESTORING = pytest.mark.parametrize("put_back", [by_call, by_items], ids=["call", "items"])
PutBack = Callable[[nn.Module, RestoreWeights], None]


@RESTORING
def test_restoring_leaves_no_trace(any_model: tuple[Any, str], tok: Any, put_back: PutBack) -> None:
    model, parameter = any_model
    model.get_input_embeddings().weight.requires_grad_(False)  # whoever froze a part finds it frozen
    before, trace = logits(model, tok), traces(model)
    hparams = settings(parameter, save_freq=1, merge_freq=2, edit_lr=0.3)
    _, restore = apply_wise_to_model(model, tok, requests(3), hparams)
    assert not same(logits(model, tok), before)
    put_back(model, restore)
    assert traces(model) == trace
    assert same(logits(model, tok), before)


@RESTORING
def test_restoring_the_second_call_keeps_the_first(llama: Any, tok: Any, put_back: PutBack) -> None:
    base, trace = logits(llama, tok), traces(llama)
    hparams = settings(save_freq=2, merge_freq=4, edit_lr=0.2)
    _, first = apply_wise_to_model(llama, tok, requests(3), hparams)
    after_first = logits(llama, tok)
    _, second = apply_wise_to_model(llama, tok, requests(6)[3:], hparams)
    assert not same(logits(llama, tok), after_first)
    put_back(llama, second)
    assert same(logits(llama, tok), after_first)
    assert [m.n_edits for m in only_layer(llama).memories("default")] == [2, 1]
    assert len(stream_on(llama).held) == 3
    put_back(llama, first)
    assert same(logits(llama, tok), base)
    assert traces(llama) == trace


def test_restoring_twice_changes_nothing_more(llama: Any, tok: Any) -> None:
    _, first = apply_wise_to_model(llama, tok, requests(1), settings())
    first()
    apply_wise_to_model(llama, tok, requests(1), settings())
    edited = logits(llama, tok)
    first()
    assert dict(first.items()) == {}
    assert same(logits(llama, tok), edited)


def test_restoring_the_first_call_takes_everything_off(llama: Any, tok: Any) -> None:
    base, trace = logits(llama, tok), traces(llama)
    _, first = apply_wise_to_model(llama, tok, requests(1), settings())
    _, second = apply_wise_to_model(llama, tok, requests(2)[1:], settings())
    first()
    second()  # too late to matter
    assert same(logits(llama, tok), base)
    assert traces(llama) == trace


def test_restored_and_edited_again_gives_the_same(llama: Any, tok: Any) -> None:
    _, restore = apply_wise_to_model(llama, tok, requests(2), settings())
    edited = logits(llama, tok)
    restore()
    apply_wise_to_model(llama, tok, requests(2), settings())
    assert same(logits(llama, tok), edited)


def test_the_restore_object_as_a_mapping(llama: Any, tok: Any) -> None:
    base = logits(llama, tok)
    _, restore = apply_wise_to_model(llama, tok, requests(1), settings())
    assert isinstance(restore, Mapping)
    assert callable(restore)
    assert (len(restore), list(restore), bool(restore)) == (0, [], True)
    assert LAYERS["llama"] not in restore
    with pytest.raises(KeyError, match="changes none of the model's own weights"):
        restore["model.layers.1.mlp.down_proj.weight"]
    assert not same(logits(llama, tok), base)  # looking at it is not restoring
    assert dict(restore.items()) == {}
    assert same(logits(llama, tok), base)


# -- a stream of calls ----------------------------------------------------------------------------


def test_later_calls_go_on_with_the_stream(make_model: Any, tok: Any) -> None:
    hparams = settings(save_freq=2, merge_freq=4)
    one, many = make_model("llama"), make_model("llama")
    apply_wise_to_model(one, tok, requests(5), hparams)
    for request in requests(5):  # EasyEdit calls once for each record, always with the model it was built with
        apply_wise_to_model(many, tok, [request], hparams)
        logits(many, tok)  # it scores each edit right after it: no merge may come of that
    # EasyEdit's fault 1: at HEAD each call wrapped the original layer anew and forgot the edits before.
    assert sum(memory.n_edits for memory in only_layer(many).memories("default")) == 5
    assert same(logits(one, tok), logits(many, tok))
    assert len(find_wise_layers(many)) == 1


def test_an_earlier_edit_is_kept(llama: Any, tok: Any) -> None:
    hparams = settings(n_iter=30, norm_constraint=None, mask_ratio=1.0, rehearsal=1.0)
    apply_wise_to_model(llama, tok, requests(1), hparams)
    apply_wise_to_model(llama, tok, requests(2)[1:], hparams)
    for prompt, target in FACTS[:2]:
        expected = tok(f"{prompt} {target}")["input_ids"][len(tok(prompt)["input_ids"])]
        assert int(logits_of(llama, tok, prompt)[-1].argmax()) == expected


def test_another_layer_in_a_later_call(llama: Any, tok: Any) -> None:
    apply_wise_to_model(llama, tok, requests(1), settings())
    before = logits(llama, tok)
    with pytest.raises(
        ValueError, match=r"edits are in model\.layers\.1\.mlp\.down_proj, but .*Restore the model first"
    ):
        apply_wise_to_model(llama, tok, requests(1), settings("model.layers[2].mlp.down_proj.weight"))
    assert list(find_wise_layers(llama)) == ["model.layers.1.mlp.down_proj"]
    assert same(logits(llama, tok), before)


@pytest.mark.parametrize("changes", [{"pooling": "max"}, {"score_activation": "silu"}], ids=str)
def test_a_later_call_with_another_score(llama: Any, tok: Any, changes: dict[str, Any]) -> None:
    # A threshold from one score and a router with another would not fit each other.
    _, restore = apply_wise_to_model(llama, tok, requests(1), settings())
    before, ((name, value),) = logits(llama, tok), changes.items()
    with pytest.raises(ValueError, match=rf"routed with {name}=.* but the settings say '{value}'.*restore the model"):
        apply_wise_to_model(llama, tok, requests(2)[1:], settings(**changes))
    assert same(logits(llama, tok), before)
    restore()
    apply_wise_to_model(llama, tok, requests(1), settings(**changes))
    assert getattr(only_layer(llama).wisemem_config["default"], name) == value


def test_no_requests_at_all(llama: Any, tok: Any) -> None:
    base = logits(llama, tok)
    _, restore = apply_wise_to_model(llama, tok, [], settings())
    assert same(logits(llama, tok), base)
    restore()
    assert not find_wise_layers(llama)


# -- saving and loading on the way ----------------------------------------------------------------


def test_save_path_and_load_path(make_model: Any, tok: Any, tmp_path: Path) -> None:
    folder = str(tmp_path / "edits")
    first, second = make_model("llama"), make_model("llama")
    apply_wise_to_model(first, tok, requests(2), settings(save_path=folder))
    assert [edit["prompt"] for edit in json.loads((tmp_path / "edits" / "wise_edits.json").read_text())["edits"]] == [
        prompt for prompt, _ in FACTS[:2]
    ]
    _, restore = apply_wise_to_model(second, tok, requests(3)[2:], settings(load_path=folder))
    assert [memory.n_edits for memory in only_layer(second).memories("default")] == [3]
    restore()
    assert not find_wise_layers(second)


def test_a_device_object_in_the_settings_does_not_stop_the_saving(llama: Any, tok: Any, tmp_path: Path) -> None:
    hparams = settings(save_path=str(tmp_path / "edits"), device=torch.device("cpu"))
    apply_wise_to_model(llama, tok, requests(1), hparams)
    assert (tmp_path / "edits" / "adapter_config.json").exists()


def test_a_load_path_that_is_not_there(llama: Any, tok: Any, tmp_path: Path) -> None:
    # As in EasyEdit, where the file is only there after the first run.
    with pytest.warns(UserWarning, match=r"load_path .*none' does not exist: nothing is loaded"):
        apply_wise_to_model(llama, tok, requests(1), settings(load_path=str(tmp_path / "none")))
    assert [memory.n_edits for memory in only_layer(llama).memories("default")] == [1]


@pytest.mark.parametrize("n_before", [1, 2], ids=["in a shard", "after a shard"])
def test_a_loaded_stream_goes_on_as_if_it_had_not_stopped(
    make_model: Any, tok: Any, tmp_path: Path, n_before: int
) -> None:
    hparams = settings(save_freq=2, merge_freq=6, n_iter=1)
    first, second = make_model("llama"), make_model("llama")
    apply_wise_to_model(first, tok, requests(n_before), hparams)
    save_edits(first, tmp_path / "edits")
    load_edits(second, tmp_path / "edits", tok=tok, hparams=hparams)
    masks = [state.mask for state in only_layer(first).memories("default") if state.mask is not None]
    for model in (first, second):
        apply_wise_to_model(model, tok, requests(3)[n_before:], hparams)
    live, other = (only_layer(model).memories("default")[-1] for model in (second, first))
    assert (live.stage, live.n_edits) == ("live", 1)
    # Its own subspace: that of an earlier shard again would make all of their entries collide.
    assert all(not torch.equal(live.mask, mask) for mask in masks)
    assert torch.equal(live.mask, other.mask)


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "changes", "message"),
    [
        ({"prompt": "x", "target_new": " "}, {}, "target_new is ''"),
        ({"prompt": "x"}, {}, "no 'target_new'"),
        ("a text", {}, "must be a dict"),
        ({"prompt": "x", "target_new": "y", "subject": "z"}, {}, "'z' does not occur"),
        (None, {"inner_params": ["model.layers[7].mlp.down_proj.weight"]}, r"does not exist.*model\.layers\[0\.\.2\]"),
        (None, {"inner_params": ["model.norm.weight"]}, "LlamaRMSNorm, not a linear map"),
        (None, {"inner_params": ["lm_head.weight", "x"]}, "2 matrices"),
        (None, {"mask_ratio": 7}, "mask_ratio"),
        (None, {"use_chat_template": True}, "no chat template"),
    ],
    ids=["blank", "no-target", "no-dict", "subject", "layer", "no-linear", "layers", "setting", "template"],
)
def test_an_error_leaves_a_fresh_model_without_a_trace(
    llama: Any, tok: Any, bad: Any, changes: dict[str, Any], message: str
) -> None:
    before, trace = logits(llama, tok), traces(llama)
    wanted = [*requests(1), *([] if bad is None else [bad])]
    config = settings().to_dict() | changes
    with pytest.raises(ValueError, match=message):
        apply_wise_to_model(llama, tok, wanted, config)
    assert traces(llama) == trace
    assert same(logits(llama, tok), before)


def test_a_target_without_tokens_is_noticed_before_the_first_edit(llama: Any, tok: Any) -> None:
    class Dropping(SpyTokenizer):
        def __call__(self, text: str, **options: Any) -> Any:
            return super().__call__(text.replace(" 東京", ""), **options)

    trace = traces(llama)
    wanted = [*requests(2), {"prompt": "The capital of Japan is", "target_new": "東京"}]
    with pytest.raises(ValueError, match="'東京' tokenises to nothing after the prompt 'The capital of Japan is'"):
        apply_wise_to_model(llama, Dropping(tok), wanted, settings())
    assert traces(llama) == trace


def test_an_error_after_loading_leaves_no_trace(make_model: Any, tok: Any, tmp_path: Path) -> None:
    model, fresh = make_model("llama"), make_model("llama")
    apply_wise_to_model(model, tok, requests(1), settings())
    save_edits(model, tmp_path / "edits")
    trace = traces(fresh)
    with pytest.raises(ValueError, match="pooling"):
        apply_wise_to_model(fresh, tok, requests(1), settings(load_path=str(tmp_path / "edits"), pooling="max"))
    assert traces(fresh) == trace


@pytest.mark.parametrize("error", [EditDivergedError, KeyboardInterrupt])
def test_a_first_edit_that_fails_leaves_no_trace(
    llama: Any, tok: Any, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error("stop")

    monkeypatch.setattr(stream_module, "train_edit", fail)
    before, trace = logits(llama, tok), traces(llama)
    with pytest.raises(error):
        apply_wise_to_model(llama, tok, requests(2), settings())
    assert traces(llama) == trace
    assert same(logits(llama, tok), before)


def test_a_later_edit_that_fails_leaves_the_ones_before(
    make_model: Any, tok: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reference = make_model("llama"), make_model("llama")
    apply_wise_to_model(reference, tok, requests(2), settings())
    diverge_at(monkeypatch, 3)
    with pytest.raises(EditDivergedError, match="edit 3"):
        apply_wise_to_model(model, tok, requests(4), settings())
    assert same(logits(model, tok), logits(reference, tok))
    monkeypatch.undo()
    apply_wise_to_model(model, tok, requests(1), settings())  # and the stream goes on
    assert [memory.n_edits for memory in only_layer(model).memories("default")] == [3]


def test_a_later_call_that_fails_keeps_the_earlier_call(llama: Any, tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, trace = logits(llama, tok), traces(llama)
    _, restore = apply_wise_to_model(llama, tok, requests(1), settings())
    before = logits(llama, tok)
    diverge_at(monkeypatch, 1)
    with pytest.raises(EditDivergedError, match="edit 2"):
        apply_wise_to_model(llama, tok, requests(1), settings())
    assert same(logits(llama, tok), before)
    restore()
    assert same(logits(llama, tok), base)
    assert traces(llama) == trace


def test_an_error_on_a_copy_leaves_the_model_alone(llama: Any, tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = traces(llama)
    diverge_at(monkeypatch, 1)
    with pytest.raises(EditDivergedError):
        apply_wise_to_model(llama, tok, requests(1), settings(), copy=True)
    assert traces(llama) == trace


def lora_injected(model: Any) -> Any:
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], r=2), model)
    return model


def lora_on_the_layer(model: Any) -> Any:
    inject_adapter_in_model(LoraConfig(target_modules=["down_proj"], r=2), model)
    return model


def lora_wrapped(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))


@pytest.mark.parametrize(
    ("with_lora", "layer"),
    [
        (lora_injected, LAYERS["llama"]),
        (lora_on_the_layer, LAYERS["llama"]),
        (lora_wrapped, f"base_model.model.{LAYERS['llama']}"),
    ],
    ids=["injected", "on-the-layer", "wrapped"],
)
def test_a_model_that_carries_lora(llama: Any, tok: Any, with_lora: Callable[[Any], Any], layer: str) -> None:
    model = with_lora(llama)
    before, trace = logits(model, tok), traces(model)
    configs = dict(model.peft_config)
    with pytest.raises(ValueError, match=r"already carries the PEFT method .*(lora|LORA).*unload"):
        apply_wise_to_model(model, tok, requests(1), settings(layer))
    assert dict(model.peft_config) == configs  # LoRA is as it was
    assert traces(model) == trace
    assert same(logits(model, tok), before)


def test_settings_that_were_spoiled_after_they_were_made(llama: Any, tok: Any) -> None:
    hparams = settings()
    hparams.edit_lr = -1.0
    with pytest.raises(ValueError, match=r"edit_lr is -1\.0"):
        apply_wise_to_model(llama, tok, requests(1), hparams)
    with pytest.raises(ValueError, match="from_hparams"):
        apply_wise_to_model(llama, tok, requests(1), packaged_hparams()[0])
    assert not find_wise_layers(llama)


def test_the_prefixes_stay_with_the_model_when_its_edits_are_taken_off(
    llama: Any, tok: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from easyedit_wise.editing import recorder

    sampled: list[int] = []
    sample = recorder.generate_prefixes

    def counting(*args: Any, **kwargs: Any) -> list[str]:
        sampled.append(1)
        return sample(*args, **kwargs)

    monkeypatch.setattr(recorder, "generate_prefixes", counting)
    for _ in range(3):  # as an editor does that restores after every edit
        _, restore = apply_wise_to_model(llama, tok, requests(1), settings())
        restore()
    assert len(sampled) == 1


def test_the_edited_model_saves_as_easyedit_asks(llama: Any, tok: Any, tmp_path: Path) -> None:
    _, restore = apply_wise_to_model(llama, tok, requests(1), settings(save_path=str(tmp_path / "edits")))
    llama.save(str(tmp_path / "again"))
    names = {path.name for path in (tmp_path / "edits").iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    restore()
    assert not hasattr(llama, "save")


def test_restoring_a_later_call_keeps_the_earlier_calls_save(llama: Any, tok: Any, tmp_path: Path) -> None:
    hparams = settings(save_path=str(tmp_path / "edits"))
    _, restore_first = apply_wise_to_model(llama, tok, requests(1), hparams)
    _, restore_second = apply_wise_to_model(llama, tok, requests(2)[1:], hparams)
    restore_second()
    assert hasattr(llama, "save")
    restore_first()
    assert not hasattr(llama, "save")


def test_loaded_edits_in_another_layer(make_model: Any, tok: Any, tmp_path: Path) -> None:
    model, fresh = make_model("llama"), make_model("llama")
    apply_wise_to_model(model, tok, requests(1), settings(save_path=str(tmp_path / "edits")))
    trace = traces(fresh)
    other = settings("model.layers[2].mlp.down_proj.weight", load_path=str(tmp_path / "edits"))
    with pytest.raises(ValueError, match=r"edits are in model\.layers\.1\.mlp\.down_proj, but"):
        apply_wise_to_model(fresh, tok, requests(1), other)
    assert traces(fresh) == trace


def test_edits_loaded_under_another_name_go_on_under_it(make_model: Any, tok: Any, tmp_path: Path) -> None:
    model, fresh = make_model("llama"), make_model("llama")
    apply_wise_to_model(model, tok, requests(1), settings())
    layer = load_edits(fresh, save_edits(model, tmp_path / "edits"), adapter_name="facts")
    apply_wise_to_model(fresh, tok, requests(2)[1:], settings(save_path=str(tmp_path / "more")))
    assert sum(memory.n_edits for memory in layer.memories("facts")) == 2
    assert (tmp_path / "more" / "adapter_model.safetensors").exists()


# -- the method that saves --------------------------------------------------------------------------


def test_an_edited_model_can_always_be_saved(llama: Any, tok: Any, tmp_path: Path) -> None:
    # EasyEdit's GitHub version calls it where ITS settings have a save_path.
    _, restore = apply_wise_to_model(llama, tok, requests(1), settings())
    llama.save(str(tmp_path / "edits"))
    assert (tmp_path / "edits" / "wise_edits.json").exists()
    restore()
    assert not hasattr(llama, "save")


def test_detaching_takes_the_method_off(llama: Any, tok: Any) -> None:
    trace = traces(llama)
    apply_wise_to_model(llama, tok, requests(1), settings())
    detach(llama)
    assert not hasattr(llama, "save")
    assert traces(llama) == trace


def test_a_copied_model_saves_its_own_edits(llama: Any, tok: Any, tmp_path: Path) -> None:
    apply_wise_to_model(llama, tok, requests(1), settings())
    copied = copy.deepcopy(llama)
    apply_wise_to_model(copied, tok, requests(2)[1:], settings())
    for name, model, n in (("first", llama, 1), ("second", copied, 2)):
        model.save(str(tmp_path / name))
        assert len(json.loads((tmp_path / name / "wise_edits.json").read_text())["edits"]) == n


def test_a_method_of_the_models_own_stays(llama: Any, tok: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(llama), "save", lambda self, path: "its own", raising=False)
    _, restore = apply_wise_to_model(llama, tok, requests(1), settings())
    assert llama.save("anywhere") == "its own"
    restore()


def blocked(folder: Path, how: str) -> Path:
    (folder / "file").touch()
    (folder / "other").mkdir()
    (folder / "other" / "thesis.tex").touch()
    return {"file": folder / "file", "below": folder / "file" / "edits", "others": folder / "other"}[how]


@pytest.mark.parametrize(
    ("how", "message"),
    [("file", "is a file: edits are saved as a folder"), ("below", "file is a file"), ("others", "holds 'thesis.tex'")],
)
def test_where_edits_go_is_checked_before_they_are_made(
    llama: Any, tok: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, message: str
) -> None:
    path, trace = blocked(tmp_path, how), traces(llama)
    monkeypatch.setattr(stream_module, "train_edit", None)
    with pytest.raises(ValueError, match=message):
        apply_wise_to_model(llama, tok, requests(1), settings(save_path=str(path)))
    assert traces(llama) == trace


def test_a_folder_that_cannot_be_written_to(
    llama: Any, tok: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write everywhere, so the system's answer is given here.
    def read_only(*_: Any, **__: Any) -> str:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("easyedit_wise.persistence.tempfile.mkdtemp", read_only)
    with pytest.raises(
        ValueError, match=r"cannot be saved in .*, since .* cannot be written to \(Read-only file system"
    ):
        apply_wise_to_model(llama, tok, requests(1), settings(save_path=str(tmp_path / "edits")))
    assert not find_wise_layers(llama)


def test_a_path_in_the_home_folder(
    llama: Any, tok: Any, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    paths = {"save_path": "~/edits", "journal": "~/journal"}
    apply_wise_to_model(llama, tok, requests(1), settings(**paths))
    assert not (tmp_path / "~").exists()
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"edits", "journal"}
    apply_wise_to_model(make_model("llama"), tok, requests(1), settings(load_path="~/edits"))


def test_what_stands_after_a_failure_is_saved(
    llama: Any, tok: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverge_at(monkeypatch, 3)
    with pytest.raises(EditDivergedError, match="edit 3"):
        apply_wise_to_model(llama, tok, requests(4), settings(save_path=str(tmp_path / "edits")))
    assert len(json.loads((tmp_path / "edits" / "wise_edits.json").read_text())["edits"]) == 2
    assert hasattr(llama, "save")


def test_a_failure_to_save_does_not_hide_the_failure_of_the_edit(
    llama: Any, tok: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError("no space left on device")

    diverge_at(monkeypatch, 2)
    monkeypatch.setattr("easyedit_wise.easyedit.saving.save_edits", full)
    with pytest.raises(EditDivergedError, match="edit 2"):
        apply_wise_to_model(llama, tok, requests(3), settings(save_path=str(tmp_path / "edits")))
    assert "could not be saved" in caplog.text
    assert len(stream_on(llama).held) == 1


@pytest.mark.parametrize("loading", ["setting", "function"])
def test_a_file_of_easyedits_own_wise(llama: Any, tok: Any, tmp_path: Path, loading: str) -> None:
    path, trace = tmp_path / "wise.pt", traces(llama)
    torch.save({"config": settings(), "adapter_state_dict": {}}, path)
    load: dict[str, Callable[[], Any]] = {
        "setting": lambda: apply_wise_to_model(llama, tok, requests(1), settings(load_path=str(path))),
        "function": lambda: load_edits(llama, path),
    }
    with pytest.raises(ValueError, match=r"wise\.pt is a file, and saved edits are a folder.*Make those edits again"):
        load[loading]()
    folder = tmp_path / "saved"
    folder.mkdir()
    path.rename(folder / "wise.pt")
    with pytest.raises(ValueError, match=r"saved holds wise\.pt, no saved edits.*Make those edits again"):
        load_edits(llama, folder)
    assert traces(llama) == trace


@pytest.mark.parametrize("falsy", ["", None, 0, False])
def test_a_separator_of_a_requests_own_is_not_passed_over(llama: Any, tok: Any, falsy: Any) -> None:
    request = {"prompt": "The year 19", "target_new": "45", "target_separator": falsy}
    with pytest.raises(ValueError, match="target_separator is"):
        apply_wise_to_model(llama, tok, request, settings())


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "T5ForConditionalGeneration", "LlamaForSequenceClassification"])
def test_what_continues_no_text_is_refused(tok: Any, kind: str) -> None:
    small = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = {
        "BertForMaskedLM": lambda: transformers.BertConfig(num_attention_heads=4, **small),
        "T5ForConditionalGeneration": lambda: transformers.T5Config(vocab_size=400, d_model=32, d_ff=64, num_layers=1),
        "LlamaForSequenceClassification": lambda: transformers.LlamaConfig(num_attention_heads=4, **small),
    }[kind]()
    model = getattr(transformers, kind)(config)
    with pytest.raises(ValueError, match=rf"{kind} is (no causal|an encoder-decoder).*AutoModelForCausalLM"):
        apply_wise_to_model(model, tok, requests(1), settings())
    assert not find_wise_layers(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lm_head.weight", "is the vocabulary projection"),
        ("model.layers[1].mlp.down_proj.bias", "does not exist in this model"),
    ],
)
def test_a_matrix_that_is_none_of_a_layers_values(llama: Any, tok: Any, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_wise_to_model(llama, tok, requests(1), settings(name))
    assert not find_wise_layers(llama)


@pytest.mark.parametrize("name", ["__base__", ""])
def test_a_set_cannot_have_a_name_that_names_none(make_model: Any, tok: Any, tmp_path: Path, name: str) -> None:
    apply_wise_to_model(make_model("llama"), tok, requests(1), settings(save_path=str(tmp_path / "edits")))
    fresh = make_model("llama")
    with pytest.raises(ValueError, match="names no set"):
        load_edits(fresh, tmp_path / "edits", adapter_name=name)
    assert not find_wise_layers(fresh)
