"""The losses of one training, read without making the device wait for the host."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Iterations by which the host reads behind an accelerator: by then the copies have long arrived.
_LAG = 4


class LossRecord:
    """Keeps the losses, decides on the device when training has settled, and tells the host.

    EasyEdit's early stop: over one turn through the groups of contexts every loss is at most ``limit``, and the
    last one has changed by at most ``change`` since the turn before; then come ``patience`` more iterations. On an
    accelerator the host reads some iterations late, so :attr:`settled` must keep later steps from moving anything.

    Args:
        n_iter: how many iterations there can be.
        n_groups: iterations of one turn.
        limit: of a settled loss.
        change: of a settled loss.
        device: where the losses are computed.
        on_iteration: called with the iteration and its loss, in order.
        lag: how many iterations late the host reads; None: at once on a CPU.
        patience: iterations between the one whose loss has settled and the last.
    """

    def __init__(
        self,
        n_iter: int,
        n_groups: int,
        limit: float,
        change: float,
        device: torch.device,
        on_iteration: Callable[[int, float], None] | None = None,
        lag: int | None = None,
        patience: int = 0,
    ) -> None:
        self._patience = patience
        self._n_groups, self._limit, self._change = n_groups, limit, change
        self._lag = (0 if device.type == "cpu" else _LAG) if lag is None else lag
        self._on_iteration = on_iteration
        self._history = torch.zeros(n_iter, device=device)
        self._host = torch.zeros(n_iter, 3, pin_memory=device.type == "cuda")
        self._arrived: list[torch.cuda.Event] = []
        self._n_added = 0
        self._stopped = False
        self.settled = torch.zeros((), dtype=torch.bool, device=device)
        self.losses: list[float] = []
        self.edit_losses: list[float] = []

    @property
    def reads_late(self) -> bool:
        """Whether steps may be made after training has settled."""
        return self._lag > 0

    def add(self, loss: Tensor, edit_loss: Tensor) -> None:
        """The losses of the next iteration, scalars."""
        index, turn = self._n_added, self._n_groups
        self._n_added += 1
        self._history[index] = loss.detach()
        judged = index - self._patience
        if judged >= turn:
            small = (self._history[judged - turn + 1 : judged + 1] <= self._limit).all()
            still = (self._history[judged] - self._history[judged - turn]).abs() <= self._change
            self.settled = self.settled | (small & still)
        row = torch.stack([loss.detach(), edit_loss.detach(), self.settled.to(loss.dtype)])
        self._host[index].copy_(row, non_blocking=True)
        if self._host.is_pinned():
            event = torch.cuda.Event()
            event.record()
            self._arrived.append(event)

    def stopped(self) -> bool:
        """Read what can be read by now; True if training has settled.

        Raises:
            FloatingPointError: a loss is NaN or infinite; its argument is the loss.
        """
        return self._read(self._n_added - self._lag)

    def finish(self) -> None:
        """Read the rest.

        Raises:
            FloatingPointError: as :meth:`stopped`.
        """
        self._read(self._n_added)

    def _read(self, end: int) -> bool:
        while len(self.losses) < end and not self._stopped:
            index = len(self.losses)
            if self._arrived:
                self._arrived[index].synchronize()
            loss, edit_loss, settled = self._host[index].tolist()
            self.losses.append(loss)
            self.edit_losses.append(edit_loss)
            if not math.isfinite(loss):
                raise FloatingPointError(loss)
            if self._on_iteration is not None:
                self._on_iteration(index, loss)
            self._stopped = bool(settled)
        return self._stopped
