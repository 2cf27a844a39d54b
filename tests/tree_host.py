"""The tree that is proposed to EasyEdit, and a Python in which nothing else of this project can be imported."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

# Before anything else: the development install of this package is on every interpreter's path.
WITHOUT_THE_PLUGIN = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname.partition(".")[0] == "easyedit_wise":
            raise ImportError(f"{fullname} was asked for, but is not installed here")

sys.meta_path.insert(0, Blocked())
"""
EVERY_MODULE_IS_THE_TREES = """
import sys
loaded = {name: module for name, module in sys.modules.items() if name.startswith("easyeditor.models.wise")}
assert len(loaded) > 50, sorted(loaded)
assert not [name for name, module in loaded.items() if not module.__file__.startswith(ROOT)], loaded
assert not [name for name in sys.modules if name.partition(".")[0] == "easyedit_wise"]
"""


def run_without_plugin(root: Path, script: str, folder: Path) -> str:
    """Run a script in which ``easyeditor`` is that of ``root``; its standard output.

    Raises:
        AssertionError: the script failed; the message is what it wrote to standard error.
    """
    file = folder / "script.py"
    file.write_text(f"{WITHOUT_THE_PLUGIN}\nROOT = {str(root)!r}\n{textwrap.dedent(script)}", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(file)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
