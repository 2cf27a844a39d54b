"""Every call and setting of EasyEdit's GitHub version that text editing with WISE meets, through its own editors."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from conftest import LAYERS
from editing_helpers import FACTS, only_layer, requests, settings, stream_on

import easyedit_wise
from easyedit_wise import WISEHyperParams
from easyedit_wise.tuner.model import find_wise_layers

pytestmark = pytest.mark.upstream

PROMPTS, TARGETS = [prompt for prompt, _ in FACTS[:3]], [target for _, target in FACTS[:3]]
OTHERS = {"prompt": [prompt for prompt, _ in FACTS[4:7]], "ground_truth": [target for _, target in FACTS[4:7]]}
HEAD_HPARAMS = Path("hparams") / "WISE"
TEXT_FILES = ("gpt-j-6B", "gpt2-xl", "llama-7b", "llama3-8b", "llama3.1-8b", "llama3.2-3b", "mistral-7b")
TEXT_FILES += ("qwen2.5-7b", "qwen3.5-9b")
MULTIMODAL_FILES = ("blip2", "llavaov-7b", "minigpt4", "qwen2vl-7b", "qwen3vl-4b")


@pytest.fixture
def checkout(head: ModuleType) -> Path:
    return Path(str(head.__file__)).parent.parent


@pytest.fixture
def own_class(head: ModuleType) -> Any:
    """EasyEdit's own settings class, where it is defined."""
    from easyeditor.models.wise.wise_hparams import WISEHyperParams as Own

    return Own


@pytest.fixture
def make_editor(head: ModuleType, saved_model: str) -> Callable[..., Any]:
    """EasyEdit's own ``BaseEditor`` on a tiny model."""

    def make(hparams: Any = None, **changes: Any) -> Any:
        hparams = settings(device="cpu", model_name=saved_model, **changes) if hparams is None else hparams
        with contextlib.redirect_stdout(io.StringIO()):
            return head.BaseEditor.from_hparams(hparams)

    return make


def made(model: Any) -> list[str]:
    return [held.request.prompt for held in stream_on(model).held]


def saved(folder: Path) -> list[str]:
    return [edit["prompt"] for edit in json.loads((folder / "wise_edits.json").read_text())["edits"]]


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where edits were saved, save by save."""
    from easyedit_wise.easyedit import saving

    written: list[str] = []
    save = saving.save_edits

    def counted(model: Any, path: Any, *rest: Any, **options: Any) -> Any:
        written.append(Path(path).name)
        return save(model, path, *rest, **options)

    monkeypatch.setattr(saving, "save_edits", counted)
    return written


# -- settings -------------------------------------------------------------------------------------


def test_readmes_script(head: ModuleType, saved_model: str) -> None:
    from easyeditor import BaseEditor, WISEHyperParams

    hparams = WISEHyperParams.from_hparams("smollm2-135m")
    hparams.model_name = saved_model
    hparams.inner_params = [LAYERS["llama"]]  # the tiny model has no layer 24
    editor = BaseEditor.from_hparams(hparams)
    metrics, model, _ = editor.edit(
        prompts=["The capital of France is", "Nokia is a company from"],
        target_new=["Lyon", "Finland"],
        sequential_edit=True,
    )
    # A random model of 32 dimensions does not hold whole facts.
    assert all(metric["post"]["rewrite_acc"] > metric["pre"]["rewrite_acc"] for metric in metrics)
    assert made(model) == ["The capital of France is", "Nokia is a company from"]


@pytest.mark.parametrize("module", ["", ".models", ".models.wise", ".util.alg_dict", ".editors.editor"])
def test_the_hosts_name_is_our_class(head: ModuleType, module: str) -> None:
    import importlib

    assert importlib.import_module(f"easyeditor{module}").WISEHyperParams is WISEHyperParams


@pytest.mark.parametrize("name", TEXT_FILES)
def test_the_hosts_own_files(checkout: Path, own_class: Any, name: str) -> None:
    path = str(checkout / HEAD_HPARAMS / name)
    own, ours = own_class.from_hparams(path), WISEHyperParams.from_hparams(path)
    assert {key: getattr(ours, key) for key in vars(own)} == vars(own)
    assert ours == WISEHyperParams.from_any(own)


def test_there_are_no_other_files(checkout: Path) -> None:
    assert {path.stem for path in (checkout / HEAD_HPARAMS).iterdir()} == {*TEXT_FILES, *MULTIMODAL_FILES}


@pytest.mark.parametrize("name", MULTIMODAL_FILES)
def test_the_hosts_multimodal_files_are_refused(checkout: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"settings of a vision-language model.*WISEMultimodalHyperParams"):
        WISEHyperParams.from_hparams(checkout / HEAD_HPARAMS / name)


def own_settings(own_class: Any, checkout: Path, saved_model: str) -> Any:
    """EasyEdit's own object, made before this package was imported."""
    hparams = own_class.from_hparams(str(checkout / HEAD_HPARAMS / "llama-7b"))
    hparams.model_name, hparams.device, hparams.inner_params = saved_model, "cpu", [LAYERS["llama"]]
    hparams.n_iter = 1
    return hparams


