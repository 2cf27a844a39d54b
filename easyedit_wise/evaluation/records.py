"""One edit and the prompts that show what it did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from easyedit_wise.evaluation.asking import Query


@dataclass(frozen=True)
class Related:
    """A question near an edit, as KnowEdit asks them.

    Attributes:
        kind: what the data call it, such as ``Reasoning`` or ``Relation_Specificity``.
        prompt: the question.
        answers: right ones; the first is the one that teacher forcing asks for, as in EasyEdit.
        follows: the answer follows from the edit (portability); False: the model's answer must stay as it was.
    """

    kind: str
    prompt: str
    answers: tuple[str, ...]
    follows: bool

    @property
    def query(self) -> Query:
        """The question with its first answer."""
        return Query(self.prompt, self.answers[0])


@dataclass(frozen=True)
class FactRecord:
    """One edit and the prompts that show what it did.

    Attributes:
        prompt: the edit's prompt.
        target: what the model should answer to it and to each rephrasing after the edit.
        subject: what the fact is about.
        rephrasings: other prompts with the same answer; may be empty.
        unrelated: a query far from every edit, whose answer must stay as it is; None without one.
        nearby: the same relation of a similar entity, whose answer must stay too; None without one.
        ood: a text about the edit's subject that the model should have become able to go on with (Temporal's
            y_ood, with the prompt at its start or in other words); None without one.
        written: whether the answer is short enough to be asked for by free generation; a sentence or a
            paragraph is scored by its likelihood alone.
        source: name of the data set that the record comes from.
        related: more questions about what follows from the edit, and about what must stay.
    """

    prompt: str
    target: str
    subject: str
    rephrasings: list[str]
    unrelated: Query | None
    nearby: Query | None = None
    ood: str | None = None
    written: bool = True
    source: str = "facts"
    related: list[Related] = field(default_factory=list)

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

    def scored_prompts(self) -> Iterator[str]:
        """Every prompt that the record is scored with."""
        yield self.prompt
        yield from self.rephrasings
        for query in (self.unrelated, self.nearby):
            if query is not None:
                yield query.prompt
        for question in self.related:
            yield question.prompt
        if self.ood is not None:
            yield self.ood

    def near(self) -> list[Query]:
        """Queries close to the edit whose answers must stay."""
        own = [] if self.nearby is None else [self.nearby]
        return own + [question.query for question in self.related if not question.follows]

    def unchanged(self) -> list[Query]:
        """All queries whose answers must stay."""
        return self.near() if self.unrelated is None else [self.unrelated, *self.near()]
