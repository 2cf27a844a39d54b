"""``easyedit-wise evaluate``: runs of the lifelong protocol, one result file each.

Every run has a fresh model. Its file's name carries a digest of all that decides its outcome, so a run whose file is
there is read back instead of being computed again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from tqdm.auto import tqdm

from .data import demo_facts
from .easyedit.algorithms import make_editor, settings_of
from .evaluation.datasets import EditSet, interleaved, read_dataset, select, without_long_ones
from .evaluation.final import Baseline, collect_baseline
from .evaluation.lifelong import Checkpoint, default_checkpoints, run_stream, stops_of
from .evaluation.metrics import Query
from .evaluation.scores import summarise
from .evaluation.smollm2 import smollm2_checkpoint
from .machine import machine_info
from .reports.lifelong import lifelong_tables, plot_retention

PROTOCOL = "final model on all edits so far; teacher-forced, and greedy generation; version 1"
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
        again: compute also what has a result file.
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
    unrelated: Path | None = None
    stats_text: Path | None = None
    dtype: str = "float32"
    device: str = "cpu"
    batch_size: int = 32
    max_new_tokens: int = 12
    threads: int | None = None


@dataclass(frozen=True)
class Stream:
    """One stream of edits of a run.

    Attributes:
        name: the data set's, or ``mixed``.
        edits: what is edited.
        data: the files, for the result.
    """

    name: str
    edits: EditSet = field(repr=False)
    data: list[dict[str, Any]]


def run_evaluate(options: EvaluateOptions) -> list[dict[str, Any]]:
    """Run every algorithm on every stream and seed, print the tables, and write the results and a plot.

    Returns:
        What the result files hold, in the order of the runs.

    Raises:
        ValueError: files, records, settings or numbers that do not fit.
        OSError: a file cannot be read or written.
        ImportError: an algorithm's EasyEdit is not there.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    machine = machine_info()  # now: files may change while a long series runs
    loader = _Models(options)
    configs = {alg: _config(alg, options) for alg in options.algs}
    results = []
    for seed in options.seeds:
        for stream in _streams(options, loader, seed):
            baseline: Baseline | None = None
            for alg, config in configs.items():
                settings = _settings(options, alg, config, stream, seed)
                path = options.out / _file_name(settings, stream)
                if path.is_file() and not options.again:
                    console.print(f"{alg} on {stream.name}, seed {seed}: read from {path}", highlight=False)
                    results.append(json.loads(path.read_text(encoding="utf-8")))
                    continue
                console.rule(f"{alg} on {stream.name}, {len(stream.edits.records)} edits, seed {seed}")
                if baseline is None:
                    baseline = collect_baseline(
                        loader.fresh(), loader.tok, stream.edits.records, options.max_new_tokens, options.batch_size
                    )
                results.append(_run(options, loader, alg, stream, seed, settings, baseline) | {"machine": machine})
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(results[-1], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                console.print(f"Result: {path}", highlight=False)
    for table in lifelong_tables(results):
        console.print(table)
    _plots(results, options.out, console)
    return results


class _Models:
    """Loads the model, fresh for each run, and keeps its tokenizer."""

    def __init__(self, options: EvaluateOptions) -> None:
        self._options = options

    @cached_property
    def path(self) -> str:
        return self._options.model or str(smollm2_checkpoint())

    @cached_property
    def tok(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path)

    def fresh(self) -> Any:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        dtype = getattr(torch, self._options.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype is {self._options.dtype!r}: name one of torch's, such as float32 or bfloat16.")
        logging.disable_progress_bar()
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype).to(self._options.device).eval()


def _run(
    options: EvaluateOptions,
    loader: _Models,
    alg: str,
    stream: Stream,
    seed: int,
    settings: dict[str, Any],
    baseline: Baseline,
) -> dict[str, Any]:
    texts = _texts(options.stats_text) if options.stats_text else None
    config = settings["hparams"]
    editor, effective = make_editor(alg, loader.fresh(), loader.tok, config, seed, texts)
    n = len(stream.edits.records)
    with tqdm(total=n, desc=alg, unit="edit") as bar:

        def scored(checkpoint: Checkpoint) -> None:
            first = next(iter(checkpoint.scores.values()))
            bar.set_postfix(T=checkpoint.edits, rel=f"{first.reliability:.2f}")

        checkpoints = run_stream(
            editor,
            loader.tok,
            stream.edits,
            baseline,
            settings["checkpoints"],
            options.batch_size,
            on_edit=lambda: _advance(bar),
            on_checkpoint=scored,
        )
    return {
        "protocol": PROTOCOL,
        "stream": stream.name,
        "settings": settings,
        "effective_hparams": effective,
        "scored": {"one_prompt_at_a_time": editor.one_by_one, "generation_with_a_cache": editor.use_cache},
        "irrelevant_prompts_from_data": sum("loc_prompt" in request for request in stream.edits.requests),
        "before": _before(baseline),
        "checkpoints": [one.to_dict(rows=one is checkpoints[-1]) for one in checkpoints],
    }


def _advance(bar: Any) -> None:
    bar.update()


def _before(baseline: Baseline) -> dict[str, Any]:
    """The unedited model's scores by data set, without rows."""
    sources = dict.fromkeys(row.source for row in baseline.scores.rows)
    scores = {
        source: summarise([row for row in baseline.scores.rows if row.source == source]).to_dict() for source in sources
    }
    return {source: {key: value for key, value in one.items() if key != "rows"} for source, one in scores.items()}


def _streams(options: EvaluateOptions, loader: _Models, seed: int) -> list[Stream]:
    """The stream of all files, and with ``separately`` each file's part of it alone."""
    if not options.data:
        raise ValueError("there are no data: name at least one file with --data.")
    counts = list(options.edits) * (len(options.data) if len(options.edits) == 1 else 1)
    if len(counts) != len(options.data):
        raise ValueError(
            f"--edits is given {len(options.edits)} times for {len(options.data)} files: give it once, or once a file."
        )
    far = _far_queries(options.unrelated)
    sets: list[EditSet] = []
    described: list[dict[str, Any]] = []
    for path, count in zip(options.data, counts, strict=True):
        dataset = without_long_ones(read_dataset(path), lambda text: len(loader.tok(text)["input_ids"]))
        sets.append(select(dataset, count, options.start, seed, far))
        described.append({"file": path.name, "format": dataset.format.name, "edits": count, "sha256": _digest_of(path)})
    if len(sets) == 1:
        return [Stream(described[0]["format"], sets[0], described)]
    mixed = interleaved(sets, seed)
    streams = [Stream("mixed", mixed, described)]
    if options.separately:
        for one, own in zip(described, sets, strict=True):
            members = {record.prompt for record in own.records}
            pairs = [
                (record, request)
                for record, request in zip(mixed.records, mixed.requests, strict=True)
                if record.source == one["format"] and record.prompt in members
            ]
            streams.append(Stream(one["format"], EditSet([a for a, _ in pairs], [b for _, b in pairs]), [one]))
    return streams


def _far_queries(path: Path | None) -> list[Query]:
    if path is None:
        return [Query(fact["unrelated"]["prompt"], fact["unrelated"]["answer"]) for fact in demo_facts()]
    queries = [query for one in read_dataset(path).records if (query := one.unrelated)]
    if not queries:
        raise ValueError(f"{path} has near-by locality prompts only: name a file with unrelated ones, such as ZsRE's.")
    return queries


def _config(alg: str, options: EvaluateOptions) -> dict[str, Any]:
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
            found[rest] = yaml.safe_load(value)
    return found


def _settings(
    options: EvaluateOptions, alg: str, config: Mapping[str, Any], stream: Stream, seed: int
) -> dict[str, Any]:
    """All that decides a run's outcome, as plain values."""
    n = len(stream.edits.records)
    wanted = options.checkpoints or default_checkpoints(n)
    if options.separately:  # the checkpoints are the mixed stream's, of which this may be a part
        wanted = [stop for stop in wanted if stop <= n]
    stops = stops_of(wanted, n)
    return {
        "alg": alg,
        "hparams": dict(config),
        "model": options.model or "SmolLM2-135M-Instruct",
        "dtype": options.dtype,
        "device": torch.device(options.device).type,
        "data": stream.data,
        "requests": _digest(json.dumps(stream.edits.requests)),
        "seed": seed,
        "start": options.start,
        "checkpoints": stops,
        "max_new_tokens": options.max_new_tokens,
        "unrelated": options.unrelated.name if options.unrelated else "demo facts",
        "stats_text": _digest_of(options.stats_text) if options.stats_text else None,
    }


def _file_name(settings: Mapping[str, Any], stream: Stream) -> str:
    digest = _digest(json.dumps([PROTOCOL, settings], sort_keys=True, default=str))
    return f"{settings['alg']}-{stream.name}-T{len(stream.edits.records)}-s{settings['seed']}-{digest[:8]}.json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _texts(path: Path) -> list[str]:
    """Paragraphs of a text file, or prompts with targets of a data file."""
    if path.suffix == ".json":
        return [f"{one.prompt} {one.target}" for one in read_dataset(path).records]
    return [part for part in path.read_text(encoding="utf-8").split("\n\n") if part.strip()]


def _plots(results: Sequence[Mapping[str, Any]], out: Path, console: Console) -> None:
    """Retention by age, for each score that a run has."""
    series = {}
    for one in results:
        name = f"{one['settings']['alg']}, {one['stream']}, seed {one['settings']['seed']}"
        series[name] = one["checkpoints"][-1]["retention"]
    for score in ("reliability", "edit_exact"):
        if any(bin_[score] is not None for bins in series.values() for bin_ in bins):
            try:
                path = plot_retention(series, out / f"retention-{score}.png", score)
            except ImportError as missing:
                console.print(str(missing), highlight=False)
                return
            console.print(f"Plot: {path}", highlight=False)
