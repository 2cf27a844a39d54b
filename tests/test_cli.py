"""The command line, on a tiny model saved to disk."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import LAYERS, build_model, build_tokenizer
from editing_helpers import logits_of, only_layer, requests, settings
from typer.testing import CliRunner, Result

import easyedit_wise.demo as demo_module
from easyedit_wise import apply_wise_to_model, load_edits
from easyedit_wise.cli import app
from easyedit_wise.hparams import WISEHyperParams
from easyedit_wise.tuner.model import find_wise_layers


def test_the_module_runs_as_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("easyedit_wise", run_name="__main__")
    assert stopped.value.code == 0
    assert "Usage: easyedit-wise" in capsys.readouterr().out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_model("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


class Files:
    """The files of one run."""

    def __init__(self, folder: Path) -> None:
        self.requests = folder / "requests.json"
        self.hparams = folder / "settings.yaml"
        self.out = folder / "edits"
        self.requests.write_text(json.dumps(requests(3)), encoding="utf-8")
        self.hparams.write_text(yaml.safe_dump(settings(save_freq=2, merge_freq=4).to_dict()), encoding="utf-8")

    def arguments(self, model: Path | str, **changes: Any) -> list[str]:
        options = {"model": model, "hparams": self.hparams, "out": self.out} | changes
        return [
            "edit",
            str(self.requests),
            *(part for key, value in options.items() for part in (f"--{key}", str(value))),
        ]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def error_of(result: Result) -> str:
    """The one line that a failed run prints."""
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)  # no traceback
    bars = ("Loading weights:", "WISE:")  # progress, while the model is loaded and edited
    lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith(bars)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert result.stdout == ""
    return lines[0]


def test_edit_saves_what_apply_makes(files: Files, checkpoint: Path, tok: Any) -> None:
    result = run(*files.arguments(checkpoint))
    assert result.exit_code == 0, result.output
    assert result.stdout == f"3 edits saved in {files.out}.\n"
    expected, loaded = build_model("llama"), build_model("llama")
    apply_wise_to_model(expected, tok, requests(3), settings(save_freq=2, merge_freq=4))
    load_edits(loaded, files.out)
    for state, other in zip(
        only_layer(loaded).memories("default"), only_layer(expected).memories("default"), strict=True
    ):
        assert (state.stage, state.n_edits) == (other.stage, other.n_edits)
        assert torch.equal(state.delta_weight, other.delta_weight)
    for request in requests(4):
        assert torch.equal(logits_of(loaded, tok, request["prompt"]), logits_of(expected, tok, request["prompt"]))
    record = json.loads((files.out / "wise_edits.json").read_text(encoding="utf-8"))
    assert [edit["prompt"] for edit in record["edits"]] == [request["prompt"] for request in requests(3)]
    assert record["settings"]["model_name"] == str(checkpoint)


def test_edit_needs_no_settings(files: Files, checkpoint: Path) -> None:
    files.requests.write_text(json.dumps(requests(1)), encoding="utf-8")
    result = run("edit", str(files.requests), "--model", str(checkpoint), "--out", str(files.out))
    assert result.exit_code == 0, result.output
    layer = "model.layers.2.mlp.down_proj"  # of layers 0 to 2
    assert f"They are in {layer}, by the model's architecture" in result.stdout
    record = json.loads((files.out / "wise_edits.json").read_text(encoding="utf-8"))
    assert (record["layer"], record["settings"]["inner_params"]) == (layer, ["model.layers[2].mlp.down_proj.weight"])


def test_a_run_replaces_what_an_earlier_one_saved(files: Files, checkpoint: Path) -> None:
    assert run(*files.arguments(checkpoint)).exit_code == 0
    files.requests.write_text(json.dumps(requests(1)), encoding="utf-8")
    assert run(*files.arguments(checkpoint)).exit_code == 0
    loaded = build_model("llama")
    load_edits(loaded, files.out)
    assert [memory.n_edits for memory in only_layer(loaded).memories("default")] == [1]


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("[]", ["requests.json", "non-empty list"]),
        ("{}", ["requests.json", "non-empty list"]),
        ("[{", ["Expecting"]),
        ('[{"prompt": "x"}]', ["no 'target_new'"]),
        ('[{"prompt": "x", "target_new": ""}]', ["target_new is ''"]),
        ("[3]", ["a request is 3"]),
        ('["text"]', ["a request is 'text'"]),
        ('[{"prompt": "France is", "target_new": "x", "subject": "Spain"}]', ["'Spain'", "does not occur"]),
    ],
)
def test_requests_that_do_not_fit(files: Files, checkpoint: Path, text: str, fragments: list[str]) -> None:
    files.requests.write_text(text, encoding="utf-8")
    result = run(*files.arguments(checkpoint))
    message = error_of(result)
    assert all(fragment in message for fragment in fragments), message
    assert "Loading weights" not in result.stderr  # the requests are read first
    assert not files.out.exists()


def test_a_file_of_requests_that_is_not_there(files: Files, checkpoint: Path) -> None:
    files.requests.unlink()
    assert "requests.json" in error_of(run(*files.arguments(checkpoint)))


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        # The square brackets are part of what the user has to read.
        (f"inner_params: ['{LAYERS['llama']}']\nact_margin: [1]", ["three numbers [alpha, beta, gamma]", "[5.0, 20.0"]),
        ("inner_params: ['[/nowhere].weight']", ["[/nowhere].weight", "does not exist"]),
        (f"inner_params: ['{LAYERS['llama']}']\nmask_ration: 1", ["did you mean 'mask_ratio'?"]),
        (f"inner_params: ['{LAYERS['llama']}']\nuse_chat_template: true", ["no chat template"]),
        ("inner_params: [model.layers[1].mlp\n", ["settings.yaml is not YAML"]),
        ("a text", ["settings.yaml does not hold settings"]),
    ],
    ids=["margin", "brackets", "unknown", "template", "yaml", "text"],
)
def test_settings_that_do_not_fit(files: Files, checkpoint: Path, text: str, fragments: list[str]) -> None:
    files.hparams.write_text(text, encoding="utf-8")
    message = error_of(run(*files.arguments(checkpoint)))
    assert all(fragment in message for fragment in fragments), message


def test_settings_that_are_not_there(files: Files, checkpoint: Path) -> None:
    assert "did you mean 'llama-7b'?" in error_of(run(*files.arguments(checkpoint, hparams="lama-7b")))


def test_packaged_settings_are_found_by_name(files: Files, checkpoint: Path) -> None:
    # The tiny model has no 28th layer: that is how far the settings of the 7B model come.
    message = error_of(run(*files.arguments(checkpoint, hparams="llama-7b")))
    assert "model.layers[27].mlp.down_proj.weight" in message
    assert "model.layers[0..2].mlp.down_proj.weight" in message


def test_a_model_that_is_not_there(files: Files, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty" in error_of(run(*files.arguments(empty)))


def test_an_out_that_is_a_file_is_noticed_before_anything_is_edited(
    files: Files, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.out.write_text("results", encoding="utf-8")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    assert "is a file" in error_of(run(*files.arguments(checkpoint)))
    assert files.out.read_text(encoding="utf-8") == "results"


def test_an_edit_that_diverges(files: Files, checkpoint: Path) -> None:
    hparams = settings(optimizer="sgd", edit_lr=1e37, norm_constraint=None, n_iter=5)
    files.hparams.write_text(yaml.safe_dump(hparams.to_dict()), encoding="utf-8")
    assert "Lower edit_lr (now 1e+37)" in error_of(run(*files.arguments(checkpoint)))
    assert not files.out.exists()


def test_help_and_missing_options() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "demo" in result.output
    assert "edit" in result.output
    assert run("edit").exit_code == 2


def test_a_demo_with_a_model_that_easyedit_has_no_loader_for() -> None:
    class NoLoader:
        @staticmethod
        def from_hparams(hparams: WISEHyperParams) -> None:
            raise NotImplementedError  # all that EasyEdit's wheel says

    with pytest.raises(ValueError, match=r"no loader for 'google/gemma-3-270m'.*a link.*'baichuan'"):
        demo_module._editor_of(NoLoader, WISEHyperParams.from_hparams("gemma-3-270m"))


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(demo_module, "run_demo", lambda *arguments: calls.append(arguments))
    assert run("demo").exit_code == 0
    assert run("demo", "--out", str(tmp_path), "--model", "tiny", "--facts", "3").exit_code == 0
    assert [call[:3] for call in calls] == [(Path("runs/demo"), None, None), (tmp_path, "tiny", 3)]
    assert run("demo", "--facts", "0").exit_code == 2


@pytest.mark.parametrize("error", [FileNotFoundError, ModuleNotFoundError, ValueError])
def test_a_demo_that_lacks_something(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def lacking(*arguments: Any) -> None:
        raise error("there is no easyeditor [here]:\n  install it")

    monkeypatch.setattr(demo_module, "run_demo", lacking)
    assert error_of(run("demo")) == "error: there is no easyeditor [here]: install it"


def test_the_edited_model_is_not_changed_on_disk(files: Files, checkpoint: Path) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert run(*files.arguments(checkpoint)).exit_code == 0
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert not find_wise_layers(build_model("llama"))


# -- journals ---------------------------------------------------------------------------------


@pytest.fixture
def journaled(files: Files, checkpoint: Path) -> Path:
    """A journal of three edits, made by the command."""
    folder = files.out.with_name("journal")
    result = run(
        "edit",
        str(files.requests),
        "--model",
        str(checkpoint),
        "--hparams",
        str(files.hparams),
        "--journal",
        str(folder),
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == f"3 edits journaled in {folder}.\n"
    return folder


def test_edit_wants_a_place(files: Files, checkpoint: Path) -> None:
    result = run("edit", str(files.requests), "--model", str(checkpoint), "--hparams", str(files.hparams))
    assert "--out" in error_of(result)
    assert "--journal" in error_of(result)


def test_log_lists_and_show_explains(journaled: Path, checkpoint: Path) -> None:
    listed = run("log", str(journaled))
    assert listed.exit_code == 0, listed.output
    assert f"3 edits, 2 side memories in model.layers.1.mlp.down_proj of {checkpoint}" in listed.stdout
    assert "Rome" in listed.stdout
    shown = run("show", str(journaled), "2")
    assert shown.exit_code == 0, shown.output
    for part in ("The currency of India is", "the euro", "side memory 0 (shard, 2 edits", "merge_freq: 4"):
        assert part in shown.stdout
    assert "holds no edit 9: it has 3, from 1 to 3" in error_of(run("show", str(journaled), "9"))


def test_forget_takes_back_and_saves(journaled: Path, files: Files, tok: Any) -> None:
    result = run("forget", str(journaled), "1", "--out", str(files.out))
    assert result.exit_code == 0, result.output
    assert "edit 1 is taken back; 2 edits are held." in result.stdout
    assert "2 edits are made again without it" in result.stderr
    expected, loaded = build_model("llama"), build_model("llama")
    apply_wise_to_model(expected, tok, requests(3)[1:], settings(save_freq=2, merge_freq=4))
    load_edits(loaded, files.out)
    for one, other in zip(
        only_layer(loaded).memories("default"), only_layer(expected).memories("default"), strict=True
    ):
        assert torch.equal(one.delta_weight, other.delta_weight)
    assert "gone" in run("log", str(journaled)).stdout.split("made, or gone")[1]
    assert "that one was taken back" in error_of(run("forget", str(journaled), "1"))


def test_the_quick_way_is_offered_and_taken(files: Files, checkpoint: Path) -> None:
    values = settings(save_freq=1, merge_freq=1, retrieve=True).to_dict()
    files.hparams.write_text(yaml.safe_dump(values), encoding="utf-8")
    folder = files.out.with_name("journal")
    assert run(*files.arguments(checkpoint, journal=folder)).exit_code == 0
    exact = run("forget", str(folder), "2")
    assert "1 edits are made again without it" in exact.stderr
    assert "With --quick only its own memory is made again: about 0 seconds." in exact.stderr
    quick = run("forget", str(folder), "1", "--quick")
    assert quick.exit_code == 0, quick.output
    assert "0 edits are made again without it" in quick.stderr
    assert "--quick" not in quick.stderr
    assert "edit 1 is taken back; 1 edits are held." in quick.stdout


def test_an_edit_can_be_saved_rounded(files: Files, checkpoint: Path) -> None:
    assert run(*files.arguments(checkpoint), "--save-dtype", "bfloat16").exit_code == 0
    config = json.loads((files.out / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["save_dtype"] == "bfloat16"
    assert "save_dtype is 'int4'" in error_of(run(*files.arguments(checkpoint), "--save-dtype", "int4"))


def test_resume_with_nothing_left_changes_nothing(journaled: Path) -> None:
    result = run("resume", str(journaled))
    assert result.exit_code == 0, result.output
    assert "3 edits are held." in result.stdout


def test_a_folder_without_a_journal(tmp_path: Path) -> None:
    for command in (["log"], ["show", "1"], ["resume"], ["forget", "1"]):
        name, *rest = command
        assert "does not exist: name a folder" in error_of(run(name, str(tmp_path / "none"), *rest))
