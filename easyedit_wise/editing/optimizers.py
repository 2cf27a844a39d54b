"""What moves the masked entries of dW."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..hparams import WISEHyperParams


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum: Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023).

    theta <- theta - lr * (sign(b1 m + (1 - b1) g) + weight_decay * theta),  m <- b2 m + (1 - b2) g

    Every entry moves by the same amount, however large the loss or its gradient is, from the first step on; Adam
    does so only roughly, and keeps two vectors for it where this keeps one.

    Args:
        parameters: what to move.
        lr: the step of each entry.
        betas: b1, for the step, and b2, for what is remembered.
        weight_decay: decoupled decay.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no closure's loss
        """One step with the gradients that stand in ``.grad``."""
        if closure is not None:
            raise ValueError("a closure was given: compute the gradients first, then call step().")
        for group in self.param_groups:
            remembered_share, decay = group["betas"][1], group["lr"] * group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                direction = torch.lerp(parameter.grad, momentum, group["betas"][0]).sign_()
                parameter.mul_(1 - decay).sub_(direction, alpha=group["lr"])
                momentum.lerp_(parameter.grad, 1 - remembered_share)


def optimizer_for(
    theta: Tensor, hparams: WISEHyperParams
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimiser that the settings name, and its schedule: linear from ``edit_lr`` to ``edit_lr * lr_end``.

    A long first stride and short last ones: half the iterations for the same losses (docs/experiments.md).
    """
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "lion": Lion}
    optimizer = kinds[hparams.optimizer]([theta], lr=hparams.edit_lr, weight_decay=hparams.weight_decay)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=hparams.lr_end, total_iters=max(1, hparams.n_iter - 1)
    )
    return optimizer, schedule
