"""WISE in EasyEdit's registries, and out of them again.

EasyEdit's registries are module-level objects that its editors star-import, so they are changed
in place, never rebound. What was there before is kept on the host's own ``alg_dict`` module: it
lives as long as what it describes, and this package keeps no state.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from easyedit_wise.easyedit.multimodal import register_multimodal, unregister_multimodal

HOST = "easyeditor"
ALG_NAME = "WISE"
_RECORD = "_easyedit_wise_record"


@dataclass
class _Record:
    """What registering replaced, for ``unregister``."""

    previous: Any
    exports: list[tuple[ModuleType, str]] = field(default_factory=list)
    restore_algs: set[str] | None = None
    batch_editor: Any = None
    batch_test: Any = None


def register() -> None:
    """Put WISE into EasyEdit's registries, importing EasyEdit when that has not happened yet.

    - ``ALG_DICT["WISE"]`` becomes ours. A host's own entry is remembered for ``unregister``.
    - ``WISEHyperParams`` and ``apply_wise_to_model`` can be imported from ``easyeditor`` and
      ``easyeditor.models`` where the host has no such names of its own.
    - Where the host lists the methods whose restore object is called, WISE is listed.
    - ``BatchEditor`` takes WISE for a method that can edit a batch.
    - ``ALG_MULTIMODAL_DICT["WISE"]`` becomes ours too, for the text side of vision-language models.

    Calling it again changes nothing, except that an ``ALG_DICT["WISE"]`` which somebody else has
    set since then becomes ours again.

    Raises:
        ImportError: EasyEdit is not installed, or is there but cannot be imported (its own error).
    """
    alg_dict = _import_alg_dict()
    from easyedit_wise.easyedit.apply import apply_wise_to_model
    from easyedit_wise.hparams import WISEHyperParams

    record = getattr(alg_dict, _RECORD, None)
    if record is None:
        record = _Record(previous=alg_dict.ALG_DICT.get(ALG_NAME))
        setattr(alg_dict, _RECORD, record)
        _export(record, {"WISEHyperParams": WISEHyperParams, "apply_wise_to_model": apply_wise_to_model})
        _list_as_callable_restore(record)
        _list_as_batchable(record)
    alg_dict.ALG_DICT[ALG_NAME] = apply_wise_to_model
    register_multimodal(alg_dict)


def unregister() -> None:
    """Give EasyEdit its own WISE back, or take WISE out where it had none.

    Where WISE is not registered there is nothing to do. Editors that were built before keep the
    function that they were built with.
    """
    alg_dict = sys.modules.get(f"{HOST}.util.alg_dict")
    record = getattr(alg_dict, _RECORD, None)
    if alg_dict is None or record is None:
        return
    unregister_multimodal(alg_dict)
    if record.previous is None:
        alg_dict.ALG_DICT.pop(ALG_NAME, None)
    else:
        alg_dict.ALG_DICT[ALG_NAME] = record.previous
    for module, name in record.exports:
        if hasattr(module, name):
            delattr(module, name)
    if record.restore_algs is not None:
        record.restore_algs.discard(ALG_NAME)
    if record.batch_editor is not None:
        record.batch_editor.is_batchable_method = staticmethod(record.batch_test)
    delattr(alg_dict, _RECORD)


def _import_alg_dict() -> ModuleType:
    module = f"{HOST}.util.alg_dict"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Only the absence of EasyEdit is explained here: what it misses itself is its own error.
        if error.name not in (HOST, f"{HOST}.util", module):
            raise
        raise ImportError(
            "EasyEdit is not importable, so WISE cannot be registered in it: put a checkout of "
            "https://github.com/zjunlp/EasyEdit on PYTHONPATH, or install the wheel with "
            "'pip install --no-deps easyeditor==0.0.1.dev0'. The PEFT tuner works without it."
        ) from error


def _export(record: _Record, names: dict[str, Any]) -> None:
    # HEAD's SimIE and its scripts use the host's own classes, hence only where there are none.
    for module in (sys.modules.get(HOST), sys.modules.get(f"{HOST}.models")):
        for name, value in names.items():
            if module is not None and not hasattr(module, name):
                setattr(module, name, value)
                record.exports.append((module, name))


def _list_as_callable_restore(record: _Record) -> None:
    algs = getattr(sys.modules.get(f"{HOST}.editors.utils"), "CALLABLE_RESTORE_ALGS", None)
    if isinstance(algs, set) and ALG_NAME not in algs:
        algs.add(ALG_NAME)
        record.restore_algs = algs


def _list_as_batchable(record: _Record) -> None:
    """Let ``BatchEditor.is_batchable_method("WISE")`` be true.

    An Enum takes no new member, but its test is a static method that every caller reaches through
    the class; replacing that one is enough.
    """
    editor = getattr(sys.modules.get(f"{HOST}.editors.batch_editor"), "BatchEditor", None)
    host_test: Callable[[str], bool] | None = getattr(editor, "is_batchable_method", None)
    if editor is None or host_test is None or host_test(ALG_NAME):
        return

    def is_batchable_method(alg_name: str) -> bool:
        """Whether EasyEdit may give this method several requests at once."""
        return alg_name == ALG_NAME or host_test(alg_name)

    editor.is_batchable_method = staticmethod(is_batchable_method)
    record.batch_editor, record.batch_test = editor, host_test
