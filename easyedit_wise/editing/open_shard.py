"""What an open shard remembers of its edits, in a fixed amount of memory.

Later edits need two things of earlier ones: what they must not disturb (rehearsal), and how strongly they
activate the memory by now (epsilon). All activations of all edits would grow with the stream; kept are a sketch
for the first, and for the second the few edits that are nearest to being lost, with the last score of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..hparams import WISEHyperParams
from ..least_squares import NormalEquations
from ..sketching import frequent_directions
from .gain import SpokenEdit
from .inherited import Inherited
from .recorded import EditScores, RecordedEdit, edit_scores
from .task import Rehearsed

# Edits that are scored anew after each edit.
WATCHED = 16
# Rows of the rehearsal's sketch: some fifteen edits are held exactly, more of them approximately.
SKETCH_ROWS = 256


@dataclass(frozen=True)
class OpenShard:
    """The edits of the live shard. Immutable: an edit makes a new one, so the old one can be put back.

    Attributes:
        watched: the edits nearest to being lost, at most ``WATCHED``.
        others: the last known scores of the rest.
        sketch: rows that stand for A(x) of all tokens of all edits; None without rehearsal.
        n_tokens: of all edits, prompts and targets, and of what they inherited.
        equations: the shard's least-squares problem; None without consolidation.
        spoken: what the latest edits of the problem say; the gain of the others is settled.
    """

    watched: tuple[RecordedEdit, ...] = ()
    others: tuple[EditScores, ...] = ()
    sketch: Tensor | None = None
    n_tokens: int = 0
    equations: NormalEquations | None = None
    spoken: tuple[SpokenEdit, ...] = ()

    @property
    def rehearsed(self) -> Rehearsed | None:
        """What the next edit should leave alone."""
        return None if self.sketch is None else Rehearsed(self.sketch, self.n_tokens)

    @property
    def settled(self) -> list[RecordedEdit]:
        """The watched edits that are not spoken any more: of before a load, or before the last :data:`WATCHED`."""
        spoken = [one.recorded.answered.activations for one in self.spoken]
        # Compared by content: a shard that was put back from a journal has its own copies of either.
        return [edit for edit in self.watched if not any(torch.equal(edit.answered.activations, one) for one in spoken)]

    def with_tokens_of(self, inherited: Inherited | None) -> OpenShard:
        """With the tokens of what some of its edits inherited: they take as much room as the edits' own."""
        return self if inherited is None else replace(self, n_tokens=self.n_tokens + len(inherited.activations))

    def joined(
        self, edits: Sequence[RecordedEdit], delta_weight: Tensor, hparams: WISEHyperParams
    ) -> tuple[OpenShard, list[EditScores]]:
        """The shard with some more edits, and the present scores of all of them (the others' as last known)."""
        watched = [*self.watched, *edits]
        scores = edit_scores(watched, delta_weight, hparams)
        by_risk = sorted(range(len(watched)), key=lambda index: scores[index].margin)
        kept = sorted(by_risk[:WATCHED])
        sketch = self.sketch
        n_tokens = self.n_tokens + sum(len(edit.answered.activations) for edit in edits)
        if hparams.rehearsal > 0:
            for edit in edits:
                rows = edit.answered.activations
                # d_in rows hold everything; more would be a waste.
                sketch = frequent_directions(sketch, rows, min(SKETCH_ROWS, rows.shape[1]))
        shard = OpenShard(
            tuple(watched[index] for index in kept),
            (*self.others, *(scores[index] for index in by_risk[WATCHED:])),
            sketch,
            n_tokens,
            self.equations,
            self.spoken,
        )
        return shard, [*self.others, *scores]
