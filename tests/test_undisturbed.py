"""An edit is the same wherever it is called: what torch's switches around it say neither matters nor changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS, build_model
from editing_helpers import only_layer, requests, settings
from peft import PeftModel
from torch import Tensor
from torch.overrides import TorchFunctionMode

from easyedit_wise import WISEHyperParams, apply_wise_to_model, last_route, load_edits, save_edits
from easyedit_wise.editing.trainer import EditDivergedError
from easyedit_wise.journal.calls import close_journal, resume
from easyedit_wise.journal.forgetting import forget
from easyedit_wise.tuner.memory import MemoryState
from easyedit_wise.undisturbed import own_modes

Context = Callable[[], AbstractContextManager[Any]]


@contextmanager
def by_default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


class LikeCuda(TorchFunctionMode):
    """What torch refuses on CUDA where algorithms have to be deterministic, refused everywhere."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        refused = name in ("kthvalue", "histc", "put_", "logcumsumexp") or (
            name in ("cumsum", "cumsum_", "cumprod") and args[0].is_floating_point()
        )
        if refused:
            raise RuntimeError(f"{name} does not have a deterministic implementation")
        return func(*args, **(kwargs or {}))


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CONTEXTS: dict[str, Context] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad off": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "bf16": lambda: by_default(torch.bfloat16),
    "fp64": lambda: by_default(torch.float64),
    "meta": lambda: default_device("meta"),
    "meta, as a context": lambda: torch.device("meta"),
    "cpu, as a context": lambda: torch.device("cpu"),
    "deterministic": deterministic,
    "deterministic, as on CUDA": LikeCuda,
}
SETTINGS: dict[str, WISEHyperParams] = {
    "default": WISEHyperParams.from_preset(
        "default", [LAYERS["llama"]], n_iter=3, n_contexts=3, context_length=3, save_freq=2, merge_freq=2
    ),
    "margin": WISEHyperParams.from_preset(
        "margin", [LAYERS["llama"]], n_iter=3, n_contexts=2, context_length=3, save_freq=2, merge_freq=2
    ),
    "paper": settings(save_freq=2, merge_freq=4, act_ratio=0.9),
    "upstream": WISEHyperParams.from_preset("upstream", [LAYERS["llama"]], n_iter=3),
}
ASKED = [{**one, "subject": one["prompt"].split()[-2]} for one in requests(3)]


@pytest.fixture(params=list(CONTEXTS))
def around(request: pytest.FixtureRequest) -> Context:
    return CONTEXTS[request.param]


