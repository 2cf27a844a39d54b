"""A side memory in closed form: what its edits shall say, and where it shall be quiet, as one least-squares problem.

Training an edit moves dW, and what earlier edits and irrelevant prompts get from it moves, too. The outputs that each
edit was trained to are known, though, and so is what should get nothing:

    dW = argmin  sum_t w_t || dW a_t - y_t ||^2  +  sum_u v_u || dW a_u ||^2  +  lambda || dW ||_F^2

a_t are the edits' tokens, y_t = dW_t a_t what their memory said when they had just been trained, a_u the tokens of
prompts to be quiet on. The sums enter through A^T A only, so a shard of any number of edits needs the same memory.
It is the update of MEMIT (Meng et al., 2023) inside the shard's subspace, with outputs from training. Not in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# lambda, as a share of the mean diagonal entry of the quiet side. Smaller ones let prompts fire that are like neither
# the edits nor the neutral prompts (docs/experiments.md).
_RIDGE = 0.05


@dataclass(frozen=True)
class NormalEquations:
    """The problem of one shard, whose mask is whole columns of dW. Immutable.

    Attributes:
        columns: which n of the d_in columns, int64, shape (n,).
        edits: sum_t w_t a_t a_t^T over these columns, shape (n, n).
        outputs: sum_t w_t y_t a_t^T, shape (d_out, n).
        quiet: sum_u v_u a_u a_u^T, shape (n, n).
    """

    columns: Tensor
    edits: Tensor
    outputs: Tensor
    quiet: Tensor

    @classmethod
    def empty(cls, columns: Tensor, d_out: int) -> NormalEquations:
        """Nothing wanted yet, in fp32 on the columns' device."""
        n = len(columns)
        square = torch.zeros(n, n, dtype=torch.float32, device=columns.device)
        return cls(columns, square, square.new_zeros(d_out, n), square)

    def saying(self, activations: Tensor, outputs: Tensor, weights: Tensor) -> NormalEquations:
        """With some tokens of edits: a_t, shape (N, d_in), y_t, shape (N, d_out), and w_t, shape (N,)."""
        own = activations[:, self.columns].to(self.edits.dtype)
        weighted = own * weights[:, None].to(own)
        return replace(
            self,
            edits=self.edits + weighted.T @ own,
            outputs=self.outputs + self.share(activations, outputs, weights),
        )

    def share(self, activations: Tensor, outputs: Tensor, weights: Tensor) -> Tensor:
        """What some tokens add to ``outputs``, shape (d_out, n); arguments as for :meth:`saying`."""
        own = activations[:, self.columns].to(self.edits.dtype)
        return outputs.to(own).T @ (own * weights[:, None].to(own))

    def louder(self, share: Tensor, gain: float) -> NormalEquations:
        """With ``gain`` times as much of what some tokens added to ``outputs``, see :meth:`share`."""
        return self.with_more(share, gain - 1)

    def with_more(self, share: Tensor, times: float) -> NormalEquations:
        """With ``times`` a share more in ``outputs``, see :meth:`share`."""
        return replace(self, outputs=self.outputs + times * share)

    def silent_on(self, activations: Tensor, weight: float | Tensor) -> NormalEquations:
        """With some tokens that shall get nothing: a_u, shape (N, d_in), each with the weight v, or its own of (N,)."""
        own = activations[:, self.columns].to(self.quiet.dtype)
        if isinstance(weight, Tensor):
            return replace(self, quiet=self.quiet + (own * weight[:, None].to(own)).T @ own)
        return replace(self, quiet=self.quiet + weight * (own.T @ own))

    def no_longer_silent_on(self, activations: Tensor, weight: float) -> NormalEquations:
        """Without some tokens that were to get nothing; at least what else there is to be quiet on stays.

        ``quiet`` would not be a sum of squares any more if more were taken off than the tokens added. The weight goes
        no further than that: to 1 / max eigenvalue of A K^-1 A^T, less a hundredth, which is at least what they added.

        Args:
            activations: a_u, shape (N, d_in).
            weight: v, with which they were added.

        Raises:
            ValueError: nothing is to be quiet.
        """
        own = activations[:, self.columns].to(self.quiet.dtype)
        solved = torch.linalg.solve_triangular(
            torch.linalg.cholesky(self._with_ridge(self.quiet, 0.1)), own.T, upper=False
        )
        largest = float(torch.linalg.matrix_norm(solved, ord=2)) ** 2
        allowed = weight if largest == 0 else min(weight, 0.99 / largest)
        return self.silent_on(activations, -allowed)

    def quiet_factor(self) -> Tensor:
        """The Cholesky factor of K = sum_u v_u a_u a_u^T + lambda I, shape (n, n).

        Raises:
            ValueError: nothing is to be quiet, so that there is no scale for lambda.
        """
        return torch.linalg.cholesky(self._with_ridge(self.quiet))

    def factor(self) -> Tensor:
        """The Cholesky factor of the whole problem, shape (n, n); ``outputs`` do not enter.

        Raises:
            ValueError: nothing is to be quiet, so that there is no scale for lambda.
        """
        return torch.linalg.cholesky(self._with_ridge(self.edits + self.quiet))

    def solution(self, factor: Tensor | None = None, feedback: int = 0) -> Tensor:
        """The columns of dW, shape (d_out, n).

        With ``feedback`` the edits' residual, sum_t w_t (y_t - dW a_t) a_t^T, is added to what they shall say, and the
        problem is solved again with the same factor: steps of the augmented Lagrangian method towards dW a_t = y_t, in
        which being quiet decides what the edits leave open.

        Args:
            factor: :meth:`factor`, where it is known.
            feedback: how many such steps.

        Raises:
            ValueError: nothing is to be quiet, so that there is no scale for lambda.
        """
        factor = self.factor() if factor is None else factor
        asked = self.outputs
        solved = torch.cholesky_solve(asked.T, factor).T
        for _ in range(feedback):
            asked = asked + self.outputs - solved @ self.edits
            solved = torch.cholesky_solve(asked.T, factor).T
        return solved.contiguous()

    def _with_ridge(self, matrix: Tensor, share: float = 1.0) -> Tensor:
        scale = self.quiet.diagonal().mean()
        if not bool(scale > 0):
            raise ValueError("the least-squares problem has no irrelevant tokens: add some with silent_on().")
        ridge = torch.diag_embed((share * _RIDGE * scale).expand(len(matrix)))
        return matrix + ridge
