"""register() and unregister(), on small packages that are laid out as EasyEdit is."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from easyedit_wise.easyedit.multimodal import apply_wise_to_multimodal_model
from easyedit_wise.easyedit.registry import register, unregister

ALG_DICT = """%s
    def apply_ft_to_model(*args, **kwargs): ...
    def apply_host_wise_to_model(*args, **kwargs): ...
    ALG_DICT = {"FT": apply_ft_to_model%s}
"""
OWN_SETTINGS = """
    class WISEHyperParams:
        pass
"""
BATCH_EDITOR = """
    from enum import Enum

    class BatchEditor(Enum):
        FT = "FT"

        @staticmethod
        def is_batchable_method(alg_name):
            return alg_name == BatchEditor.FT.value
"""
EDITOR = """
    from ..util.alg_dict import *
    from .batch_editor import BatchEditor

    def algorithm(name): return ALG_DICT[name]
    def can_batch(name): return BatchEditor.is_batchable_method(name)
"""


def write_host(root: Path, *, own_wise: bool, current: bool) -> None:
    """A package ``easyeditor`` under root; ``current`` has the restore sets that GitHub HEAD has."""
    package = root / "easyeditor"
    files = {
        "__init__.py": "from .editors import *\nfrom .models import *\n",
        "util/__init__.py": "",
        "util/alg_dict.py": ALG_DICT
        % (
            "\n    from ..models.wise import WISEHyperParams" if own_wise else "",
            ', "WISE": apply_host_wise_to_model' if own_wise else "",
        ),
        "editors/__init__.py": "from .editor import *\n",
        "editors/batch_editor.py": BATCH_EDITOR,
        "editors/editor.py": EDITOR,
        "models/__init__.py": "from .wise import *\n" if own_wise else "",
    }
    if own_wise:
        files["models/wise/__init__.py"] = "from .wise_hparams import WISEHyperParams\n"
        files["models/wise/wise_hparams.py"] = OWN_SETTINGS
    if current:
        files["util/device.py"] = ""
        files["editors/utils.py"] = 'CALLABLE_RESTORE_ALGS = {"KN"}\n'
        files["editors/editor.py"] += "    from .utils import *\n"
    for name, source in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))


@pytest.fixture
def clean_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No ``easyeditor`` imported, no finder waiting for it; both as before afterwards."""

    def present() -> dict[str, ModuleType]:
        return {n: m for n, m in sys.modules.items() if n == "easyeditor" or n.startswith("easyeditor.")}

    before = present()
    for name in before:
        del sys.modules[name]
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f).__name__ != "HostFinder"])
    yield
    for name in present():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def make_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_modules: None) -> Callable[..., ModuleType]:
    """Write such a package, import it, and give its editor module."""

    def make(*, own_wise: bool, current: bool = True) -> ModuleType:
        write_host(tmp_path, own_wise=own_wise, current=current)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.import_module("easyeditor")
        return sys.modules["easyeditor.editors.editor"]

    return make


