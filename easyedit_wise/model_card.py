"""The README.md beside an adapter: what was edited, how it routes, how to load it and take it off again."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from .adapter_format import CARD_FILE
from .editing.stream import EditStream, HeldEdit
from .hparams import WISEHyperParams
from .identity import DISTRIBUTIONS, HOW_TO_GET_IT
from .tuner.config import WiseConfig
from .tuner.layer import WiseLayer, find_wise_layers

N_SHOWN = 50
_LONGEST_CELL = 200
_TAGS = ("wise", "model-editing", "knowledge-editing", "easyedit")
_PACKAGES = (*DISTRIBUTIONS, "peft", "transformers", "torch", "safetensors")
_JOINERS = "\u200c\u200d"  # format characters that words in several scripts need
# What Markdown or HTML could read as more than a character.
_SPECIAL = {character: f"&#{ord(character)};" for character in "&<>|\\`*_[]~$"}


def write_model_card(
    model: nn.Module, path: str | Path, adapter_name: str = "default", scores: Mapping[str, Any] | None = None
) -> Path:
    """Write the README.md of an adapter into the folder ``path``, in place of one that is there.

    ``save_edits`` writes one itself; this is for a folder that PEFT's ``save_pretrained`` wrote.

    Args:
        model: a model that carries edits.
        path: the adapter's folder.
        adapter_name: which set of edits.
        scores: named results to be shown, such as ``{"reliability": 0.98}``: numbers or short texts.

    Returns:
        The file.

    Raises:
        ValueError: the model has no edits of that name, there is no such folder, or a score is neither number nor text.
    """
    layers = {name: layer for name, layer in find_wise_layers(model).items() if adapter_name in layer.wisemem_config}
    if not layers:
        raise ValueError(f"this model has no set of edits called {adapter_name!r}: edit it first, or name another one.")
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name the one that the adapter was saved into.")
    name, layer = next(iter(layers.items()))
    file = folder / CARD_FILE
    file.write_text(model_card(name, layer, adapter_name, scores), encoding="utf-8")
    return file


def model_card(
    layer_name: str, layer: WiseLayer, adapter_name: str = "default", scores: Mapping[str, Any] | None = None
) -> str:
    """The text of the card.

    Args:
        layer_name: the edited layer's name in the model.
        layer: the layer.
        adapter_name: which set of edits.
        scores: as in :func:`write_model_card`.

    Raises:
        ValueError: a score is neither a finite number nor a text.
    """
    config = layer.wisemem_config[adapter_name]
    base = config.base_model_name_or_path or None
    stream = layer.edit_streams.get(adapter_name)
    if not isinstance(stream, EditStream) or stream.adapter_name != adapter_name:
        stream = None
    parts = [
        _header(base, config),
        f"# Edits of {plain(base)}" if base else "# Edits",
        _introduction(layer_name, layer, config),
        *_edits(stream.held if stream is not None else ()),
        *_memories(layer, adapter_name),
        *_scores(scores or {}),
        _use(base),
        *_settings(stream.hparams if stream is not None else None),
        "## Versions",
        ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
    ]
    return "\n\n".join(parts) + "\n"


def plain(text: Any) -> str:
    """A text that Markdown shows as it is, in one line of at most 200 characters.

    Line ends become a mark, characters that steer the display (direction, control) are left out, and everything that
    could end a cell, open a tag or begin a link is written as a number.
    """
    shown = []
    for character in " ⏎ ".join(str(text).splitlines()):
        kind = unicodedata.category(character)
        if kind == "Cs":  # half of a pair, which no file can hold
            shown.append("�")
        elif kind in ("Zl", "Zp", "Zs"):
            shown.append(" ")
        elif kind not in ("Cc", "Cf") or character in _JOINERS:
            shown.append(character)
    if len(shown) > _LONGEST_CELL:
        shown = [*shown[: _LONGEST_CELL - 1], "…"]
    return "".join(_SPECIAL.get(character, character) for character in shown).strip()


def _header(base: str | None, config: WiseConfig) -> str:
    # JSON strings are YAML's, too, and whatever they hold stays on their line.
    lines = ["---"]
    if base:
        lines.append(f"base_model: {json.dumps(base)}")
    lines.append("library_name: peft")
    if config.task_type is not None and getattr(config.task_type, "value", config.task_type) == "CAUSAL_LM":
        lines.append("pipeline_tag: text-generation")
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in _TAGS), "---"])


def _introduction(layer_name: str, layer: WiseLayer, config: WiseConfig) -> str:
    return (
        f"Facts edited into a language model by [WISE](https://arxiv.org/abs/2405.14768): side memories beside the "
        f"layer {plain(layer_name.removeprefix('base_model.model.'))} ({layer.out_features} x {layer.in_features}), "
        "of which a router picks one for prompts that it was edited for. All other prompts are answered by the base "
        f"model, bit for bit. In these files the memories are {plain(config.save_dtype)}."
    )


def _edits(held: Sequence[HeldEdit]) -> Iterable[str]:
    yield "## Edits"
    if not held:
        yield "The list of edits was not kept with this adapter."
        return
    count = "1 edit" if len(held) == 1 else f"{len(held)} edits"
    yield count + (f", the first {N_SHOWN} of them:" if len(held) > N_SHOWN else ":")
    rows = [(edit.memory, edit.request.prompt, edit.request.target) for edit in held[:N_SHOWN]]
    yield _table(("memory", "prompt", "answer"), rows)


def _memories(layer: WiseLayer, adapter_name: str) -> Iterable[str]:
    yield "## Memories"
    yield "A memory answers a prompt that activates it more than epsilon."
    rows = [
        (index, memory.stage, memory.n_edits, f"{memory.epsilon:.4g}")
        for index, memory in enumerate(layer.memories(adapter_name))
    ]
    yield _table(("memory", "stage", "edits", "epsilon"), rows)


def _scores(scores: Mapping[str, Any]) -> Iterable[str]:
    for name, value in scores.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not isinstance(name, str) or not (number or isinstance(value, str)):
            raise ValueError(f"scores holds {name!r}: {value!r}. Give names with finite numbers or texts.")
    if scores:
        yield "## Scores"
        rows = [(name, f"{value:.4g}" if isinstance(value, float) else value) for name, value in scores.items()]
        yield _table(("", "score"), rows)


def _use(base: str | None) -> str:
    name = json.dumps(base or "the-base-model")
    return f"""## Use

{HOW_TO_GET_IT}, in this folder (`.` is its path):

```python
from transformers import AutoModelForCausalLM
from easyedit_wise import detach, edits_disabled, last_route, load_edits

model = AutoModelForCausalLM.from_pretrained({name})
load_edits(model, ".")
with edits_disabled(model):  # switched off: the base model, for a while
    pass
detach(model)  # taken back: the base model, for good
```

`last_route(model)` says which memory answered the last prompt. With PEFT alone:

```python
import easyedit_wise
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({name}), ".")
with model.disable_adapter():
    pass
base = model.unload()
```"""


def _settings(hparams: WISEHyperParams | None) -> Iterable[str]:
    if hparams is None:
        return
    defaults = WISEHyperParams(inner_params=hparams.inner_params).to_dict()
    rows = [(name, value, defaults[name]) for name, value in hparams.changes().items()]
    yield "## Settings"
    if not rows:
        yield "The defaults."
        return
    yield "What differs from the defaults:"
    yield _table(("setting", "here", "default"), rows)


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [names, ["---"] * len(names), *([plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed as a package)"
