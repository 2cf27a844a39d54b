"""A mixed batch at the router: rows that ask for different adapters are decided apart, then joined again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..routing import MAIN_MEMORY
from .route import Route
from .router import Candidate, Product, decide, follow
from .sketches import SketchCache


class _Group(NamedTuple):
    """The rows that ask for one adapter, and where its memories stand among the candidates."""

    rows: list[int]
    first: int
    end: int


def decide_mixed(
    x: Tensor,
    base_output: Tensor,
    candidates: Sequence[Candidate],
    asked: tuple[str, ...],
    product: Product,
    token_mask: Tensor | None = None,
    earlier: Route | None = None,
    sketches: SketchCache | None = None,
) -> tuple[Route, Tensor]:
    """:func:`~easyedit_wise.tuner.router.decide`, each row among the memories of the adapter that it asks for.

    Rows of one adapter are decided as a batch of their own, so that every rule of the router holds as if that adapter
    were the only one: its pooling and its kind of score, screening, the newest of like memories.

    Args:
        x: a = A(x), shape (B, T, d_in).
        base_output: W_v a, shape (B, T, d_out).
        candidates: the memories of all adapters that are asked for, those of one adapter side by side.
        asked: B names; a row whose name has no candidates stays in the main memory.
        product: (a, dW) -> dW a.
        token_mask: shape (B, T), True (or non-zero) where a token is real; None means all are.
        earlier: a decision that some of the rows keep, for the same candidates.
        sketches: where the sketches are kept; None: every score is exact.

    Returns:
        The route, and the output of shape (B, T, d_out).
    """
    groups = list(_groups(candidates, asked))
    if len(groups) == 1 and len(groups[0].rows) == len(asked):
        route, result = decide(x, base_output, candidates, product, token_mask, earlier, sketches)
        route.asked = asked
        return route, result
    n_rows, device = x.shape[0], x.device
    result = base_output.clone()
    choice = torch.full((n_rows,), MAIN_MEMORY, device=device)
    scores = torch.zeros(n_rows, len(candidates), dtype=torch.float32, device=device)
    exact = torch.ones(n_rows, len(candidates), dtype=torch.bool, device=device)
    epsilon = torch.zeros(len(candidates), dtype=torch.float32, device=device)
    decided = torch.ones(n_rows, dtype=torch.bool, device=device)
    for group in groups:
        rows, columns = torch.tensor(group.rows, device=device), slice(group.first, group.end)
        own, kept = (x[rows], base_output[rows]), None if earlier is None else earlier.part(rows, *group[1:])
        if kept is not None and kept.decided is None:
            route, output = kept, follow(kept, *own, candidates[columns], product)
        else:
            mask = None if token_mask is None else token_mask[rows]
            route, output = decide(*own, candidates[columns], product, mask, kept, sketches)
        epsilon[columns] = route.epsilon
        scores[rows, columns] = route.scores
        if route.active:
            result = result.index_copy(0, rows, output)
            choice[rows] = torch.where(route.choice == MAIN_MEMORY, route.choice, route.choice + group.first)
        if route.exact is not None:
            exact[rows, columns] = route.exact
        if route.decided is not None:
            decided[rows] = route.decided
    names = tuple(candidate.name for candidate in candidates)
    return Route(choice, scores, epsilon, names, decided, exact, asked), result


def _groups(candidates: Sequence[Candidate], asked: tuple[str, ...]) -> Iterator[_Group]:
    adapters = [candidate.adapter for candidate in candidates]
    for name in dict.fromkeys(adapters):
        rows = [row for row, wanted in enumerate(asked) if wanted == name]
        first = adapters.index(name)
        if rows:
            yield _Group(rows, first, first + adapters.count(name))
