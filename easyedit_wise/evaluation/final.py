"""The final-model protocol: every edited fact is asked of the model that has all edits.

Scores taken after each single edit flatter a lifelong editor, because later edits have not yet had
their chance to overwrite earlier ones. Here the model answers once before the first edit
(:func:`collect_baseline`) and once after the last (:func:`score_model`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from easyedit_wise.evaluation.metrics import (
    Query,
    TokenPrediction,
    exact_at_start,
    greedy_answers,
    locality,
    same_text,
    teacher_forced,
)


@dataclass(frozen=True)
class FactRecord:
    """One edit and the prompts that show what it did.

    Attributes:
        prompt: the edit's prompt.
        target: what the model should answer to it and to each rephrasing after the edit.
        subject: what the fact is about.
        rephrasings: other prompts with the same answer; may be empty.
        unrelated: a query far from every edit, whose answer must stay as it is.
        nearby: the same relation of a similar entity, whose answer must stay too; None without one.
    """

    prompt: str
    target: str
    subject: str
    rephrasings: list[str]
    unrelated: Query
    nearby: Query | None = None

    @classmethod
    def from_dict(cls, fact: Mapping[str, Any]) -> FactRecord:
        """Read a fact in the form of :func:`easyedit_wise.data.demo_facts`.

        Raises:
            ValueError: a key is missing, which the message names.
        """
        try:
            nearby = fact.get("nearby")
            return cls(
                prompt=fact["prompt"],
                target=fact["target_new"],
                subject=fact["subject"],
                rephrasings=list(fact["rephrasings"]),
                unrelated=Query(fact["unrelated"]["prompt"], fact["unrelated"]["answer"]),
                nearby=Query(nearby["prompt"], nearby["answer"]) if nearby else None,
            )
        except KeyError as missing:
            raise ValueError(f"The fact {fact.get('prompt', fact)!r} has no {missing}.") from missing


@dataclass(frozen=True)
class Answers:
    """A model's answers to one kind of prompt: teacher-forced and, as text, greedy."""

    forced: list[TokenPrediction]
    texts: list[str]


@dataclass(frozen=True)
class RecordAnswers:
    """A model's answers to all prompts of one record; ``nearby`` is empty when the record has none."""

    edit: Answers
    rephrasings: Answers
    unrelated: Answers
    nearby: Answers


@dataclass(frozen=True)
class RecordScores:
    """One row of :class:`FinalScores`: a record's scores, in [0, 1], and what the model wrote.

    None stands where the record has no prompt of that kind. ``perplexity`` is the target's.
    """

    prompt: str
    target: str
    reliability: float
    generalisation: float | None
    locality: float
    nearby_kept: float | None
    edit_exact: bool
    rephrasing_exact: float | None
    unrelated_same: bool
    nearby_same: bool | None
    perplexity: float
    edit_text: str
    rephrasing_texts: list[str]
    unrelated_text: str
    nearby_text: str | None


@dataclass(frozen=True)
class FinalScores:
    """Means over all records, in [0, 1]; None where no record has such a prompt.

    Teacher-forced shares of tokens:
        reliability: right on the edit prompts.
        generalisation: right on the rephrasings; each rephrasing counts once.
        locality, nearby_kept: predicted as before the edits, on unrelated and nearby prompts.

    Greedy shares of prompts:
        edit_exact, rephrasing_exact: the text begins with the target as a whole word.
        unrelated_same, nearby_same: the text is the one written before the edits.

    ``perplexity`` is the mean over the edit prompts' targets, from 1 to infinity.
    """

    reliability: float
    generalisation: float | None
    locality: float
    nearby_kept: float | None
    edit_exact: float
    rephrasing_exact: float | None
    unrelated_same: float
    nearby_same: float | None
    perplexity: float
    rows: list[RecordScores] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """All scores and rows as plain JSON values; a perplexity that is not finite becomes None."""
        result: dict[str, Any] = _finite(asdict(self))
        return result


@dataclass(frozen=True)
class Baseline:
    """What the model answered to these records before the edits, and what that scores."""

    records: list[FactRecord] = field(repr=False)
    answers: list[RecordAnswers] = field(repr=False)
    scores: FinalScores
    max_new_tokens: int


