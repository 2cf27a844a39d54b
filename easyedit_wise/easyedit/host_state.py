"""What EasyEdit's methods leave behind between two edits, kept apart for each run: globals, and files.

Most methods keep caches in globals of their modules, AlphaEdit all that it knows of the earlier edits; it also writes
its projections into the working folder. Another run in the same process, and a script of the user's that runs the
same method, must find none of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from .registry import HOST

_INITIAL = "_easyedit_wise_initial_globals"

Globals = dict[str, dict[str, Any]]  # of each module: its data by name


def remember_initial_globals() -> None:
    """Note the data of EasyEdit's method modules as they are now; of a module that is noted already, nothing.

    The note is on EasyEdit's own package and lives as long as what it describes. It is taken as soon as EasyEdit is
    imported; where that was before this package, it is taken later, and holds what was done until then.
    """
    initial: Globals = vars(sys.modules[HOST]).setdefault(_INITIAL, {})
    for name, data in _copied(_globals()).items():
        initial.setdefault(name, data)


class RunState:
    """The globals and the working folder of one run of a method.

    Attributes:
        folder: the working folder while :meth:`entered`; it goes when this object does.
    """

    def __init__(self) -> None:
        remember_initial_globals()
        initial: Globals = vars(sys.modules[HOST])[_INITIAL]
        self._globals: Globals = _copied(initial)
        self.folder = Path(tempfile.mkdtemp(prefix="easyedit-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, the method finds what it left at the last time, and nothing of anybody else's.

        A module that is loaded inside for the first time is not covered: its globals stay.
        """
        others, before = _globals(), Path.cwd()
        _put(self._globals)
        os.chdir(self.folder)
        try:
            yield
        finally:
            os.chdir(before)
            present = _globals()
            self._globals = {name: present[name] for name in self._globals if name in present}
            _put(others)


def _globals() -> Globals:
    """The data of all method modules that are loaded."""
    modules = {name: module for name, module in sys.modules.items() if name.startswith(f"{HOST}.models.") and module}
    return {name: _data(module) for name, module in modules.items()}


def _data(module: ModuleType) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("__") and not isinstance(value, ModuleType) and not callable(value)
    }


def _copied(values: Globals) -> Globals:
    """With copies of what is changed in place; what is one object in two modules stays one."""
    copies: dict[int, Any] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return copies.setdefault(id(value), value.clone())
        if type(value) in (dict, list, set):
            return copies.setdefault(id(value), type(value)(value))
        return value

    return {name: {key: copied(value) for key, value in data.items()} for name, data in values.items()}


def _put(values: Globals) -> None:
    for name, data in values.items():
        module = sys.modules.get(name)
        if module is None:
            continue
        for gone in _data(module).keys() - data.keys():
            delattr(module, gone)
        vars(module).update(data)
