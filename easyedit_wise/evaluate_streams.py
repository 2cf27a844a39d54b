"""The streams of edits of an evaluation, read from data files, and the settings that decide a run's outcome."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .data import demo_facts
from .evaluate_options import EvaluateOptions
from .evaluation.asking import Query
from .evaluation.datasets import EditSet, interleaved, read_dataset, select, without_long_ones
from .evaluation.lifelong import default_checkpoints, stops_of

PROTOCOL = "final model on all edits so far; teacher-forced, and greedy generation; version 1"


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


def streams_of(options: EvaluateOptions, n_tokens: Callable[[str], int], seed: int) -> list[Stream]:
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
        dataset = without_long_ones(read_dataset(path), n_tokens)
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


def run_settings(
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


def file_name(settings: Mapping[str, Any], stream: Stream) -> str:
    digest = _digest(json.dumps([PROTOCOL, settings], sort_keys=True, default=str))
    return f"{settings['alg']}-{stream.name}-T{len(stream.edits.records)}-s{settings['seed']}-{digest[:8]}.json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
