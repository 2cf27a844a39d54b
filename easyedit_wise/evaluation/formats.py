"""What EasyEdit's data files call the parts of a record, and one record checked and read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from easyedit_wise.evaluation.asking import Query
from easyedit_wise.evaluation.records import FactRecord


@dataclass(frozen=True)
class Format:
    """What EasyEdit calls the parts of one data set's records.

    Attributes:
        name: of the data set.
        prompt, target, subject: fields of the edit.
        locality: fields of the prompt whose answer must stay, and of that answer.
        marks: fields that tell a file of this format from the others'.
        rephrasing: field of the rephrased prompt; None where there is none.
        ood: field of the out-of-distribution text; None where there is none.
        nearby: the locality prompt asks about a neighbour of the fact, not about something far from it.
        written: see :class:`FactRecord`.
    """

    name: str
    prompt: str
    target: str
    subject: str
    locality: tuple[str, str]
    marks: tuple[str, ...]
    rephrasing: str | None = None
    ood: str | None = None
    nearby: bool = False
    written: bool = True

    def record(self, where: str, entry: object) -> FactRecord:
        """One record of the file as a :class:`FactRecord`.

        Raises:
            ValueError: a field is missing, empty or no text; ``where`` is the record in words.
        """
        optional = [name for name in (self.rephrasing, self.ood) if name]
        entry = with_texts(where, entry, [self.prompt, self.target, self.subject, *optional, *self.locality])
        query = Query(*(entry[name] for name in self.locality))
        return FactRecord(
            prompt=entry[self.prompt],
            target=entry[self.target],
            subject=entry[self.subject],
            rephrasings=[entry[self.rephrasing]] if self.rephrasing else [],
            unrelated=None if self.nearby else query,
            nearby=query if self.nearby else None,
            ood=entry[self.ood] if self.ood else None,
            written=self.written,
            source=self.name,
        )

    def irrelevant(self, where: str, entry: object) -> list[Query]:
        """The locality prompts of a train file's record, some of whose answers are empty in EasyEdit's own."""
        prompt, answer = self.locality
        entry = with_texts(where, entry, [prompt])
        return [Query(entry[prompt], str(entry.get(answer) or ""))]


def with_texts(where: str, entry: object, fields: Iterable[str]) -> Mapping[str, Any]:
    """The record, if it is one and has these fields as texts that are not empty.

    Raises:
        ValueError: it has not; the message names ``where`` and the field.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {type(entry).__name__}, not an object with fields.")
    for name in fields:
        if name not in entry:
            raise ValueError(f"{where} has no field {name!r}.")
        if not isinstance(entry[name], str) or not entry[name].strip():
            raise ValueError(f"{where}: the field {name!r} is {entry[name]!r}, but must be a text that is not empty.")
    return entry
