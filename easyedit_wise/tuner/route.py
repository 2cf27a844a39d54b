"""A decision of the router: which memory answers each sequence of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..routing import MAIN_MEMORY


@dataclass
class Route:
    """Where each sequence of a call went.

    Attributes:
        choice: shape (B,), index into ``memories`` or -1 for the main memory.
        scores: shape (B, M), Delta_act of each memory, exact or estimated from its sketch; 0 for a memory that the
            sequence could not go to (see ``own``).
        epsilon: shape (M,), each memory's threshold.
        memories: M names, ``adapter/index``.
        decided: shape (B,), False where a sequence had no real token yet, so that its turn is still to
            come (a prompt prefilled in chunks starts with padding only); None: all are decided.
        exact: bool, shape (B, M), False where a score is an estimate; None: all are exact. A chosen memory's
            score is exact.
        asked: B names: the adapter whose memories each sequence was routed among; None: all active ones.
        rows: for each memory that answers at least one sequence, the sequences' indices on ``choice``'s
            device; None: all of them.
    """

    choice: Tensor
    scores: Tensor
    epsilon: Tensor
    memories: tuple[str, ...]
    decided: Tensor | None = None
    exact: Tensor | None = None
    asked: tuple[str, ...] | None = None
    rows: dict[int, Tensor | None] = field(init=False, default_factory=dict)
    _expanded: dict[int, Route] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # One synchronisation here, at prefill, spares one in every decode step.
        choice = self.choice.tolist()
        for index in sorted(set(choice) - {MAIN_MEMORY}):
            rows = [row for row, chosen in enumerate(choice) if chosen == index]
            self.rows[index] = None if len(rows) == len(choice) else torch.tensor(rows, device=self.choice.device)
        if self.decided is not None and bool(self.decided.all()):
            self.decided = None
        if self.exact is not None and bool(self.exact.all()):
            self.exact = None

    @property
    def active(self) -> tuple[int, ...]:
        """Indices of the memories that at least one sequence goes to."""
        return tuple(self.rows)

    def expand(self, rows: int) -> Route | None:
        """The same route for ``rows`` sequences: as it is, or each repeated for its beams.

        Returns:
            None when ``rows`` is no multiple of the sequences that were routed.
        """
        routed = self.choice.shape[0]
        if rows == routed:
            return self
        if routed == 0 or rows % routed:
            return None
        if rows not in self._expanded:  # kept, since every decode step asks
            repeat = rows // routed
            self._expanded[rows] = Route(
                self.choice.repeat_interleave(repeat),
                self.scores.repeat_interleave(repeat, dim=0),
                self.epsilon,
                self.memories,
                None if self.decided is None else self.decided.repeat_interleave(repeat),
                None if self.exact is None else self.exact.repeat_interleave(repeat, dim=0),
                None if self.asked is None else tuple(name for name in self.asked for _ in range(repeat)),
            )
        return self._expanded[rows]

    def part(self, rows: Tensor, first: int, end: int) -> Route:
        """The route of some sequences among the memories ``first`` to ``end`` only, which hold all their choices.

        Args:
            rows: indices of the sequences, on ``choice``'s device.
        """
        choice = self.choice[rows]
        return Route(
            torch.where(choice == MAIN_MEMORY, choice, choice - first),
            self.scores[rows, first:end],
            self.epsilon[first:end],
            self.memories[first:end],
            None if self.decided is None else self.decided[rows],
            None if self.exact is None else self.exact[rows, first:end],
        )

    def own(self, row: int) -> Sequence[int]:
        """Indices of the memories that one sequence could go to."""
        if self.asked is None:
            return range(len(self.memories))
        return [i for i, name in enumerate(self.memories) if name.rpartition("/")[0] == self.asked[row]]

    def describe(self, row: int = 0) -> dict[str, Any]:
        """The route of one sequence in plain values: memory, score, epsilon, and whether the score is exact."""
        choice = int(self.choice[row])
        best: int | None = choice
        if choice == MAIN_MEMORY:
            best = max(self.own(row), key=lambda index: float(self.scores[row, index]), default=None)
        return {
            "memory": self.memories[choice] if choice != MAIN_MEMORY else "main",
            "score": None if best is None else float(self.scores[row, best]),
            "epsilon": None if best is None else float(self.epsilon[best]),
            "exact": best is None or self.exact is None or bool(self.exact[row, best]),
        }
