"""What other memories hold, on the quiet side of an open shard's least-squares problem."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..least_squares import NormalEquations
from .recorded import RecordedEdit
from .scored import ScoredInputs

# A token of an edit that another memory holds counts as this share of a token of its irrelevant prompt.
_ELSEWHERE_WEIGHT = 0.3


@torch.no_grad()
def with_elsewhere(elsewhere: Tensor | None, edits: Sequence[RecordedEdit]) -> Tensor | None:
    """sum_u v_u a_u a_u^T of what other memories' edits and their irrelevant prompts give, with some more of them.

    A sum of fixed size: what a stream has seen does not grow with it.

    Args:
        elsewhere: so far, shape (d_in, d_in); None without any.
        edits: of other memories.
    """
    for edit in edits:
        tokens = edit.answered.activations.float()
        added = _ELSEWHERE_WEIGHT * (tokens.T @ tokens)
        if edit.irrelevant is not None:
            own = edit.irrelevant.activations.float()
            added += own.T @ own
        elsewhere = added if elsewhere is None else elsewhere + added
    return elsewhere


@torch.no_grad()
def without_own(equations: NormalEquations, own: Sequence[RecordedEdit]) -> NormalEquations:
    """Not quiet on edits of the shard itself, where :func:`with_elsewhere` counted them among all others."""
    equations = without_answered(equations, ScoredInputs.stack([edit.answered for edit in own]))
    irrelevant = [edit.irrelevant for edit in own if edit.irrelevant is not None]
    if not irrelevant:
        return equations
    return equations.no_longer_silent_on(ScoredInputs.stack(irrelevant).activations, 1.0)


@torch.no_grad()
def without_answered(equations: NormalEquations, answered: ScoredInputs | None) -> NormalEquations:
    """Not quiet on some edits' prompts and targets that :func:`with_elsewhere` counted, such as overruled ones'.

    Args:
        equations: quiet on these.
        answered: their prompts and targets, or None.
    """
    return equations if answered is None else equations.no_longer_silent_on(answered.activations, _ELSEWHERE_WEIGHT)
