"""The lifelong protocol: a stream of edits by any editor, each checkpoint's model scored on all edits so far.

The editor is anything with the shape of :class:`StreamEditor`: nothing here knows how it edits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from easyedit_wise.evaluation.datasets import EditSet, Request
from easyedit_wise.evaluation.final import Baseline, score_model
from easyedit_wise.evaluation.records import FactRecord
from easyedit_wise.evaluation.routed import RoutedPrompt, RoutingScores, routing_scores
from easyedit_wise.evaluation.scores import FinalScores, RecordScores, finite, summarise

RouteProbe = Callable[[Sequence[str]], list[RoutedPrompt]]
AGE_BINS = 10


class StreamEditor(Protocol):
    """An editing algorithm in the middle of a stream.

    Attributes:
        model: what answers after the edits made so far.
        one_by_one: score one prompt at a time: the algorithm's model answers differently in a batch.
        use_cache: whether its model may generate with a cache.
        route_probe: where each prompt would be answered; None for an editor without a router.
    """

    one_by_one: bool
    use_cache: bool
    route_probe: RouteProbe | None

    @property
    def model(self) -> Any:
        """What answers after the edits made so far."""

    def edit(self, requests: Sequence[Request], on_edit: Callable[[], None]) -> None:
        """Make these edits on top of the earlier ones, calling ``on_edit`` after each."""

    def holders(self) -> list[str] | None:
        """The memory that holds each edit so far, in order; None where there is no such thing."""


@dataclass(frozen=True)
class AgeBin:
    """Edits of similar age in one final model, oldest last. Age is the number of edits made afterwards.

    Attributes:
        youngest, oldest: ages, both included.
        n: edits.
        reliability, generalisation: teacher-forced, as in :class:`FinalScores`.
        edit_exact, rephrasing_exact: greedy.
        perplexity_median: of the targets.
    """

    youngest: int
    oldest: int
    n: int
    reliability: float
    generalisation: float | None
    edit_exact: float | None
    rephrasing_exact: float | None
    perplexity_median: float | None


@dataclass(frozen=True)
class Checkpoint:
    """What the model was worth after some of the stream's edits.

    Attributes:
        edits: made so far; all of them are scored.
        scores: by data set.
        routing: by data set; empty for an editor without a router.
        retention: by age, over all data sets.
        edit_seconds: of all edits so far, without scoring.
        score_seconds: of this checkpoint's scoring.
    """

    edits: int
    scores: dict[str, FinalScores]
    routing: dict[str, RoutingScores]
    retention: list[AgeBin]
    edit_seconds: float
    score_seconds: float = field(compare=False)

    def to_dict(self, rows: bool = True) -> dict[str, Any]:
        """Plain JSON values; ``rows`` says whether each edit's own scores are among them."""
        result: dict[str, Any] = finite(asdict(self))
        result["seconds_per_edit"] = self.edit_seconds / self.edits
        if not rows:
            for scores in result["scores"].values():
                del scores["rows"]
        return result


def run_stream(
    editor: StreamEditor,
    tok: Any,
    edits: EditSet,
    baseline: Baseline,
    checkpoints: Sequence[int],
    batch_size: int = 16,
    on_edit: Callable[[], None] = lambda: None,
    on_checkpoint: Callable[[Checkpoint], None] = lambda checkpoint: None,
    made: int = 0,
    made_seconds: float = 0.0,
    scored: int = 0,
) -> list[Checkpoint]:
    """Make the edits in order and score the model at checkpoints, always on all edits made so far.

    Args:
        editor: on a model without edits, or with the first ``made`` of these.
        tok: the model's tokenizer.
        edits: requests, and the records that they are scored with.
        baseline: of the unedited model on these records.
        checkpoints: after how many edits to score; the last edit is always one.
        batch_size: prompts a forward in scoring.
        on_edit: called after each edit.
        on_checkpoint: called with each checkpoint as soon as it is scored.
        made: edits that the editor made before, of a stream that was stopped.
        made_seconds: what they took.
        scored: the last checkpoint that was scored before; 0: none.

    Returns:
        The checkpoints that were scored now.

    Raises:
        ValueError: a checkpoint that is not between 1 and the number of edits, or edits beyond one that is not scored.
    """
    stops = [stop for stop in stops_of(checkpoints, len(edits.records)) if stop > scored]
    if not scored <= made <= (stops[0] if stops else scored):
        raise ValueError(
            f"{made} edits are made, but the last checkpoint scored is {scored} and the next {stops[:1]}: "
            "what is between two checkpoints goes on, nothing else. Start the stream anew."
        )
    reached: list[Checkpoint] = []
    seconds, done = made_seconds, made
    for stop in stops:
        started = time.perf_counter()
        editor.edit(edits.requests[done:stop], on_edit)
        seconds, done = seconds + time.perf_counter() - started, stop
        checkpoint = _checkpoint(editor, tok, edits.records[:stop], baseline, seconds, batch_size)
        reached.append(checkpoint)
        on_checkpoint(checkpoint)
    return reached


