"""An open shard in closed form: what its edits add to the least-squares problem, and the solution as its dW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..hparams import WISEHyperParams
from ..least_squares import NormalEquations
from .elsewhere import without_answered
from .gain import SpokenEdit, write_amplified
from .inherited import Inherited
from .open_shard import WATCHED, OpenShard
from .recorded import RecordedEdit
from .scored import ScoredInputs
from .steepest import train_steepest
from .task import EditTask, RecordedContexts
from .trainer import EditDivergedError, EditOutcome

# What the setting `consolidation` counts per: a narrow layer has room for fewer tokens to be quiet on.
_COLUMNS = 1000
# A context beside the plain prompt counts as this share of it.
_CONTEXT_WEIGHT = 0.3
# A token of a prompt counts as this many of a target. The prompt decides the route, and a long target has many tokens
# more; one that is said less than it should be is raised until it is heard, in unrelated texts, too.
_PROMPT_WEIGHT = 3.0
# What a target's tokens out of order count as, all of an edit's together, in prompts: they say what is new, and are
# the loudest.
_SCRAMBLED_TARGET_WEIGHT = 3.0


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


def opened(
    mask: Tensor,
    neutral: ScoredInputs,
    written: Tensor | None,
    elsewhere: Tensor | None,
    hparams: WISEHyperParams,
) -> NormalEquations:
    """The problem of a shard without edits: quiet on neutral prompts, on text at large, and on what others hold.

    Args:
        mask: the shard's, bool, shape (d_out, d_in).
        neutral: all neutral prompts; the shard is made quiet on one half, and the other says how quiet it is.
        written: E[a a^T] of text at large, shape (d_in, d_in), or None.
        elsewhere: see :func:`with_elsewhere`.
        hparams: settings.
    """
    silent = neutral.halves()[0].activations
    columns = columns_of(mask)
    n_tokens = hparams.consolidation * len(columns) / _COLUMNS
    equations = NormalEquations.empty(columns, mask.shape[0]).silent_on(silent, n_tokens / len(silent))
    for moments, weight in ((written, hparams.written * len(columns) / _COLUMNS), (elsewhere, 1.0)):
        if moments is not None:
            equations = replace(equations, quiet=equations.quiet + weight * moments[columns[:, None], columns])
    return equations


def rebuilt(
    equations: NormalEquations, edits: Sequence[RecordedEdit], delta_weight: Tensor, hparams: WISEHyperParams
) -> NormalEquations:
    """With edits of which only the texts are known, as after loading: they shall say what dW says now."""
    for edit in edits:
        tokens = edit.answered.activations.to(delta_weight)
        weights = _as_in_all_contexts(edit.prompt_mask[edit.answered.token_mask].bool(), hparams)
        equations = equations.saying(tokens, tokens @ delta_weight.T, weights)
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
        task: the edits, with their prompts about other subjects, their targets' tokens out of order, what would follow
            their targets, the tokens of names that are not finished yet, and other memories' edits about the same,
            whose tokens count as much as their own (a token of both is the other's).
        own: the irrelevant prompt of each edit that has one.
        hparams: settings.
    """
    for irrelevant in own:
        if irrelevant is not None:
            equations = equations.silent_on(irrelevant.activations, 1.0)
    # All of an edit's of one kind together count as one prompt.
    if task.about_others is not None:
        equations = equations.silent_on(task.about_others.activations, 1.0 / hparams.other_subjects)
    if task.scrambled_targets is not None:
        equations = equations.silent_on(
            task.scrambled_targets.activations, _SCRAMBLED_TARGET_WEIGHT / hparams.scrambled
        )
    if task.after_answers is not None:
        equations = equations.silent_on(task.after_answers.activations, 1.0)
    for group in task.contexts if hparams.unfinished_names else ():
        weights, quiet = hparams.unfinished_names * _context_weights(group, task), group.unfinished
        equations = equations.silent_on(group.activations[quiet], weights[quiet])
    if task.related is not None:
        equations = equations.silent_on(task.related.activations, _PROMPT_WEIGHT)
    return equations


@torch.no_grad()
def with_inherited(
    equations: NormalEquations, inherited: Inherited | None, hparams: WISEHyperParams
) -> NormalEquations:
    """Saying also what other memories say of their edits."""
    if inherited is None:
        return equations
    weights = _as_in_all_contexts(inherited.in_prompt, hparams)
    return equations.saying(inherited.activations, inherited.outputs, weights)


def _as_in_all_contexts(in_prompt: Tensor, hparams: WISEHyperParams) -> Tensor:
    """What a token of an edit's plain prompt and target counts where its other contexts are not at hand."""
    return torch.where(in_prompt, _PROMPT_WEIGHT, 1.0) * (1.0 + _CONTEXT_WEIGHT * hparams.n_contexts)


