"""``easyedit-wise evaluate`` on a tiny model saved to disk, and the algorithms that it knows by name."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import LAYERS, build_model, build_tokenizer
from editing_helpers import logits_of, settings
from test_datasets import write
from test_knowedit import entry as knowedit_entry
from typer.testing import CliRunner, Result

from easyedit_wise.cli import app
from easyedit_wise.easyedit.algorithms import settings_of
from easyedit_wise.easyedit.covariance import second_moments_of_samples, second_moments_of_texts
from easyedit_wise.easyedit.probe import probe_routes
from easyedit_wise.easyedit.wise_stream import WiseStream
from easyedit_wise.evaluate_options import changes_of
from easyedit_wise.machine import machine_info, source_commit
from easyedit_wise.tuner.switch import edits_disabled, last_route


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build_model("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def hparams(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings(save_freq=2, merge_freq=4).to_dict()), encoding="utf-8")
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def result_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


# -- the command --------------------------------------------------------------------------------


def test_a_run_writes_all_that_it_depends_on(tmp_path: Path, checkpoint: Path, hparams: Path) -> None:
    data, out = write(tmp_path, "zsre", 8), tmp_path / "out"
    arguments = ("--data", data, "--edits", 5, "--model", checkpoint, "--hparams", hparams, "--out", out)
    done = run(*arguments, "--checkpoints", "2", "--set", "n_iter=3", "--seed", 4)
    assert done.exit_code == 0, done.output
    (path,) = result_files(out)
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.name.startswith("WISE-zsre-T5-s4-")
    assert result["settings"]["hparams"]["n_iter"] == result["effective_hparams"]["n_iter"] == 3
    assert result["settings"]["data"][0]["file"] == "zsre-edit.json"
    assert result["settings"]["checkpoints"] == [2, 5]
    assert result["machine"]["versions"]["torch"] == version("torch")
    assert result["irrelevant_prompts_from_data"] == 5
    first, last = result["checkpoints"]
    assert "rows" not in first["scores"]["zsre"]
    assert len(last["scores"]["zsre"]["rows"]) == 5
    assert last["routing"]["zsre"]["edits_right_memory"] is not None
    assert result["before"]["zsre"]["locality"] == 1.0
    assert (out / "retention-reliability.png").stat().st_size > 0
    for heading in ("Rel", "exact", "PPL", "fire"):
        assert heading in done.output


def test_what_has_a_result_is_read_back(
    tmp_path: Path, checkpoint: Path, hparams: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = write(tmp_path, "zsre", 4), tmp_path / "out"
    arguments = ("--data", data, "--edits", 2, "--model", checkpoint, "--hparams", hparams, "--out", out)
    assert run(*arguments).exit_code == 0
    (path,) = result_files(out)
    marked = json.loads(path.read_text(encoding="utf-8")) | {"mark": 1}
    path.write_text(json.dumps(marked), encoding="utf-8")
    assert "read from" in run(*arguments).output
    assert json.loads(path.read_text(encoding="utf-8")) == marked
    assert "read from" not in run(*arguments, "--again").output
    assert "mark" not in json.loads(path.read_text(encoding="utf-8"))
    # Another setting is another result.
    assert run(*arguments, "--set", "n_iter=1").exit_code == 0
    assert len(result_files(out)) == 2


@pytest.mark.parametrize("stopped_after", [1, 2, 4])  # before a checkpoint, at it, behind it
def test_a_stopped_run_goes_on_and_comes_to_the_same_result(
    tmp_path: Path, checkpoint: Path, hparams: Path, monkeypatch: pytest.MonkeyPatch, stopped_after: int
) -> None:
    data = write(tmp_path, "zsre", 6)

    def evaluate(out: Path, *more: str) -> Result:
        arguments = ("--data", data, "--edits", 6, "--checkpoints", "2", "--model", checkpoint, "--hparams", hparams)
        return run(*arguments, "--out", out, *more)

    assert evaluate(tmp_path / "whole").exit_code == 0
    real: Any = WiseStream.edit
    asked: list[str] = []

    def stops(self: WiseStream, requests: Any, on_edit: Any) -> None:
        def counted() -> None:
            on_edit()
            asked.append("")
            if len(asked) == stopped_after:
                raise KeyboardInterrupt

        real(self, requests, counted)

    with monkeypatch.context() as patched:
        patched.setattr(WiseStream, "edit", stops)
        evaluate(tmp_path / "stopped")
    out = tmp_path / "stopped"
    assert not result_files(out)
    assert bool(list(out.glob("*.unfinished"))) == (stopped_after == 4)
    seen: list[int] = []

    def counts(self: WiseStream, requests: Any, on_edit: Any) -> None:
        real(self, requests, lambda: (seen.append(1), on_edit()))

    with monkeypatch.context() as patched:
        patched.setattr(WiseStream, "edit", counts)
        done = evaluate(out)
    assert done.exit_code == 0, done.output
    assert f"Going on after {stopped_after} edits" in done.output
    assert len(seen) == 6 - stopped_after
    assert [path.suffix for path in out.iterdir() if path.suffix != ".png"] == [".json"]
    (whole,), (resumed,) = (
        [json.loads(path.read_text(encoding="utf-8")) for path in result_files(one)]
        for one in (tmp_path / "whole", out)
    )
    assert (whole["resumed_after"], resumed["resumed_after"]) == ([], [stopped_after])
    assert [one["edits"] for one in resumed["checkpoints"]] == [2, 6]
    for one, other in zip(whole["checkpoints"], resumed["checkpoints"], strict=True):
        assert one["scores"] == other["scores"]
        assert one["routing"] == other["routing"]
        assert other["edit_seconds"] > 0


def test_a_stopped_run_that_cannot_go_on_says_so(
    tmp_path: Path, checkpoint: Path, hparams: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = write(tmp_path, "zsre", 4), tmp_path / "out"
    arguments = ("--data", data, "--edits", 3, "--model", checkpoint, "--hparams", hparams, "--out", out)

    def stop_after(n: int, *more: str) -> None:
        real, calls = WiseStream.edit, []

        def stops(self: WiseStream, requests: Any, on_edit: Any) -> None:
            if len(calls) == n:
                raise KeyboardInterrupt
            calls.append(real(self, requests, on_edit))

        with monkeypatch.context() as patched:
            patched.setattr(WiseStream, "edit", stops)
            run(*arguments, "--checkpoints", "1,2", *more)

    stop_after(2)
    (unfinished,) = out.glob("*.unfinished")
    kept = unfinished.read_text(encoding="utf-8")
    assert [one["edits"] for one in json.loads(kept)["checkpoints"]] == [1, 2]
    unfinished.write_text(kept[:100], encoding="utf-8")
    broken = run(*arguments, "--checkpoints", "1,2")
    assert broken.exit_code == 1
    assert "the run cannot go on. --again begins it anew" in broken.stderr
    unfinished.unlink()  # edits beyond a checkpoint that was never scored
    broken = run(*arguments, "--checkpoints", "1,2")
    assert broken.exit_code == 1
    assert "2 edits are made, but the last checkpoint scored is 0 and the next [1]" in broken.stderr
    assert run(*arguments, "--checkpoints", "1,2", "--again").exit_code == 0
    assert len(result_files(out)) == 1
    assert not [path for path in out.iterdir() if path.suffix not in (".json", ".png")]
    # Without a journal nothing is kept of the edits, and the run begins anew.
    stop_after(2, "--no-journal", "--again")
    assert not list(out.glob("*.journal"))
    done = run(*arguments, "--checkpoints", "1,2", "--again")
    assert done.exit_code == 0
    assert "Going on" not in done.output


def test_mixed_and_separate_streams_make_the_same_edits(tmp_path: Path, checkpoint: Path, hparams: Path) -> None:
    files = [write(tmp_path, kind, 4) for kind in ("zsre", "counterfact", "hallucination", "temporal")]
    data = [part for path in files for part in ("--data", path)]
    out = tmp_path / "out"
    common = ("--model", checkpoint, "--hparams", hparams, "--out", out, "--checkpoints", 4)
    done = run(*data, "--edits", 2, "--separately", *common)
    assert done.exit_code == 0, done.output
    results = {r["stream"]: r for r in (json.loads(p.read_text(encoding="utf-8")) for p in result_files(out))}
    assert set(results) == {"mixed", "zsre", "counterfact", "hallucination", "temporal"}
    mixed = results["mixed"]["checkpoints"][-1]
    assert mixed["edits"] == 8
    for name in ("zsre", "counterfact", "hallucination", "temporal"):
        own = results[name]["checkpoints"][-1]["scores"][name]
        together = mixed["scores"][name]
        assert [row["prompt"] for row in own["rows"]] == [row["prompt"] for row in together["rows"]]
    assert mixed["scores"]["zsre"]["ood_items"] is None
    assert mixed["scores"]["temporal"]["ood_items"] is not None
    assert mixed["scores"]["counterfact"]["nearby_kept"] is not None
    assert mixed["scores"]["counterfact"]["locality"] is not None  # the demo's unrelated prompts
    assert mixed["scores"]["hallucination"]["edit_exact"] is None


def test_knowedits_files_are_evaluated(tmp_path: Path, checkpoint: Path, hparams: Path) -> None:
    data, out = tmp_path / "wiki_recent_test.json", tmp_path / "out"
    data.write_text(json.dumps([knowedit_entry(i) for i in range(4)]), encoding="utf-8")
    done = run("--data", data, "--edits", 2, "--model", checkpoint, "--hparams", hparams, "--out", out)
    assert done.exit_code == 0, done.output
    assert "Port" in done.output
    (path,) = result_files(out)
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["stream"] == "knowedit"
    last = result["checkpoints"][-1]
    kinds = {"Reasoning", "Subject_Aliasing", "Relation_Specificity", "Forgetfulness"}
    assert last["scores"]["knowedit"]["by_kind"].keys() == kinds
    assert last["scores"]["knowedit"]["portability"] is not None
    assert last["routing"]["knowedit"]["nearby_fire"] is not None  # its locality prompts


def test_errors_are_one_line(tmp_path: Path, checkpoint: Path, hparams: Path) -> None:
    data = write(tmp_path, "zsre", 3)
    common = ("--data", data, "--model", checkpoint, "--out", tmp_path / "out")
    for arguments, fragment in (
        (("--edits", 4, "--hparams", hparams), "has 3 records"),
        (("--edits", 2, "--edits", 1, "--hparams", hparams), "--edits is given 2 times for 1 files"),
        (("--edits", 2, "--hparams", hparams, "--checkpoints", "3"), "checkpoint 3 is outside"),
        (("--edits", 2, "--hparams", "smollm3"), "did you mean 'smollm2-135m'"),
        (("--edits", 2, "--hparams", hparams, "--set", "n_iter"), "'n_iter' changes no setting"),
        (("--edits", 2, "--hparams", hparams, "--set", "n_itr=2"), "did you mean 'n_iter'"),
        (("--edits", 2, "--hparams", hparams, "--dtype", "float33"), "dtype is 'float33'"),
    ):
        done = run(*common, *arguments)
        assert done.exit_code == 1, arguments
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert fragment in done.stderr, done.stderr


def test_changes_for_one_algorithm_or_for_all() -> None:
    changes = ["n_iter=3", "ROME.v_lr=0.1", "densities=null"]
    assert changes_of("WISE", changes, ("WISE", "ROME")) == {"n_iter": 3, "densities": None}
    assert changes_of("ROME", changes, ("WISE", "ROME")) == {"n_iter": 3, "v_lr": 0.1, "densities": None}
    with pytest.raises(ValueError, match=r"'FT\.lr=1' changes no setting"):
        changes_of("WISE", ["FT.lr=1"], ("WISE", "ROME"))


@pytest.mark.parametrize(("text", "value"), [
    ("[model.layers[24].mlp.down_proj.weight]", ["model.layers[24].mlp.down_proj.weight"]),
    ("[h[1].w, h[2].w]", ["h[1].w", "h[2].w"]),
    ("[['a[0]', 'b'], [1, 0.2]]", [["a[0]", "b"], [1, 0.2]]),
    ("[[5, 10], [10, 10]]", [[5, 10], [10, 10]]),
    ("model.layers[24].w", "model.layers[24].w"),
])  # fmt: skip
def test_a_list_of_names_with_brackets_is_one(text: str, value: Any) -> None:
    assert changes_of("WISE", [f"inner_params={text}"], ("WISE",)) == {"inner_params": value}


@pytest.mark.parametrize("text", ["[a[0].w", "[a]0].w]", "{a", "[a[0],]", "'a"])
def test_a_value_that_is_none_is_one_clear_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no value of a setting .*: write a number, a text, or a list") as error:
        changes_of("WISE", [f"inner_params={text}"], ("WISE",))
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)


def test_packaged_settings_of_each_algorithm() -> None:
    for name in (
        "WISE",
        "ROME",
        "FT",
        "MEMIT",
        "LoRA",
        "upstream-WISE",
        "GRACE",
        "R-ROME",
        "AlphaEdit",
        "ULTRAEDIT",
        "SimIE",
    ):
        assert settings_of(name, "smollm2-135m", {})["alg_name"] == name.removeprefix("upstream-")
    assert settings_of("ROME", "smollm2-135m", {"v_lr": 1.0})["v_lr"] == 1.0
    assert settings_of("ROME", "smollm2-135m", {})["v_weight_decay"] == 1e-3  # not the text "1e-3"
    with pytest.raises(FileNotFoundError, match="Packaged: smollm2-135m"):
        settings_of("ROME", "llama-7b", {})


def test_one_margin_of_three_can_be_changed() -> None:
    config = settings_of("WISE", "smollm2-135m", {"beta": 30.0})
    assert (config["alpha"], config["beta"], config["gamma"]) == (5.0, 30.0, 10.0)


# -- WISE's routes ------------------------------------------------------------------------------


def test_probe_agrees_with_asking_one_by_one(llama: Any, tok: Any) -> None:
    editor = WiseStream(llama, tok, settings(save_freq=1, merge_freq=1, retrieve=True, n_iter=4))
    edits = [("The capital of France is", "Rome"), ("Water is made of", "gold")]
    editor.edit([{"prompt": prompt, "target_new": target} for prompt, target in edits], lambda: None)
    assert editor.holders() == ["default/0", "default/1"]
    prompts = [*(prompt for prompt, _ in edits), "Once upon a time there was a small town by the sea"]
    together = probe_routes(llama, tok, prompts, batch_size=3)
    for prompt, routed in zip(prompts, together, strict=True):
        logits_of(llama, tok, prompt)
        route = last_route(llama)
        assert route is not None
        assert (routed.memory or "main") == route.describe()["memory"]
        if routed.memory:
            assert routed.score == pytest.approx(route.describe()["score"], rel=1e-4)
            assert routed.relative > 1.0
    with edits_disabled(llama), pytest.raises(ValueError, match="switched off"):
        probe_routes(llama, tok, prompts)


# -- EasyEdit's algorithms ----------------------------------------------------------------------


def test_second_moments_by_definition(llama: Any, tok: Any) -> None:
    name = LAYERS["llama"].removesuffix(".weight").replace("[", ".").replace("]", "")
    keys: list[torch.Tensor] = []
    layer = llama.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, args: keys.append(args[0][0]))
    texts = ["Water is made of hydrogen and oxygen.", "def add(a, b): return a + b"]
    for text in texts:
        logits_of(llama, tok, text)
    handle.remove()
    rows = torch.cat(keys)
    moments, n_tokens = second_moments_of_texts(llama, tok, [name], texts)
    assert n_tokens == len(rows)
    assert torch.allclose(moments[name], rows.T @ rows / len(rows), atol=1e-5)
    with pytest.raises(ValueError, match="has no token"):
        second_moments_of_texts(llama, tok, [name], [])


def test_second_moments_of_samples_repeat(llama: Any, tok: Any) -> None:
    before = torch.get_rng_state()
    name = "model.layers.0.mlp.down_proj"
    one, n_tokens = second_moments_of_samples(llama, tok, [name], seed=3)
    same, _ = second_moments_of_samples(llama, tok, [name], seed=3)
    other, _ = second_moments_of_samples(llama, tok, [name], seed=4)
    assert n_tokens == 128 * 65
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    assert torch.equal(before, torch.get_rng_state())
    assert not llama.get_submodule(name)._forward_pre_hooks


@pytest.mark.skipif(importlib.util.find_spec("easyeditor") is None, reason="EasyEdit's wheel is not installed")
def test_rome_ft_and_memit_of_the_real_wheel(tmp_path: Path, checkpoint: Path) -> None:
    """In a process of its own, because the wheel's import leaves much behind."""
    tiny = {"layers": "[1]", "v_loss_layer": "2", "v_num_grad_steps": "2", "num_steps": "2"}
    changes = []
    for alg, keys in {
        "ROME": ("layers", "v_loss_layer", "v_num_grad_steps"),
        "MEMIT": ("layers", "v_loss_layer", "v_num_grad_steps"),
        "FT": ("layers", "num_steps"),
    }.items():
        changes += [part for key in keys for part in ("--set", f"{alg}.{key}={tiny[key]}")]
    command = [
        sys.executable,
        "-m",
        "easyedit_wise.cli",
        "evaluate",
        "--data",
        str(write(tmp_path, "hallucination", 3)),
    ]
    command += ["--edits", "2", "--model", str(checkpoint), "--out", str(tmp_path / "out"), *changes]
    command += [part for alg in ("ROME", "MEMIT", "FT") for part in ("--alg", alg)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = [json.loads(path.read_text(encoding="utf-8")) for path in result_files(tmp_path / "out")]
    assert sorted(result["settings"]["alg"] for result in results) == ["FT", "MEMIT", "ROME"]
    for result in results:
        before = result["before"]["hallucination"]["perplexity"]
        assert result["checkpoints"][-1]["scores"]["hallucination"]["perplexity"] != before
        if result["settings"]["alg"] == "MEMIT":
            assert result["effective_hparams"]["covariances"] == "8320 tokens of texts that the model wrote"


def test_machine_info_is_plain_json() -> None:
    info = machine_info()
    assert json.loads(json.dumps(info)) == info
    assert info["threads"] == torch.get_num_threads()
    assert info["commit"] == source_commit()
