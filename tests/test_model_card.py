"""The card beside an adapter: what it says, that its commands work, and that no text can break out of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import LAYERS
from editing_helpers import requests, settings
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from tuner_helpers import ALWAYS, config_for, only_layer, set_thresholds, with_memories

from easyedit_wise import apply_wise_to_model, save_edits, write_model_card
from easyedit_wise.editing.requests import EditRequest
from easyedit_wise.editing.stream import HeldEdit
from easyedit_wise.model_card import _edits, model_card, plain

LLAMA = LAYERS["llama"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


def header(text: str) -> dict[str, Any]:
    """What YAML reads between the two rules at the top, which are the first lines of that kind."""
    lines = text.splitlines()
    assert lines[0] == "---"
    values = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    assert isinstance(values, dict)
    return values


def tables(text: str) -> list[list[list[str]]]:
    """Each table as rows of cells."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.MULTILINE)
    return [[line[2:-2].split(" | ") for line in table.splitlines()] for table in found]


def blocks_of(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def edited(tok: Any, make_model: Callable[..., Any]) -> Any:
    model = make_model("llama")
    model.name_or_path = "tiny/llama"
    apply_wise_to_model(model, tok, requests(3), settings(n_iter=2))
    return model


def test_a_card_says_what_was_edited(edited: Any, tmp_path: Path) -> None:
    save_edits(edited, tmp_path / "edits", scores={"reliability": 0.98123, "edits": 3, "note": "by hand | here"})
    text = card_of(tmp_path / "edits")
    assert header(text) == {
        "base_model": "tiny/llama",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["wise", "model-editing", "knowledge-editing", "easyedit"],
    }
    edits, memories, scores, changed = tables(text)
    asked = requests(3)
    assert edits[0] == ["memory", "prompt", "answer"]
    assert [row[1:] for row in edits[2:]] == [[one["prompt"], one["target_new"]] for one in asked]
    assert "3 edits:" in text
    (memory,) = only_layer(edited).memories("default")
    assert memories[2:] == [["0", memory.stage, "3", f"{memory.epsilon:.4g}"]]
    assert scores[2:] == [["reliability", "0.9812"], ["edits", "3"], ["note", "by hand &#124; here"]]
    assert ["n&#95;iter", "2", "30"] in changed
    assert "model.layers.1.mlp.down&#95;proj (32 x 64)" in text
    assert "float32" in text
    assert re.search(r"peft \d.*transformers \d.*torch \d", text)
    ModelCard.load(tmp_path / "edits" / "README.md")


def test_only_the_first_fifty_edits_are_listed(edited: Any) -> None:
    layer = only_layer(edited)
    stream = layer.edit_stream
    held = tuple(HeldEdit(EditRequest(f"prompt {number}", f"answer {number}"), 0) for number in range(73))
    stream.restore(replace(stream.snapshot(), held=held))
    text = model_card("a.layer", layer)
    assert "73 edits, the first 50 of them:" in text
    assert len(tables(text)[0]) == 2 + 50
    assert "prompt 49" in text
    assert "prompt 50" not in text


def test_an_adapter_that_peft_saved_gets_a_card(make_model: Callable[..., Any], tmp_path: Path) -> None:
    peft_model = get_peft_model(make_model("llama"), config_for(LLAMA, base_model_name_or_path="tiny/llama"))
    set_thresholds(only_layer(peft_model), 1.5, ALWAYS)
    peft_model.save_pretrained(tmp_path)
    assert "WISE" not in card_of(tmp_path)
    assert write_model_card(peft_model, tmp_path, scores={"generality": 0.5}) == tmp_path / "README.md"
    text = card_of(tmp_path)
    assert "The list of edits was not kept" in text
    assert "Settings" not in text
    assert [row[1:] for row in tables(text)[0][2:]] == [["merged", "1", "1.5"], ["merged", "1", "-1"]]
    assert "model.layers.1.mlp" in text
    assert "base&#95;model.model" not in text


def test_a_card_needs_edits_a_folder_and_scores_that_can_be_shown(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no set of edits called 'default'"):
        write_model_card(llama, tmp_path)
    with_memories(llama, LLAMA, 1.0)
    with pytest.raises(ValueError, match="is no folder"):
        write_model_card(llama, tmp_path / "nowhere")
    for scores in ({"x": [1]}, {"x": float("nan")}, {5: 0.5}, {"x": None}, {"x": True}):
        with pytest.raises(ValueError, match="finite numbers or texts"):
            save_edits(llama, tmp_path / "edits", scores=scores)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_the_commands_work(make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of the card, run as it stands."""
    make_model("llama").save_pretrained(tmp_path / 'a "base"')
    model = AutoModelForCausalLM.from_pretrained(tmp_path / 'a "base"')
    with_memories(model, LLAMA, ALWAYS, base_model_name_or_path=str(tmp_path / 'a "base"'))
    save_edits(model, tmp_path / "edits")
    blocks = blocks_of(card_of(tmp_path / "edits"))
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path / "edits")
    for block in blocks:
        names: dict[str, Any] = {}
        exec(compile(block, "card", "exec"), names)
        assert isinstance(names["model"], torch.nn.Module)
    assert os.getcwd() == str(tmp_path / "edits")


# -- texts from anywhere ----------------------------------------------------------------------------------

NASTY = [
    "a | b",
    "line\nbreak\r\n---\nbase_model: other",
    "``` code",
    "<script>alert(1)</script>",
    "[click](http://x.example) ![i](y)",
    "\\| \\\\|",
    "\u202eright to left\u2066",
    "\x00\x1b[31m red",
    "*bold* _it_ ~~gone~~ $x$ &amp;",
    "\u2028\u2029\x85",
    "very " * 100,
    "\ud800 half",
]


@pytest.mark.parametrize("text", NASTY)
def test_no_text_breaks_the_table(text: str) -> None:
    shown = plain(text)
    assert not re.search(r"[\n\r|`<>\[\]\\*_~$\x00-\x1f\u2028\u2029\x85\u202e\u2066]", shown)
    shown.encode("utf-8")


@hypothesis_settings(deadline=None, max_examples=200)
@given(st.text(), st.text())
def test_any_prompt_is_one_row_of_three_cells(prompt: str, target: str) -> None:
    if not prompt.strip() or not target.strip():
        return
    text = "\n\n".join(_edits([HeldEdit(EditRequest(prompt, target), 0)]))
    (table,) = tables(text)
    assert len(text.splitlines()) == 7
    assert [len(row) for row in table] == [3, 3, 3]


def test_text_stays_readable() -> None:
    assert plain("Wer schrieb »Faust«? Ein Würfel, 你好 🎲, नमस्ते, می‌خواهم") == (
        "Wer schrieb »Faust«? Ein Würfel, 你好 🎲, नमस्ते, می‌خواهم"
    )
    assert plain("one\ntwo") == "one ⏎ two"


@pytest.mark.parametrize("name", [*NASTY, 'x"\n---\ntags:\n- evil', "x: y", "- a", "{a: b}", "!!python/object:os"])
def test_no_model_name_breaks_the_header(llama: Any, name: str) -> None:
    layer = with_memories(llama, LLAMA, 1.0, base_model_name_or_path=name)
    text = model_card("a.layer", layer)
    values = header(text)
    assert set(values) == {"base_model", "library_name", "tags"}
    if "\ud800" not in name:
        assert values["base_model"] == name
    text.encode("utf-8")
    for block in blocks_of(text):
        compile(block, "card", "exec")
    assert text.count("```") == 4 + 3 * name.count("```")  # in the header and in both blocks
    assert len([line for line in text.splitlines() if line.startswith("```")]) == 4