def stops_of(checkpoints: Sequence[int], n: int) -> list[int]:
    """Checkpoints in order, each once, with the last edit among them.

    Raises:
        ValueError: one is not between 1 and ``n``.
    """
    for stop in checkpoints:
        if not 1 <= stop <= n:
            raise ValueError(f"The checkpoint {stop} is outside the stream: name numbers from 1 to {n}.")
    return sorted({*checkpoints, n})


def default_checkpoints(n: int) -> list[int]:
    """1, 10, 100 and so on, and the last edit."""
    return [*(10**e for e in range(9) if 10**e < n), n]


def retention(rows: Sequence[RecordScores], n_bins: int = AGE_BINS) -> list[AgeBin]:
    """Scores by age of the edit, youngest first, in bins of equal size (the oldest may be smaller).

    Args:
        rows: in the order in which the edits were made.
        n_bins: at most as many bins.

    Raises:
        ValueError: no rows, or fewer than one bin.
    """
    if not rows or n_bins < 1:
        raise ValueError(f"Retention by age needs rows and bins, got {len(rows)} and {n_bins}.")
    size = -(-len(rows) // n_bins)
    by_age = list(reversed(rows))
    bins = []
    for first in range(0, len(by_age), size):
        members = by_age[first : first + size]
        mean = summarise(members)
        bins.append(
            AgeBin(
                youngest=first,
                oldest=first + len(members) - 1,
                n=len(members),
                reliability=mean.reliability,
                generalisation=mean.generalisation,
                edit_exact=mean.edit_exact,
                rephrasing_exact=mean.rephrasing_exact,
                perplexity_median=mean.perplexity_median,
            )
        )
    return bins


def _checkpoint(
    editor: StreamEditor,
    tok: Any,
    records: Sequence[FactRecord],
    baseline: Baseline,
    seconds: float,
    batch_size: int,
) -> Checkpoint:
    started = time.perf_counter()
    size = 1 if editor.one_by_one else batch_size
    rows = score_model(editor.model, tok, records, baseline, size, editor.use_cache).rows
    by_source: dict[str, list[RecordScores]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row)
    return Checkpoint(
        edits=len(records),
        scores={source: summarise(members) for source, members in by_source.items()},
        routing=_routing(editor, records),
        retention=retention(rows),
        edit_seconds=seconds,
        score_seconds=time.perf_counter() - started,
    )


def _routing(editor: StreamEditor, records: Sequence[FactRecord]) -> dict[str, RoutingScores]:
    if editor.route_probe is None:
        return {}
    prompts = list(dict.fromkeys(prompt for record in records for prompt in _routed_prompts(record)))
    routes = dict(zip(prompts, editor.route_probe(prompts), strict=True))
    holders = editor.holders()
    result = {}
    for source in dict.fromkeys(record.source for record in records):
        places = [i for i, record in enumerate(records) if record.source == source]
        members = [records[i] for i in places]
        result[source] = routing_scores(
            edits=[routes[one.prompt] for one in members],
            rephrasings=[[routes[prompt] for prompt in one.rephrasings] for one in members],
            unrelated=[routes[one.unrelated.prompt] for one in members if one.unrelated],
            nearby=[routes[query.prompt] for one in members for query in one.near()],
            holders=None if holders is None else [holders[i] for i in places],
        )
    return result


def _routed_prompts(record: FactRecord) -> list[str]:
    return [record.prompt, *record.rephrasings, *(query.prompt for query in record.unchanged())]