def switches() -> dict[str, Any]:
    """All that an edit switches for itself."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_default_dtype(),
        "device": torch.empty(0).device,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def memories(model: Any) -> list[MemoryState]:
    return only_layer(model).memories("default")


def assert_same(made: list[MemoryState], expected: list[MemoryState]) -> None:
    """The same bits, and ordinary tensors, so that later edits go on with them."""
    assert len(made) == len(expected) > 0
    for one, other in zip(made, expected, strict=True):
        assert not one.delta_weight.is_inference()
        assert one.delta_weight.dtype == torch.float32
        assert torch.equal(one.delta_weight, other.delta_weight)
        assert (one.mask is None) == (other.mask is None)
        assert one.mask is None or torch.equal(one.mask, other.mask)
        assert (one.epsilon, one.n_edits, one.weakest_edit) == (other.epsilon, other.n_edits, other.weakest_edit)


def edited(tok: Any, hparams: WISEHyperParams, asked: list[dict[str, Any]] = ASKED) -> Any:
    return apply_wise_to_model(build_model("llama"), tok, asked, hparams)[0]


@pytest.fixture(scope="module")
def in_no_context(tok: Any) -> dict[str, list[MemoryState]]:
    """The memories of all edits, and of all but the first, made where nothing is switched."""
    made = {preset: memories(edited(tok, hparams)) for preset, hparams in SETTINGS.items()}
    return {**made, "without the first": memories(edited(tok, SETTINGS["default"], ASKED[1:]))}


@pytest.mark.parametrize("preset", list(SETTINGS))
def test_the_same_memories_come_out_in_any_context(
    around: Context, preset: str, tok: Any, in_no_context: dict[str, list[MemoryState]]
) -> None:
    model = build_model("llama")
    with around():
        before = switches()
        apply_wise_to_model(model, tok, ASKED[:2], SETTINGS[preset])
        apply_wise_to_model(model, tok, ASKED[2:], SETTINGS[preset])
        assert switches() == before
    assert_same(memories(model), in_no_context[preset])


def test_restoring_saving_and_loading_are_undisturbed(around: Context, tok: Any, tmp_path: Path) -> None:
    hparams = SETTINGS["default"]
    first, model = edited(tok, hparams, ASKED[:1]), build_model("llama")
    with around():
        before = switches()
        save_edits(first, tmp_path / "edits")
        load_edits(model, tmp_path / "edits", tok=tok)
        _, restore = apply_wise_to_model(model, tok, ASKED[2:], hparams)
        restore()
        assert switches() == before
    assert_same(memories(model), memories(first))
    # Outside of the context it goes on as a stream that was loaded outside.
    outside = build_model("llama")
    load_edits(outside, tmp_path / "edits", tok=tok)
    for one in (model, outside):
        apply_wise_to_model(one, tok, ASKED[1:], hparams)
    assert_same(memories(model), memories(outside))


def test_a_journal_is_undisturbed(
    around: Context, tok: Any, tmp_path: Path, in_no_context: dict[str, list[MemoryState]]
) -> None:
    hparams = WISEHyperParams.from_dict({**SETTINGS["default"].to_dict(), "journal": str(tmp_path / "journal")})
    made, resumed, forgotten = (build_model("llama") for _ in range(3))
    with around():
        before = switches()
        apply_wise_to_model(made, tok, ASKED, hparams)
        close_journal(made)
        resume(resumed, tok, tmp_path / "journal")
        close_journal(resumed)
        forget(forgotten, tok, tmp_path / "journal", 1)
        close_journal(forgotten)
        assert switches() == before
    assert_same(memories(resumed), in_no_context["default"])
    assert_same(memories(forgotten), in_no_context["without the first"])


def test_an_edit_that_fails_puts_every_switch_back(around: Context, tok: Any) -> None:
    model = edited(tok, SETTINGS["paper"], ASKED[:1])
    expected = [one.with_(delta_weight=one.delta_weight.clone()) for one in memories(model)]
    too_far = {"optimizer": "sgd", "edit_lr": 1e37, "n_iter": 5, "norm_constraint": None}
    diverging = settings(save_freq=2, merge_freq=4, act_ratio=0.9, **too_far)
    with around():
        before = switches()
        with pytest.raises(EditDivergedError):
            apply_wise_to_model(model, tok, ASKED[1:], diverging)
        assert switches() == before
    assert_same(memories(model), expected)


@torch.no_grad()
def answers(model: Any, inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(the route, its scores, what is generated)."""
    model(**inputs)
    route = last_route(model)
    assert route is not None
    written = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=1)
    return route.choice.clone(), route.scores.clone(), written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in CONTEXTS if name != "autocast"])
