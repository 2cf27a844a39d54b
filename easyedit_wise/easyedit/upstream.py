"""EasyEdit's own WISE, from a checkout of its GitHub HEAD, in this process, to compare with.

``easyeditor/__init__.py`` imports every method that EasyEdit has, and with them packages that text editing
does not need. WISE itself needs four files. So the checkout is mounted under a private name,
``easyedit_head``, as packages whose ``__init__`` files above ``models/wise`` are not run; nothing is stubbed,
nothing is written into the checkout, and an installed ``easyeditor`` is neither imported nor shadowed.

EasyEdit's code runs as it is. Around it, per stream of edits: its module-level globals are set back, its
prints go nowhere, and ``sequential_edit`` is set by hand on its settings, which have no such field, because
without it every edit starts over from the bare layer.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from torch import nn

HOME = "EASYEDIT_HOME"
PACKAGE = "easyedit_head"
_MARK = Path("easyeditor") / "models" / "wise" / "WISE.py"


def why_not() -> str | None:
    """Why EasyEdit's own WISE cannot be loaded, in one line; None when it can."""
    home = os.environ.get(HOME)
    if not home:
        return f"{HOME} is not set: name a checkout of github.com/zjunlp/EasyEdit to compare with its own WISE."
    if not (Path(home) / _MARK).is_file():
        return f"{HOME}={home} holds no {_MARK}: it is not a checkout of github.com/zjunlp/EasyEdit."
    return None


def load_upstream() -> UpstreamWise | None:
    """EasyEdit's own WISE from the checkout that ``EASYEDIT_HOME`` names; None without one (:func:`why_not`)."""
    return None if why_not() else UpstreamWise(Path(os.environ[HOME]))


@dataclass
class EditTiming:
    """When one edit's iterations began.

    Attributes:
        seconds: the whole edit, without the generation of the context templates.
        marks: a time stamp at the same point of every iteration.
    """

    seconds: float = 0.0
    marks: list[float] = field(default_factory=list)

    @property
    def iterations(self) -> list[float]:
        """Seconds from one mark to the next: a whole iteration each, without what precedes the first."""
        return [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]


