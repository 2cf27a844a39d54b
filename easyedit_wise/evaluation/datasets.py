"""Readers of EasyEdit's own data files: ZsRE, CounterFact, hallucination (SelfCheckGPT), Temporal, KnowEdit's.

A file is recognised by the fields of its first record. Each reader says which of EasyEdit's fields
becomes which part of a :class:`FactRecord`; everything else about the sets is the same.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from easyedit_wise.evaluation.asking import Query
from easyedit_wise.evaluation.formats import Format
from easyedit_wise.evaluation.knowedit import KnowEdit
from easyedit_wise.evaluation.records import FactRecord
from easyedit_wise.separators import joined

HALLUCINATION_LIMIT = 254
"""Tokens of prompt and target: longer samples are left out of the hallucination set (paper, Appendix A.1)."""

Request = dict[str, str]


_EDIT = ("prompt", "target_new", "subject", ("locality_prompt", "locality_ground_truth"))

# The first whose marks a record has is its format: the last one's are the others' common fields.
FORMATS: Mapping[str, Format] = {
    one.name: one
    for one in (
        Format("zsre", "src", "alt", "subject", ("loc", "loc_ans"), marks=("src", "alt"), rephrasing="rephrase"),
        Format("temporal", *_EDIT, marks=("ood_rephrase",), ood="ood_rephrase", written=False),
        Format("counterfact", *_EDIT, marks=("rephrase_prompt",), rephrasing="rephrase_prompt", nearby=True),
        KnowEdit("knowedit", *_EDIT, marks=("locality",)),
        Format("hallucination", *_EDIT, marks=("prompt", "target_new"), written=False),
    )
}


@dataclass(frozen=True)
class Dataset:
    """All records of one file.

    Attributes:
        format: which of the sets it is.
        path: the file.
        records: in the file's order.
        n_too_long: records that :func:`without_long_ones` left out.
    """

    format: Format
    path: Path
    records: list[FactRecord] = field(repr=False)
    n_too_long: int = 0


@dataclass(frozen=True)
class EditSet:
    """The edits of one stream: what to ask for, and how each is scored.

    Attributes:
        records: what is edited and scored, in the stream's order.
        requests: EasyEdit's request of each record; ``loc_prompt`` is absent where no irrelevant prompt is left.
    """

    records: list[FactRecord]
    requests: list[Request]


def read_dataset(path: Path, name: str | None = None) -> Dataset:
    """Read a file in one of EasyEdit's formats.

    Args:
        path: a JSON list of records.
        name: the format; None recognises it by the fields of the first record.

    Raises:
        ValueError: not JSON, no list, no records, an unknown format, or a record whose field is missing, empty or
            no text: the message names the file, the record and the field.
        OSError: the file cannot be read.
    """
    entries = _entries(path)
    kind = _format(path, entries[0], name)
    return Dataset(kind, path, [kind.record(*one) for one in _described(path, entries, kind)])


def without_long_ones(dataset: Dataset, n_tokens: Callable[[str], int], limit: int = HALLUCINATION_LIMIT) -> Dataset:
    """The hallucination set without samples of which prompt and target have more than ``limit`` tokens.

    The other sets are returned as they are.

    Args:
        dataset: what was read.
        n_tokens: how many tokens a text has.
        limit: how many it may have.
    """
    if dataset.format.name != "hallucination":
        return dataset
    kept = [one for one in dataset.records if n_tokens(joined(one.prompt, one.target)) <= limit]
    return replace(dataset, records=kept, n_too_long=len(dataset.records) - len(kept))


def select(dataset: Dataset, n: int, start: int = 0, seed: int = 0, unrelated: Sequence[Query] = ()) -> EditSet:
    """Choose which records are edited, and an irrelevant prompt for each edit's training.

    Seed 0 takes ``n`` records from ``start`` on in the file's order; any other seed takes a random sample of the
    whole file in a random order.

    The irrelevant prompts (``loc_prompt``) are, as in EasyEdit's ``run_wise_editing.py``, locality prompts with their
    answers: of the train file beside an edit file where there is one, otherwise of this file's records that are not
    evaluated. None is a prompt that an evaluated record is scored with; where none is left, requests have no
    ``loc_prompt``, and the editor's own neutral prompts serve.

    Args:
        dataset: what was read.
        n: how many records.
        start: the first one, with seed 0.
        seed: see above.
        unrelated: far queries for records that have none of their own; used again from the first when there are fewer.

    Raises:
        ValueError: the file has fewer records.
    """
    records = _chosen(dataset, n, start, seed)
    far = itertools.cycle(unrelated) if unrelated else None
    last = records[-1]
    records = [replace(one, unrelated=next(far)) if far and one.unrelated is None else one for one in records]
    scored = {prompt for record in records for prompt in record.scored_prompts()}
    return EditSet(records, requests_of(records, irrelevant_prompts(dataset, last, scored)))


def requests_of(records: Sequence[FactRecord], irrelevant: Sequence[str] = ()) -> list[Request]:
    """EasyEdit's request of each record; irrelevant prompts are used again from the first when there are fewer."""
    requests: list[Request] = [
        {"prompt": one.prompt, "target_new": one.target, "ground_truth": "", "subject": one.subject} for one in records
    ]
    if irrelevant:
        for request, prompt in zip(requests, itertools.cycle(irrelevant), strict=False):
            request["loc_prompt"] = prompt
    return requests


