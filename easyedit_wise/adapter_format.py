"""What the files of saved edits are called, and the error that all of their readers raise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
EDITS_FILE = "wise_edits.json"
CARD_FILE = "README.md"
OUR_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, EDITS_FILE, CARD_FILE})
# 2: tensors are packed, and there are digests. 3: a memory says what its weakest edit scores. 4: and with its target.
# 5: an edit says what stands between its prompt and its target.
FORMAT_VERSION = 5
# What Python, torch and the libraries raise on values that nobody wrote on purpose. Nesting that is too deep is a
# RuntimeError, and so is most of what torch says; a number that is too large is an ArithmeticError.
UNREADABLE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    OSError,
    re.error,
)


class AdapterFileError(ValueError):
    """A saved adapter is missing, damaged, or made for another model."""


def damaged(path: Path, why: Any) -> AdapterFileError:
    """The error for a file that cannot be what was saved."""
    return AdapterFileError(f"{path} is damaged ({quoted(why)}): take it from a backup or save the edits again.")


def quoted(why: Any, length: int = 500) -> str:
    """A reason as an error gives it, cut off after ``length`` characters: what it quotes may be as long as the file."""
    reason = str(why) or type(why).__name__
    return reason if len(reason) <= length else f"{reason[:length]} ..."


def missing(path: Path) -> AdapterFileError:
    """The error for a file that has to be there."""
    return AdapterFileError(f"{path} does not exist: name a folder that edits were saved into.")
