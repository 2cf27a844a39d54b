"""What an open shard remembers of its edits, in a fixed amount of memory.

Later edits need two things of earlier ones: what they must not disturb (rehearsal), and how strongly they
activate the memory by now (epsilon). All activations of all edits would grow with the stream; kept are a sketch
for the first, and for the second the few edits that are nearest to being lost, with the last score of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hparams import WISEHyperParams
from ..least_squares import NormalEquations
from ..routing import calibrated_threshold, minimum_threshold
from ..sketching import frequent_directions
from .scored import ScoredInputs
from .task import Rehearsed

# Edits that are scored anew after each edit.
WATCHED = 16
# Rows of the rehearsal's sketch: some fifteen edits are held exactly, more of them approximately.
SKETCH_ROWS = 256


@dataclass(frozen=True)
class EditScores:
    """Delta_act of one edit in a side memory.

    Attributes:
        prompt: of its prompt, as a user asks.
        answered: of the prompt with the target behind it, as teacher-forced scoring asks.
        irrelevant: of its own irrelevant prompt, if it has one.
    """

    prompt: float
    answered: float
    irrelevant: float | None = None

    @property
    def margin(self) -> float:
        """How far the edit is from being lost, or its irrelevant prompt from firing."""
        return min(self.prompt, self.answered) - (self.irrelevant or 0.0)


@dataclass(frozen=True)
class RecordedEdit:
    """One edit as the router sees it.

    Attributes:
        answered: the plain prompt with the target behind it.
        prompt_mask: the prompt's tokens among them, shape (1, T).
        irrelevant: its own irrelevant prompt, if it has one.
    """

    answered: ScoredInputs
    prompt_mask: Tensor
    irrelevant: ScoredInputs | None = None


@dataclass(frozen=True)
class OpenShard:
    """The edits of the live shard. Immutable: an edit makes a new one, so the old one can be put back.

    Attributes:
        watched: the edits nearest to being lost, at most ``WATCHED``.
        others: the last known scores of the rest.
        sketch: rows that stand for A(x) of all tokens of all edits; None without rehearsal.
        n_tokens: how many tokens these are.
        equations: the shard's least-squares problem; None without consolidation.
    """

    watched: tuple[RecordedEdit, ...] = ()
    others: tuple[EditScores, ...] = ()
    sketch: Tensor | None = None
    n_tokens: int = 0
    equations: NormalEquations | None = None

    @property
    def rehearsed(self) -> Rehearsed | None:
        """What the next edit should leave alone."""
        return None if self.sketch is None else Rehearsed(self.sketch, self.n_tokens)

    def joined(
        self, edits: Sequence[RecordedEdit], delta_weight: Tensor, hparams: WISEHyperParams
    ) -> tuple[OpenShard, list[EditScores]]:
        """The shard with some more edits, and the present scores of all of them (the others' as last known)."""
        watched = [*self.watched, *edits]
        scores = edit_scores(watched, delta_weight, hparams)
        by_risk = sorted(range(len(watched)), key=lambda index: scores[index].margin)
        kept = sorted(by_risk[:WATCHED])
        sketch, n_tokens = self.sketch, self.n_tokens
        if hparams.rehearsal > 0:
            for edit in edits:
                rows = edit.answered.activations
                # d_in rows hold everything; more would be a waste.
                sketch = frequent_directions(sketch, rows, min(SKETCH_ROWS, rows.shape[1]))
                n_tokens += rows.shape[0]
        shard = OpenShard(
            tuple(watched[index] for index in kept),
            (*self.others, *(scores[index] for index in by_risk[WATCHED:])),
            sketch,
            n_tokens,
            self.equations,
        )
        return shard, [*self.others, *scores]


@torch.no_grad()
def edit_scores(edits: Sequence[RecordedEdit], delta_weight: Tensor, hparams: WISEHyperParams) -> list[EditScores]:
    """Delta_act of each edit under dW, all in one product."""
    if not edits:
        return []
    answered = ScoredInputs.stack([edit.answered for edit in edits])
    length = answered.token_mask.shape[1]
    prompts = torch.cat([F.pad(e.prompt_mask, (length - e.prompt_mask.shape[1], 0)) for e in edits])
    own = [index for index, edit in enumerate(edits) if edit.irrelevant is not None]
    irrelevant: dict[int, float] = {}
    if own:
        stacked = ScoredInputs.stack([one for e in edits if (one := e.irrelevant) is not None])
        irrelevant = dict(zip(own, stacked.scores(delta_weight, hparams).tolist(), strict=True))
    product = F.linear(answered.activations.to(delta_weight), delta_weight)
    whole = answered.pooled(product, hparams).tolist()
    asked = answered.pooled(product, hparams, over=prompts).tolist()
    return [EditScores(asked[index], whole[index], irrelevant.get(index)) for index in range(len(edits))]


def threshold(
    scores: Iterable[EditScores], neutral: ScoredInputs, delta_weight: Tensor, hparams: WISEHyperParams
) -> float:
    """epsilon of a memory, from what its edits and what irrelevant prompts score under its dW.

    Raises:
        ValueError: there is no edit.
    """
    scores = list(scores)
    if hparams.act_ratio is not None:
        return minimum_threshold([one.prompt for one in scores], hparams.act_ratio)
    edits = [value for one in scores for value in (one.prompt, one.answered)]
    irrelevant = [one.irrelevant for one in scores if one.irrelevant is not None]
    with torch.no_grad():
        irrelevant += neutral.scores(delta_weight, hparams).tolist()
    return calibrated_threshold(edits, irrelevant, hparams.epsilon_position)
