"""The tree that is proposed to EasyEdit, copied over a checkout of it, in a Python without this package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import LAYERS
from head_host import HOME, why_no_head
from tree_host import EVERY_MODULE_IS_THE_TREES, run_without_plugin

from easyedit_wise.easyedit.proposal import write_tree

pytestmark = [pytest.mark.upstream, pytest.mark.skipif(why_no_head() is not None, reason=str(why_no_head()))]

# What the tiny random model learns to say: not every target of several tokens is.
FACTS = [
    {"prompt": "The capital of France is", "target_new": "Madrid", "subject": "France"},
    {"prompt": "The currency of India is", "target_new": "fine", "subject": "India"},
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout after what docs/upstream.md tells a maintainer to do."""
    folder = tmp_path_factory.mktemp("host")
    head, root, tree = Path(os.environ[HOME]), folder / "EasyEdit", folder / "tree"
    for name in ("easyeditor", "hparams", "examples"):
        shutil.copytree(head / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "requirements.txt"):
        shutil.copy(head / name, root / name)
    write_tree(tree, root)
    for name in ("easyeditor", "hparams", "examples"):
        shutil.copytree(tree / name, root / name, dirs_exist_ok=True)
    subprocess.run(["git", "apply", "--unidiff-zero", str(tree / "changes.patch")], cwd=root, check=True)
    return root


@pytest.fixture
def settings_file(saved_model: str, tmp_path: Path) -> Path:
    values = {
        "alg_name": "WISE",
        "preset": "default",
        "model_name": saved_model,
        "device": "cpu",
        "inner_params": [LAYERS["llama"]],
    }
    path = tmp_path / "llama-tiny.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_the_readmes_script_runs(checkout: Path, settings_file: Path, tmp_path: Path) -> None:
    script = f"""
    import torch, transformers
    from easyeditor import BaseEditor, WISEHyperParams
    from easyeditor.models.wise import last_route, load_edits

    hparams = WISEHyperParams.from_hparams({str(settings_file)!r})
    hparams.save_path = "edits"
    editor = BaseEditor.from_hparams(hparams)
    question = editor.tok("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        base = editor.model(**question).logits
    metrics, model, restore = editor.edit(
        prompts=["The capital of France is", "The currency of India is"],
        target_new=["Madrid", "fine"],
        subject=["France", "India"],
        sequential_edit=True,
    )
    assert [one["post"]["rewrite_acc"] for one in metrics] == [[1.0], [1.0]], metrics
    answer = model.generate(**question, max_new_tokens=3, do_sample=False, pad_token_id=1)
    assert "Madrid" in editor.tok.decode(answer[0])
    assert last_route(model).describe()["memory"] == "default/0"
    with torch.no_grad():
        edited = model(**question).logits
        fresh = transformers.AutoModelForCausalLM.from_pretrained(hparams.model_name).eval()
        load_edits(fresh, "edits")
        assert fresh(**question).logits.equal(edited)
        restore()
        before_the_second = model(**question).logits
    assert before_the_second.shape == base.shape

    # One at a time: EasyEdit takes each edit back by calling what it was given.
    hparams.save_path = None
    editor = BaseEditor.from_hparams(hparams)
    metrics, model, _ = editor.edit(
        prompts=["The capital of France is"], target_new=["Madrid"], subject=["France"], sequential_edit=False
    )
    assert metrics[0]["post"]["rewrite_acc"] == [1.0]
    with torch.no_grad():
        assert editor.model(**question).logits.equal(base)

    # Several at once, by the line that the patch adds.
    hparams.batch_size = 2
    metrics, model, _ = editor.batch_edit(
        prompts=["The capital of France is", "The currency of India is"],
        target_new=["Madrid", "fine"],
        subject=["France", "India"],
        sequential_edit=True,
    )
    assert len(metrics) == 2
    with torch.no_grad():
        assert not model(**question).logits.equal(base)
    """
    run_without_plugin(checkout, script + EVERY_MODULE_IS_THE_TREES.replace("\n", "\n    "), tmp_path)


def test_what_other_methods_take_from_it_is_there(checkout: Path, tmp_path: Path) -> None:
    script = f"""
    from pathlib import Path
    import easyeditor
    from easyeditor import ALG_DICT, ALG_MULTIMODAL_DICT, WISEHyperParams, WISEMultimodalHyperParams
    from easyeditor.models import wise
    from easyeditor.models.simie.simie_hparams import SimIEHyperParams

    assert ALG_DICT["WISE"] is wise.apply_wise_to_model
    assert ALG_MULTIMODAL_DICT["WISE"].__module__ == "easyeditor.models.wise.wise_main"
    assert SimIEHyperParams._get_base_hparams_class("WISE") is WISEHyperParams
    assert not hasattr(easyeditor, "attach") and not hasattr(easyeditor, "forget")
    text = multimodal = 0
    for path in sorted(Path({str(checkout / "hparams" / "WISE")!r}).glob("*.yaml")):
        if "qformer_name_or_path" in path.read_text():
            WISEMultimodalHyperParams.from_hparams(str(path))
            multimodal += 1
        else:
            hparams = WISEHyperParams.from_hparams(str(path))
            assert hparams.alg_name == "WISE" and hparams.inner_params
            text += 1
    assert text == 11 and multimodal >= 4, (text, multimodal)
    """
    run_without_plugin(checkout, script + EVERY_MODULE_IS_THE_TREES.replace("\n", "\n    "), tmp_path)


def test_its_own_script_and_easyedits_run(checkout: Path, settings_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "data" / "ZsRE"
    data.mkdir(parents=True)
    records = [
        {
            "src": fact["prompt"],
            "alt": fact["target_new"],
            "rephrase": fact["prompt"],
            "subject": fact["subject"],
            "loc": "Water is made of",
            "loc_ans": "hydrogen",
        }
        for fact in FACTS
    ]
    for name in ("zsre_mend_edit.json", "zsre_mend_train.json"):
        (data / name).write_text(json.dumps(records), encoding="utf-8")
    (tmp_path / "facts.json").write_text(json.dumps(FACTS), encoding="utf-8")
    script = f"""
    import runpy
    examples = {str(checkout / "examples")!r}
    sys.argv = ["x", "--hparams={settings_file}", "--facts=facts.json", "--out=mine"]
    runpy.run_path(examples + "/run_wise_facts.py", run_name="__main__")
    sys.argv = ["x", "--editing_method=WISE", "--hparams_dir={settings_file}", "--data_dir=data", "--data_type=ZsRE",
                "--ds_size=2", "--sequential_edit"]
    runpy.run_path(examples + "/run_wise_editing.py", run_name="__main__")
    """
    said = run_without_plugin(checkout, script + EVERY_MODULE_IS_THE_TREES.replace("\n", "\n    "), tmp_path)
    assert "[default/0] The capital of France is Madrid" in said, said
    assert (tmp_path / "mine" / "README.md").is_file()
    (result,) = (tmp_path / "outputs").glob("*.json")
    assert [one["post"]["rewrite_acc"] for one in json.loads(result.read_text())] == [[1.0], [1.0]]
