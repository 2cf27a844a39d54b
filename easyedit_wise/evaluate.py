"""``easyedit-wise evaluate``: runs of the lifelong protocol, one result file each.

Every run has a fresh model. Its file's name carries a digest of all that decides its outcome, so a run whose file is
there is read back instead of being computed again. While a run is under way, the checkpoints that it has reached stand
in a file of the same name that ends in ``.unfinished``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm.auto import tqdm

from .easyedit.algorithms import make_editor
from .evaluate_options import EvaluateOptions, config_of
from .evaluate_streams import PROTOCOL, Stream, file_name, run_settings, streams_of
from .evaluation.datasets import read_dataset
from .evaluation.final import Baseline, collect_baseline
from .evaluation.lifelong import Checkpoint, run_stream
from .evaluation.scores import summarise
from .evaluation.smollm2 import smollm2_checkpoint
from .machine import machine_info
from .reports.lifelong import lifelong_tables, plot_retention


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
    configs = {alg: config_of(alg, options) for alg in options.algs}
    results = []
    for seed in options.seeds:
        for stream in streams_of(options, loader.n_tokens, seed):
            baseline: Baseline | None = None
            for alg, config in configs.items():
                settings = run_settings(options, alg, config, stream, seed)
                path = options.out / file_name(settings, stream)
                if path.is_file() and not options.again:
                    console.print(f"{alg} on {stream.name}, seed {seed}: read from {path}", highlight=False)
                    results.append(json.loads(path.read_text(encoding="utf-8")))
                    continue
                console.rule(f"{alg} on {stream.name}, {len(stream.edits.records)} edits, seed {seed}")
                if baseline is None:
                    console.print("Asking the unedited model ...", highlight=False)
                    baseline = collect_baseline(
                        loader.fresh(), loader.tok, stream.edits.records, options.max_new_tokens, options.batch_size
                    )
                path.parent.mkdir(parents=True, exist_ok=True)
                unfinished = path.with_suffix(".unfinished")

                def save_unfinished(result: dict[str, Any], to: Path = unfinished) -> None:
                    _write(result | {"machine": machine}, to)

                result = _run(options, loader, alg, stream, seed, settings, baseline, save_unfinished)
                results.append(result | {"machine": machine})
                _write(results[-1], unfinished)
                unfinished.replace(path)
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

    def n_tokens(self, text: str) -> int:
        return len(self.tok(text)["input_ids"])

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
    on_checkpoint: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """One run; ``on_checkpoint`` is given the result as far as it is, at each checkpoint before the last."""
    texts = _texts(options.stats_text) if options.stats_text else None
    config = settings["hparams"]
    editor, effective = make_editor(alg, loader.fresh(), loader.tok, config, seed, texts)
    n = len(stream.edits.records)
    reached: list[Checkpoint] = []

    def result() -> dict[str, Any]:
        return {
            "protocol": PROTOCOL,
            "stream": stream.name,
            "settings": settings,
            "effective_hparams": effective,
            "scored": {"one_prompt_at_a_time": editor.one_by_one, "generation_with_a_cache": editor.use_cache},
            "irrelevant_prompts_from_data": sum("loc_prompt" in request for request in stream.edits.requests),
            "before": _before(baseline),
            "checkpoints": [one.to_dict(rows=one is reached[-1]) for one in reached],
        }

    with tqdm(total=n, desc=alg, unit="edit") as bar:

        def scored(checkpoint: Checkpoint) -> None:
            first = next(iter(checkpoint.scores.values()))
            bar.set_postfix(T=checkpoint.edits, rel=f"{first.reliability:.2f}")
            reached.append(checkpoint)
            if checkpoint.edits < n:
                on_checkpoint(result())

        run_stream(
            editor,
            loader.tok,
            stream.edits,
            baseline,
            settings["checkpoints"],
            options.batch_size,
            on_edit=lambda: _advance(bar),
            on_checkpoint=scored,
        )
    return result()


def _advance(bar: Any) -> None:
    bar.update()


def _before(baseline: Baseline) -> dict[str, Any]:
    """The unedited model's scores by data set, without rows."""
    sources = dict.fromkeys(row.source for row in baseline.scores.rows)
    scores = {
        source: summarise([row for row in baseline.scores.rows if row.source == source]).to_dict() for source in sources
    }
    return {source: {key: value for key, value in one.items() if key != "rows"} for source, one in scores.items()}


def _write(result: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
