"""What one edit, or a batch of edits, trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..hparams import WISEHyperParams
from ..routing import pool
from .frozen_prefix import FrozenPrefix
from .inherited import Inherited
from .requests import TokenBatch
from .scored import ScoredInputs, placed, real_positions, score_tokens


@dataclass(frozen=True)
class RecordedContexts:
    """Some contexts of each edit: their tokens, and what precedes the side memory.

    The rows stand edit by edit, each edit's plain prompt first, and every edit has as many.

    Attributes:
        batch: B = E * C sequences.
        prefix: their recording.
        activations: A(x) of their N real tokens, shape (N, d_in), in the dtype that training computes in.
        positions: where these stand in the (B * T) tokens, shape (N,). Where padding counts they are all of them.
    """

    batch: TokenBatch
    prefix: FrozenPrefix
    activations: Tensor
    positions: Tensor

    @classmethod
    def of(cls, batch: TokenBatch, prefix: FrozenPrefix, dtype: torch.dtype = torch.float32) -> RecordedContexts:
        """Keep the real tokens' activations of a recording, and drop its padded ones."""
        positions = real_positions(batch.counted_mask)
        activations = prefix.take_layer_input().flatten(0, 1)[positions].to(dtype)
        return cls(batch, prefix, activations, positions)

    @property
    def row(self) -> Tensor:
        """The sequence of each of the N tokens, shape (N,)."""
        return self.positions // self.batch.input_ids.shape[1]

    @property
    def place(self) -> Tensor:
        """Which token of its sequence each of the N tokens is, from 0, shape (N,); padding counts where it is kept."""
        row = self.row
        return torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)

    @property
    def in_prompt(self) -> Tensor:
        """Which of the N tokens stand before the target, bool, shape (N,)."""
        return self.batch.prompt_mask.flatten()[self.positions]

    @property
    def unfinished(self) -> Tensor:
        """Which of the N tokens are of names that are not finished yet, bool, shape (N,); see :mod:`.names`."""
        return self._marked(self.batch.unfinished_mask)

    @property
    def beside(self) -> Tensor:
        """Which of the N tokens stand in a prompt beside the name that it is about, bool, shape (N,)."""
        return self._marked(self.batch.beside_mask)

    def _marked(self, mask: Tensor | None) -> Tensor:
        return torch.zeros_like(self.in_prompt) if mask is None else mask.flatten()[self.positions]

    def logits(self, product: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """The model's logits at some positions with W_v a + dW a as the layer's output.

        Args:
            product: dW a of the real tokens, shape (N, d_out).
            positions: (rows, columns), each of shape (P,).

        Returns:
            Shape (P, V).
        """
        base = self.prefix.layer_output
        flat = base.flatten(0, 1).index_add(0, self.positions, product.to(base.dtype))
        return self.prefix.replay(flat.view(base.shape), positions)

    def scores(self, product: Tensor, hparams: WISEHyperParams) -> tuple[Tensor, Tensor | None]:
        """Which tokens of the contexts shall activate the memory, and which shall not.

        With ``subject_routing`` and a known subject, its tokens shall and the prompt's other tokens shall
        not, so that the memory answers wherever the subject is mentioned, however the question is put, and
        not to the same question about another one. (EasyEdit does so for requests whose irrelevant prompt
        is part of the prompt.) Otherwise the whole prompt shall.

        Args:
            product: dW a of the real tokens, shape (N, d_out).
            hparams: settings.

        Returns:
            (Delta_act(x_e) of each context, shape (B,); what counts as irrelevant, shape (B,), or None).
        """
        prompt = self.batch.prompt_mask
        base: Tensor | None = None
        if hparams.score_activation is not None:
            base = self.prefix.layer_output.flatten(0, 1)[self.positions]
        tokens = placed(score_tokens(product, base, self.activations, hparams), self.positions, prompt)
        subject = self.batch.subject_mask if hparams.subject_routing else None
        if subject is None:
            return pool(tokens, prompt, hparams.pooling), None
        return pool(tokens, subject, hparams.pooling), pool(tokens, prompt & ~subject, hparams.pooling)


@dataclass(frozen=True)
class Rehearsed:
    """The shard's earlier edits for the rehearsal loss.

    Attributes:
        rows: B, their activations or a sketch of them, shape (R, d_in).
        n_tokens: how many tokens the rows stand for.
    """

    rows: Tensor
    n_tokens: int


@dataclass
class EditTask:
    """Everything that E edits of one shard train on, recorded once.

    Attributes:
        contexts: the contexts in groups; the iterations take turns through them.
        irrelevant: x_i of Eq. 5, of all edits.
        past: x_m of Appendix B.3, edits that other memories hold, or None.
        earlier: the shard's earlier edits, or None.
        irrelevant_of: which rows of ``irrelevant`` are each edit's; None: one edit, which has all of them.
        about_others: the edits' own prompts about other subjects, or None.
        scrambled_targets: the tokens of the edits' targets among others, or None.
        related: edits that other memories hold about the same subjects, with their targets, or None.
        inherited: those that one of these goes on from or that go on from it, and what they say, or None.
        n_inherited: how many first tokens of each edit's plain prompt and target are those of edits that it inherited
            (:func:`.inherited.divided`); empty: none.
        overruled: edits that other memories hold of the very same prompts, with their targets, or None.
        after_answers: what the main memory would write behind the targets, or None.
        unit: what Delta_act and the rehearsal's distances are counted in.
        base_weight: W, shape (d_out, d_in), where the whole matrix decays; else None.
    """

    contexts: list[RecordedContexts]
    irrelevant: ScoredInputs
    past: ScoredInputs | None = None
    earlier: Rehearsed | None = None
    irrelevant_of: Sequence[Tensor] | None = None
    unit: float = 1.0
    about_others: ScoredInputs | None = None
    scrambled_targets: ScoredInputs | None = None
    related: ScoredInputs | None = None
    inherited: Inherited | None = None
    n_inherited: Sequence[int] = ()
    base_weight: Tensor | None = None
    overruled: ScoredInputs | None = None
    after_answers: ScoredInputs | None = None

    @property
    def n_edits(self) -> int:
        """E."""
        return 1 if self.irrelevant_of is None else len(self.irrelevant_of)


def target_positions(batch: TokenBatch, hparams: WISEHyperParams) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Where the supervised tokens are predicted.

    Returns:
        ((rows, columns), targets, is_first), each of shape (N,): the logits at (row, column) predict
        the target; ``is_first`` marks the first supervised token of each sequence.
    """
    supervised = batch.target_mask
    if hparams.objective_optimization == "prompt_and_label":
        supervised = supervised | batch.prompt_mask
    # The first token of a sequence has nothing before it that could predict it.
    predicted = supervised[:, 1:] & batch.counted_mask[:, :-1]
    rows, columns = predicted.nonzero(as_tuple=True)
    is_target = batch.target_mask[:, 1:][rows, columns]
    first_target = is_target & ~batch.target_mask[rows, columns]
    return (rows, columns), batch.input_ids[rows, columns + 1], first_target
