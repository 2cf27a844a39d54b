"""docs/adapters.md: its commands, one after the other."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

PAGE = Path(__file__).parent.parent / "docs" / "adapters.md"
# Sections build on each other; others of the page have tests of their own.
SECTIONS = (
    "Save and load",
    "With PEFT and transformers",
    "Switch off, take back",
    "Several sets of edits",
    "What is in the folder",
    "The base",
)


def blocks() -> list[str]:
    text = PAGE.read_text(encoding="utf-8")
    sections = {part.partition("\n")[0]: part for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]}
    return [
        block
        for name in SECTIONS
        for block in re.findall(r"^```python\n(.*?)^```$", sections[name], flags=re.DOTALL | re.MULTILINE)
    ]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_every_command_of_the_page_runs(
    tok: Any, make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("llama").save_pretrained(tmp_path / "base")

    def fresh_model() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()

    names: dict[str, Any] = {"model": fresh_model(), "tok": tok, "fresh_model": fresh_model}
    monkeypatch.chdir(tmp_path)
    found = blocks()
    assert len(found) == len(SECTIONS)
    for block in found:
        # The tiny model has three layers, and few iterations do for it.
        block = block.replace("layers[24]", "layers[1]").replace('.weight"])', '.weight"], n_iter=2)')
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["AutoPeftModelForCausalLM"].from_pretrained("my-edits")