def test_what_is_set_on_the_hosts_own_object_holds(
    make_editor: Callable[..., Any], own_class: Any, checkout: Path, saved_model: str, tmp_path: Path
) -> None:
    hparams = own_settings(own_class, checkout, saved_model)
    hparams.journal, hparams.preset, hparams.n_contexts = str(tmp_path / "journal"), "upstream", 2
    hparams.evaluation_type, hparams.api_key = None, "none"
    _, model, _ = make_editor(hparams).edit(PROMPTS[:1], TARGETS[:1], sequential_edit=True, verbose=False)
    used = stream_on(model).hparams
    assert (used.padding_counts, used.n_contexts, used.mask_ratio) == (True, 2, 0.2)  # upstream's, ours, its own
    assert (tmp_path / "journal").is_dir()
    easyedit_wise.journal.calls.close_journal(model)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("preset", "default", "contradict each other.*from_preset"), ("n_iters", 3, "did you mean 'n_iter'")],
)
def test_what_cannot_hold_on_the_hosts_own_object_is_refused(
    make_editor: Callable[..., Any],
    own_class: Any,
    checkout: Path,
    saved_model: str,
    name: str,
    value: Any,
    message: str,
) -> None:
    hparams = own_settings(own_class, checkout, saved_model)
    setattr(hparams, name, value)
    editor = make_editor(hparams)
    with pytest.raises(ValueError, match=message):
        editor.edit(PROMPTS[:1], TARGETS[:1], sequential_edit=True, verbose=False)
    assert not find_wise_layers(editor.model)


