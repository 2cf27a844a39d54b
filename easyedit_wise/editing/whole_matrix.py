"""EasyEdit's way to train a shard: the whole matrix W' is the parameter, and it decays everywhere.

The mask is laid over the gradient of the loss, but not over the decay: W' <- W' - eta (M o g + lambda W'), as EasyEdit
has SGD do it. So every entry moves, those of no mask as well. Kept as W', in fp32, and not as dW: the merge compares
magnitudes of entries that only decayed, and only the same rounding gives the same order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WholeMatrix:
    """dW of a live shard, trained as W' = W + dW. Serves in place of ``Subspace``.

    Args:
        delta_weight: dW, shape (d_out, d_in).
        mask: M, bool, same shape.
        base_weight: W, same shape.

    Attributes:
        matrix: dW as it is now, a tensor of its own.
        theta: W', the leaf that an optimiser moves. Call :meth:`write` after each step.
    """

    def __init__(self, delta_weight: Tensor, mask: Tensor, base_weight: Tensor) -> None:
        self._mask, self._base = mask, base_weight.to(delta_weight.dtype)
        self.matrix = delta_weight.detach().clone(memory_format=torch.contiguous_format)
        self.theta = (self._base + self.matrix).requires_grad_(True)

    def products(self, *activations: Tensor) -> tuple[Tensor, ...]:
        """dW a of several batches of rows a, each of shape (N_i, d_in) -> (N_i, d_out).

        As W'a - Wa: EasyEdit has W'a, with the rounding of that sum, and adding Wa gives it back.
        """
        return tuple(F.linear(a, self.theta) - F.linear(a, self._base) for a in activations)

    def masked(self, gradient: Tensor) -> Tensor:
        """M o g."""
        return gradient * self._mask

    @torch.no_grad()
    def clamp(self, limit: float) -> None:
        """Keep every entry of W' within ``limit`` of W."""
        torch.clamp(self.theta, self._base - limit, self._base + limit, out=self.theta)

    @torch.no_grad()
    def write(self) -> None:
        """Put W' - W into the matrix."""
        torch.sub(self.theta, self._base, out=self.matrix)


def base_weight(layer: nn.Module) -> Tensor:
    """W of a plain linear map or GPT-2's Conv1D, shape (d_out, d_in), in fp32 or wider.

    Raises:
        ValueError: it is neither; a quantised matrix cannot decay.
    """
    from transformers.pytorch_utils import Conv1D

    weight = getattr(layer, "weight", None)
    if not isinstance(layer, (nn.Linear, Conv1D)) or not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ValueError(
            f"the layer is a {type(layer).__name__}, which has no plain matrix to decay: set decay_whole_matrix: false."
        )
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return weight.T.contiguous() if isinstance(layer, Conv1D) else weight
