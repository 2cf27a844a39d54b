"""A journal as tables: what it holds, and all about one edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

_LONGEST = 60


def shortened(text: str, longest: int = _LONGEST) -> str:
    """One line, cut in the middle where it is too long."""
    line = " ".join(text.split())
    if len(line) <= longest:
        return line
    head = (longest - 3) // 2
    return f"{line[:head]}...{line[-(longest - 3 - head) :]}"


def log_table(edits: Sequence[Mapping[str, Any]], taken_back: Sequence[Mapping[str, Any]]) -> Table:
    """One row an edit; those that were taken back at the end, with "gone" for their memory, and when that was.

    Args:
        edits: of the journal, as plain values (``EditEntry``).
        taken_back: likewise (``ForgottenEntry``).
    """
    table = Table(box=None, pad_edge=False)
    for name, justify in (("edit", "right"), ("prompt", "left"), ("target", "left"), ("memory", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]  # one of rich's literals
    for name in ("score", "epsilon", "s"):
        table.add_column(name, justify="right")
    table.add_column("made, or gone", no_wrap=True)
    for edit in edits:
        table.add_row(*_cells(edit), _minute(edit["made"]))
    for one in taken_back:
        cells = [Text(cell, style="dim") for cell in _cells({**one["edit"], "memory": "gone"})]
        table.add_row(*cells, Text(_minute(one["when"]), style="dim"))
    return table


def _minute(when: str) -> str:
    """An ISO time, in UTC, as it is read: "2024-05-23 17:59"."""
    return when[:16].replace("T", " ")


def _cells(edit: Mapping[str, Any]) -> list[str]:
    request = edit["request"]
    return [
        str(edit["id"]),
        shortened(request["prompt"]),
        shortened(request["target"], _LONGEST // 2),
        str(edit["memory"]),
        f"{edit['scores'][0]:.3g}",
        f"{edit['epsilon']:.3g}",
        f"{edit['seconds']:.1f}",
    ]


def edit_table(lines: Mapping[str, str]) -> Table:
    """What is known of one edit, line by line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in lines.items():
        table.add_row(name, Text(value))
    return table
