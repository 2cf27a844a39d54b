"""A folder that is replaced as a whole: whatever happens, there is the old one or the new one."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from pathlib import Path


def sync(folder: Path) -> None:
    """Wait until a folder's files are on the disk: a rename may get there before what it renames."""
    for path in (*folder.iterdir(), folder):
        _sync_one(path)


def replace_folder(new: Path, target: Path) -> None:
    """Put ``new`` where ``target`` is, in one step where the system can; ``new`` may hold the old folder then."""
    if not target.exists():
        os.replace(new, target)
    elif not exchange(new, target):
        _replace_in_two_steps(new, target)
    _sync_one(target.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders at once (Linux's renameat2); False where that is not to be had."""
    at_working_directory, swap = -100, 2
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(renameat2(at_working_directory, os.fsencode(one), at_working_directory, os.fsencode(other), swap) == 0)


def _replace_in_two_steps(new: Path, target: Path) -> None:
    # For a moment there is no folder of this name, and a failure puts the old one back.
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    try:
        os.replace(target, old / "old")
        os.replace(new, target)
    except BaseException:
        if (old / "old").exists() and not target.exists():
            os.replace(old / "old", target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _sync_one(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # nor do some file systems write them
        return
    finally:
        os.close(descriptor)