def collect_baseline(
    model: Any,
    tok: Any,
    records: Sequence[FactRecord],
    max_new_tokens: int = 12,
    batch_size: int = 16,
) -> Baseline:
    """Ask the unedited model everything that the edited one will be compared with.

    Raises:
        ValueError: no records, or an empty prompt or answer in one.
    """
    answers = _ask(model, tok, records, max_new_tokens, batch_size)
    return Baseline(list(records), answers, _score(records, answers, answers), max_new_tokens)


def score_model(
    model: Any,
    tok: Any,
    records: Sequence[FactRecord],
    baseline: Baseline,
    batch_size: int = 16,
) -> FinalScores:
    """Score the final model on all records, which are those that the baseline was collected with.

    Raises:
        ValueError: no records, an empty prompt or answer in one, or another baseline's records.
    """
    if list(records) != baseline.records:
        raise ValueError("The baseline was collected with other records than the ones to score.")
    answers = _ask(model, tok, records, baseline.max_new_tokens, batch_size)
    return _score(records, baseline.answers, answers)


def _ask(
    model: Any, tok: Any, records: Sequence[FactRecord], max_new_tokens: int, batch_size: int
) -> list[RecordAnswers]:
    """All prompts of all records in one pass each way, so that batches are full."""
    if not records:
        raise ValueError("There are no records to ask the model.")
    groups: list[list[Query]] = []  # four a record: edit, rephrasings, unrelated, nearby
    for record in records:
        groups.append([Query(record.prompt, record.target)])
        groups.append([Query(prompt, record.target) for prompt in record.rephrasings])
        groups.append([record.unrelated])
        groups.append([record.nearby] if record.nearby else [])
    queries = [query for group in groups for query in group]
    forced = iter(teacher_forced(model, tok, queries, batch_size))
    prompts = [query.prompt for query in queries]
    texts = iter(greedy_answers(model, tok, prompts, max_new_tokens, batch_size))
    answers = [Answers([next(forced) for _ in group], [next(texts) for _ in group]) for group in groups]
    return [RecordAnswers(*answers[i : i + 4]) for i in range(0, len(answers), 4)]


def _score(
    records: Sequence[FactRecord], before: Sequence[RecordAnswers], after: Sequence[RecordAnswers]
) -> FinalScores:
    rows = [_row(*three) for three in zip(records, before, after, strict=True)]
    rephrased = [
        (prediction.accuracy, exact_at_start(text, record.target))
        for record, answers in zip(records, after, strict=True)
        for prediction, text in zip(answers.rephrasings.forced, answers.rephrasings.texts, strict=True)
    ]
    return FinalScores(
        reliability=fmean(row.reliability for row in rows),
        generalisation=_mean(accuracy for accuracy, _ in rephrased),
        locality=fmean(row.locality for row in rows),
        nearby_kept=_mean(row.nearby_kept for row in rows),
        edit_exact=fmean(row.edit_exact for row in rows),
        rephrasing_exact=_mean(exact for _, exact in rephrased),
        unrelated_same=fmean(row.unrelated_same for row in rows),
        nearby_same=_mean(row.nearby_same for row in rows),
        perplexity=fmean(row.perplexity for row in rows),
        rows=rows,
    )


def _row(record: FactRecord, before: RecordAnswers, after: RecordAnswers) -> RecordScores:
    near = bool(after.nearby.texts)
    return RecordScores(
        prompt=record.prompt,
        target=record.target,
        reliability=after.edit.forced[0].accuracy,
        generalisation=_mean(prediction.accuracy for prediction in after.rephrasings.forced),
        locality=locality(before.unrelated.forced, after.unrelated.forced)[0],
        nearby_kept=locality(before.nearby.forced, after.nearby.forced)[0] if near else None,
        edit_exact=exact_at_start(after.edit.texts[0], record.target),
        rephrasing_exact=_mean(exact_at_start(text, record.target) for text in after.rephrasings.texts),
        unrelated_same=same_text(before.unrelated.texts, after.unrelated.texts)[0],
        nearby_same=same_text(before.nearby.texts, after.nearby.texts)[0] if near else None,
        perplexity=after.edit.forced[0].perplexity,
        edit_text=after.edit.texts[0],
        rephrasing_texts=after.rephrasings.texts,
        unrelated_text=after.unrelated.texts[0],
        nearby_text=after.nearby.texts[0] if near else None,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _finite(value: Any) -> Any:
    """The same nested value with None for numbers that JSON cannot write."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