def test_the_hosts_own_wise_takes_our_settings(
    head: ModuleType, saved_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from easyeditor.models.wise import wise_main

    # Its prefixes are generated with a helper of its own, which is slow.
    monkeypatch.setattr(wise_main, "get_context_templates", lambda *args, **kwargs: ["{}"])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(saved_model)
    tok = AutoTokenizer.from_pretrained(saved_model)
    hparams = settings(device="cpu", model_name=saved_model, act_ratio=0.88, norm_constraint=1.0)
    request = {**requests(1)[0], "loc_prompt": "Water is made of"}
    with contextlib.redirect_stdout(io.StringIO()):
        edited, restore = wise_main.apply_wise_to_model(model, tok, [request], hparams)
        assert edited(**tok(PROMPTS[0], return_tensors="pt")).logits.isfinite().all()
        restore()
    assert type(edited).__module__ == "easyeditor.models.wise.WISE"


@pytest.fixture
def unregistered(head: ModuleType) -> Iterator[None]:
    easyedit_wise.unregister()
    yield
    easyedit_wise.register()


@pytest.mark.usefixtures("unregistered")
def test_unregister_gives_everything_back(head: ModuleType, own_class: Any) -> None:
    from easyeditor.models import wise
    from easyeditor.models.simie import SimIEHyperParams
    from easyeditor.util.alg_dict import ALG_DICT

    assert head.WISEHyperParams is wise.WISEHyperParams is own_class
    assert head.apply_wise_to_model is ALG_DICT["WISE"]
    assert {entry.__module__.split(".")[0] for entry in ALG_DICT.values()} == {"easyeditor"}
    assert not [name for name, entry in ALG_DICT.items() if hasattr(entry, "__wrapped__")]
    assert not hasattr(head.BaseEditor.edit, "__wrapped__")
    assert SimIEHyperParams._get_base_hparams_class("WISE") is own_class


# -- SimIE ----------------------------------------------------------------------------------------


def test_simie_over_wise_is_refused_when_its_settings_are_read(head: ModuleType, tmp_path: Path) -> None:
    values = {"alg_name": "SimIE", "base_method": "WISE", "lamHyper": 10.0, "init_model": True, "solver": "LU"}
    values |= {"fast": False, "model_name": "llama", "device": "cpu", "max_length": 40, "model_parallel": False}
    path = tmp_path / "SimIE" / "llama.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump({**values, "fp16": False}))
    with pytest.raises(ValueError, match=r"SimIE over base_method 'WISE' is not possible.*side memories"):
        head.SimIEHyperParams.from_hparams(str(path))


@pytest.mark.parametrize("sequential", [True, False])
def test_simie_over_wise_is_refused_where_it_was_set_by_hand(
    head: ModuleType, make_editor: Callable[..., Any], saved_model: str, sequential: bool
) -> None:
    hparams = head.SimIEHyperParams("WISE", 10.0, True, "LU", False, "SimIE", saved_model, "cpu", 40, False, False)
    hparams._base_hparams = settings(device="cpu", model_name=saved_model)
    editor = make_editor(hparams)
    with pytest.raises(ValueError, match="SimIE over base_method 'WISE' is not possible"):
        editor.edit(PROMPTS, TARGETS, sequential_edit=sequential, verbose=False)
    assert not find_wise_layers(editor.model)


# -- saving ---------------------------------------------------------------------------------------


def test_a_sequence_is_saved_once(make_editor: Callable[..., Any], tmp_path: Path, writes: list[str]) -> None:
    editor = make_editor(save_path=str(tmp_path / "edits"))
    _, model, restore = editor.edit(PROMPTS, TARGETS, sequential_edit=True, verbose=False)
    assert writes == ["edits"]
    assert saved(tmp_path / "edits") == PROMPTS == made(model)
    restore()


def test_batches_are_saved_once(make_editor: Callable[..., Any], tmp_path: Path, writes: list[str]) -> None:
    editor = make_editor(save_path=str(tmp_path / "edits"), batch_size=2)
    editor.batch_edit(PROMPTS, TARGETS, sequential_edit=True, verbose=False)
    assert writes == ["edits"]
    assert saved(tmp_path / "edits") == PROMPTS


def test_single_edits_are_not_saved_and_it_is_said(
    make_editor: Callable[..., Any], tmp_path: Path, writes: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    editor = make_editor(save_path=str(tmp_path / "edits"))
    editor.edit(PROMPTS, TARGETS, sequential_edit=False, verbose=False)
    assert writes == []
    assert "nothing is saved there" in caplog.text


def test_what_was_made_before_a_failure_is_saved(
    make_editor: Callable[..., Any], tmp_path: Path, writes: list[str]
) -> None:
    editor = make_editor(save_path=str(tmp_path / "edits"))
    bad = [*requests(2), {"prompt": "The largest planet is", "target_new": "  "}]
    for request in bad:
        request |= {"portability": {}, "locality": {}, "ground_truth": None}
    with pytest.raises(ValueError, match="target_new"):
        editor.edit_requests(bad, sequential_edit=True, verbose=False, pre_edit=[{"pre": {}} for _ in bad])
    assert writes == ["edits"]
    assert saved(tmp_path / "edits") == PROMPTS[:2]


def test_a_save_path_that_is_a_file_is_refused_before_anything_is_computed(
    make_editor: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from easyeditor.editors import editor as editor_module

    (tmp_path / "wise.pt").touch()
    editor = make_editor(save_path=str(tmp_path / "wise.pt"))
    monkeypatch.setattr(editor_module, "compute_edit_quality", None)
    with pytest.raises(ValueError, match="is a file: edits are saved as a folder"):
        editor.edit(PROMPTS, TARGETS, sequential_edit=True, verbose=False)


def test_a_path_that_is_set_after_the_edit(make_editor: Callable[..., Any], tmp_path: Path) -> None:
    editor = make_editor()
    _, model, restore = editor.edit(PROMPTS, TARGETS, sequential_edit=True, verbose=False)
    editor.hparams.save_path = str(tmp_path / "later")
    model.save(editor.hparams.save_path)
    assert saved(tmp_path / "later") == PROMPTS
    restore()
    assert made(model) == PROMPTS[:2]  # EasyEdit's editor gives back what restores the last edit
    easyedit_wise.detach(model)
    assert not hasattr(model, "save")


def test_a_load_path_that_names_the_hosts_own_file(make_editor: Callable[..., Any], tmp_path: Path) -> None:
    torch.save({"adapter_state_dict": {}}, tmp_path / "wise.pt")
    editor = make_editor(load_path=str(tmp_path / "wise.pt"))
    with pytest.raises(ValueError, match=r"wise\.pt is a file, and saved edits are a folder.*EasyEdit's own WISE"):
        editor.edit(PROMPTS, TARGETS, sequential_edit=True, verbose=False)
    assert not find_wise_layers(editor.model)


def test_saved_and_loaded_in_another_editor(make_editor: Callable[..., Any], tmp_path: Path) -> None:
    folder = str(tmp_path / "edits")
    make_editor(save_path=folder).edit(PROMPTS[:2], TARGETS[:2], sequential_edit=True, verbose=False)
    editor = make_editor(load_path=folder)
    editor.edit(PROMPTS[2:], TARGETS[2:], sequential_edit=True, verbose=False)
    assert made(editor.model) == PROMPTS


# -- the calls ------------------------------------------------------------------------------------


def test_single_edits_leave_the_model_as_it_was(make_editor: Callable[..., Any]) -> None:
    editor = make_editor()
    before = {name: value.clone() for name, value in editor.model.state_dict().items()}
    metrics, model, _ = editor.edit(PROMPTS, TARGETS, verbose=False)
    assert len(metrics) == 3
    assert model is editor.model
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("sequential", [True, False])
def test_normal_edit_gives_back_the_edited_model(make_editor: Callable[..., Any], sequential: bool) -> None:
    editor = make_editor(batch_size=2)
    _, model, restore = editor.normal_edit(PROMPTS, TARGETS, sequential_edit=sequential)
    assert made(model) == PROMPTS
    restore()
    assert not find_wise_layers(model)


def test_batch_edit_with_everything(make_editor: Callable[..., Any]) -> None:
    editor = make_editor(batch_size=2)
    metrics, model, _ = editor.batch_edit(
        PROMPTS,
        TARGETS,
        rephrase_prompts=PROMPTS,
        locality_inputs={"neighborhood": OTHERS},
        portability_inputs={"one_hop": OTHERS},
        subject=["France", "India", "planet"],
        loc_prompts=["Water is made of"],
        sequential_edit=True,
        verbose=False,
    )
    assert [metric["requested_rewrite"]["prompt"] for metric in metrics] == PROMPTS
    assert all("neighborhood_acc" in metric["post"]["locality"] for metric in metrics)
    assert all("one_hop_acc" in metric["post"]["portability"] for metric in metrics)
    assert made(model) == PROMPTS
    assert [held.request.subject for held in stream_on(model).held] == ["France", "India", "planet"]


def test_edit_with_everything(make_editor: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk, "word_tokenize", str.split)  # its own needs data that is downloaded
    editor = make_editor()
    wanted: dict[str, Any] = {"sequential_edit": True, "verbose": False, "test_generation": True}
    inputs = {
        "rephrase_prompts": PROMPTS,
        "locality_inputs": {"neighborhood": OTHERS},
        "portability_inputs": {"one_hop": OTHERS},
        "subject": ["France", "India", "planet"],
    }
    metrics, model, _ = editor.edit(PROMPTS, TARGETS, **inputs, pre_file=str(tmp_path / "pre.json"), **wanted)
    assert all({"rewrite_acc", "rephrase_acc", "fluency"} <= metric["post"].keys() for metric in metrics)
    assert made(model) == PROMPTS
    # Scores of before, computed once and given to a later call.
    kept = json.loads((tmp_path / "pre.json").read_text())
    easyedit_wise.detach(model)
    again, _, _ = editor.edit(PROMPTS, TARGETS, **inputs, pre_edit=kept, **wanted)
    assert [metric["pre"] for metric in again] == [metric["pre"] for metric in kept]


def test_edit_requests(make_editor: Callable[..., Any]) -> None:
    editor = make_editor()
    wanted = [{**request, "portability": {}, "locality": {}, "ground_truth": None} for request in requests(3)]
    editor.edit_requests(wanted, sequential_edit=True, verbose=False)
    assert made(editor.model) == PROMPTS


def test_generate_edit(make_editor: Callable[..., Any]) -> None:
    editor = make_editor()
    editor.tok.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    editor.model.generation_config.max_length = 8
    inputs = {"prompt": [[prompt] for prompt in OTHERS["prompt"][:2]], "ground_truth": OTHERS["ground_truth"][:2]}
    results, model, _ = editor.generate_edit(
        PROMPTS[:2],
        TARGETS[:2],
        rephrase_prompts=PROMPTS[:2],
        portability_inputs={"por_hop": inputs},
        sequential_edit=True,
        verbose=False,
    )
    assert [isinstance(result["post"]["rewrite_ans"], str) for result in results] == [True, True]
    assert made(model) == PROMPTS[:2]


def test_chat_template(make_editor: Callable[..., Any]) -> None:
    editor = make_editor(use_chat_template=True)
    editor.tok.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    metrics, model, _ = editor.edit(PROMPTS[:1], TARGETS[:1], sequential_edit=True, verbose=False)
    assert made(model) == PROMPTS[:1]
    assert len(metrics) == 1


@pytest.mark.parametrize("changes", [{"fp16": True}, {"model_parallel": True}], ids=str)
def test_settings_that_the_host_reads(make_editor: Callable[..., Any], changes: dict[str, Any]) -> None:
    editor = make_editor(**changes)
    editor.edit(PROMPTS[:1], TARGETS[:1], sequential_edit=True, verbose=False)
    (state,) = only_layer(editor.model).memories("default")
    assert (state.n_edits, state.delta_weight.dtype) == (1, torch.float32)
    assert editor.model.dtype == (torch.float16 if "fp16" in changes else torch.float32)


@pytest.mark.parametrize("metric", ["ppl", "ood_ppl"])
def test_other_metrics(make_editor: Callable[..., Any], metric: str) -> None:
    editor = make_editor()
    metrics, _, _ = editor.edit(PROMPTS[:1], TARGETS[:1], eval_metric=metric, sequential_edit=True, verbose=False)
    assert metrics[0]["post"]


# -- other algorithms on a model that carries WISE edits -------------------------------------------


def another(head: ModuleType, saved_model: str, name: str, layer: int) -> Any:
    """Settings of one of EasyEdit's other algorithms, for one layer of the tiny model."""
    prefix = "model.layers.{}"
    common = {"device": "cpu", "alg_name": name.removesuffix(" by module"), "model_name": saved_model}
    if name == "LoRA":
        return head.LoRAHyperParams(
            lora_type="lora",
            layers=[],
            num_steps=2,
            lr=1e-3,
            weight_decay=0,
            kl_factor=0,
            norm_constraint=False,
            target_modules=["q_proj"],
            rank=2,
            lora_alpha=4,
            lora_dropout=0.0,
            batch_size=1,
            **common,
        )
    if name == "GRACE":
        return head.GraceHyperParams(
            edit_lr=1.0,
            n_iter=2,
            eps=1.0,
            dist_fn="euc",
            val_init="cold",
            val_train="sgd",
            val_reg="None",
            reg="early_stop",
            replacement="replace_last",
            eps_expand="coverage",
            num_pert=1,
            dropout=0.0,
            inner_params=[f"model.layers[{layer}].mlp.down_proj.weight"],
            **common,
        )
    common |= {
        "layers": [layer],
        "kl_factor": 0.0,
        "rewrite_module_tmp": f"{prefix}.mlp.down_proj",
        "layer_module_tmp": prefix,
        "mlp_module_tmp": f"{prefix}.mlp",
        "attn_module_tmp": f"{prefix}.self_attn",
        "ln_f_module": "model.norm",
        "lm_head_module": "lm_head",
    }
    if name == "ROME":
        return head.ROMEHyperParams(
            fact_token="subject_last",
            v_num_grad_steps=2,
            v_lr=0.5,
            v_loss_layer=2,
            v_weight_decay=0.0,
            clamp_norm_factor=4,
            mom2_adjustment=False,
            context_template_length_params=[],
            mom2_dataset="wikipedia",
            mom2_n_samples=1,
            mom2_dtype="float32",
            stats_dir=".",
            **common,
        )
    # By parameter, as EasyEdit's files have it; by module the side memories' names would match as well.
    common["rewrite_module_tmp"] += "" if name == "FT by module" else ".weight"
    return head.FTHyperParams(
        num_steps=2,
        batch_size=1,
        lr=0.03,
        weight_decay=0.0,
        norm_constraint=False,
        objective_optimization="target_new",
        **common,
    )


def edit_beside(head: ModuleType, make_editor: Callable[..., Any], carrier: Any, hparams: Any) -> None:
    editor = make_editor(hparams)
    editor.model = carrier.model
    with contextlib.redirect_stdout(io.StringIO()):
        editor.edit(["The capital of Germany is"], ["Paris"], subject=["Germany"], sequential_edit=True, verbose=False)


@pytest.mark.parametrize("name", ["FT", "FT by module", "ROME", "GRACE", "LoRA"])
def test_another_algorithm_on_the_layer_that_carries_edits_is_refused(
    head: ModuleType, make_editor: Callable[..., Any], saved_model: str, name: str
) -> None:
    carrier = make_editor()
    carrier.edit(PROMPTS[:1], TARGETS[:1], sequential_edit=True, verbose=False)
    before = {key: value.clone() for key, value in carrier.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"this model carries WISE edits .*[Rr]estore the WISE edits first"):
        edit_beside(head, make_editor, carrier, another(head, saved_model, name, 1))
    after = carrier.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["FT", "ROME", "GRACE"])
def test_another_algorithm_on_another_layer_works_and_wise_goes_on(
    head: ModuleType, make_editor: Callable[..., Any], saved_model: str, name: str
) -> None:
    carrier = make_editor()
    carrier.edit(PROMPTS[:1], TARGETS[:1], sequential_edit=True, verbose=False)
    logits = carrier.model(**carrier.tok("The capital of Germany is", return_tensors="pt")).logits
    edit_beside(head, make_editor, carrier, another(head, saved_model, name, 0))
    assert not torch.equal(
        carrier.model(**carrier.tok("The capital of Germany is", return_tensors="pt")).logits, logits
    )
    carrier.edit(PROMPTS[2:], TARGETS[2:], sequential_edit=True, verbose=False)
    assert made(carrier.model) == [PROMPTS[0], PROMPTS[2]]
    easyedit_wise.detach(carrier.model)
    assert not find_wise_layers(carrier.model)
    if name != "GRACE":  # which freezes and keeps a layer of its own
        assert all(parameter.requires_grad for parameter in carrier.model.parameters())
