"""The examples run, and say what they promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_merging_for_other_methods() -> None:
    head, *rows = run("merge_for_other_methods.py")
    ties = head.split().index("ties") - 2  # "in all masks" are three words
    kept = [float(row.split()[ties]) for row in rows]
    assert len(kept) == 4
    assert kept == sorted(kept, reverse=True)  # the larger the subspaces, the less is left of each update


@pytest.mark.slow
def test_the_easyedit_script() -> None:
    lines = run("easyedit_script.py")
    assert "The capital of France is Lyon" in lines[-3]
    assert "Nokia is a company from Japan" in lines[-2]
    assert "Apple is a company from Japan" not in lines[-1]


@pytest.mark.slow
def test_correcting_a_deployed_model(tmp_path: Path) -> None:
    from easyedit_wise.evaluation.smollm2 import smollm2_checkpoint

    arguments = str(smollm2_checkpoint()), str(tmp_path / "deployed")
    lines = run("correct_a_deployed_model.py", *arguments)
    north, south, base = lines[-4:-1]
    assert "Oslo" in north
    assert "north/0" in north
    assert "Madrid" in south
    assert "south/0" in south
    assert "main" in base
    assert lines[-1].endswith("now holds 1 edit")
    with pytest.raises(AssertionError, match="is there already"):  # run again, it would make the edits again
        run("correct_a_deployed_model.py", *arguments)
