"""Tables for the terminal: what a model answered before and after its edits, and how that scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from rich.table import Table
from rich.text import Text

from easyedit_wise.evaluation.final import Baseline, FinalScores
from easyedit_wise.evaluation.metrics import exact_at_start, same_text

EDIT, REPHRASING, NEARBY, UNRELATED = "edit", "rephrasing", "nearby", "unrelated"

SCORE_LABELS: Mapping[str, str] = {
    "reliability": "Reliability (tokens of the edits)",
    "generalisation": "Generalisation (tokens of the rephrasings)",
    "locality": "Locality (tokens of unrelated prompts kept)",
    "nearby_kept": "Nearby kept (tokens of nearby prompts kept)",
    "portability": "Portability (tokens of what follows from the edits)",
    "edit_exact": "Edits answered exactly (greedy)",
    "rephrasing_exact": "Rephrasings answered exactly (greedy)",
    "unrelated_same": "Unrelated answers unchanged (greedy)",
    "nearby_same": "Nearby answers unchanged (greedy)",
    "perplexity": "Perplexity of the targets",
    "edit_contains": "Edits contained in the answer (greedy)",
    "rephrasing_contains": "Rephrasings contained in the answer (greedy)",
    "portability_contains": "What follows contained in the answer (greedy)",
    "edit_f1": "F1 of the edits' words (greedy)",
    "rephrasing_f1": "F1 of the rephrasings' words (greedy)",
    "perplexity_clipped": "Perplexity, each cut to 100",
    "perplexity_median": "Perplexity, median",
    "target_known": "Target tokens with a loss below -log 0.8",
    "ood_items": "OOD texts with a loss below -log 0.8",
    "ood_tokens": "OOD texts' tokens with a loss below -log 0.8",
}
# The one score of which less is better.
_SMALLER_IS_BETTER = frozenset({"perplexity", "perplexity_clipped", "perplexity_median"})


@dataclass(frozen=True)
class AnswerRow:
    """One prompt with the model's answers before and after the edits.

    Attributes:
        fact: what the fact is called in the table; neighbouring rows of one fact form a block.
        kind: "edit", "rephrasing", "nearby" or "unrelated".
        prompt: what the model was asked.
        before: its answer before the edits.
        after: its answer after them.
        correct: whether ``after`` is as it should be: the target for the first two kinds,
            the same as ``before`` for the other two.
    """

    fact: str
    kind: str
    prompt: str
    before: str
    after: str
    correct: bool


def answer_rows(baseline: Baseline, scores: FinalScores) -> list[AnswerRow]:
    """The rows of :func:`answers_table` for all records that a baseline and final scores share."""
    rows: list[AnswerRow] = []
    triples = zip(baseline.records, baseline.scores.rows, scores.rows, strict=True)
    for record, before, after in triples:
        fact = f"{record.subject} → {record.target}"
        asked = [(EDIT, record.prompt, before.edit_text, after.edit_text)]
        asked += [
            (REPHRASING, prompt, old, new)
            for prompt, old, new in zip(
                record.rephrasings, before.rephrasing_texts, after.rephrasing_texts, strict=True
            )
        ]
        if record.nearby is not None and before.nearby_text is not None and after.nearby_text is not None:
            asked.append((NEARBY, record.nearby.prompt, before.nearby_text, after.nearby_text))
        if record.unrelated is not None:
            asked.append((UNRELATED, record.unrelated.prompt, before.unrelated_text, after.unrelated_text))
        for kind, prompt, old, new in asked:
            if kind in (EDIT, REPHRASING):
                correct = exact_at_start(new, record.target)
            else:
                correct = same_text([old], [new])[0]
            rows.append(AnswerRow(fact, kind, prompt, old, new, correct))
    return rows


def answers_table(rows: Sequence[AnswerRow], title: str = "Answers before and after the edits") -> Table:
    """A rich table of answers, one block a fact: ✓ marks an answer as it should be, ✗ any other.

    Answers are shown up to the end of their first line; the marks judge the whole text.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("There are no answers to show.")
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("Fact", style="bold", max_width=22)
    table.add_column("Asked as", no_wrap=True)
    table.add_column("Prompt", ratio=3)
    table.add_column("Before", ratio=2, style="dim")
    table.add_column("After", ratio=2)
    table.add_column("", no_wrap=True)
    previous = ""
    for row in rows:
        if row.fact != previous and previous:
            table.add_section()
        # Text, not str: rich would read brackets in a model's answer as its own markup.
        table.add_row(
            Text(row.fact if row.fact != previous else ""),
            row.kind,
            Text(" ".join(row.prompt.split())),
            Text(_first_line(row.before)),
            Text(_first_line(row.after)),
            _mark(row.correct),
        )
        previous = row.fact
    return table


def scores_table(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    targets: Mapping[str, float] | None = None,
    title: str = "The final model on all edits",
) -> Table:
    """A rich table of scores before and after the edits, beside what they should reach.

    Args:
        before: scores by name, such as :meth:`FinalScores.to_dict`; entries that are no numbers
            (None, rows, texts) are passed over.
        after: the same after the edits; decides which scores are shown, and in which order.
        targets: what a score should at least reach (a perplexity: at most). May name few or none.
        title: shown above the table.

    Raises:
        ValueError: ``after`` has no number, or no score that ``targets`` names.
    """
    shown: dict[str, float] = {name: value for name, value in after.items() if _is_number(value)}
    if not shown:
        raise ValueError("There are no scores to show.")
    wanted = dict(targets or {})
    unknown = sorted(wanted.keys() - shown.keys())
    if unknown:
        raise ValueError(f"There is no score for the targets {', '.join(unknown)}; there are: {', '.join(shown)}.")
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("Score")
    for heading in ("Before", "After"):
        table.add_column(heading, justify="right")
    if wanted:
        table.add_column("Target", justify="right")
        table.add_column("", no_wrap=True)
    for name, value in shown.items():
        cells: list[str | Text] = [
            Text(SCORE_LABELS.get(name, name)),
            _number(before.get(name)),
            Text(_number(value), "bold"),
        ]
        if wanted and name in wanted:
            smaller = name in _SMALLER_IS_BETTER
            met = value <= wanted[name] if smaller else value >= wanted[name]
            cells += [f"{'≤' if smaller else '≥'} {_number(wanted[name])}", _mark(met)]
        table.add_row(*cells)
    return table


def _first_line(text: str) -> str:
    """The text up to its first line break; an ellipsis says that there is more."""
    lines = text.strip().splitlines() or [""]
    return lines[0] if len(lines) == 1 else f"{lines[0]} …"


def _mark(good: bool) -> Text:
    return Text("✓", style="bold green") if good else Text("✗", style="bold red")


def _is_number(value: object) -> TypeGuard[float]:
    # True and False are ints to Python, but no scores.
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: object) -> str:
    if not _is_number(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"
