"""A process that is killed at any moment loses no edit that it had acknowledged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_PROGRAM = Path(__file__).with_name("kill_journal.py")


def killed(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """In a process of its own: it forks, so it must have used one thread only."""
    done = subprocess.run(
        [sys.executable, str(_PROGRAM), str(folder), str(kills), str(seed)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    result = killed(tmp_path, kills=8, seed=2)
    assert result["wrong"] == []
    assert result["acknowledged"] > 0


@pytest.mark.soak
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_two_hundred_kills(tmp_path: Path) -> None:
    result = killed(tmp_path, kills=200, seed=7)
    assert result["wrong"] == []
    assert set(result["during"]) >= {"resume", "edit", "forget", "save"}
    assert result["acknowledged"] > 100
