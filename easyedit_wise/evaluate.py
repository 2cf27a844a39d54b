"""``easyedit-wise evaluate``: runs of the lifelong protocol, one result file each.

Every run has a fresh model. Its file's name carries a digest of all that decides its outcome, so a run whose file is
there is read back instead of being computed again. A run of WISE that was stopped goes on from its journal
(:mod:`.evaluate_unfinished`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm.auto import tqdm

from .easyedit.algorithms import WISE, make_editor
from .easyedit.wise_stream import WiseStream
from .evaluate_options import EvaluateOptions, config_of
from .evaluate_streams import PROTOCOL, Stream, file_name, run_settings, streams_of
from .evaluate_unfinished import UnfinishedRun
from .evaluation.datasets import read_dataset
from .evaluation.final import Baseline, collect_baseline
from .evaluation.lifelong import Checkpoint, StreamEditor, run_stream
from .evaluation.scores import summarise
from .evaluation.smollm2 import smollm2_checkpoint
from .machine import machine_info
from .reports.lifelong import lifelong_tables, plot_retention
from .separators import AUTO, joined
from .wording import Wording


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
            # Of each way to ask: a chat's prompts are other texts than plain ones.
            baselines: dict[tuple[bool, str], Baseline] = {}
            for alg, config in configs.items():
                settings = run_settings(options, alg, config, stream, seed)
                path = options.out / file_name(settings, stream)
                if path.is_file() and not options.again:
                    console.print(f"{alg} on {stream.name}, seed {seed}: read from {path}", highlight=False)
                    results.append(json.loads(path.read_text(encoding="utf-8")))
                    continue
                console.rule(f"{alg} on {stream.name}, {len(stream.edits.records)} edits, seed {seed}")
                unfinished = UnfinishedRun(path, alg == WISE and options.journal, options.again)
                wording = _wording(loader.tok, config)
                key = (wording.chat, wording.separator)
                if key not in baselines:
                    console.print("Asking the unedited model ...", highlight=False)
                    baselines[key] = collect_baseline(
                        loader.fresh(), wording, stream.edits.records, options.max_new_tokens, options.batch_size
                    )
                run = _Run(options, alg, stream, settings, baselines[key], unfinished, machine)
                results.append(run(loader.fresh(), loader.tok, console))
                unfinished.finish(results[-1])
                console.print(f"Result: {path}", highlight=False)
    for table in lifelong_tables(results):
        console.print(table)
    _plots(results, options.out, console)
    return results


def _wording(tok: Any, config: Mapping[str, Any]) -> Wording:
    """How a model with these settings is asked: as its edits were trained."""
    return Wording(tok, bool(config.get("use_chat_template")), config.get("target_separator") or AUTO)


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


class _Run:
    """One run: the edits that are left of it are made, and its checkpoints scored."""

    def __init__(
        self,
        options: EvaluateOptions,
        alg: str,
        stream: Stream,
        settings: dict[str, Any],
        baseline: Baseline,
        unfinished: UnfinishedRun,
        machine: dict[str, Any],
    ) -> None:
        self._options, self._alg, self._stream, self._settings = options, alg, stream, settings
        self._baseline, self._unfinished, self._machine = baseline, unfinished, machine
        self._checkpoints = list(unfinished.checkpoints)
        self._resumed_after = list(unfinished.resumed_after)

    def __call__(self, model: Any, tok: Any, console: Console) -> dict[str, Any]:
        """Run it.

        Raises:
            ValueError: settings that do not fit, or files of an unfinished run that do not fit together.
        """
        options, seed, n = self._options, self._settings["seed"], len(self._stream.edits.records)
        texts = _texts(options.stats_text) if options.stats_text else None
        config, journal = self._settings["hparams"], self._unfinished.journal
        editor, effective = make_editor(self._alg, model, tok, config, seed, texts, journal)
        made, seconds = (editor.made, editor.made_seconds) if isinstance(editor, WiseStream) else (0, 0.0)
        if made:
            console.print(f"Going on after {made} edits, which a stopped run had made.", highlight=False)
            self._resumed_after.append(made)
        try:
            with tqdm(total=n, initial=made, desc=self._alg, unit="edit") as bar:

                def scored(checkpoint: Checkpoint) -> None:
                    first = next(iter(checkpoint.scores.values()))
                    bar.set_postfix(T=checkpoint.edits, rel=f"{first.reliability:.2f}")
                    self._reached(checkpoint)
                    if checkpoint.edits < n:
                        self._unfinished.save(self._result(editor, effective))

                run_stream(
                    editor,
                    _wording(tok, config),
                    self._stream.edits,
                    self._baseline,
                    self._settings["checkpoints"],
                    options.batch_size,
                    on_edit=lambda: _advance(bar),
                    on_checkpoint=scored,
                    made=made,
                    made_seconds=seconds,
                    scored=self._unfinished.scored,
                )
            return self._result(editor, effective)
        finally:
            if isinstance(editor, WiseStream):
                editor.close()

    def _reached(self, checkpoint: Checkpoint) -> None:
        """Each edit's own scores are kept of the last checkpoint only."""
        for earlier in self._checkpoints:
            for scores in earlier["scores"].values():
                scores.pop("rows", None)
        self._checkpoints.append(checkpoint.to_dict())

    def _result(self, editor: StreamEditor, effective: dict[str, Any]) -> dict[str, Any]:
        return {
            "protocol": PROTOCOL,
            "stream": self._stream.name,
            "settings": self._settings,
            "effective_hparams": effective,
            "scored": {"one_prompt_at_a_time": editor.one_by_one, "generation_with_a_cache": editor.use_cache},
            "irrelevant_prompts_from_data": sum("loc_prompt" in one for one in self._stream.edits.requests),
            "resumed_after": self._resumed_after,
            "before": _before(self._baseline),
            "checkpoints": self._checkpoints,
            "machine": self._machine,
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


def _texts(path: Path) -> list[str]:
    """Paragraphs of a text file, or prompts with targets of a data file."""
    if path.suffix == ".json":
        return [joined(one.prompt, one.target) for one in read_dataset(path).records]
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
