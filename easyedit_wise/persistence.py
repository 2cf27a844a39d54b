"""Edits as a small folder: PEFT's adapter files, and a list of what was edited.

The folder is a plain PEFT adapter, so ``PeftModel.from_pretrained`` loads it, too. Tensors are
safetensors and everything else is JSON: nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .editing.requests import EditRequest
from .editing.stream import EditStream, HeldEdit
from .hparams import WISEHyperParams
from .tuner.attach import attach, check_layer, detach
from .tuner.config import WiseConfig
from .tuner.layer import WiseLayer
from .tuner.model import find_wise_layers

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
EDITS_FILE = "wise_edits.json"
FORMAT_VERSION = 1
# PEFT's checkpoints name modules as seen from the wrapping PeftModel.
_PEFT_PREFIX = "base_model.model."


class AdapterFileError(ValueError):
    """A saved adapter is missing, damaged, or made for another model."""


def save_edits(model: nn.Module, path: str | Path, adapter_name: str = "default") -> Path:
    """Write a model's edits into the folder ``path``; what was there is replaced as a whole.

    Args:
        model: a model that was edited in place.
        path: the folder.
        adapter_name: which set of edits.

    Returns:
        The folder.

    Raises:
        ValueError: the model carries no edits, or ``path`` is a file.
    """
    layer_name, layer = _only_layer(model)
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: edits are saved as a folder, so name another path.")
    target.parent.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors = {_PEFT_PREFIX + key: value.detach().cpu().contiguous() for key, value in state.items()}
    # Written aside and moved into place, so that a crash leaves the old folder or the new one.
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        save_file(tensors, aside / WEIGHTS_FILE, metadata={"format": "pt"})
        layer.wisemem_config[adapter_name].save_pretrained(str(aside))
        (aside / EDITS_FILE).write_text(
            json.dumps(_edits_record(layer, layer_name, adapter_name), indent=1, ensure_ascii=False),
            encoding="utf-8",
        )
        aside.chmod(0o755)
        _replace_folder(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return target


def load_edits(
    model: nn.Module,
    path: str | Path,
    adapter_name: str = "default",
    tok: Any = None,
    hparams: WISEHyperParams | None = None,
) -> WiseLayer:
    """Attach saved edits to a model, in place.

    Args:
        model: the model that the edits were made for, or the same one freshly loaded.
        path: a folder that :func:`save_edits` or PEFT's ``save_pretrained`` wrote.
        adapter_name: the name that the set of edits gets.
        tok: the tokenizer; with it the stream of edits can be continued.
        hparams: settings to continue with; None takes the saved ones.

    Returns:
        The WISE layer.

    Raises:
        AdapterFileError: a file is missing, damaged, or does not fit this model; the model is as before.
    """
    folder = Path(path)
    config, tensors, record = _read_config(folder), _read_tensors(folder), _read_record(folder)
    fresh = not find_wise_layers(model)
    try:
        if config.target_modules and len(config.target_modules) == 1:
            check_layer(model, next(iter(config.target_modules)))
        layer = attach(model, config, adapter_name)
        result = set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)
        expected = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        absent = sorted(set(expected) - {key.removeprefix(_PEFT_PREFIX) for key in tensors})
        if absent or result.unexpected_keys:
            raise AdapterFileError(
                f"{folder / WEIGHTS_FILE} does not hold what {CONFIG_FILE} says: "
                f"{(absent or list(result.unexpected_keys))[0]!r} does not match. Take both files from the same save."
            )
    except (ValueError, RuntimeError) as error:
        if fresh:
            detach(model)
        if isinstance(error, AdapterFileError):
            raise
        raise AdapterFileError(f"the edits in {folder} do not fit this model: {error}") from error
    layer.set_adapter(adapter_name, inference_mode=True)
    if tok is not None:
        _continue_stream(model, tok, hparams, layer, adapter_name, record)
    return layer


def _edits_record(layer: WiseLayer, layer_name: str, adapter_name: str) -> dict[str, Any]:
    stream = layer.edit_stream
    held = stream.held if isinstance(stream, EditStream) else []
    return {
        "format_version": FORMAT_VERSION,
        "method": "WISE",
        "layer": layer_name,
        "memories": [
            {"stage": memory.stage, "edits": memory.n_edits, "epsilon": memory.epsilon}
            for memory in layer.memories(adapter_name)
        ],
        "edits": [
            {
                "prompt": edit.request.prompt,
                "target_new": edit.request.target,
                "subject": edit.request.subject,
                "loc_prompt": edit.request.loc_prompt,
                "memory": edit.memory,
            }
            for edit in held
        ],
        "settings": stream.hparams.to_dict() if isinstance(stream, EditStream) else None,
    }


def _continue_stream(
    model: nn.Module,
    tok: Any,
    hparams: WISEHyperParams | None,
    layer: WiseLayer,
    adapter_name: str,
    record: Mapping[str, Any],
) -> None:
    settings = hparams
    if settings is None:
        if not record.get("settings"):
            return  # saved by PEFT alone: the edits answer, and a first call with settings opens a new stream
        settings = WISEHyperParams.from_dict(record["settings"])
    stream = EditStream(model, tok, settings, layer, adapter_name)
    stream.held = [HeldEdit(EditRequest.from_easyedit(edit), int(edit["memory"])) for edit in record.get("edits", [])]
    layer.edit_stream = stream


def _only_layer(model: nn.Module) -> tuple[str, WiseLayer]:
    layers = find_wise_layers(model)
    if not layers:
        raise ValueError("this model carries no edits: edit it first, then save.")
    return next(iter(layers.items()))


def _read_config(folder: Path) -> WiseConfig:
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


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterFileError(f"{path} does not exist: name a folder that edits were saved into.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(
            f"{path} is damaged ({error}): take it from a backup or save the edits again."
        ) from error


def _read_record(folder: Path) -> Mapping[str, Any]:
    """The list of edits; a folder that PEFT's own ``save_pretrained`` wrote has none."""
    path = folder / EDITS_FILE
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = int(record.get("format_version", 0))
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise AdapterFileError(
            f"{path} is damaged ({error}): take it from a backup or save the edits again."
        ) from error
    if version > FORMAT_VERSION:
        raise AdapterFileError(
            f"{path} has format {version}, and this version reads up to {FORMAT_VERSION}: update easyedit_wise."
        )
    return dict(record)


def _replace_folder(new: Path, target: Path) -> None:
    if not target.exists():
        os.replace(new, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    os.replace(target, old / "old")
    try:
        os.replace(new, target)
    except OSError:
        os.replace(old / "old", target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
