"""The router of one layer: decide at prefill, follow while decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..routing import (
    MAIN_MEMORY,
    NEWEST_WITHIN,
    RECOGNISED_FROM,
    choose_memory,
    pool,
    relative_activation,
    sustained_activation,
    upstream_activation,
)
from ..screening import SKETCH_ROWS, next_to_score, score_bounds
from .config import WiseConfig
from .memory import SideMemory
from .route import Route
from .sketches import SketchCache

# With fewer memories their products cost less than the screening.
SCREEN_FROM = 4
_TINY = torch.finfo(torch.float32).tiny

Product = Callable[[Tensor, Tensor], Tensor]


class Candidate(NamedTuple):
    """A side memory that may answer, as ``adapter/index``, with its adapter's configuration."""

    name: str
    memory: SideMemory
    config: WiseConfig

    @property
    def adapter(self) -> str:
        return self.name.rpartition("/")[0]


def follow(route: Route, x: Tensor, base_output: Tensor, candidates: Sequence[Candidate], product: Product) -> Tensor:
    """Apply a decision made at prefill: each active memory's product is taken for its own rows only.

    Args:
        route: the decision, for B sequences.
        x: a = A(x), shape (B, T, d_in).
        base_output: W_v a, shape (B, T, d_out).
        candidates: the memories that the route counts.
        product: (a, dW) -> dW a.

    Returns:
        Shape (B, T, d_out); ``base_output`` itself where no row is routed.
    """
    result = base_output
    for index, rows in route.rows.items():
        delta_weight = candidates[index].memory.delta_weight
        if rows is None:
            return base_output + product(x, delta_weight).to(base_output.dtype)
        rows = rows.to(x.device)
        result = result.index_add(0, rows, product(x.index_select(0, rows), delta_weight).to(base_output.dtype))
    return result


def decide(
    x: Tensor,
    base_output: Tensor,
    candidates: Sequence[Candidate],
    product: Product,
    token_mask: Tensor | None = None,
    earlier: Route | None = None,
    sketches: SketchCache | None = None,
) -> tuple[Route, Tensor]:
    """Score the memories (Eq. 3), choose one for each sequence (Eq. 6), and add the chosen products.

    Few memories are all scored exactly. Of many, a sketch rules out those that cannot be chosen; only the others'
    exact scores are computed, for the rows that need them, and the choice is the same (``screening``).

    Args:
        x: a = A(x), shape (B, T, d_in).
        base_output: W_v a, shape (B, T, d_out).
        candidates: M memories.
        product: (a, dW) -> dW a.
        token_mask: shape (B, T), True (or non-zero) where a token is real; None means all are.
        earlier: a decision that some of the sequences keep, those that it ``decided``.
        sketches: where the sketches are kept; None: every score is exact.

    Returns:
        The route, and the output of shape (B, T, d_out).
    """
    prefill = _Prefill(x, base_output, candidates, product, token_mask, earlier)
    stacked = None
    if sketches is not None and _pays(candidates):
        stacked = sketches.of([candidate.memory.delta_weight for candidate in candidates])
    if stacked is None:
        for index in range(len(candidates)):
            prefill.measure(index)
    else:
        prefill.screen(stacked)
    prefill.settle()
    return prefill.route(), prefill.result


def _pays(candidates: Sequence[Candidate]) -> bool:
    """Whether screening is possible (norms of linear maps, pooled alike) and cheaper than all products."""
    first = candidates[0]
    return (
        len(candidates) >= SCREEN_FROM
        and first.memory.delta_weight.shape[0] > 2 * SKETCH_ROWS
        and all(c.config.score_activation is None and c.config.pooling == first.config.pooling for c in candidates)
        and all(c.config.relative_scores == first.config.relative_scores for c in candidates)
    )


