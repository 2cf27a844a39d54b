"""What a model's answers to the records of a stream score: one row a record, and means over rows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

from easyedit_wise.evaluation.asking import TokenPrediction
from easyedit_wise.evaluation.metrics import (
    contains,
    exact_at_start,
    locality,
    same_text,
    token_f1,
)
from easyedit_wise.evaluation.records import FactRecord

DELTA = -math.log(0.8)
"""A token or an item whose loss lies below it counts as known (paper, Appendix A.1, for Temporal)."""
PERPLEXITY_CLIP = 100.0
"""Where the clipped perplexity ends: one lost edit must not hide all others."""


@dataclass(frozen=True)
class Answers:
    """A model's answers to one kind of prompt: teacher-forced and, as text, greedy.

    ``texts`` is empty where the record's answers are not asked for by generation.
    """

    forced: list[TokenPrediction]
    texts: list[str]


@dataclass(frozen=True)
class RecordAnswers:
    """A model's answers to all prompts of one record; empty where the record has none of that kind.

    ``ood`` predicts all tokens of the record's out-of-distribution text but the first; the first ``ood_prompt`` of
    them still belong to the edit's prompt.
    """

    edit: Answers
    rephrasings: Answers
    unrelated: Answers
    nearby: Answers
    portability: Answers = field(default_factory=lambda: Answers([], []))
    ood: TokenPrediction | None = None
    ood_prompt: int = 0


@dataclass(frozen=True)
class RecordScores:
    """One row of :class:`FinalScores`: a record's scores, in [0, 1], and what the model wrote.

    None stands where the record has no prompt of that kind, or where its answers are not asked for by generation.
    ``perplexity`` is the target's, ``ood_loss`` the mean loss of y_ood given the prompt. ``by_kind`` holds, for each
    kind of related questions, the share of tokens that are right (portability) or kept.
    """

    prompt: str
    target: str
    reliability: float
    generalisation: float | None
    locality: float | None
    nearby_kept: float | None
    edit_exact: bool | None
    rephrasing_exact: float | None
    unrelated_same: bool | None
    nearby_same: float | None
    perplexity: float
    edit_text: str
    rephrasing_texts: list[str]
    unrelated_text: str
    nearby_text: str | None
    edit_contains: bool | None = None
    rephrasing_contains: float | None = None
    edit_f1: float | None = None
    rephrasing_f1: float | None = None
    target_known: float | None = None
    ood_loss: float | None = None
    ood_tokens: float | None = None
    source: str = "facts"
    n_rephrasings: int = 0
    portability: float | None = None
    portability_contains: float | None = None
    by_kind: dict[str, float] = field(default_factory=dict)
    portability_texts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FinalScores:
    """Means over all records, in [0, 1]; None where no record has such a prompt.

    Teacher-forced shares of tokens:
        reliability: right on the edit prompts.
        generalisation: right on the rephrasings; each rephrasing counts once.
        locality, nearby_kept: predicted as before the edits, on unrelated and nearby prompts.
        portability: right on questions whose answer follows from the edit.
        by_kind: of related questions, by their kind: right or kept.
        target_known: of the edit's target with a loss below delta = -log 0.8 (the paper's delta-ACC).
        ood_tokens: of the out-of-distribution text with a loss below delta, as EasyEdit's ``ood_ppl``.

    ``ood_items`` is the share of records whose mean loss on y_ood is below delta (the paper's Eq. 10).

    Greedy shares of prompts:
        edit_exact, rephrasing_exact: the text begins with the target as a whole word.
        edit_contains, rephrasing_contains: the target occurs in the text.
        portability_contains: one of the question's answers does.
        unrelated_same, nearby_same: the text is the one written before the edits.

    ``edit_f1`` and ``rephrasing_f1`` are the F1 of the words of the greedy text and the target.

    ``perplexity`` is the mean over the edit prompts' targets, from 1 to infinity; ``perplexity_clipped`` the same with
    each value cut to 100; ``perplexity_median`` the median.
    """

    reliability: float
    generalisation: float | None
    locality: float | None
    nearby_kept: float | None
    edit_exact: float | None
    rephrasing_exact: float | None
    unrelated_same: float | None
    nearby_same: float | None
    perplexity: float
    rows: list[RecordScores] = field(repr=False)
    edit_contains: float | None = None
    rephrasing_contains: float | None = None
    edit_f1: float | None = None
    rephrasing_f1: float | None = None
    perplexity_clipped: float | None = None
    perplexity_median: float | None = None
    target_known: float | None = None
    ood_items: float | None = None
    ood_tokens: float | None = None
    portability: float | None = None
    portability_contains: float | None = None
    by_kind: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All scores and rows as plain JSON values; a perplexity that is not finite becomes None."""
        result: dict[str, Any] = finite(asdict(self))
        return result


def summarise(rows: Sequence[RecordScores]) -> FinalScores:
    """Means over rows, which may be some of another result's.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("There are no rows to summarise.")
    perplexities = [row.perplexity for row in rows]
    return FinalScores(
        reliability=fmean(row.reliability for row in rows),
        generalisation=_mean_of_rephrasings(rows, "generalisation"),
        locality=_mean(row.locality for row in rows),
        nearby_kept=_mean(row.nearby_kept for row in rows),
        edit_exact=_mean(row.edit_exact for row in rows),
        rephrasing_exact=_mean_of_rephrasings(rows, "rephrasing_exact"),
        unrelated_same=_mean(row.unrelated_same for row in rows),
        nearby_same=_mean(row.nearby_same for row in rows),
        perplexity=fmean(perplexities),
        rows=list(rows),
        edit_contains=_mean(row.edit_contains for row in rows),
        rephrasing_contains=_mean_of_rephrasings(rows, "rephrasing_contains"),
        edit_f1=_mean(row.edit_f1 for row in rows),
        rephrasing_f1=_mean_of_rephrasings(rows, "rephrasing_f1"),
        perplexity_clipped=fmean(min(value, PERPLEXITY_CLIP) for value in perplexities),
        perplexity_median=median(perplexities),
        target_known=_mean(row.target_known for row in rows),
        ood_items=_mean(row.ood_loss < DELTA for row in rows if row.ood_loss is not None),
        ood_tokens=_mean(row.ood_tokens for row in rows),
        portability=_mean(row.portability for row in rows),
        portability_contains=_mean(row.portability_contains for row in rows),
        by_kind=_means((kind, value) for row in rows for kind, value in row.by_kind.items()),
    )


def score_record(record: FactRecord, before: RecordAnswers, after: RecordAnswers) -> RecordScores:
    """One row: a record's scores from a model's answers before and after the edits."""
    target, edit, rephrased = record.target, after.edit.texts, after.rephrasings.texts
    ood = after.ood
    follow = [question for question in record.related if question.follows]
    stay = [question for question in record.related if not question.follows]
    kept = _kept(before.nearby, after.nearby)
    beyond = ood.log_probs[after.ood_prompt :] if ood else ()
    return RecordScores(
        prompt=record.prompt,
        target=target,
        reliability=after.edit.forced[0].accuracy,
        generalisation=_mean(prediction.accuracy for prediction in after.rephrasings.forced),
        locality=_mean(_kept(before.unrelated, after.unrelated)),
        nearby_kept=_mean(kept),
        edit_exact=exact_at_start(edit[0], target) if edit else None,
        rephrasing_exact=_mean(exact_at_start(text, target) for text in rephrased),
        unrelated_same=next(iter(_same(before.unrelated, after.unrelated)), None),
        nearby_same=_mean(_same(before.nearby, after.nearby)),
        perplexity=after.edit.forced[0].perplexity,
        edit_text=edit[0] if edit else "",
        rephrasing_texts=rephrased,
        unrelated_text=after.unrelated.texts[0] if after.unrelated.texts else "",
        nearby_text=after.nearby.texts[0] if after.nearby.texts else None,
        edit_contains=contains(edit[0], target) if edit else None,
        rephrasing_contains=_mean(contains(text, target) for text in rephrased),
        edit_f1=_f1(edit[0], target) if edit else None,
        rephrasing_f1=_mean(_f1(text, target) for text in rephrased),
        target_known=after.edit.forced[0].share_below(DELTA),
        ood_loss=-fmean(beyond) if beyond else None,
        ood_tokens=ood.share_below(DELTA) if ood else None,
        source=record.source,
        n_rephrasings=len(record.rephrasings),
        portability=_mean(prediction.accuracy for prediction in after.portability.forced),
        portability_contains=_mean(
            any(contains(text, answer) for answer in question.answers)
            for question, text in zip(follow, after.portability.texts, strict=False)
        ),
        by_kind=_means(
            [(one.kind, share.accuracy) for one, share in zip(follow, after.portability.forced, strict=True)]
            + [(one.kind, share) for one, share in zip(stay, kept[len(kept) - len(stay) :], strict=True)]
        ),
        portability_texts=after.portability.texts,
    )


def _kept(before: Answers, after: Answers) -> list[float]:
    return locality(before.forced, after.forced) if after.forced else []


def _same(before: Answers, after: Answers) -> list[bool]:
    return same_text(before.texts, after.texts) if after.texts else []


def _f1(text: str, target: str) -> float | None:
    return token_f1(text, target) if re.search(r"\w", target) else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _means(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean of each name's values."""
    values: dict[str, list[float]] = {}
    for name, value in pairs:
        values.setdefault(name, []).append(value)
    return {name: fmean(group) for name, group in values.items()}


def _mean_of_rephrasings(rows: Sequence[RecordScores], name: str) -> float | None:
    """Each rephrasing counts once, so a row weighs as many as it has."""
    pairs = [(getattr(row, name), row.n_rephrasings) for row in rows if getattr(row, name) is not None]
    total = sum(count for _, count in pairs)
    return sum(value * count for value, count in pairs) / total if total else None


def finite(value: Any) -> Any:
    """The same nested value with None for numbers that JSON cannot write."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
