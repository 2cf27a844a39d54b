"""One side memory: the difference dW = W_v' - W_v of one layer, and how it routes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

LIVE = "live"
SHARD = "shard"
MERGED = "merged"
# A memory's buffers in the unit of its scores.
SCORES = ("epsilon", "weakest_edit", "weakest_answered")


@dataclass(frozen=True)
class MemoryState:
    """The contents of a side memory. Immutable: an edit installs a new state, so the old one can be put back.

    Attributes:
        stage: "live" (takes edits), "shard" (closed, waits for the merge) or "merged".
        delta_weight: dW, shape (d_out, d_in).
        mask: where a live shard may change, bool, same shape; None for the others.
        epsilon: the threshold of Eq. 6.
        n_edits: how many edits it holds.
        weakest_edit: what the prompt that activates it least of its edits' scores; infinite where that is not known.
        weakest_answered: the same of their prompts with their targets behind them. A long one may score less than its
            prompt alone (see :func:`~easyedit_wise.routing.pool`), and it shall fire, too.
    """

    stage: str
    delta_weight: Tensor
    mask: Tensor | None
    epsilon: float
    n_edits: int
    weakest_edit: float = math.inf
    weakest_answered: float = math.inf

    def with_(self, **changes: Any) -> MemoryState:
        """A copy with some attributes changed; tensors that are not named are shared."""
        return replace(self, **changes)


class SideMemory(nn.Module):
    """A :class:`MemoryState` inside the module tree, so that it moves, saves and copies with the model.

    A live memory's dW is a parameter (PEFT trains it); a closed one's is a buffer and stays as it is.
    """

    delta_weight: Tensor
    mask: Tensor
    epsilon: Tensor
    n_edits: Tensor
    weakest_edit: Tensor
    weakest_answered: Tensor

    def __init__(self, state: MemoryState) -> None:
        super().__init__()
        self.stage = state.stage
        if state.stage == LIVE:
            self.delta_weight = nn.Parameter(state.delta_weight, requires_grad=False)
            if state.mask is None:
                raise ValueError("a live side memory needs the mask that its edits are confined to.")
            self.register_buffer("mask", state.mask)
        else:
            self.register_buffer("delta_weight", state.delta_weight)
        device = state.delta_weight.device
        if device.type == "meta":  # buffers are real even when PEFT builds the layer without memory
            device = torch.device("cpu")
        # fp32 whatever the model's dtype: a threshold rounded to bf16 would move edits across it.
        for name in SCORES:
            value = float(getattr(state, name))
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32, device=device))
        self.register_buffer("n_edits", torch.tensor(int(state.n_edits), dtype=torch.int64, device=device))

    def _apply(self, fn: Any, recurse: bool = True) -> SideMemory:
        # model.half() and model.to(torch.bfloat16) cast every floating buffer: not these, see above.
        scores = {name: getattr(self, name) for name in SCORES}
        super()._apply(fn, recurse)
        for name, score in scores.items():
            setattr(self, name, score.to(getattr(self, name).device))
        return self

    def state(self) -> MemoryState:
        """The contents, sharing the tensors."""
        return MemoryState(
            stage=self.stage,
            delta_weight=self.delta_weight.detach(),
            mask=self.mask if self.stage == LIVE else None,
            epsilon=float(self.epsilon),
            n_edits=int(self.n_edits),
            weakest_edit=float(self.weakest_edit),
            weakest_answered=float(self.weakest_answered),
        )

    def extra_repr(self) -> str:
        d_out, d_in = self.delta_weight.shape
        return f"stage={self.stage}, d_in={d_in}, d_out={d_out}, edits={int(self.n_edits)}"