class _Prefill:
    """One decision under way: what is known of the scores, and the output so far."""

    def __init__(
        self,
        x: Tensor,
        base_output: Tensor,
        candidates: Sequence[Candidate],
        product: Product,
        token_mask: Tensor | None,
        earlier: Route | None,
    ) -> None:
        self.x, self.base_output, self.result = x, base_output, base_output
        self.candidates, self.product, self.token_mask = candidates, product, token_mask
        self.epsilon = torch.stack([candidate.memory.epsilon.to(x.device) for candidate in candidates])
        # Scores in units of each memory's own epsilon, where they are not to be compared as they are.
        relative = any(candidate.config.relative_scores for candidate in candidates)
        self.unit = self.epsilon.clamp(min=_TINY) if relative else torch.ones_like(self.epsilon)
        self.newest_within = NEWEST_WITHIN if relative else None
        weakest = torch.stack([candidate.memory.weakest_edit.to(x.device) for candidate in candidates])
        self.recognised = RECOGNISED_FROM * weakest / self.unit if relative else None
        # What a memory sustains counts in its own edits' loudness: a later memory's epsilon lies nearer to it.
        self.loudness = torch.where(weakest.isfinite(), weakest, self.epsilon).clamp(min=_TINY)
        shape = (x.shape[0], len(candidates))
        self.scores = torch.zeros(shape, dtype=torch.float32, device=x.device)
        self.sustained = torch.zeros_like(self.scores) if relative else None
        self.known = torch.zeros(shape, dtype=torch.bool, device=x.device)
        self.choice = torch.full(shape[:1], MAIN_MEMORY, device=x.device)
        # Whose product stands in the result: a better score can bring back one that another had replaced.
        self.applied = self.choice.clone()
        # Rows that an earlier chunk of the prompt decided stay as they are.
        self.earlier = earlier if earlier is not None and earlier.decided is not None else None
        self.fixed: Tensor | None = None
        if self.earlier is not None and self.earlier.decided is not None:
            self.fixed = self.earlier.decided
            self.scores[self.fixed] = self.earlier.scores[self.fixed]
            self.known[self.fixed] = True if self.earlier.exact is None else self.earlier.exact[self.fixed]

    def measure(self, index: int, rows: Tensor | None = None) -> None:
        """The exact score of one memory for some rows (None: all), and its product where it leads."""
        memory, config = self.candidates[index].memory, self.candidates[index].config
        x, base = (self.x, self.base_output) if rows is None else (self.x[rows], self.base_output[rows])
        mask = self.token_mask if rows is None or self.token_mask is None else self.token_mask[rows]
        which = slice(None) if rows is None else rows
        product = self.product(x, memory.delta_weight)
        tokens = _token_scores(x, product, base, config).detach().to(self.scores.dtype)
        score = pool(tokens, mask, config.pooling)
        if self.fixed is not None:
            score = torch.where(self.fixed[which], self.scores[which, index], score)
        self.scores[which, index] = score
        if self.sustained is not None:
            self.sustained[which, index] = sustained_activation(tokens, mask)
        self.known[which, index] = True
        self._choose()
        leads = (self.choice[which] == index).nonzero().squeeze(-1)
        if len(leads) == len(self.x):
            self.result = self.base_output + product.to(self.base_output.dtype)
            self.applied = self.choice
        elif len(leads):
            self._apply(index, leads if rows is None else rows[leads], product[leads])

    def _choose(self) -> None:
        """The choice among the memories whose scores are known; what an earlier chunk decided stays."""
        known_scores = torch.where(self.known, self.scores, torch.full_like(self.scores, -math.inf))
        sustained = None if self.sustained is None else self.sustained / self.loudness
        choice = choose_memory(
            known_scores / self.unit, self.epsilon / self.unit, self.newest_within, self.recognised, sustained
        )
        if self.earlier is not None and self.fixed is not None:
            choice = torch.where(self.fixed, self.earlier.choice, choice)
        self.choice = choice

    def _apply(self, index: int, rows: Tensor, product: Tensor) -> None:
        if self.result is self.base_output:
            self.result = self.base_output.clone()
        self.result[rows] = self.base_output[rows] + product.to(self.base_output.dtype)
        self.applied = self.applied.index_fill(0, rows, index)

    def settle(self) -> None:
        """Put the product of every row's choice into the result where another one's stands there."""
        if self.newest_within is None or len(self.candidates) < 3:
            return
        differs = self.choice != self.applied
        for index in set(self.choice[differs].tolist()):
            rows = (differs & (self.choice == index)).nonzero().squeeze(-1)
            self._apply(index, rows, self.product(self.x[rows], self.candidates[index].memory.delta_weight))

    def screen(self, sketches: Tensor) -> None:
        """Measure only what the choice needs."""
        with torch.no_grad():
            pooling = self.candidates[0].config.pooling
            relative = self.candidates[0].config.relative_scores
            x = self.x.float() / self.x.float().norm(dim=-1, keepdim=True).clamp(min=_TINY) if relative else self.x
            estimates, upper = score_bounds(x, sketches, self.token_mask, pooling)
        if self.earlier is not None and self.fixed is not None:
            estimates = torch.where(self.fixed[:, None], self.scores, estimates)
            upper = upper.masked_fill(self.fixed[:, None], -math.inf)
            self._measure_leading(torch.where(self.fixed, self.earlier.choice, MAIN_MEMORY))
        self.scores = torch.where(self.known, self.scores, estimates)
        limit, upper = self.epsilon / self.unit, upper / self.unit
        while self._measure_leading(
            next_to_score(upper, limit, self.scores / self.unit, self.known, self.newest_within, self.recognised)
        ):
            pass

    def _measure_leading(self, leading: Tensor) -> bool:
        """Measure for each row the memory named for it; False where none is."""
        wanted = sorted(set(leading.tolist()) - {MAIN_MEMORY})
        for index in wanted:
            self.measure(index, (leading == index).nonzero().squeeze(-1))
        return bool(wanted)

    def route(self) -> Route:
        decided = None if self.token_mask is None else self.token_mask.bool().any(dim=-1)
        if decided is not None and self.fixed is not None:
            decided = decided | self.fixed
        names = tuple(candidate.name for candidate in self.candidates)
        return Route(self.choice, self.scores, self.epsilon, names, decided, self.known)


def _token_scores(x: Tensor, product: Tensor, base_output: Tensor, config: WiseConfig) -> Tensor:
    if config.relative_scores:
        return relative_activation(product, x)
    if config.score_activation is None:
        return product.norm(dim=-1)
    base = base_output.to(product.dtype)
    return upstream_activation(base, base + product, config.score_activation)
