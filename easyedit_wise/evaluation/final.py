"""The final-model protocol: every edited fact is asked of the model that has all edits.

Scores taken after each single edit flatter a lifelong editor, because later edits have not yet had
their chance to overwrite earlier ones. Here the model answers once before the first edit
(:func:`collect_baseline`) and once after the last (:func:`score_model`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from easyedit_wise.evaluation.asking import (
    Query,
    TextTooLongError,
    greedy_answers,
    predict_texts,
    shared_tokens,
    teacher_forced,
)
from easyedit_wise.evaluation.records import FactRecord
from easyedit_wise.evaluation.scores import Answers, FinalScores, RecordAnswers, RecordScores, score_record, summarise

__all__ = ["Baseline", "FactRecord", "FinalScores", "RecordScores", "collect_baseline", "score_model"]

_Asked = TypeVar("_Asked", bound=Hashable)
_Answer = TypeVar("_Answer")


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

    Args:
        model: without edits.
        tok: its tokenizer, or a ``Wording`` of it: prompts in a chat, or another separator before the answers.
        records: the edits that will be made.
        max_new_tokens: of each greedy answer.
        batch_size: prompts a forward.

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
    use_cache: bool = True,
) -> FinalScores:
    """Score the final model on all records, which are those that the baseline was collected with, or the first of them.

    Args:
        model: the edited model.
        tok: as the baseline was collected with.
        records: the edits that were made.
        baseline: of the unedited model.
        batch_size: prompts a forward.
        use_cache: whether generation keeps keys and values, as users' does.

    Raises:
        ValueError: no records, an empty prompt or answer in one, or another baseline's records.
    """
    if list(records) != baseline.records[: len(records)]:
        raise ValueError("The baseline was collected with other records than the ones to score.")
    answers = _ask(model, tok, records, baseline.max_new_tokens, batch_size, use_cache)
    return _score(records, baseline.answers[: len(records)], answers)


def _ask(
    model: Any,
    tok: Any,
    records: Sequence[FactRecord],
    max_new_tokens: int,
    batch_size: int,
    use_cache: bool = True,
) -> list[RecordAnswers]:
    """:func:`_ask_all`, with the record named that the model cannot read."""
    if not records:
        raise ValueError("There are no records to ask the model.")
    try:
        return _ask_all(model, tok, records, max_new_tokens, batch_size, use_cache)
    except TextTooLongError as error:
        number, record = next((i, one) for i, one in enumerate(records, 1) if error.text in one.scored_prompts())
        raise ValueError(f"Record {number} ({record.prompt!r} -> {record.target!r}): {error}") from error


def _ask_all(
    model: Any,
    tok: Any,
    records: Sequence[FactRecord],
    max_new_tokens: int,
    batch_size: int,
    use_cache: bool,
) -> list[RecordAnswers]:
    """All prompts of all records in one pass each way, so that batches are full; the same prompt is asked once."""
    groups: list[tuple[bool, list[Query]]] = []  # five a record: edit, rephrasings, unrelated, near, portability
    for record in records:
        groups.append((record.written, [Query(record.prompt, record.target)]))
        groups.append((record.written, [Query(prompt, record.target) for prompt in record.rephrasings]))
        groups.append((record.written, [record.unrelated] if record.unrelated else []))
        groups.append((record.written, record.near()))
        groups.append((record.written, [one.query for one in record.related if one.follows]))
    queries = [query for _, group in groups for query in group]
    forced = _each_once(queries, lambda asked: teacher_forced(model, tok, asked, batch_size))
    prompts = [query.prompt for written, group in groups if written for query in group]
    texts = _each_once(prompts, lambda asked: greedy_answers(model, tok, asked, max_new_tokens, batch_size, use_cache))
    ood_texts = [record.ood for record in records if record.ood is not None]
    ood = _each_once(ood_texts, lambda asked: predict_texts(model, tok, asked, batch_size))
    answers = [
        Answers([forced[query] for query in group], [texts[query.prompt] for query in group] if written else [])
        for written, group in groups
    ]
    return [
        RecordAnswers(
            edit=answers[5 * i],
            rephrasings=answers[5 * i + 1],
            unrelated=answers[5 * i + 2],
            nearby=answers[5 * i + 3],
            portability=answers[5 * i + 4],
            ood=None if record.ood is None else ood[record.ood],
            ood_prompt=0 if record.ood is None else max(0, shared_tokens(tok, record.prompt, record.ood) - 1),
        )
        for i, record in enumerate(records)
    ]


def _each_once(asked: Sequence[_Asked], ask: Callable[[list[_Asked]], list[_Answer]]) -> dict[_Asked, _Answer]:
    different = list(dict.fromkeys(asked))
    return dict(zip(different, ask(different), strict=True)) if different else {}


def _score(
    records: Sequence[FactRecord], before: Sequence[RecordAnswers], after: Sequence[RecordAnswers]
) -> FinalScores:
    return summarise([score_record(*three) for three in zip(records, before, after, strict=True)])
