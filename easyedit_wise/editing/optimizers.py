"""How a gradient becomes a step of the side memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..hparams import WISEHyperParams


class NormalizedAdam(torch.optim.Optimizer):
    """Adam with one second moment for the whole matrix instead of one for every entry.

    The step keeps the gradient's own direction. That direction is a sum of outer products of what
    the output lacks with the activations A(x), so the features that carry the prompt's meaning move
    most. Elementwise Adam moves every entry alike, which puts as much weight on features that
    are mere noise, and disturbs earlier edits more. The learning rate is the root mean square of a
    step's non-zero entries, so it does not depend on the scale of A(x) or of the loss.

    Args:
        params: the matrices to train.
        lr: root mean square of a step's entries.
        betas: decay of the first and second moment.
        eps: keeps the division finite.
        weight_decay: added to the gradient as weight_decay * weight.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step: m <- b1 m + (1-b1) g, v <- b2 v + (1-b2) mean(g^2), W <- W - lr m^ / sqrt(v^)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                self._step(parameter, beta1, beta2, group)
        return loss

    def _step(self, parameter: Tensor, beta1: float, beta2: float, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        if group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["first"] = torch.zeros_like(parameter)
            state["second"] = parameter.new_zeros(())
        state["step"] += 1
        state["first"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        n_moving = torch.count_nonzero(gradient).clamp(min=1)
        state["second"].mul_(beta2).add_(gradient.square().sum() / n_moving, alpha=1 - beta2)
        first_correction = 1 - beta1 ** state["step"]
        second = (state["second"] / (1 - beta2 ** state["step"])).sqrt().add_(group["eps"])
        parameter.sub_(state["first"] / second * (group["lr"] / first_correction))


def make_optimizer(parameter: Tensor, hparams: WISEHyperParams) -> torch.optim.Optimizer:
    """The optimiser that ``hparams.optimizer`` names, over one matrix."""
    settings: dict[str, Any] = {"lr": hparams.edit_lr, "weight_decay": hparams.weight_decay}
    if hparams.optimizer == "adam":
        return torch.optim.Adam([parameter], **settings)
    if hparams.optimizer == "normalized":
        return NormalizedAdam([parameter], **settings)
    return torch.optim.SGD([parameter], **settings)
