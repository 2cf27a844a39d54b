"""The tree that is proposed to EasyEdit: complete, without this package, and usable under a stand-in for EasyEdit."""

from __future__ import annotations

import ast
import compileall
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import LAYERS, build_model, build_tokenizer
from tree_host import EVERY_MODULE_IS_THE_TREES, run_without_plugin
from typer.testing import CliRunner

from easyedit_wise import WISEHyperParams, apply_wise_to_model
from easyedit_wise.cli import app
from easyedit_wise.easyedit.proposal import REPLACED, modules_behind, patch_for, write_tree

ROOT = Path(__file__).parent.parent
HOME = Path("easyeditor") / "models" / "wise"
# What a checkout of EasyEdit has beside our modules, and multimodal models go on using.
OF_EASYEDIT = ("WISE.py", "utils.py", "wise_main.py", "wise_hparams.py", "wise_multimodal_hparams.py", "merge")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tree") / "out"
    write_tree(out)
    return out


def stand_in(root: Path) -> Path:
    """As much of EasyEdit as its WISE is beside: the registry, the settings' base class, the multimodal entry."""
    texts = {
        "easyeditor/__init__.py": "from .models import *\nfrom .util.alg_dict import *\n",
        "easyeditor/models/__init__.py": "from .wise import *\n",
        "easyeditor/models/wise/__init__.py": "raise ImportError('the tree has not been copied')\n",
        "easyeditor/models/wise/wise_main.py": "def apply_wise_to_multimodal_model(): ...\n",
        "easyeditor/models/wise/wise_multimodal_hparams.py": (
            "from ...util.hparams import HyperParams\nclass WISEMultimodalHyperParams(HyperParams): ...\n"
        ),
        "easyeditor/models/wise/merge/__init__.py": "slerp = None\n",
        "easyeditor/util/__init__.py": "",
        "easyeditor/util/hparams.py": "class HyperParams: ...\n",
        "easyeditor/util/alg_dict.py": (
            "from ..models.wise import WISEHyperParams, apply_wise_to_model, apply_wise_to_multimodal_model\n"
            "ALG_DICT = {'WISE': apply_wise_to_model}\n"
            "ALG_MULTIMODAL_DICT = {'WISE': apply_wise_to_multimodal_model}\n"
        ),
        "easyeditor/editors/batch_editor.py": (
            "class BatchEditor:\n    DPO = 'DPO'\n    CORE = 'CORE'\n\n    def is_batchable_method(alg_name):\n"
            "        return alg_name == BatchEditor.CORE \\\n            or alg_name == BatchEditor.DPO.value \\\n"
            "            or alg_name == 'x'\n"
        ),
        "requirements.txt": "torch\npeft==0.18.0",
        "README.md": (
            "# Title\n| ROME | ✅ |\n| [WISE](https://here/WISE.md) | |✅ |\n\n|WISE|WISE: Rethinking|[Quick](there)|\n"
        ),
    }
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_every_module_compiles_and_names_its_licence(tree: Path) -> None:
    assert compileall.compile_dir(tree, quiet=1)
    modules = sorted(tree.rglob("*.py"))
    assert len(modules) > 80
    assert all(path.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: MIT\n") for path in modules)
    licence = (tree / HOME / "LICENSE").read_text(encoding="utf-8")
    assert licence == (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_nothing_of_it_imports_this_package(tree: Path) -> None:
    for path in tree.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            # resources.files and importlib take a module's name as text
            names += [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
            assert not [name for name in names if re.search(r"\beasyedit_wise\b", name)], path


def test_it_is_complete_and_brings_nothing_for_other_hosts(tree: Path) -> None:
    brought = {path.relative_to(tree / HOME).as_posix() for path in (tree / HOME).rglob("*") if path.is_file()}
    assert {"editing/stream.py", "journal/forgetting.py", "tuner/switch.py", "editing/__init__.py"} <= brought
    assert {f"data/{path.name}" for path in (ROOT / "easyedit_wise" / "data").glob("*.json")} <= brought
    assert not [name for name in brought if name.startswith(("cli", "demo", "evaluat", "easyedit/wheel"))]
    assert not [name for name in brought if name.split("/")[0] in OF_EASYEDIT]


def test_its_settings_load(tree: Path) -> None:
    files = sorted((tree / "hparams" / "WISE").glob("*.yaml"))
    assert [path.stem for path in files] == ["gemma-3-270m", "smollm2-135m"]
    for path in files:
        assert WISEHyperParams.from_hparams(path) == WISEHyperParams.from_hparams(path.stem)


SCRIPT = """
    import torch, transformers
    from peft import PeftModel
    from easyeditor import ALG_DICT, ALG_MULTIMODAL_DICT, WISEHyperParams, apply_wise_to_model
    from easyeditor.models.wise import edits_disabled, last_route, load_edits, resume
    from easyeditor.models.wise.data import neutral_prompts, other_subjects

    assert ALG_DICT["WISE"] is apply_wise_to_model
    assert ALG_MULTIMODAL_DICT["WISE"].__module__ == "easyeditor.models.wise.wise_main"
    assert len(neutral_prompts()) > 100 and len(other_subjects()) > 100

    def fresh():
        return transformers.AutoModelForCausalLM.from_pretrained("model").eval()

    tok = transformers.AutoTokenizer.from_pretrained("model")
    question = tok("The capital of France is", return_tensors="pt")
    hparams = WISEHyperParams.from_hparams("settings.yaml")
    hparams.save_path, hparams.journal = "edits", "journal"
    model, restore = apply_wise_to_model(
        fresh(), tok, [{"prompt": "The capital of France is", "target_new": "Madrid", "subject": "France"}], hparams
    )
    torch.save(model.generate(**question, max_new_tokens=3, do_sample=False, pad_token_id=1), "answer.pt")
    assert last_route(model).describe()["memory"] == "default/0"
    with torch.no_grad():
        base, edited = fresh()(**question).logits, model(**question).logits
        torch.save(edited, "edited.pt")
        loaded = fresh()
        load_edits(loaded, "edits")
        assert loaded(**question).logits.equal(edited)
        assert PeftModel.from_pretrained(fresh(), "edits")(**question).logits.equal(edited)
        with edits_disabled(model):
            assert model(**question).logits.equal(base)
        restore()
        assert model(**question).logits.equal(base)
    card = open("edits/README.md").read()
    assert "from easyeditor.models.wise import" in card and "pip install" not in card
    try:
        WISEHyperParams.from_hparams("no-such-file")
    except FileNotFoundError as error:
        print(error)
"""


def test_it_edits_without_the_plugin(tree: Path, tmp_path: Path) -> None:
    root = stand_in(tmp_path / "host")
    shutil.copytree(tree / "easyeditor", root / "easyeditor", dirs_exist_ok=True)
    build_model("llama").save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    settings = {"alg_name": "WISE", "preset": "default", "inner_params": [LAYERS["llama"]]}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    said = run_without_plugin(root, SCRIPT + EVERY_MODULE_IS_THE_TREES.replace("\n", "\n    "), tmp_path)
    tok, model = build_tokenizer(), build_model("llama")
    question = tok("The capital of France is", return_tensors="pt")
    hparams = WISEHyperParams.from_hparams(tmp_path / "settings.yaml")
    request = {"prompt": "The capital of France is", "target_new": "Madrid", "subject": "France"}
    apply_wise_to_model(model, tok, [request], hparams)
    with torch.no_grad():
        assert model(**question).logits.equal(torch.load(tmp_path / "edited.pt"))
    answer = torch.load(tmp_path / "answer.pt")[0]
    assert "Madrid" in tok.decode(answer)
    assert "no-such-file.yaml does not exist. Name the YAML file" in said


def test_the_patch_changes_easyedits_own_lines(tmp_path: Path) -> None:
    root = stand_in(tmp_path / "host")
    (tmp_path / "changes.patch").write_text(patch_for(root), encoding="utf-8")
    subprocess.run(["git", "apply", "--unidiff-zero", str(tmp_path / "changes.patch")], cwd=root, check=True)
    assert (root / "requirements.txt").read_text() == "torch\npeft>=0.21"
    editor = (root / "easyeditor/editors/batch_editor.py").read_text()
    compile(editor, "batch_editor", "exec")
    assert "CORE = 'CORE'\n    WISE = \"WISE\"\n" in editor
    assert "or alg_name == BatchEditor.WISE.value" in editor
    readme = (root / "README.md").read_text()
    assert "| [WISE](https://here/WISE.md) | | ✅ | ✅ |  |  |  | ✅ | |\n" in readme
    assert readme.startswith("# Title\n| ROME | ✅ |\n")


def test_what_it_brings_is_listed_with_the_state_of_each_file(tmp_path: Path) -> None:
    root = stand_in(tmp_path / "host")
    done = CliRunner().invoke(app, ["upstream-tree", str(tmp_path / "a" / "out"), "--head", str(root)])
    assert done.exit_code == 0, done.output
    out = tmp_path / "a" / "out"
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert f"{len(written)} files" in done.output
    letter = (out / "PROPOSAL.md").read_text(encoding="utf-8")
    rows = dict(
        line.strip("| ").split(" | ") for line in letter.splitlines() if line.endswith((" new |", "EasyEdit's |"))
    )
    assert rows.keys() == written - {"PROPOSAL.md", "changes.patch"}
    assert {name for name, state in rows.items() if state != "new"} == set(REPLACED)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "README.md").unlink(), "holds no README.md"),
        (lambda root: (root / "requirements.txt").write_text("peft>=1"), "has 0 lines"),
        (lambda root: (root / HOME / "wise_main.py").unlink(), "wise_main.py, which the tree needs"),
        (lambda root: (root / HOME / "hparams.py").write_text(""), "has a easyeditor/models/wise/hparams.py already"),
    ],
    ids=["no README", "another requirement", "no multimodal entry", "the tree is there"],
)
def test_a_checkout_that_does_not_fit_is_refused(tmp_path: Path, spoil: Any, message: str) -> None:
    root = stand_in(tmp_path / "host")
    spoil(root)
    with pytest.raises(ValueError, match=message):
        write_tree(tmp_path / "out", root)
    assert [path.name for path in tmp_path.iterdir()] == ["host"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = CliRunner().invoke(app, ["upstream-tree", str(tmp_path)])
    assert done.exit_code == 1
    assert "is there already" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("source", ["from .no_such_module import x", "from . import x", "import easyedit_wise.routing"])
def test_an_import_that_leads_nowhere_is_an_error(source: str) -> None:
    with pytest.raises(RuntimeError, match=r"imported|followed"):
        modules_behind(source)
