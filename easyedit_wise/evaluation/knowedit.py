"""KnowEdit's files (wiki_recent, wiki_counterfact, ZsRE, WikiBio): edits, each with lists of questions near it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from easyedit_wise.evaluation.asking import Query
from easyedit_wise.evaluation.formats import Format, with_texts
from easyedit_wise.evaluation.records import FactRecord, Related

_PORTABILITY, _LOCALITY = "portability", "locality"
_REPHRASINGS = ("rephrase_prompt", "rephrase")
# The fields of WikiBio, whose targets are sentences.
_BIOGRAPHY: Mapping[str, str] = {"prompt": "text", "target_new": "labels", "subject": "concept"}


class KnowEdit(Format):
    """A record of KnowEdit.

    ``portability`` and ``locality`` hold questions, each with ``prompt`` and ``ground_truth``: in lists by kind
    (``Reasoning``, ``Subject_Aliasing``, ``Logical_Generalization``; ``Relation_Specificity``, ``Forgetfulness``), or
    in one list. A ground truth is a text or a list of them, in which lists may stand for the other names of one answer;
    all are taken, in order, and a question without any is passed over, as EasyEdit does.
    """

    def record(self, where: str, entry: object) -> FactRecord:
        """One record of the file as a :class:`FactRecord`.

        Raises:
            ValueError: a field or a question is not of the form above.
        """
        entry = with_texts(where, entry, ())
        names = [
            _BIOGRAPHY[name] if name not in entry and _BIOGRAPHY[name] in entry else name
            for name in (self.prompt, self.target, self.subject)
        ]
        entry = with_texts(where, entry, names)
        prompt, target, subject = (entry[name] for name in names)
        return FactRecord(
            prompt=prompt,
            target=target,
            subject=subject,
            rephrasings=_rephrasings(where, entry),
            unrelated=None,
            written=self.target in names,
            source=self.name,
            related=[*_related(where, entry, _PORTABILITY), *_related(where, entry, _LOCALITY)],
        )

    def irrelevant(self, where: str, entry: object) -> list[Query]:
        """The locality prompts of a train file's record."""
        return [one.query for one in _related(where, with_texts(where, entry, ()), _LOCALITY)]


def _rephrasings(where: str, entry: Mapping[str, Any]) -> list[str]:
    values: Any = next((entry[name] for name in _REPHRASINGS if entry.get(name)), [])
    found = [values] if isinstance(values, str) else values
    if not isinstance(found, list) or not all(isinstance(one, str) and one.strip() for one in found):
        raise ValueError(f"{where}: the rephrasings are {values!r}, but must be a text or a list of texts.")
    return found


def _related(where: str, entry: Mapping[str, Any], field: str) -> Iterator[Related]:
    groups = entry.get(field) or {}
    if isinstance(groups, list):
        groups = {field: groups}
    if not isinstance(groups, dict):
        raise ValueError(f"{where}: {field!r} is {groups!r}, but must be lists of questions by kind, or one list.")
    for kind, questions in groups.items():
        for index, question in enumerate([questions] if isinstance(questions, dict) else questions or []):
            place = f"{where}: {field}, {kind}, question {index}"
            if not isinstance(question, dict) or not question.keys() >= {"prompt", "ground_truth"}:
                raise ValueError(f"{place} is {question!r}, but must have a 'prompt' and a 'ground_truth'.")
            prompt = next(_texts(place, question["prompt"]), None)
            if prompt is None:
                raise ValueError(f"{place} has no text as its 'prompt': {question['prompt']!r}.")
            answers = tuple(dict.fromkeys(_texts(place, question["ground_truth"])))
            if answers:
                yield Related(kind, prompt, answers, follows=field == _PORTABILITY)


def _texts(place: str, value: object) -> Iterator[str]:
    """All texts in nested lists that are not empty, in order."""
    if isinstance(value, list):
        for one in value:
            yield from _texts(place, one)
    elif isinstance(value, (str, int, float)):
        if str(value).strip():
            yield str(value)
    elif value is not None:
        raise ValueError(f"{place} holds {value!r} where a text or a list of texts must be.")
