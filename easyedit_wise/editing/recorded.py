"""Edits as the router sees them, and their scores in a side memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hparams import WISEHyperParams
from .scored import ScoredInputs


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
