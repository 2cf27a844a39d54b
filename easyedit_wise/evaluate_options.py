"""What ``easyedit-wise evaluate`` is asked to run: its options, and each algorithm's settings among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .easyedit.algorithms import settings_of

DEFAULT_HPARAMS = "smollm2-135m"


@dataclass(frozen=True)
class EvaluateOptions:
    """What to run.

    Attributes:
        data: files in EasyEdit's formats; several make one mixed stream.
        edits: how many of each file, or one number for all of them.
        algs: algorithms by name.
        out: folder of the result files.
        model: a causal language model; None takes SmolLM2-135M-Instruct.
        hparams: settings of all algorithms, or ``ALG=settings`` for one.
        changes: ``KEY=VALUE`` for all algorithms, or ``ALG.KEY=VALUE`` for one.
        seeds: 0 takes the file's order; others a random sample each.
        start: the first record, with seed 0.
        checkpoints: after how many edits to score; empty: 1, 10, 100, ... and the last.
        separately: of a mixed stream, also each file's edits in a stream of their own.
        again: compute also what has a result file, from the first edit on.
        journal: keep each WISE edit until the run has its result, so that it goes on after a stop.
        unrelated: a data file whose locality prompts serve as far prompts for records without; None: the demo's.
        stats_text: a text, or a data file, for MEMIT's covariances.
        dtype: of the model's weights.
        device: where the model runs.
        batch_size: prompts a forward in scoring.
        max_new_tokens: of a greedy answer.
        threads: of torch; None leaves them.
    """

    data: Sequence[Path]
    edits: Sequence[int]
    algs: Sequence[str] = ("WISE",)
    out: Path = Path("runs/evaluate")
    model: str | None = None
    hparams: Sequence[str] = ()
    changes: Sequence[str] = ()
    seeds: Sequence[int] = (0,)
    start: int = 0
    checkpoints: Sequence[int] = ()
    separately: bool = False
    again: bool = False
    journal: bool = True
    unrelated: Path | None = None
    stats_text: Path | None = None
    dtype: str = "float32"
    device: str = "cpu"
    batch_size: int = 32
    max_new_tokens: int = 12
    threads: int | None = None


def config_of(alg: str, options: EvaluateOptions) -> dict[str, Any]:
    """An algorithm's settings: the file's, with the changes that concern it."""
    chosen = DEFAULT_HPARAMS
    for one in options.hparams:
        name, separator, value = one.partition("=")
        if not separator:
            chosen = one
    for one in options.hparams:
        name, separator, value = one.partition("=")
        if separator and name == alg:
            chosen = value
    return settings_of(alg, chosen, changes_of(alg, options.changes, options.algs))


def changes_of(alg: str, changes: Iterable[str], algs: Sequence[str]) -> dict[str, Any]:
    """Those of ``KEY=VALUE`` and ``ALG.KEY=VALUE`` that concern one algorithm; values are read as YAML.

    Raises:
        ValueError: not of that form, or for an algorithm that is not run.
    """
    found: dict[str, Any] = {}
    for change in changes:
        key, separator, value = change.partition("=")
        name, dot, rest = key.rpartition(".")
        if not separator or not rest or (dot and name not in algs):
            raise ValueError(
                f"{change!r} changes no setting: write KEY=VALUE, or ALG.KEY=VALUE for one of {', '.join(algs)}."
            )
        if not dot or name == alg:
            found[rest] = value_of(value)
    return found


def value_of(text: str) -> Any:
    """A setting's value, written as in a YAML file; in a list also names with brackets, which YAML wants quoted.

    Raises:
        ValueError: it is no value; the message says what is.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        items = _list_items(text.strip())
        if items is None:
            raise ValueError(
                f"{text!r} is no value of a setting ({' '.join(str(error).split())}): write a number, a text, or a "
                "list such as [model.layers[24].mlp.down_proj.weight]; what has : or # in it in quotes."
            ) from error
        return [value_of(item) for item in items]


def _list_items(text: str) -> list[str] | None:
    """What stands between the commas of ``[a[0].b, c]``; None for what is no list, or whose brackets do not match."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    items, depth = [""], 0
    for char in text[1:-1]:
        depth += (char == "[") - (char == "]")
        if depth < 0:
            return None
        if char == "," and depth == 0:
            items.append("")
        else:
            items[-1] += char
    items = [item.strip() for item in items]
    return items if depth == 0 and all(items) else None
