"""Families of models by the checks that fill the table of docs/hosts.md, and the table itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.families import BEGIN, CHECKS, END, GREEN, RED, REFUSED, Cell, Row, check_family, table, write
from benchmarks.tiny_families import FAMILIES, Family, tiny_tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "hosts.md"


def family(name: str) -> Family:
    return next(one for one in FAMILIES if one.name == name)


# Fused gate and value, attention beside the feed-forward part, flattened tokens, keys that later layers share,
# convolutions in place of attention, shared experts.
@pytest.mark.parametrize("name", ["Phi-3", "GPT-J", "Falcon", "Gemma 3n", "LFM2", "DeepSeek-V3"])
def test_a_family_is_edited(name: str) -> None:
    row = check_family(family(name), tiny_tokenizer())
    assert row.cells == dict.fromkeys(CHECKS, Cell(GREEN))


def test_a_family_that_offers_no_matrix_is_refused() -> None:
    row = check_family(family("Mixtral"), tiny_tokenizer())
    assert {cell.state for cell in row.cells.values()} == {REFUSED}
    assert "routed experts" in row.cells["edit"].why


class ForgetfulFamily(Family):
    """A model whose answers depend on the batch: the checks have to notice."""

    def build(self, seed: int = 0) -> Any:
        model = super().build(seed)

        def shift(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output + 0.1 * output.roll(1, 0) if len(output) > 1 else output

        model.get_input_embeddings().register_forward_hook(shift)
        return model


def test_what_is_wrong_is_red() -> None:
    row = check_family(ForgetfulFamily("forgetful", "llama"), tiny_tokenizer())
    assert row.cells["padding"].state == RED
    assert "with left padding" in row.cells["padding"].why
    assert row.cells["save, load"].state == GREEN


def test_the_table_gives_each_reason_once(tmp_path: Path) -> None:
    why = Cell(REFUSED, "no matrix\nthere")
    rows = [Row("A", "a.b", dict.fromkeys(CHECKS, Cell(GREEN))), Row("B", "", dict.fromkeys(CHECKS, why))]
    rows.append(Row("C", "c", {**rows[0].cells, "route": Cell(RED, "it fires")}))
    text = table(rows)
    assert "| A | `a.b` | yes | yes | yes | yes | yes |" in text
    assert "| B |  | refused (1) |" in text
    assert "| C | `c` | yes | **no** (2) |" in text
    assert text.endswith("(1) no matrix there\n\n(2) it fires")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    write(page, f"{BEGIN}\n{text}\n{END}")
    assert page.read_text(encoding="utf-8") == f"before\n{BEGIN}\n{text}\n{END}\nafter\n"
    page.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="no lines"):
        write(page, text)


def test_the_page_has_every_family() -> None:
    written = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    named = re.findall(r"^\| ([^|]+) \| (?:`|  ?\|)", written, flags=re.MULTILINE)
    assert named == [one.name for one in FAMILIES]
    assert re.search(r"commit [0-9a-f]{7,}: python", written)
