"""The files of saved edits: what they are called, and reading them without trust.

Tensors are safetensors and everything else is JSON: nothing is ever unpickled. A file that is
missing, damaged or of a newer version is refused by :class:`AdapterFileError`, which names it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .editing.requests import EditRequest
from .editing.stream import HeldEdit
from .hparams import WISEHyperParams
from .model_card import CARD_FILE
from .tuner.config import WiseConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
EDITS_FILE = "wise_edits.json"
OUR_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, EDITS_FILE, CARD_FILE})
FORMAT_VERSION = 1


class AdapterFileError(ValueError):
    """A saved adapter is missing, damaged, or made for another model."""


@dataclass(frozen=True)
class EditsRecord:
    """What ``wise_edits.json`` says; all of it empty for a folder that PEFT's own ``save_pretrained`` wrote."""

    settings: WISEHyperParams | None = None
    held: tuple[HeldEdit, ...] = ()
    generator_state: Tensor | None = None


def encoded(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def decoded(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)


def read_config(folder: Path) -> WiseConfig:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterFileError(f"{path} does not exist: name a folder that edits were saved into.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("peft_type") != "WISE":
            raise AdapterFileError(f"{path} is not a WISE adapter's configuration (no peft_type 'WISE').")
        return WiseConfig.from_pretrained(str(folder))
    except AdapterFileError:
        raise
    except (ValueError, TypeError, OSError) as error:
        raise AdapterFileError(
            f"{path} is damaged ({error}): take it from a backup or save the edits again."
        ) from error


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterFileError(f"{path} does not exist: name a folder that edits were saved into.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(
            f"{path} is damaged ({error}): take it from a backup or save the edits again."
        ) from error


def check_numbers(name: str, tensor: torch.Tensor, path: Path) -> None:
    """Refuse what no edit can have left in a side memory.

    Raises:
        AdapterFileError: a dW that is not finite or no floating numbers, a mask that is not of bools, a threshold
            that is NaN, or a negative number of edits.
    """
    kind = name.rpartition(".")[2]
    good = {
        "delta_weight": lambda: tensor.is_floating_point() and bool(tensor.isfinite().all()),
        "mask": lambda: tensor.dtype == torch.bool,
        "epsilon": lambda: tensor.is_floating_point() and not bool(tensor.isnan()),
        "n_edits": lambda: tensor.dtype == torch.int64 and int(tensor) >= 0,
    }.get(kind)
    if good is not None and not good():
        raise AdapterFileError(
            f"{path} is damaged: {name} ({str(tensor.dtype).removeprefix('torch.')}) holds what no edit leaves there. "
            "Take it from a backup or save the edits again."
        )


def read_record(folder: Path, n_memories: int) -> EditsRecord:
    """The list of edits; a folder that PEFT's own ``save_pretrained`` wrote has none."""
    path = folder / EDITS_FILE
    if not path.is_file():
        return EditsRecord()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = int(values.get("format_version", 0))
        if version > FORMAT_VERSION:
            raise AdapterFileError(
                f"{path} has format {version}, and this version reads up to {FORMAT_VERSION}: update easyedit_wise."
            )
        return _parsed_record(values, n_memories)
    except AdapterFileError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OSError) as error:
        raise AdapterFileError(
            f"{path} is damaged ({error}): take it from a backup or save the edits again."
        ) from error


def _parsed_record(values: Mapping[str, Any], n_memories: int) -> EditsRecord:
    settings, generator = values.get("settings"), values.get("generator")
    held = tuple(HeldEdit(EditRequest.from_easyedit(edit), int(edit["memory"])) for edit in values.get("edits", []))
    if any(not 0 <= edit.memory < n_memories for edit in held):
        raise ValueError(f"an edit is in a memory that does not exist, the adapter has {n_memories}")
    state = None if generator is None else decoded(generator)
    if state is not None:
        torch.Generator().set_state(state)  # refuses what is not a generator's state
    return EditsRecord(WISEHyperParams.from_dict(settings) if settings else None, held, state)
