"""``easyedit-wise lm-eval``: the harness's own command line, with WISE known to PEFT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import LAYERS, build_model, build_tokenizer
from typer.testing import CliRunner

from easyedit_wise import WISEHyperParams, apply_wise_to_model, save_edits
from easyedit_wise.cli import app

# A harness as lm_eval is laid out: it reads sys.argv, and loads the adapter with PEFT alone.
STAND_IN = """
    import json, os, sys
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def cli_evaluate():
        model, edits = sys.argv[sys.argv.index("--model_args") + 1].split(",")
        model = AutoModelForCausalLM.from_pretrained(model.partition("=")[2])
        model = PeftModel.from_pretrained(model, edits.partition("=")[2])
        with open(os.environ["TOLD"], "w") as file:
            json.dump([sys.argv, str(model.peft_config["default"].peft_type.value)], file)
        sys.exit(3)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, and edits that were made on it."""
    folder = tmp_path_factory.mktemp("saved")
    tok, model = build_tokenizer(), build_model("llama")
    model.save_pretrained(folder / "model")
    tok.save_pretrained(folder / "model")
    hparams = WISEHyperParams(inner_params=[LAYERS["llama"]])
    save_edits(
        apply_wise_to_model(model, tok, {"prompt": "The capital of France is", "target_new": "Rome"}, hparams)[0],
        folder / "edits",
    )
    return folder


def run_alone(*arguments: str, path: Path, told: Path) -> subprocess.CompletedProcess[str]:
    """A process that has not imported the package, with a stand-in for the harness on its path."""
    package = path / "lm_eval"
    package.mkdir()
    (package / "__init__.py").write_text("")
    main = textwrap.dedent(STAND_IN) + '\nif __name__ == "__main__":\n    cli_evaluate()\n'
    (package / "__main__.py").write_text(main)
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), root]), "TOLD": str(told)}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_the_launcher_hands_on_every_argument_and_peft_knows_the_adapter(saved: Path, tmp_path: Path) -> None:
    arguments = ["--model", "hf", "--model_args", f"pretrained={saved / 'model'},peft={saved / 'edits'}", "-h", "x y"]
    done = run_alone("easyedit_wise", "lm-eval", *arguments, path=tmp_path, told=tmp_path / "told")
    assert done.returncode == 3, done.stderr[-2000:]  # the harness's own exit status
    argv, kind = json.loads((tmp_path / "told").read_text())
    assert argv == ["lm_eval", *arguments]
    assert kind == "WISE"


def test_without_the_launcher_peft_does_not_know_it(saved: Path, tmp_path: Path) -> None:
    arguments = ["--model_args", f"pretrained={saved / 'model'},peft={saved / 'edits'}"]
    done = run_alone("lm_eval", *arguments, path=tmp_path, told=tmp_path / "told")
    assert "KeyError: 'WISE'" in done.stderr


def test_a_missing_harness_is_one_line_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = CliRunner().invoke(app, ["lm-eval", "--tasks", "x"])
    assert done.exit_code == 1
    assert done.output.splitlines() == ["error: lm-evaluation-harness is not installed: pip install lm-eval"]


def test_with_the_real_harness(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base model prefers another answer, the edited one the new fact."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    data, results = tmp_path / "facts.jsonl", tmp_path / "results"
    asked = {"q": "The capital of France is", "choices": ["Rome", "Oslo", "Lyon"], "a": 0}
    data.write_text(json.dumps(asked))
    (tmp_path / "facts.yaml").write_text(
        textwrap.dedent(f"""
            task: edited_facts
            dataset_path: json
            dataset_kwargs: {{data_files: {{test: {data}}}}}
            output_type: multiple_choice
            test_split: test
            doc_to_text: "{{{{q}}}}"
            doc_to_choice: "{{{{choices}}}}"
            doc_to_target: a
            metric_list: [{{metric: acc}}]
        """)
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    scores = []
    for peft in ("", f",peft={saved / 'edits'}"):
        model = f"pretrained={saved / 'model'}{peft}"
        where = ["--include_path", str(tmp_path), "--device", "cpu", "--output_path", str(results / str(len(scores)))]
        done = CliRunner().invoke(
            app, ["lm-eval", "--model", "hf", "--model_args", model, "--tasks", "edited_facts", *where]
        )
        assert done.exit_code == 0, done.output[-2000:]
        (report,) = (results / str(len(scores))).rglob("*.json")
        scores.append(json.loads(report.read_text())["results"]["edited_facts"]["acc,none"])
    assert scores == [0.0, 1.0]
