"""Reading the files of saved edits without trust.

Tensors are safetensors and everything else is JSON: nothing is ever unpickled. A file that is
missing, damaged or of a newer version is refused by :class:`AdapterFileError`, which names it.
"""

from __future__ import annotations

import base64
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .adapter_digests import verify
from .adapter_format import (
    CONFIG_FILE,
    EDITS_FILE,
    FORMAT_VERSION,
    UNREADABLE,
    WEIGHTS_FILE,
    AdapterFileError,
    damaged,
    missing,
)
from .editing.held import HeldEdit
from .editing.requests import EditRequest
from .hparams import WISEHyperParams
from .separators import SPACE
from .tuner.adapter_tensors import memory_names
from .tuner.config import WiseConfig
from .tuner.memory import SCORES

# In the header of the weights file: there is a list of edits beside it.
LISTED = "wise_edits"
# A name, or the end of one. Anything else in these places is a pattern, and a pattern from a file can take for ever.
_PLAIN_NAME = re.compile(r"[\w.]+")


@dataclass(frozen=True)
class EditsRecord:
    """What ``wise_edits.json`` says; all of it empty for a folder that PEFT's own ``save_pretrained`` wrote."""

    settings: WISEHyperParams | None = None
    held: tuple[HeldEdit, ...] = ()
    generator_state: Tensor | None = None


@dataclass(frozen=True)
class SavedEdits:
    """The contents of a folder of edits."""

    config: WiseConfig
    tensors: dict[str, Tensor]
    record: EditsRecord


def encoded(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def decoded(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)


def read_folder(folder: Path) -> SavedEdits:
    """Everything in a folder of edits, checked as far as that goes without a model.

    Raises:
        AdapterFileError: a file is missing or damaged, or files do not belong together.
    """
    values = _edits_values(folder)
    if values is not None and values["format_version"] > 1:
        verify(values, folder)
    config = _config(folder)
    tensors, listed = _tensors(folder)
    if listed and values is None:
        raise AdapterFileError(
            f"{folder / EDITS_FILE} does not exist, and {WEIGHTS_FILE} was saved with one: take it from a backup, or "
            "load the adapter without its list of edits with PeftModel.from_pretrained."
        )
    # Before a model makes room for them: a configuration can list any number.
    if len(config.memories) != len(memory_names(tensors)):
        raise AdapterFileError(
            f"{folder / WEIGHTS_FILE} holds {len(memory_names(tensors))} memories, and {CONFIG_FILE} lists "
            f"{len(config.memories)}. Take both files from the same save."
        )
    try:
        record = EditsRecord() if values is None else _parsed_record(values, len(config.memories))
    except UNREADABLE as error:
        raise damaged(folder / EDITS_FILE, error) from error
    return SavedEdits(config, tensors, record)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file that says of itself that there is a list of edits beside it: the same bytes each time."""
    save_file(dict(tensors), path, metadata={"format": "pt", LISTED: EDITS_FILE})
    # The library writes these in random order, and files of the same edits shall be the same.
    order = [f'"{key}":"{value}"'.encode() for key, value in (("format", "pt"), (LISTED, EDITS_FILE))]
    with path.open("r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        file.seek(8)
        file.write(header.replace(b",".join(reversed(order)), b",".join(order), 1))


def check_numbers(name: str, tensor: Tensor, path: Path) -> None:
    """Refuse what no edit can have left in a side memory.

    Raises:
        AdapterFileError: a dW that is not finite or no floating numbers, a mask that is not of bools, a threshold
            that is NaN, or a negative number of edits.
    """
    kind = name.rpartition(".")[2]
    good = {
        "delta_weight": lambda: tensor.is_floating_point() and bool(tensor.isfinite().all()),
        "mask": lambda: tensor.dtype == torch.bool,
        **dict.fromkeys(SCORES, lambda: tensor.is_floating_point() and not bool(tensor.isnan())),
        "n_edits": lambda: tensor.dtype == torch.int64 and int(tensor) >= 0,
    }.get(kind)
    if good is not None and not good():
        raise damaged(path, f"{name}, {str(tensor.dtype).removeprefix('torch.')}, holds what no edit leaves there")


def _config(folder: Path) -> WiseConfig:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise missing(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("peft_type") != "WISE":
            raise AdapterFileError(f"{path} is not a WISE adapter's configuration (no peft_type 'WISE').")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unexpected keyword arguments")  # of a later version
            config = WiseConfig.from_peft_type(**values)
        _check_patterns(config)
    except AdapterFileError:
        raise
    except UNREADABLE as error:
        raise damaged(path, error) from error
    if config.modules_to_save:
        raise AdapterFileError(
            f"{path} also replaces whole modules ({str(config.modules_to_save)[:80]}), which has nothing to do with "
            "edits: load this adapter with PeftModel.from_pretrained."
        )
    return config


def _check_patterns(config: WiseConfig) -> None:
    """PEFT takes a text, and the name of the list of layers, for a regular expression."""
    patterns = [config.target_modules, config.exclude_modules]
    texts = [value for value in patterns if isinstance(value, str)]
    layers = config.layers_pattern
    texts += [] if layers is None else [layers] if isinstance(layers, str) else list(layers)
    for text in texts:
        if not isinstance(text, str) or not _PLAIN_NAME.fullmatch(text):
            raise ValueError(
                f"{str(text)[:80]!r} is a pattern, and no plain name of a module; PeftModel.from_pretrained takes it"
            )


def _tensors(folder: Path) -> tuple[dict[str, Tensor], bool]:
    """(the tensors, whether a list of edits was written with them)."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise missing(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
            return tensors, LISTED in (file.metadata() or {})
    except Exception as error:  # SafetensorError is no more than an Exception
        raise damaged(path, error) from error


def _edits_values(folder: Path) -> dict[str, Any] | None:
    """The list of edits as JSON has it; None for a folder that PEFT's own ``save_pretrained`` wrote."""
    path = folder / EDITS_FILE
    if not path.exists():
        return None
    try:
        if not path.is_file():  # a pipe would be read for ever
            raise ValueError("it is no file")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not the keys of a list of edits")
        version = values.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ValueError(f"format_version is {str(version)[:80]!r}")
    except UNREADABLE as error:
        raise damaged(path, error) from error
    if version > FORMAT_VERSION:
        raise AdapterFileError(
            f"{path} has format {version}, and this version reads up to {FORMAT_VERSION}: update easyedit_wise."
        )
    return values


def _parsed_record(values: Mapping[str, Any], n_memories: int) -> EditsRecord:
    settings, generator = values.get("settings"), values.get("generator")
    as_before = {"target_separator": SPACE}  # what earlier versions, which do not name it, put before every target
    edits = values.get("edits", [])
    if not isinstance(edits, list):
        raise ValueError(f"edits is a {type(edits).__name__}, and must be a list")
    held = tuple(HeldEdit(EditRequest.from_easyedit(edit, SPACE), edit["memory"]) for edit in edits)
    for edit in held:
        known = isinstance(edit.memory, int) and not isinstance(edit.memory, bool) and 0 <= edit.memory < n_memories
        if not known:
            raise ValueError(
                f"an edit is in the memory {str(edit.memory)[:20]}, which does not exist, the adapter has {n_memories}"
            )
    state = None if generator is None else decoded(generator)
    if state is not None:
        torch.Generator().set_state(state)  # refuses what is not a generator's state
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"settings is a {type(settings).__name__}, and must be a mapping")
    return EditsRecord(None if settings is None else WISEHyperParams.from_dict({**as_before, **settings}), held, state)
