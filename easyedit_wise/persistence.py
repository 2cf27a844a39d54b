"""Edits as a small folder: PEFT's adapter files, and a list of what was edited.

The folder is a plain PEFT adapter, so ``PeftModel.from_pretrained`` loads it, too. Tensors are
safetensors and everything else is JSON: nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from .adapter_digests import sealed
from .adapter_files import EditsRecord, check_numbers, encoded, read_folder, write_tensors
from .adapter_format import (
    CARD_FILE,
    CONFIG_FILE,
    EDITS_FILE,
    FORMAT_VERSION,
    OUR_FILES,
    UNREADABLE,
    WEIGHTS_FILE,
    AdapterFileError,
    quoted,
)
from .editing.stream import EditStream
from .folders import replace_folder, sync
from .hparams import WISEHyperParams
from .journal.database import JOURNAL_FILE
from .journal.journal import Journal
from .journal.restoring import attached
from .model_card import model_card
from .tuner.adapter_tensors import shapes_in, unpacked
from .tuner.attach import attach
from .tuner.config import WiseConfig
from .tuner.layer import WiseLayer
from .tuner.model import find_wise_layers
from .tuner.packing import PackingError
from .tuner.replacing import all_or_nothing
from .undisturbed import undisturbed

# PEFT's checkpoints name modules as seen from the wrapping PeftModel.
_PEFT_PREFIX = "base_model.model."
# What EasyEdit's own WISE saves, by the name that its settings have for it.
_OF_EASYEDIT = "wise.pt"


@undisturbed
def save_edits(
    model: nn.Module,
    path: str | Path,
    adapter_name: str = "default",
    scores: Mapping[str, Any] | None = None,
    save_dtype: str | None = None,
) -> Path:
    """Write a model's edits into the folder ``path``; edits that were saved there before are replaced as a whole.

    Args:
        model: a model that was edited in place.
        path: the folder.
        adapter_name: which set of edits.
        scores: results to be shown in the model card, by name: numbers or texts.
        save_dtype: what dW is rounded to in the files: "float32", which keeps every bit, "bfloat16" or "float16"; None:
            what the adapter's configuration says. The model's memories stay as they are.

    Returns:
        The folder.

    Raises:
        ValueError: the model carries no edits of that name, ``path`` cannot be saved to (a file, or it holds other
            files), a score is neither a number nor a text, or an entry of dW is too large for ``save_dtype``.
    """
    layer_name, layer = _only_layer(model)
    if adapter_name not in layer.wisemem_config:
        raise ValueError(
            f"this model has no set of edits called {adapter_name!r}: it has {', '.join(layer.wisemem_config)}."
        )
    target = check_save_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _rounded_to(layer.wisemem_config[adapter_name], save_dtype):
        _write(model, target, layer_name, layer, adapter_name, scores)
    return Path(path).expanduser()


def check_save_path(path: str | Path) -> Path:
    """Whether edits can be saved there, to be asked before they are made. Nothing that is written stays.

    Returns:
        The path in full.

    Raises:
        ValueError: it is a file, holds other files than saved edits, or lies where no folder can be made.
    """
    target = Path(path).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: edits are saved as a folder, so name another path.")
    foreign = sorted({entry.name for entry in target.iterdir()} - OUR_FILES) if target.exists() else []
    if foreign:
        raise ValueError(
            f"{target} holds {foreign[0]!r}, which is not part of saved edits, and a folder is replaced as a whole: "
            "name one of its own for the edits."
        )
    # Written beside it and moved into place. Tried, since permissions do not tell all, to root least.
    above = next(folder for folder in target.parents if folder.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{target.name}-", dir=above))
    except OSError as error:
        why = f"cannot be written to ({error.strerror})" if above.is_dir() else "is a file"
        raise ValueError(f"edits cannot be saved in {target}, since {above} {why}: name another path.") from error
    return target


@contextmanager
def _rounded_to(config: WiseConfig, save_dtype: str | None) -> Iterator[None]:
    """The configuration with another ``save_dtype``, for the time of one save."""
    kept = config.save_dtype
    config.save_dtype = save_dtype or kept
    try:
        yield
    finally:
        config.save_dtype = kept


def _write(
    model: nn.Module,
    target: Path,
    layer_name: str,
    layer: WiseLayer,
    adapter_name: str,
    scores: Mapping[str, Any] | None,
) -> None:
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors = {
        _PEFT_PREFIX + key.removeprefix(_PEFT_PREFIX): value.detach().cpu().contiguous() for key, value in state.items()
    }
    # Written aside and moved into place, so that a crash leaves the old folder or the new one.
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write_tensors(tensors, aside / WEIGHTS_FILE)
        layer.wisemem_config[adapter_name].save_pretrained(str(aside))
        record = sealed(_edits_record(layer, layer_name, adapter_name), aside)
        (aside / EDITS_FILE).write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
        (aside / CARD_FILE).write_text(model_card(layer_name, layer, adapter_name, scores), encoding="utf-8")
        # safetensors lets nobody but the owner read what it writes, and a folder of edits is to be passed on.
        (aside / WEIGHTS_FILE).chmod((aside / CONFIG_FILE).stat().st_mode & 0o777)
        aside.chmod(0o755)
        sync(aside)
        replace_folder(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@undisturbed
def load_edits(
    model: nn.Module,
    path: str | Path,
    adapter_name: str = "default",
    tok: Any = None,
    hparams: WISEHyperParams | None = None,
    any_base: bool = False,
) -> WiseLayer:
    """Attach saved edits to a model, in place; edits of the same name that it carries are replaced.

    Args:
        model: the model that the edits were made for, or the same one freshly loaded.
        path: a folder that :func:`save_edits` or PEFT's ``save_pretrained`` wrote, or a journal's. To go on with a
            journal's edits and keep them there, name it in the settings, or ``resume`` it.
        adapter_name: the name that the set of edits gets.
        tok: the tokenizer, to continue the stream of edits with; ``apply_wise_to_model`` brings its own.
        hparams: settings to continue with; None takes the saved ones.
        any_base: load them although the layer's weight is not the one that they were made beside. It has to have the
            same size. What they say there is not tested by anybody.

    Returns:
        The WISE layer.

    Raises:
        AdapterFileError: a file is missing, damaged, or does not fit this model; the model is as before.
        JournalError: likewise, for a journal.
    """
    folder = Path(path).expanduser()
    if folder.is_file() or ((folder / _OF_EASYEDIT).is_file() and not (folder / CONFIG_FILE).is_file()):
        what = (
            "is a file, and saved edits are a folder" if folder.is_file() else f"holds {_OF_EASYEDIT}, no saved edits"
        )
        raise AdapterFileError(
            f"{folder} {what}. Files such as {_OF_EASYEDIT} are what EasyEdit's own WISE "
            "saves; they hold pickled objects, which are not loaded here. Make those edits again, or load the file "
            "with EasyEdit's own WISE (after easyedit_wise.unregister())."
        )
    if (folder / JOURNAL_FILE).is_file():
        return _load_journal(model, folder, adapter_name, tok, hparams, any_base)
    saved = read_folder(folder)
    config, record = saved.config, saved.record
    if any_base:
        config.base_fingerprint = None
    with all_or_nothing(model, adapter_name):
        try:
            layer = attach(model, config, adapter_name)
            tensors = unpacked(saved.tensors, shapes_in(find_wise_layers(model)))
            _check_tensors(model, tensors, adapter_name, folder)
            set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)
        except AdapterFileError:
            raise
        except PackingError as error:
            raise AdapterFileError(f"{folder / WEIGHTS_FILE} does not fit or is damaged: {error}") from error
        except UNREADABLE as error:
            raise _misfit(folder, config, str(error)) from error
        layer.edit_stream = _continued_stream(model, tok, hparams or record.settings, layer, adapter_name, record)
    return layer


def _load_journal(
    model: nn.Module, folder: Path, adapter_name: str, tok: Any, hparams: WISEHyperParams | None, any_base: bool
) -> WiseLayer:
    with Journal(folder) as journal, all_or_nothing(model, adapter_name):
        try:
            stream = attached(model, tok, journal, adapter_name, any_base)
        except ValueError as error:
            raise AdapterFileError(f"the edits in {folder} do not fit this model: {error}") from error
    stream.use(tok, hparams or stream.hparams)
    return stream.layer


def _edits_record(layer: WiseLayer, layer_name: str, adapter_name: str) -> dict[str, Any]:
    stream = layer.edit_streams.get(adapter_name)
    if not isinstance(stream, EditStream):
        stream = None
    return {
        "format_version": FORMAT_VERSION,
        "method": "WISE",
        "layer": layer_name.removeprefix(_PEFT_PREFIX),
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
                "target_separator": edit.request.separator,
                "memory": edit.memory,
            }
            for edit in (stream.held if stream else [])
        ],
        "settings": stream.hparams.to_dict() if stream else None,
        # Without it the next shard would get the first one's mask again.
        "generator": encoded(stream.snapshot().generator_state) if stream else None,
    }


def _check_tensors(model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str, folder: Path) -> None:
    """Every tensor that the freshly attached adapter has, in its shape and kind of numbers, and no other."""
    # Without data, since only names and shapes are asked for: nothing is packed then.
    shapes = {
        key: value.to("meta") if type(value) in (Tensor, nn.Parameter) else value
        for key, value in model.state_dict().items()
    }
    state = get_peft_model_state_dict(model, state_dict=shapes, adapter_name=adapter_name, save_embedding_layers=False)
    expected = {key.removeprefix(_PEFT_PREFIX): tuple(value.shape) for key, value in state.items()}
    given = {key.removeprefix(_PEFT_PREFIX): value for key, value in tensors.items()}
    unmatched = sorted(expected.keys() ^ given.keys())
    if unmatched:
        raise AdapterFileError(
            f"{folder / WEIGHTS_FILE} does not hold what {CONFIG_FILE} says: {unmatched[0]!r} is in one of them only. "
            "Take both files from the same save."
        )
    for key, shape in expected.items():
        if tuple(given[key].shape) != shape:
            raise ValueError(f"{key} has the shape {tuple(given[key].shape)}, and this model needs {shape}.")
        check_numbers(key, given[key], folder / WEIGHTS_FILE)


def _misfit(folder: Path, config: WiseConfig, why: str) -> AdapterFileError:
    name = config.base_model_name_or_path
    return AdapterFileError(
        f"the edits in {folder} do not fit this model: {quoted(why, 1000)} Load them onto the model that they were "
        f"made for{f', {quoted(name, 200)}' if name else ''}."
    )


def _continued_stream(
    model: nn.Module,
    tok: Any,
    settings: WISEHyperParams | None,
    layer: WiseLayer,
    adapter_name: str,
    record: EditsRecord,
) -> EditStream | None:
    """The stream with its edits and its place in the random numbers; None if there are no settings for one."""
    if settings is None:
        return None
    stream = EditStream(model, tok, settings, layer, adapter_name)
    fresh = stream.snapshot()
    state = fresh.generator_state if record.generator_state is None else record.generator_state
    stream.restore(replace(fresh, held=record.held, generator_state=state))
    return stream


def _only_layer(model: nn.Module) -> tuple[str, WiseLayer]:
    layers = find_wise_layers(model)
    if not layers:
        raise ValueError("this model carries no edits: edit it first, then save.")
    return next(iter(layers.items()))
