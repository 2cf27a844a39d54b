"""What a run of ``easyedit-wise evaluate`` has on disk while it is under way, so that it goes on after a stop.

Beside the result ``NAME.json``: ``NAME.unfinished``, the checkpoints that were scored so far, and for WISE
``NAME.journal``, every edit made so far.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class UnfinishedRun:
    """The files of one run.

    Args:
        result: the result file.
        journaled: whether the algorithm keeps its edits in a journal, without which there is no going on.
        again: begin anew whatever is there.

    Attributes:
        journal: the journal's folder; None without one.
        checkpoints: those that were scored before a stop, as plain values.
        resumed_after: after how many edits the run went on, each time that it did.

    Raises:
        ValueError: the file of checkpoints cannot be read.
    """

    def __init__(self, result: Path, journaled: bool, again: bool) -> None:
        self._result = result
        self._path = result.with_suffix(".unfinished")
        self.journal = result.with_suffix(".journal") if journaled else None
        self.checkpoints: list[dict[str, Any]] = []
        self.resumed_after: list[int] = []
        if again or not result.with_suffix(".journal").is_dir():
            self.forget_edits()
        elif journaled and self._path.is_file():
            self._read()

    def _read(self) -> None:
        try:
            values = json.loads(self._path.read_text(encoding="utf-8"))
            self.checkpoints = list(values["checkpoints"])
            self.resumed_after = list(values.get("resumed_after", []))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._path} cannot be read ({error}): the run cannot go on. --again begins it anew."
            ) from error

    @property
    def scored(self) -> int:
        """The last checkpoint that was scored; 0: none."""
        return int(self.checkpoints[-1]["edits"]) if self.checkpoints else 0

    def save(self, result: Mapping[str, Any]) -> None:
        """Keep the checkpoints so far, as a whole or not at all."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".writing")
        temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, self._path)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result, and drop what is needed only until then."""
        self.save(result)
        os.replace(self._path, self._result)
        self.forget_edits()

    def forget_edits(self) -> None:
        """Drop the journal, if there is one."""
        shutil.rmtree(self._result.with_suffix(".journal"), ignore_errors=True)
