"""One set of settings for any model: margins and steps in units of the layer's own output.

The layer's output has a norm of 68 in the 21st layer of SmolLM2-135M and of 3 in the 13th of Gemma 3 270M: a
margin of 20, or a step that fits the one, is of no use in the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..hparams import WISEHyperParams

# Delta_act is counted in this part of the mean output norm, which leaves the paper's margins (5, 20, 10) about
# what they are in the layers that they were found in.
_PARTS = 64.0


@dataclass(frozen=True)
class LayerUnits:
    """The scale of one layer on neutral prompts.

    Attributes:
        output_norm: mean of || W_v a ||_2 over tokens.
        input_norm: mean of || a ||_1 over tokens.
        d_out: components of the output.
    """

    output_norm: float
    input_norm: float
    d_out: int

    @classmethod
    def of(cls, activations: Tensor, base_output: Tensor) -> LayerUnits:
        """From A(x) of some tokens, shape (N, d_in), and W_v a, shape (N, d_out)."""
        return cls(
            float(base_output.float().norm(dim=-1).mean()),
            float(activations.float().abs().sum(dim=-1).mean()),
            base_output.shape[-1],
        )

    @property
    def score(self) -> float:
        """The unit of Delta_act."""
        return self.output_norm / _PARTS

    def step(self, share: float, rho: float) -> float:
        """The step of each masked entry that changes the output by ``share`` of its own size.

        If all masked entries of a row move by eta in the signs of a, the component changes by eta * rho * ||a||_1;
        the layer's own components have the size ||W_v a||_2 / sqrt(d_out).
        """
        size = self.output_norm / self.d_out**0.5
        return share * size / max(rho * self.input_norm, torch.finfo(torch.float32).tiny)

    def resolved(self, hparams: WISEHyperParams) -> WISEHyperParams:
        """The same settings with ``edit_lr`` as the optimiser wants it."""
        return replace(hparams, edit_lr=self.step(hparams.edit_lr, hparams.mask_ratio))
