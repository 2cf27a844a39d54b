"""Watches for EasyEdit and puts WISE into it, whichever of the two is imported first.

An existing script adds ``import easyedit_wise`` and changes nothing else. That import must stay
cheap and must work without EasyEdit (whose own import closure is large, and at GitHub HEAD
reseeds every global generator), so nothing here imports ``easyeditor``: a finder on
``sys.meta_path`` waits for somebody else to do it. What EasyEdit needs before and after its
import depends on which EasyEdit it is; the old PyPI wheel's part is in ``wheel.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType
from typing import Any

from easyedit_wise.easyedit import wheel
from easyedit_wise.easyedit.host_state import remember_initial_globals
from easyedit_wise.easyedit.registry import HOST, register
from easyedit_wise.easyedit.rewriting import RewritingLoader


def install() -> None:
    """Register WISE in EasyEdit: at once where it is imported already, else right after its import.

    Calling it again changes nothing.
    """
    host = sys.modules.get(HOST)
    if host is not None and not _is_being_imported(host):
        _finish(host)
    # The finder is needed in either case: it also serves a later importlib.reload.
    if not any(isinstance(finder, HostFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, HostFinder())


class HostFinder(MetaPathFinder):
    """Finds nothing itself: asks the other finders, and dresses their loader for EasyEdit's modules.

    It keeps no state. Whether the wheel's bridge is active is written on the host package.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give for EasyEdit's modules; None for any other module."""
        is_host = fullname == HOST
        if not is_host and not (fullname.startswith(f"{HOST}.") and wheel.is_bridged(sys.modules.get(HOST))):
            return None
        spec = self._others_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        # Looking for a spec is no import (importlib.util.find_spec does it too), so
        # everything with an effect waits for the loader to be executed.
        bridged = wheel.is_wheel(spec) if is_host else True
        if bridged and isinstance(spec.loader, SourceFileLoader):
            spec.loader = RewritingLoader(spec.loader.name, spec.loader.path)
        if is_host:
            spec.loader = _HostLoader(spec.loader, wheel.prepare if bridged else None, _finish)
        return spec

    def _others_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is self or isinstance(finder, HostFinder):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None


class _HostLoader(Loader):
    """Runs the host package's own loader, with a step before and a step after.

    Attributes that an importer may look for (``get_source``, ``is_package``, ...) are the inner loader's.
    """

    def __init__(
        self,
        inner: Loader,
        before: Callable[[ModuleType], None] | None,
        after: Callable[[ModuleType], None],
    ) -> None:
        self._inner = inner
        self._before = before
        self._after = after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The inner loader's module, or None for the default."""
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the host. Its own errors pass through as they are."""
        # Once loaded, the package shows its own loader: tools that read it see what they expect.
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        if self._before is not None:
            self._before(module)
        self._inner.exec_module(module)
        self._after(module)


def _finish(host: ModuleType) -> None:
    """What a completely imported host still needs."""
    if host.__spec__ is not None and wheel.is_wheel(host.__spec__):
        wheel.complete()
    remember_initial_globals()
    register()


def _is_being_imported(module: ModuleType) -> bool:
    # The import system's own mark of a package that is still executing; such a
    # package has no ALG_DICT yet, and whoever imports it has to call register().
    return bool(getattr(module.__spec__, "_initializing", False))