class UpstreamWise:
    """Runs EasyEdit's ``apply_wise_to_model``, one stream of edits at a time.

    Attributes:
        commit: of the checkout, with its date; None where it is no git repository.
        timings: one of each edit of the stream.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.commit = _commit(home)
        self._mount(home / "easyeditor")
        self._wise: Any = importlib.import_module(f"{PACKAGE}.models.wise.WISE")
        self._main: Any = importlib.import_module(f"{PACKAGE}.models.wise.wise_main")
        self._utils: Any = importlib.import_module(f"{PACKAGE}.models.wise.utils")
        self._hparams_class = importlib.import_module(f"{PACKAGE}.models.wise.wise_hparams").WISEHyperParams
        self.merging: ModuleType = importlib.import_module(f"{PACKAGE}.models.wise.merge")
        self.timings: list[EditTiming] = []
        self._model: nn.Module | None = None
        self._hparams: Any = None
        self._before: tuple[str, nn.Module, Any, list[nn.Parameter]] | None = None
        self._mark_iterations()

    # -- settings and contexts ----------------------------------------------------------------

    def settings(self, name: str = "llama-7b", **changes: Any) -> dict[str, Any]:
        """The keys of one of EasyEdit's own files in ``hparams/WISE``, some of them changed; on the CPU."""
        text = (self.home / "hparams" / "WISE" / f"{name}.yaml").read_text(encoding="utf-8")
        return {**yaml.safe_load(text), "device": "cpu", **changes}

    def context_templates(self, model: nn.Module, tok: Any) -> list[str]:
        """The templates that EasyEdit makes for a model: ``{}`` and ten greedy continuations before ``{}``."""
        kept, self._utils.CONTEXT_TEMPLATES_CACHE = self._utils.CONTEXT_TEMPLATES_CACHE, None
        try:
            with _quiet(), _padding(tok), torch.no_grad():
                made = self._utils.get_context_templates(
                    model, tok, length_params=[[5, 5], [10, 5]], device=next(model.parameters()).device
                )
            return list(made)
        finally:
            self._utils.CONTEXT_TEMPLATES_CACHE = kept

    # -- a stream of edits --------------------------------------------------------------------

    def start(
        self, model: nn.Module, tok: Any, hparams: Mapping[str, Any], templates: Sequence[str] | None = None
    ) -> None:
        """Begin a stream on an unedited model; a stream under way is restored.

        Args:
            model: the model.
            tok: its tokenizer.
            hparams: EasyEdit's YAML keys, ``act_margin`` among them.
            templates: context templates; None makes EasyEdit's.
        """
        self.restore()
        values = dict(hparams)
        if "act_margin" in values:
            values["alpha"], values["beta"], values["gamma"] = values.pop("act_margin")
        self._hparams = self._hparams_class(**values)
        self._hparams.sequential_edit = True
        self._utils.CONTEXT_TEMPLATES_CACHE = list(templates or self.context_templates(model, tok))
        self._model = model
        name = values["inner_params"][0].removesuffix(".weight").replace("[", ".").replace("]", "")
        layer = model.get_submodule(name)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._before = (name, layer, layer.weight, trainable)

    def edit(
        self, model: nn.Module, tok: Any, requests: Sequence[Mapping[str, Any]], hparams: Mapping[str, Any]
    ) -> nn.Module:
        """Edits one after the other, as EasyEdit's editor makes them in sequence. Requests need ``loc_prompt``.

        A model other than that of the stream under way begins a stream.

        Returns:
            EasyEdit's wrapper: call it, or its ``.model``.
        """
        if model is not self._model:
            self.start(model, tok, hparams)
        wrapper: nn.Module | None = None
        for request in requests:
            timing = EditTiming()
            self.timings.append(timing)
            with _quiet(), _padding(tok):
                started = now()
                wrapper, _ = self._main.apply_wise_to_model(model, tok, [dict(request)], self._hparams)
                timing.seconds = now() - started
        if wrapper is None:
            raise ValueError("there are no requests.")
        return wrapper

    def restore(self) -> None:
        """End the stream: the model has its own layer and weight again, EasyEdit's globals are as at import."""
        if self._model is not None and self._before is not None:
            name, layer, weight, trainable = self._before
            layer.weight = weight
            self._model.set_submodule(name, layer)
            for parameter in trainable:
                parameter.requires_grad = True
        self._model = self._before = self._hparams = None
        self.timings = []
        self._wise.edit_history = []
        self._wise.merge_group_edit_history = []
        self._utils.CONTEXT_TEMPLATES_CACHE = None
        self._main.WISEload = True

    # -- loading ------------------------------------------------------------------------------

    @staticmethod
    def _mount(root: Path) -> None:
        for name in ("", ".models", ".util"):
            folder = root.joinpath(*name.split("."))
            module = ModuleType(PACKAGE + name)
            module.__path__ = [str(folder)]
            module.__spec__ = ModuleSpec(module.__name__, None, is_package=True)
            module.__spec__.submodule_search_locations = [str(folder)]
            sys.modules[module.__name__] = module

    def _mark_iterations(self) -> None:
        """Let the loss that opens every iteration leave a time stamp."""
        editor = self._wise.WISE
        loss = editor._cal_ft_loss

        def marked(instance: Any, *args: Any, **kwargs: Any) -> Any:
            if self.timings:
                self.timings[-1].marks.append(now())
            return loss(instance, *args, **kwargs)

        editor._cal_ft_loss = marked


def now() -> float:
    """A time stamp after everything that was asked of the accelerator, if there is one, is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _commit(home: Path) -> str | None:
    command = ["git", "-C", str(home), "log", "-1", "--format=%h %cs"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


class _Nowhere(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(_Nowhere()):
        yield


@contextlib.contextmanager
def _padding(tok: Any) -> Iterator[None]:
    """The tokenizer as EasyEdit's editor prepares it: padding on the left, with the end-of-text token."""
    kept = tok.padding_side, tok.pad_token
    tok.padding_side = "left"
    tok.pad_token = tok.eos_token or tok.pad_token
    try:
        yield
    finally:
        tok.padding_side = kept[0]
        if kept[1] is not None:
            tok.pad_token = kept[1]
