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

from .editors import CALLS, around_wise
from .multimodal import register_multimodal, unregister_multimodal
from .neighbours import beside_wise, refuse_as_base

HOST = "easyeditor"
ALG_NAME = "WISE"
_RECORD = "_easyedit_wise_record"
_BASE_CLASS = "_get_base_hparams_class"
_ABSENT = object()


@dataclass
class _Record:
    """What registering replaced, for ``unregister``.

    Attributes:
        previous: the host's own ``ALG_DICT["WISE"]``; None where it had none.
        algorithms: its other entries, each with what stands in its place.
    """

    previous: Any
    algorithms: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    replaced: list[tuple[Any, str, Any]] = field(default_factory=list)
    restore_algs: set[str] | None = None

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of a module or a class, and remember what it was."""
        self.replaced.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def put_back(self) -> None:
        """Undo every :meth:`replace`, the last one first."""
        while self.replaced:
            owner, name, value = self.replaced.pop()
            if value is not _ABSENT:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)


def register() -> None:
    """Put WISE into EasyEdit's registries, importing EasyEdit when that has not happened yet.

    - ``ALG_DICT["WISE"]`` becomes ours.
    - So do ``WISEHyperParams`` and ``apply_wise_to_model``, wherever the host exports its own: a script that imports
      them from ``easyeditor`` runs as it is. In the modules that define them (``easyeditor.models.wise.wise_hparams``,
      ``wise_main``) the host's own stay. A host without any exports ours.
    - ``BaseEditor`` saves edits once a call, see ``editors``; its ``BatchEditor`` takes WISE for a method that can
      edit a batch; where methods whose restore object is called are listed, WISE is.
    - The other algorithms refuse what they and WISE cannot do together, see ``neighbours``.
    - Its token accuracy of WISE is asked of the text that was trained, see ``scoring``.
    - ``ALG_MULTIMODAL_DICT["WISE"]`` becomes ours too, for the text side of vision-language models.

    What was there before is remembered for ``unregister``. Calling it again changes nothing, except that an
    ``ALG_DICT["WISE"]`` which somebody else has set since then becomes ours again.

    Raises:
        ImportError: EasyEdit is not installed, or is there but cannot be imported (its own error).
    """
    alg_dict = _import_alg_dict()
    from easyedit_wise.easyedit.apply import apply_wise_to_model
    from easyedit_wise.easyedit.scoring import score_as_trained
    from easyedit_wise.hparams import WISEHyperParams

    if getattr(alg_dict, _RECORD, None) is None:
        record = _Record(alg_dict.ALG_DICT.get(ALG_NAME))
        setattr(alg_dict, _RECORD, record)
        for name, value in (("WISEHyperParams", WISEHyperParams), ("apply_wise_to_model", apply_wise_to_model)):
            _export(record, name, value)
        _guard_the_others(record, alg_dict.ALG_DICT)
        _refuse_as_base(record)
        _list_as_callable_restore(record)
        _list_as_batchable(record)
        score_as_trained(HOST, ALG_NAME, record.replace)
        _save_once_a_call(record, apply_wise_to_model)
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
    for name, (own, guarded) in record.algorithms.items():
        if alg_dict.ALG_DICT.get(name) is guarded:  # and not what somebody else has set since
            alg_dict.ALG_DICT[name] = own
    record.put_back()
    if record.restore_algs is not None:
        record.restore_algs.discard(ALG_NAME)
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


def _export(record: _Record, name: str, value: Any) -> None:
    """Put ours in place of the host's own in every module that has imported it, or into the two that users import."""
    modules = [m for key, m in sys.modules.items() if m is not None and (key == HOST or key.startswith(f"{HOST}."))]
    packages = [sys.modules[key] for key in (HOST, f"{HOST}.models") if key in sys.modules]
    own = next((vars(module)[name] for module in packages if name in vars(module)), _ABSENT)
    defined_in = getattr(own, "__module__", None)
    for module in packages if own is _ABSENT else modules:
        if vars(module).get(name, _ABSENT) is own and module.__name__ != defined_in:
            record.replace(module, name, value)


def _guard_the_others(record: _Record, algorithms: dict[str, Any]) -> None:
    for name, own in algorithms.items():
        if name != ALG_NAME:
            record.algorithms[name] = own, beside_wise(name, own)
            algorithms[name] = record.algorithms[name][1]


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

    record.replace(editor, "is_batchable_method", staticmethod(is_batchable_method))


def _save_once_a_call(record: _Record, apply_wise: Callable[..., Any]) -> None:
    editor = getattr(sys.modules.get(f"{HOST}.editors.editor"), "BaseEditor", None)
    if editor is None:
        return
    for name in CALLS:
        if name in vars(editor):
            record.replace(editor, name, around_wise(vars(editor)[name], apply_wise))


def _refuse_as_base(record: _Record) -> None:
    """Let SimIE's settings over base method WISE be refused when they are read, before a model is loaded."""
    settings = getattr(sys.modules.get(f"{HOST}.models.simie.simie_hparams"), "SimIEHyperParams", None)
    host_choice: Callable[[str], type] | None = getattr(settings, _BASE_CLASS, None)
    if settings is None or host_choice is None:
        return

    def class_of_base(base_method: str) -> type:
        """The settings class of a base method."""
        if base_method == ALG_NAME:
            refuse_as_base("SimIE")
        return host_choice(base_method)

    record.replace(settings, _BASE_CLASS, staticmethod(class_of_base))