@torch.no_grad()
def with_trained(
    equations: NormalEquations,
    task: EditTask,
    outputs: Sequence[Tensor],
    recorded: Sequence[RecordedEdit],
    hparams: WISEHyperParams,
) -> tuple[NormalEquations, list[SpokenEdit]]:
    """With the edits of a task, which shall say what they were trained to at every token of their contexts.

    Args:
        equations: the shard's so far.
        task: the edits.
        outputs: for each group of contexts y_t of its tokens, shape (N_g, d_out).
        recorded: the edits as the router sees them.
        hparams: settings.

    Returns:
        (the problem with them, each one's share of it).
    """
    shares = [torch.zeros_like(equations.outputs) for _ in recorded]
    prompts = [torch.zeros_like(equations.outputs) for _ in recorded]
    for group, said in zip(task.contexts, outputs, strict=True):
        weights = _context_weights(group, task)
        if hparams.unfinished_names:  # the quiet side has the former, and the latter say what follows from the rest
            weights = torch.where(group.unfinished | group.beside, 0.0, weights)
        edit = group.row // (len(group.batch.input_ids) // task.n_edits)
        if any(task.n_inherited):  # there the inherited edits say what is said
            n_inherited = torch.tensor(task.n_inherited, device=edit.device)[edit]
            weights = torch.where(_is_plain(group, task) & (group.place < n_inherited), 0.0, weights)
        equations = equations.saying(group.activations, said, weights)
        for index in range(len(recorded)):
            own = edit == index
            for total, some in ((shares[index], own), (prompts[index], own & group.in_prompt)):
                total += equations.share(group.activations[some], said[some], weights[some])
    return equations, [SpokenEdit(*one) for one in zip(recorded, shares, prompts, strict=True)]


def _context_weights(group: RecordedContexts, task: EditTask) -> Tensor:
    """What each token of some contexts counts, shape (N,)."""
    # The plain prompt stands in every group, and counts once.
    weights = torch.where(_is_plain(group, task), 1.0 / len(task.contexts), _CONTEXT_WEIGHT)
    return torch.where(group.in_prompt, _PROMPT_WEIGHT * weights, weights)


def _is_plain(group: RecordedContexts, task: EditTask) -> Tensor:
    """Which tokens of some contexts are of a plain prompt and its target, bool, shape (N,)."""
    return group.row % (len(group.batch.input_ids) // task.n_edits) == 0


def keep_to_norm_constraint(delta_weight: Tensor, hparams: WISEHyperParams) -> None:
    """Clamp the entries of dW, in place, to the limit that the settings have, if any."""
    if hparams.norm_constraint is not None:
        delta_weight.clamp_(-hparams.norm_constraint, hparams.norm_constraint)


def write_solution(shard: OpenShard, delta_weight: Tensor, hparams: WISEHyperParams) -> OpenShard:
    """Solve a shard's problem into dW, entries clamped to ``norm_constraint``.

    Args:
        shard: with its problem.
        delta_weight: dW, shape (d_out, d_in), changed in place.
        hparams: settings.

    Returns:
        The shard; of more than :data:`WATCHED` edits the earliest keep the gain that they have by now.

    Raises:
        EditDivergedError: the solution is not finite.
        ValueError: the shard has no problem, or one without anything to be quiet on.
    """
    if shard.equations is None:
        raise ValueError("the shard has no least-squares problem: it was begun without consolidation.")
    equations, spoken = shard.equations, shard.spoken
    try:
        gains = write_amplified(equations, spoken, delta_weight, hparams, shard.settled)
        finite = bool(torch.isfinite(delta_weight).all())
    except torch.linalg.LinAlgError:  # what is not finite has no Cholesky factor
        finite = False
    if not finite:
        raise EditDivergedError(
            "what the last edit was trained to overflows the shard's least-squares problem: the edit was taken back "
            "and earlier edits are as they were. Lower edit_lr."
        )
    keep_to_norm_constraint(delta_weight, hparams)
    n_settled = max(0, len(spoken) - WATCHED)
    for edit, gain in zip(spoken[:n_settled], gains[:n_settled], strict=True):
        equations = gain.applied(equations, edit)
    return replace(shard, equations=equations, spoken=spoken[n_settled:])


def train_into(
    shard: OpenShard,
    task: EditTask,
    recorded: Sequence[RecordedEdit],
    hparams: WISEHyperParams,
    step: float,
    label: str,
    on_iteration: Callable[[int, float], None] | None = None,
) -> tuple[OpenShard, EditOutcome]:
    """Train the edits of a task, and put them into the shard's problem.

    Args:
        shard: with its problem so far.
        task: the edits.
        recorded: the edits as the router sees them.
        hparams: settings.
        step: see :func:`train_steepest`.
        label: what an error calls the edits.
        on_iteration: called with the iteration and its loss.

    Returns:
        (the shard with these edits in its problem, which is to be solved yet; what training gave).

    Raises:
        EditDivergedError: the loss is not finite.
        ValueError: the shard has no problem.
    """
    if shard.equations is None:
        raise ValueError("the shard has no least-squares problem: it was begun without consolidation.")
    equations = without_answered(shard.equations, task.overruled)
    equations = with_irrelevant(equations, task, [one.irrelevant for one in recorded], hparams)
    quiet = equations
    if task.inherited is not None:  # what is the other edits' is divided out of this one's
        quiet = quiet.silent_on(task.inherited.activations, _PROMPT_WEIGHT)
    trained = train_steepest(quiet, len(equations.outputs), task, hparams, step, label, on_iteration)
    equations = with_inherited(equations, task.inherited, hparams)
    equations, spoken = with_trained(equations, task, trained.outputs, recorded, hparams)
    shard = replace(shard, equations=equations, spoken=(*shard.spoken, *spoken))
    return shard.with_tokens_of(task.inherited), trained.losses