def irrelevant_prompts(dataset: Dataset, last: FactRecord, scored: Iterable[str]) -> list[str]:
    """Locality prompts with their answers, each once: of the train file beside the file, or of the file itself.

    Args:
        dataset: the file that the evaluated records come from.
        last: the last evaluated record; without a train file the records that follow it come first.
        scored: prompts that evaluated records are scored with: none of them occurs.
    """
    train = train_file(dataset.path)
    if train:
        queries = _locality_of(train, dataset.format)
    else:  # begin behind the last evaluated one, so that streams of one file differ
        behind = dataset.records.index(last) + 1
        others = dataset.records[behind:] + dataset.records[:behind]
        queries = [query for one in others for query in one.unchanged()]
    taken = set(scored)
    return list(dict.fromkeys(f"{q.prompt} {q.answer}".rstrip() for q in queries if q.prompt not in taken))


def train_file(path: Path) -> Path | None:
    """The train file beside an edit or test file: ``temporal-train.json`` beside ``temporal-edit.json``; or None."""
    if path.stem.endswith(("-edit", "_edit", "-test", "_test")):
        train = path.with_name(f"{path.stem[: -len('edit')]}train{path.suffix}")
        return train if train.is_file() else None
    return None


def interleaved(sets: Sequence[EditSet], seed: int = 0) -> EditSet:
    """The edits of several sets in one stream, in a seeded random order that keeps each set's own order.

    No request's irrelevant prompt is one that a record of *another* set is scored with: such a request loses it.
    """
    order = [index for index, one in enumerate(sets) for _ in one.records]
    random.Random(seed).shuffle(order)
    pairs = [iter(list(zip(one.records, one.requests, strict=True))) for one in sets]
    merged = [next(pairs[index]) for index in order]
    scored = tuple(f"{prompt} " for record, _ in merged for prompt in record.scored_prompts())
    requests = [
        {key: value for key, value in request.items() if key != "loc_prompt" or not value.startswith(scored)}
        for _, request in merged
    ]
    return EditSet([record for record, _ in merged], requests)


def _chosen(dataset: Dataset, n: int, start: int, seed: int) -> list[FactRecord]:
    available = len(dataset.records) - (start if seed == 0 else 0)
    if n < 1 or start < 0:
        raise ValueError(f"{n} edits from record {start} on are wanted: at least one edit, from record 0 or later.")
    if n > available:
        left_out = f" ({dataset.n_too_long} longer than {HALLUCINATION_LIMIT} tokens)" if dataset.n_too_long else ""
        raise ValueError(
            f"{n} edits are wanted, but {dataset.path} has {max(available, 0)} records"
            f"{f' from number {start} on' if start and seed == 0 else ''}"
            f"{left_out}: ask for at most as many."
        )
    if seed == 0:
        return dataset.records[start : start + n]
    return random.Random(seed).sample(dataset.records, n)


def _format(path: Path, first: object, name: str | None) -> Format:
    known = ", ".join(FORMATS)
    if name is not None:
        if name not in FORMATS:
            raise ValueError(f"{name!r} is no format of data: there are {known}.")
        return FORMATS[name]
    fields = first if isinstance(first, dict) else {}
    for kind in FORMATS.values():
        if all(mark in fields for mark in kind.marks):
            return kind
    raise ValueError(
        f"{path} is in none of the known formats ({known}): record 0 has the fields {', '.join(map(str, fields))}."
    )


def _entries(path: Path) -> list[Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must hold a list of records, at least one.")
    return entries


def _locality_of(path: Path, kind: Format) -> list[Query]:
    """The locality prompts of a train file."""
    return [query for one in _described(path, _entries(path), kind) for query in kind.irrelevant(*one)]


def _described(path: Path, entries: Sequence[Any], kind: Format) -> Iterator[tuple[str, Any]]:
    """Each record, with what it is called in an error."""
    return ((f"{path}, record {index} ({kind.name})", entry) for index, entry in enumerate(entries))
