"""What an EasyEdit's algorithm is given, and what it leaves: settings that fit this host, and a run's own state."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from conftest import build_model

from easyedit_wise.easyedit.algorithms import make_editor, settings_of
from easyedit_wise.easyedit.host_state import remember_initial_globals
from easyedit_wise.easyedit.host_stream import HostStream

# The manner of AlphaEdit: globals that a run fills, and a file in the working folder that the next edit looks for.
LEAVES = """
import os
import torch
CACHE, LOADED = [], False

def apply_leaves(model, tok, requests, hparams):
    global LOADED, SUMS
    found = os.path.exists(hparams.P_loc)
    if not found:
        torch.save(torch.zeros(1), "null_space_project.pt")
    if not LOADED:
        SUMS, LOADED = torch.zeros(1), True
    SUMS += 1
    CACHE.append(requests[0]["prompt"])
    model.seen = [*getattr(model, "seen", []), (found, SUMS.item(), list(CACHE))]
    return model, {}
"""


@dataclass
class LeavesHyperParams:
    P_loc: str
    device: str


@dataclass
class Settings:
    """As at EasyEdit's GitHub version; the reader gives one key another name, as UltraEdit's does."""

    layers: list[int]
    objective_optimization: str
    alg_name: str
    device: str
    model_name: str
    stats_dir: str = "none"
    model_class: str = "none"

    @classmethod
    def from_hparams(cls, path: str) -> Settings:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        assert config["alg_name"] == "R-Toy"
        if "class_name" in config:
            config["model_class"] = config.pop("class_name")
        return cls(**config)


@dataclass
class WheelSettings:
    """The same without what the wheel lacks."""

    layers: list[int]
    alg_name: str
    device: str
    model_name: str


def install(monkeypatch: pytest.MonkeyPatch, name: str, apply: Callable[..., Any], **names: Any) -> ModuleType:
    """An EasyEdit with one algorithm."""
    module = ModuleType("easyeditor.models.toy")
    vars(module).update(names)
    alg_dict = ModuleType("easyeditor.util.alg_dict")
    alg_dict.ALG_DICT = {name: apply}  # type: ignore[attr-defined]
    for one in (ModuleType("easyeditor"), ModuleType("easyeditor.util"), alg_dict, module):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    return module


@pytest.fixture
def leaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = install(monkeypatch, "Leaves", lambda: None)
    exec(compile(LEAVES, "toy.py", "exec"), vars(module))
    sys.modules["easyeditor.util.alg_dict"].ALG_DICT["Leaves"] = module.apply_leaves
    module.apply_leaves.__module__ = module.__name__
    module.LeavesHyperParams = LeavesHyperParams  # type: ignore[attr-defined]
    monkeypatch.chdir(tmp_path)
    return module


def edit(editor: Any, prompt: str) -> Any:
    editor.edit([{"prompt": prompt, "target_new": "x"}], lambda: None)
    return editor.model.seen[-1]


# -- what a run leaves --------------------------------------------------------------------------


def test_a_run_finds_what_it_left_and_nothing_of_another(leaves: Any, tok: Any) -> None:
    editors = [HostStream("Leaves", build_model("llama"), tok, {"P_loc": "elsewhere/p.pt"}, 0, None) for _ in range(2)]
    assert edit(editors[0], "a") == (False, 1.0, ["a"])
    assert edit(editors[1], "b") == (False, 1.0, ["b"])  # in turns, each goes on with its own
    assert edit(editors[0], "c") == (True, 2.0, ["a", "c"])
    assert edit(editors[1], "d") == (True, 2.0, ["b", "d"])
    assert (leaves.CACHE, leaves.LOADED) == ([], False)
    assert not hasattr(leaves, "SUMS")


def test_a_users_own_state_is_neither_found_nor_lost(leaves: Any, tok: Any, llama: Any) -> None:
    remember_initial_globals()  # as when EasyEdit is imported
    by_hand = build_model("llama")
    leaves.apply_leaves(by_hand, tok, [{"prompt": "mine"}], LeavesHyperParams("null_space_project.pt", "cpu"))
    editor = HostStream("Leaves", llama, tok, {"P_loc": "elsewhere/p.pt"}, 0, None)
    assert edit(editor, "a") == (False, 1.0, ["a"])
    assert (leaves.CACHE, leaves.LOADED, leaves.SUMS.item()) == (["mine"], True, 1.0)


def test_nothing_is_left_in_the_working_folder_and_a_file_there_is_found_by_its_name(
    leaves: Any, tok: Any, llama: Any, tmp_path: Path
) -> None:
    def fail(*args: Any) -> Any:
        Path("half.pt").touch()
        raise OSError("disk")

    editor = HostStream("Leaves", llama, tok, {"P_loc": "elsewhere/p.pt"}, 0, None)
    edit(editor, "a")
    sys.modules["easyeditor.util.alg_dict"].ALG_DICT["Leaves"] = fail
    fail.__module__ = leaves.__name__
    failing = HostStream("Leaves", build_model("llama"), tok, {"P_loc": "p.pt"}, 0, None)
    with pytest.raises(RuntimeError, match="failed on the edit 'a' -> 'x': OSError: disk"):
        edit(failing, "a")
    assert (Path.cwd(), list(tmp_path.iterdir())) == (tmp_path, [])

    sys.modules["easyeditor.util.alg_dict"].ALG_DICT["Leaves"] = leaves.apply_leaves
    (tmp_path / "mine.pt").touch()
    assert edit(HostStream("Leaves", build_model("llama"), tok, {"P_loc": "mine.pt"}, 0, None), "a")[0]


class Executor:
    """In the manner of UltraEdit's and MEND's, of which the host keeps one object."""

    def __init__(self) -> None:
        self.model: Any = None

    def apply_to_model(self, model: Any, tok: Any, requests: Any, hparams: Any) -> tuple[Any, dict[str, Any]]:
        self.model = self.model or model
        return self.model, {}


def test_an_object_that_the_host_keeps_does_not_keep_the_first_runs_model(
    monkeypatch: pytest.MonkeyPatch, tok: Any
) -> None:
    Executor.__module__ = "easyeditor.models.toy"
    install(monkeypatch, "Leaves", Executor().apply_to_model, LeavesHyperParams=LeavesHyperParams)
    for _ in range(2):
        model = build_model("llama")
        editor = HostStream("Leaves", model, tok, {"P_loc": "x"}, 0, None)
        editor.edit([{"prompt": prompt, "target_new": "x"} for prompt in "ab"], lambda: None)
        assert editor.model is model


# -- what it is given ---------------------------------------------------------------------------


def given(monkeypatch: pytest.MonkeyPatch, tok: Any, model: Any, cls: type, config: dict[str, Any]) -> Any:
    """The settings object that the algorithm gets."""
    seen: list[Any] = []

    def apply(model: Any, tok: Any, requests: Any, hparams: Any) -> tuple[Any, dict[str, Any]]:
        seen.append((hparams, tok.padding_side))
        return model, {}

    apply.__module__ = "easyeditor.models.toy"
    install(monkeypatch, "R-Toy", apply, R_TOYHyperParams=cls)
    editor, effective = make_editor("R-Toy", model, tok, config)
    editor.edit([{"prompt": "a", "target_new": "x"}], lambda: None)
    assert effective == config
    return seen[0][0]


BOTH = {"layers": [1], "alg_name": "R-Toy", "model_name": "me/SmolLM2", "objective_optimization": "prompt_last"}


def test_one_file_fits_both_hosts(monkeypatch: pytest.MonkeyPatch, tok: Any, llama: Any) -> None:
    assert given(monkeypatch, tok, llama, WheelSettings, BOTH).layers == [1]
    assert given(monkeypatch, tok, llama, Settings, BOTH).objective_optimization == "prompt_last"
    older = {key: value for key, value in BOTH.items() if key != "objective_optimization"}
    assert given(monkeypatch, tok, llama, Settings, older).objective_optimization == "prompt_last"
    with pytest.raises(ValueError, match=r"'target_new', but the installed EasyEdit has no such setting.*GitHub"):
        given(monkeypatch, tok, llama, WheelSettings, {**BOTH, "objective_optimization": "target_new"})


def test_settings_go_through_the_hosts_own_reader(monkeypatch: pytest.MonkeyPatch, tok: Any, llama: Any) -> None:
    settings = given(monkeypatch, tok, llama, Settings, {**BOTH, "class_name": "AutoModel"})
    assert settings.model_class == "AutoModel"
    assert settings.device == "cpu"
    assert settings.model_name == "llama-me/SmolLM2"  # EasyEdit asks the name what kind of model it is
    for config, message in (
        ({**BOTH, "layrs": 1}, r"unknown R-Toy setting 'layrs': did you mean 'layers'\?"),
        ({"layers": [1]}, "the settings of R-Toy are not complete: .*'model_name'"),
        ({**BOTH, "alg_name": "Toy"}, "easyeditor does not read the settings of R-Toy: AssertionError"),
    ):
        with pytest.raises(ValueError, match=message):
            given(monkeypatch, tok, llama, Settings, config)


def test_one_name_where_a_list_belongs(monkeypatch: pytest.MonkeyPatch, tok: Any, llama: Any) -> None:
    @dataclass
    class Lists:
        inner_params: list[str]
        device: str

    Lists.__dataclass_fields__["inner_params"].type = list[str]
    with pytest.raises(ValueError, match=r"inner_params of R-Toy is 'a\.b': it must be a list, such as \[a\.b\]"):
        given(monkeypatch, tok, llama, Lists, {"inner_params": "a.b"})


def test_folders_are_looked_for_where_the_command_runs(
    monkeypatch: pytest.MonkeyPatch, tok: Any, llama: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stats").mkdir()
    assert given(monkeypatch, tok, llama, Settings, {**BOTH, "stats_dir": "stats"}).stats_dir == str(tmp_path / "stats")
    assert given(monkeypatch, tok, llama, Settings, {**BOTH, "stats_dir": "none"}).stats_dir == "none"


def test_a_base_methods_settings_come_along(tmp_path: Path) -> None:
    simie = settings_of("SimIE", "smollm2-135m", {})
    assert simie["base_hparams"] == settings_of("ROME", "smollm2-135m", {})
    for folder, text in (("SimIE", "base_method: ROME"), ("ROME", "layers: [3]")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.yaml").write_text(text, encoding="utf-8")
    assert settings_of("SimIE", tmp_path / "SimIE" / "mine.yaml", {})["base_hparams"] == {"layers": [3]}


def test_the_base_method_is_read_beside_and_decides_the_padding(
    monkeypatch: pytest.MonkeyPatch, tok: Any, llama: Any
) -> None:
    @dataclass
    class SimIEHyperParams:
        base_method: str
        alg_name: str
        device: str
        model_name: str
        base: Any = None

        @classmethod
        def from_hparams(cls, path: str) -> SimIEHyperParams:
            made = cls(**yaml.safe_load(Path(path).read_text(encoding="utf-8")))
            beside = path.replace("/SimIE/", f"/{made.base_method}/")
            made.base = yaml.safe_load(Path(beside).read_text(encoding="utf-8"))
            return made

    seen: list[Any] = []

    def apply(model: Any, tok: Any, requests: Any, hparams: Any) -> tuple[Any, dict[str, Any]]:
        seen.append((hparams.base, tok.padding_side))
        return model, {}

    apply.__module__ = "easyeditor.models.toy"
    install(monkeypatch, "SimIE", apply, SimIEHyperParams=SimIEHyperParams, ROMEHyperParams=WheelSettings)
    sys.modules["easyeditor.util.alg_dict"].ALG_DICT["ROME"] = apply
    config = {"base_method": "ROME", "model_name": "m", "base_hparams": {"layers": [3], "model_name": "m"}}
    editor = HostStream("SimIE", llama, tok, config, 0, None)
    edit_once = [{"prompt": "a", "target_new": "x"}]
    editor.edit(edit_once, lambda: None)
    base, side = seen[0]
    assert (base["layers"], base["alg_name"], base["device"], side) == ([3], "ROME", "cpu", "right")
    with pytest.raises(ValueError, match=r"the base method 'ROMA' is no algorithm: did you mean 'ROME'\?"):
        HostStream("SimIE", llama, tok, {**config, "base_method": "ROMA"}, 0, None)
    with pytest.raises(ValueError, match=r"SimIE over WISE is not run: .* changes none"):
        HostStream("SimIE", llama, tok, {**config, "base_method": "WISE"}, 0, None)


def test_a_host_that_misses_a_package_is_named_with_the_way_round(
    monkeypatch: pytest.MonkeyPatch, tok: Any, llama: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "easyeditor"
    (folder / "util").mkdir(parents=True)
    (folder / "__init__.py").write_text("import timmm\n", encoding="utf-8")
    (folder / "util" / "__init__.py").touch()
    (folder / "util" / "device.py").touch()  # not the wheel
    (folder / "util" / "alg_dict.py").write_text("ALG_DICT = {}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "easyeditor"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError) as error:
        HostStream("ROME", llama, tok, {}, 0, None)
    for fragment in (str(folder), "'timmm'", "requirements.txt", "pip install --no-deps easyeditor==0.0.1.dev0"):
        assert fragment in str(error.value)


def test_no_host_at_all(monkeypatch: pytest.MonkeyPatch, tok: Any, llama: Any) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "easyeditor"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "easyeditor", None)  # type: ignore[arg-type]
    with pytest.raises(ImportError, match=r"every algorithm but WISE is its own: .* PYTHONPATH, or install the wheel"):
        HostStream("ROME", llama, tok, {}, 0, None)