@pytest.fixture
def apply_wise(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The registered function; a stand-in for it, since registering does not call it."""

    def apply_wise_to_model(*args: Any, **kwargs: Any) -> None: ...

    module = ModuleType("easyedit_wise.easyedit.apply")
    module.__dict__["apply_wise_to_model"] = apply_wise_to_model
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return apply_wise_to_model


@pytest.mark.parametrize("own_wise", [True, False])
@pytest.mark.parametrize("current", [True, False])
def test_register_then_unregister_leaves_the_host_as_it_was(
    make_host: Callable[..., ModuleType], apply_wise: Callable[..., Any], own_wise: bool, current: bool
) -> None:
    editor = make_host(own_wise=own_wise, current=current)
    alg_dict, before, names = editor.ALG_DICT, dict(editor.ALG_DICT), set(vars(sys.modules["easyeditor"]))

    for _ in range(2):
        register()
        assert editor.algorithm("WISE") is apply_wise
        assert editor.ALG_DICT is alg_dict
        assert editor.can_batch("WISE")
        assert editor.can_batch("FT")
        assert not editor.can_batch("ROME")
        if current:
            assert sorted(editor.CALLABLE_RESTORE_ALGS) == ["KN", "WISE"]

    for _ in range(2):
        unregister()
        assert before == alg_dict
        assert set(vars(sys.modules["easyeditor"])) == names
        assert not editor.can_batch("WISE")
        assert editor.can_batch("FT")
        if current:
            assert sorted(editor.CALLABLE_RESTORE_ALGS) == ["KN"]

    register()
    assert editor.algorithm("WISE") is apply_wise


def test_the_multimodal_table_goes_with_the_others(
    make_host: Callable[..., ModuleType], apply_wise: Callable[..., Any]
) -> None:
    make_host(own_wise=True)
    alg_dict = sys.modules["easyeditor.util.alg_dict"]
    table: dict[str, Any] = {"WISE": print}
    alg_dict.__dict__.update(ALG_MULTIMODAL_DICT=table, MULTIMODAL_EDIT_ALGS={"WISE"})
    register()
    assert table["WISE"] is apply_wise_to_multimodal_model
    unregister()
    assert table == {"WISE": print}


def test_names_are_exported_where_the_host_has_none(
    make_host: Callable[..., ModuleType], apply_wise: Callable[..., Any]
) -> None:
    from easyedit_wise.hparams import WISEHyperParams

    make_host(own_wise=False)
    register()
    for module in (sys.modules["easyeditor"], sys.modules["easyeditor.models"]):
        assert module.__dict__["WISEHyperParams"] is WISEHyperParams
        assert module.__dict__["apply_wise_to_model"] is apply_wise


def test_a_script_that_imports_from_the_host_gets_ours(
    make_host: Callable[..., ModuleType], apply_wise: Callable[..., Any]
) -> None:
    from easyedit_wise.hparams import WISEHyperParams

    editor = make_host(own_wise=True)
    for _ in range(2):
        register()
        for name in ("easyeditor", "easyeditor.models", "easyeditor.models.wise", "easyeditor.util.alg_dict"):
            assert sys.modules[name].__dict__["WISEHyperParams"] is WISEHyperParams, name
        assert editor.WISEHyperParams is WISEHyperParams  # star-imported from the registry
        assert sys.modules["easyeditor"].__dict__["apply_wise_to_model"] is apply_wise
        # Where the host defines it, its own stays, for whoever wants that one.
        home = sys.modules["easyeditor.models.wise.wise_hparams"].__dict__["WISEHyperParams"]
        assert home.__module__ == "easyeditor.models.wise.wise_hparams"
        unregister()
        for name in ("easyeditor", "easyeditor.models", "easyeditor.models.wise", "easyeditor.util.alg_dict"):
            assert sys.modules[name].__dict__["WISEHyperParams"] is home, name
        assert not hasattr(sys.modules["easyeditor"], "apply_wise_to_model")


SIMIE = """
    class SimIEHyperParams:
        @staticmethod
        def _get_base_hparams_class(base_method):
            return base_method
"""


def test_simie_over_wise_is_refused_when_its_settings_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_modules: None, apply_wise: Callable[..., Any]
) -> None:
    write_host(tmp_path, own_wise=True, current=True)
    simie = tmp_path / "easyeditor" / "models" / "simie"
    simie.mkdir()
    (simie / "__init__.py").write_text("from .simie_hparams import SimIEHyperParams\n")
    (simie / "simie_hparams.py").write_text(textwrap.dedent(SIMIE))
    (tmp_path / "easyeditor" / "models" / "__init__.py").write_text("from .wise import *\nfrom .simie import *\n")
    monkeypatch.syspath_prepend(tmp_path)
    host = importlib.import_module("easyeditor")
    register()
    choose = host.SimIEHyperParams._get_base_hparams_class
    assert choose("ROME") == "ROME"
    with pytest.raises(ValueError, match="SimIE over base_method 'WISE' is not possible"):
        choose("WISE")
    unregister()
    assert host.SimIEHyperParams._get_base_hparams_class("WISE") == "WISE"


def test_an_entry_that_somebody_set_later_stays(
    make_host: Callable[..., ModuleType], apply_wise: Callable[..., Any]
) -> None:
    editor = make_host(own_wise=True)
    register()
    editor.ALG_DICT["FT"] = print
    unregister()
    assert editor.algorithm("FT") is print


def test_a_host_that_lists_wise_keeps_listing_it_after_unregister(
    make_host: Callable[..., ModuleType], apply_wise: Callable[..., Any]
) -> None:
    editor = make_host(own_wise=True)
    editor.CALLABLE_RESTORE_ALGS.add("WISE")
    register()
    unregister()
    assert "WISE" in editor.CALLABLE_RESTORE_ALGS


def test_register_again_takes_back_an_entry_that_somebody_overwrote(
    make_host: Callable[..., ModuleType], apply_wise: Callable[..., Any]
) -> None:
    editor = make_host(own_wise=True)
    own = editor.algorithm("WISE")
    register()
    editor.ALG_DICT["WISE"] = print
    register()
    assert editor.algorithm("WISE") is apply_wise
    unregister()
    assert editor.algorithm("WISE") is own


@pytest.mark.usefixtures("clean_modules")
def test_without_easyedit_register_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easyeditor", None)
    with pytest.raises(ImportError, match=r"EasyEdit is not importable.*PYTHONPATH.*pip install"):
        register()


def test_what_easyedit_itself_misses_is_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_modules: None
) -> None:
    write_host(tmp_path, own_wise=False, current=True)
    (tmp_path / "easyeditor" / "models" / "__init__.py").write_text("import no_such_package_of_the_host\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError) as error:
        register()
    assert error.value.name == "no_such_package_of_the_host"


@pytest.mark.usefixtures("clean_modules")
def test_unregister_imports_nothing() -> None:
    unregister()
    assert "easyeditor" not in sys.modules