def test_answers_are_the_same_in_any_context(name: str, dtype: torch.dtype, tok: Any) -> None:
    model = edited(tok, SETTINGS["default"]).to(dtype)
    inputs = tok([one["prompt"] for one in ASKED] + ["Once upon"], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    expected = answers(model, inputs)
    only_layer(model).install("default", memories(model))  # nothing is known of earlier queries
    with CONTEXTS[name]():
        before = switches()
        made = answers(model, inputs)
        assert switches() == before
    assert int((expected[0] >= 0).sum()) >= 2
    for one, other in zip(made, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def many_memories(tok: Any, n: int = 6) -> Any:
    hparams = WISEHyperParams.from_dict({**SETTINGS["default"].to_dict(), "save_freq": 1, "merge_freq": 1})
    return edited(tok, hparams, requests(n))


@pytest.mark.parametrize("n_edits", [3, 6])
def test_under_autocast_scores_are_those_of_its_activations_in_fp32(n_edits: int, tok: Any) -> None:
    """Autocast is the model's: its activations are rounded, what they are multiplied with and compared with is not."""
    model = many_memories(tok, n_edits)
    layer = only_layer(model)
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    inputs = tok(requests(n_edits)[0]["prompt"], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs)
    handle.remove()
    route = last_route(model)
    assert route is not None
    assert int(route.choice[0]) >= 0
    for index, one in enumerate(memories(model)):
        if route.exact is not None and not bool(route.exact[0, index]):
            continue
        a = seen[0][0].float()
        score = ((a @ one.delta_weight.T).norm(dim=-1) / a.norm(dim=-1)).max()
        torch.testing.assert_close(route.scores[0, index], score, rtol=1e-5, atol=1e-7)
    assert route.scores.dtype == torch.float32


def test_sketches_and_masks_do_not_depend_on_the_default_dtype(tok: Any) -> None:
    inputs = tok(requests(6)[4]["prompt"], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    expected = answers(many_memories(tok), inputs)
    model = many_memories(tok)
    with by_default(torch.bfloat16):
        made = answers(model, inputs)
    assert all(torch.equal(one, other) for one, other in zip(made, expected, strict=True))


@pytest.mark.parametrize("name", ["bf16", "meta", "inference_mode", "fp64"])
def test_pefts_own_loading_is_undisturbed(name: str, tok: Any, tmp_path: Path) -> None:
    model = edited(tok, SETTINGS["default"])
    save_edits(model, tmp_path / "edits")
    base = build_model("llama")
    with CONTEXTS[name]():
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "edits"))
    for one, other in zip(memories(loaded), memories(model), strict=True):
        assert torch.equal(one.delta_weight, other.delta_weight)
        assert one.epsilon == other.epsilon


def in_inference_mode(architecture: str = "llama") -> Any:
    with torch.inference_mode():
        model = build_model(architecture)
    assert all(parameter.is_inference() for parameter in model.parameters())
    return model


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # GPT-2's vocabulary projection is tied
def test_a_model_that_was_loaded_in_inference_mode_is_edited(architecture: str, inside: bool, tok: Any) -> None:
    parameter = LAYERS[architecture]
    hparams = WISEHyperParams.from_dict({**SETTINGS["default"].to_dict(), "inner_params": [parameter]})
    plain = build_model(architecture)
    apply_wise_to_model(plain, tok, ASKED, hparams)
    model = in_inference_mode(architecture)
    weights = {name: id(one) for name, one in model.named_parameters()}
    trainable = {name for name, one in model.named_parameters() if one.requires_grad}
    with torch.inference_mode(inside):
        _, restore = apply_wise_to_model(model, tok, ASKED, hparams)
    assert_same(memories(model), memories(plain))
    assert not any(one.requires_grad for one in model.parameters())  # frozen, as any model that carries edits
    with torch.inference_mode(inside):
        restore()
    assert {name: id(one) for name, one in model.named_parameters()} == weights
    assert {name for name, one in model.named_parameters() if one.requires_grad} == trainable
    assert all(one.is_inference() for one in model.parameters())


def test_a_weight_that_cannot_be_stood_in_for_is_one_clear_error(llama: Any) -> None:
    with torch.inference_mode():
        llama.register_buffer("odd", torch.eye(3).to_sparse())
    with (
        pytest.raises(ValueError, match=r"odd of LlamaForCausalLM was made inside torch.inference_mode\(\).*load the"),
        own_modes(llama),
    ):
        pass
    assert llama.odd.is_inference()


def test_activations_asked_for_in_inference_mode_do_not_stop_a_later_edit(tok: Any) -> None:
    model = edited(tok, SETTINGS["default"], ASKED[:1])
    expected = build_model("llama")
    inputs = tok(ASKED[0]["prompt"], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=1)
    apply_wise_to_model(model, tok, ASKED[1:], SETTINGS["default"])
    apply_wise_to_model(expected, tok, ASKED[:1], SETTINGS["default"])
    apply_wise_to_model(expected, tok, ASKED[1:], SETTINGS["default"])
    assert_same(memories(model), memories(expected))


def test_the_default_dtype_comes_back_when_the_last_of_two_threads_leaves() -> None:
    """It is one for the process: who leaves first must not take it from the other, nor put back what that one set."""
    entered, leave, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with own_modes():
            entered.set()
            leave.wait(10)
            seen.append(torch.get_default_dtype())

    with by_default(torch.bfloat16):
        with own_modes():
            thread = threading.Thread(target=other)
            thread.start()
            assert entered.wait(10)
        assert torch.get_default_dtype() == torch.float32  # the other one is inside
        leave.set()
        thread.join(10)
        assert seen == [torch.float32]
        assert torch.get_default_dtype() == torch.bfloat16
