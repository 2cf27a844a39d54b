"""EasyEdit's GitHub version in this process, for tests that drive its own editors.

``make test-head`` runs them in a virtual environment of their own, since that EasyEdit imports some thirty packages
that nothing else here needs. Elsewhere they are skipped, with the reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

HOME = "EASYEDIT_HOME"
# Those without which ``import easyeditor`` fails at once, and which a virtual environment for users may lack.
_ASKED_FOR = ("timm", "torchvision", "hydra", "higher", "fairscale", "iopath", "cv2", "av", "zhipuai", "rouge")


@functools.cache
def why_no_head() -> str | None:
    """Why EasyEdit's GitHub version cannot be imported here, in one line; None when it can."""
    home = os.environ.get(HOME)
    if not home or not (Path(home) / "easyeditor" / "util" / "device.py").is_file():
        return f"{HOME} names no checkout of github.com/zjunlp/EasyEdit: see 'make test-head'"
    missing = [name for name in _ASKED_FOR if importlib.util.find_spec(name) is None]
    return f"EasyEdit needs {', '.join(missing)}: see 'make test-head'" if missing else None


def import_head() -> ModuleType:
    """The package ``easyeditor`` of the checkout, ahead of an installed wheel, with WISE registered."""
    home = os.environ[HOME]
    if home not in sys.path:
        sys.path.insert(0, home)
    import easyedit_wise  # noqa: F401 - registers WISE when EasyEdit is imported

    host = importlib.import_module("easyeditor")
    if not str(host.__file__).startswith(str(Path(home))):
        raise RuntimeError(f"{host.__file__} is not the checkout {home}: an installed EasyEdit was imported before.")
    return host
