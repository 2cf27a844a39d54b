"""An open shard in closed form: what its edits add to the least-squares problem, and the solution as its dW."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..hparams import WISEHyperParams
from ..least_squares import NormalEquations
from .open_shard import RecordedEdit
from .scored import ScoredInputs
from .steepest import train_steepest
from .task import EditTask
from .trainer import EditDivergedError, EditOutcome

# What the setting `consolidation` counts per: a narrow layer has room for fewer tokens to be quiet on.
_COLUMNS = 1000
# A context beside the plain prompt counts as this share of it.
_CONTEXT_WEIGHT = 0.3
# A token of an edit that another memory holds counts as this share of a token of an irrelevant prompt.
_ELSEWHERE_WEIGHT = 0.3


def columns_of(mask: Tensor) -> Tensor:
    """The columns that a mask leaves free, int64, shape (n,).

    Raises:
        ValueError: the mask is not of whole columns.
    """
    free = mask.any(dim=0)
    if not torch.equal(free, mask.all(dim=0)):
        raise ValueError(
            "the open shard was begun with a mask of random entries, and consolidation needs whole columns: go on with "
            "consolidation: 0 until the shard is full, or restore the model first."
        )
    return free.nonzero().squeeze(-1)


def trained_on_silence(neutral: ScoredInputs) -> ScoredInputs:
    """The half of the neutral prompts that a shard is made quiet on."""
    return neutral.select(torch.arange(0, len(neutral), 2))


def held_out(neutral: ScoredInputs) -> ScoredInputs:
    """The other half: what a shard was not made quiet on says how quiet it is, so epsilon is set from these."""
    return neutral.select(torch.arange(1, len(neutral), 2))


def opened(
    mask: Tensor, neutral: ScoredInputs, elsewhere: Sequence[RecordedEdit], hparams: WISEHyperParams
) -> NormalEquations:
    """The problem of a shard without edits: quiet on neutral prompts, and on edits that other memories hold.

    Args:
        mask: the shard's, bool, shape (d_out, d_in).
        neutral: all neutral prompts.
        elsewhere: edits of other memories.
        hparams: settings.
    """
    silent = trained_on_silence(neutral).activations
    columns = columns_of(mask)
    n_tokens = hparams.consolidation * len(columns) / _COLUMNS
    equations = NormalEquations.empty(columns, mask.shape[0]).silent_on(silent, n_tokens / len(silent))
    for edit in elsewhere:
        equations = equations.silent_on(edit.answered.activations, _ELSEWHERE_WEIGHT)
    return equations


def rebuilt(equations: NormalEquations, edits: Sequence[RecordedEdit], delta_weight: Tensor) -> NormalEquations:
    """With edits of which only the texts are known, as after loading: they shall say what dW says now."""
    for edit in edits:
        tokens = edit.answered.activations.to(delta_weight)
        equations = equations.saying(tokens, tokens @ delta_weight.T, tokens.new_ones(len(tokens)))
        if edit.irrelevant is not None:
            equations = equations.silent_on(edit.irrelevant.activations, 1.0)
    return equations


@torch.no_grad()
def with_irrelevant(
    equations: NormalEquations, task: EditTask, own: Sequence[ScoredInputs | None], hparams: WISEHyperParams
) -> NormalEquations:
    """Quiet also on the irrelevant prompts of the edits of a task.

    Args:
        equations: the shard's so far.
        task: the edits, with their prompts about other subjects.
        own: the irrelevant prompt of each edit that has one.
        hparams: settings.
    """
    for irrelevant in own:
        if irrelevant is not None:
            equations = equations.silent_on(irrelevant.activations, 1.0)
    if task.about_others is not None:
        # All of an edit's together count as one prompt.
        equations = equations.silent_on(task.about_others.activations, 1.0 / hparams.other_subjects)
    return equations


@torch.no_grad()
def with_trained(equations: NormalEquations, task: EditTask, outputs: Sequence[Tensor]) -> NormalEquations:
    """With the edits of a task, which shall say what they were trained to at every token of their contexts.

    Args:
        equations: the shard's so far.
        task: the edits.
        outputs: for each group of contexts y_t of its tokens, shape (N_g, d_out).
    """
    for recorded, said in zip(task.contexts, outputs, strict=True):
        rows, length = recorded.batch.input_ids.shape
        row = recorded.positions // length
        plain = row % (rows // task.n_edits) == 0
        # The plain prompt stands in every group, and counts once.
        weights = torch.where(plain, 1.0 / len(task.contexts), _CONTEXT_WEIGHT)
        equations = equations.saying(recorded.activations, said, weights)
    return equations


@torch.no_grad()
def write_solution(equations: NormalEquations, delta_weight: Tensor, limit: float | None) -> None:
    """Solve, and put the solution into dW, entries clamped to ``limit``.

    Raises:
        EditDivergedError: the solution is not finite; dW is as it was.
    """
    try:
        solution = equations.solution()
        finite = bool(torch.isfinite(solution).all())
    except torch.linalg.LinAlgError:  # what is not finite has no Cholesky factor
        finite = False
    if not finite:
        raise EditDivergedError(
            "what the last edit was trained to overflows the shard's least-squares problem: the edit was taken back "
            "and earlier edits are as they were. Lower edit_lr."
        )
    if limit is not None:
        solution.clamp_(-limit, limit)
    delta_weight[:, equations.columns] = solution.to(delta_weight)


def train_into(
    delta_weight: Tensor,
    equations: NormalEquations,
    task: EditTask,
    own: Sequence[ScoredInputs | None],
    hparams: WISEHyperParams,
    step: float,
    label: str,
    on_iteration: Callable[[int, float], None] | None = None,
) -> tuple[NormalEquations, EditOutcome]:
    """Train the edits of a task, and solve for dW with them.

    Args:
        delta_weight: dW of the shard, shape (d_out, d_in), changed in place; if anything is raised, the caller has to
            put it back.
        equations: the shard's problem so far.
        task: the edits.
        own: the irrelevant prompt of each edit that has one.
        hparams: settings.
        step: see :func:`train_steepest`.
        label: what an error calls the edits.
        on_iteration: called with the iteration and its loss.

    Returns:
        (the shard's problem with these edits, what training gave).

    Raises:
        EditDivergedError: the loss or the solution is not finite.
    """
    equations = with_irrelevant(equations, task, own, hparams)
    trained = train_steepest(equations, len(delta_weight), task, hparams, step, label, on_iteration)
    equations = with_trained(equations, task, trained.outputs)
    write_solution(equations, delta_weight, hparams.norm_constraint)
    return equations, trained.losses
