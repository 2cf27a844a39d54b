"""Switches that give the arithmetic of EasyEdit's own code where it is not the paper's.

All are off by default and on in ``preset="upstream"`` (``presets``). Each is one difference between the paper and
EasyEdit's ``models/wise``; docs/fidelity.md measures how closely they reproduce it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .checks import check_choice, check_count, check_switch

SCORE_ACTIVATION_OF_THE_MODEL = "model"


@dataclass(kw_only=True)
class EasyEditArithmetic:
    """The part of ``WISEHyperParams`` that says how far EasyEdit's code is followed, not the paper.

    Raises:
        ValueError: from ``WISEHyperParams``, whose other fields these are checked against.
    """

    score_activation: str | None = None
    """None: Eq. 3. A name such as "silu": EasyEdit's variant, which applies it to both outputs first. "model": the
    activation function that the edited model names in its own configuration, as EasyEdit takes it."""
    margin_over_violated: bool = False
    """True: EasyEdit's variant of Eq. 5, averaged over violated samples only."""
    padding_counts: bool = False
    """True: EasyEdit's padded batch, taken as it stands (``editing.padded_batch``). Contexts and irrelevant prompt are
    padded to one length; scores are means over all of it, padding and target included; positions begin at the
    padding; what stands behind the longest prompt's length is the target; and each target counts one more position,
    of loss 0, in the mean of L_edit."""
    decay_whole_matrix: bool = False
    """True: ``weight_decay`` is of W' = W + dW, and outside the mask, too. EasyEdit decays by 1e-5 in this way."""
    fixed_contexts: bool = False
    """True: EasyEdit's ten prefixes, five fixed words with 5 and with 10 greedy tokens behind them, put before the
    prompt with a space; ``n_contexts`` and ``context_length`` then say nothing."""
    epsilon_as_trained: bool = False
    """True: EasyEdit's epsilon, act_ratio * min over the edits of the mean of their contexts' scores in the last
    iteration. Nothing is scored again, and the memories of WISE-Merge share one epsilon. Needs ``act_ratio``."""
    easyedit_merge: bool = False
    """True: later merges of WISE-Merge weigh the earlier memory 0.6 and the new shards 0.4 together; TIES elects its
    sign on weighted sums and keeps exactly its share of entries (``merging.ties_weighted``)."""
    early_stop_patience: int = 0
    """Iterations that are still made once the loss has settled. EasyEdit makes one."""

    def validate_arithmetic(self) -> None:
        """Check these fields alone.

        Raises:
            ValueError: naming the first value that does not fit, the limit and the cure.
        """
        if self.score_activation is not None:
            from transformers.activations import ACT2FN

            check_choice("score_activation", self.score_activation, (*ACT2FN, SCORE_ACTIVATION_OF_THE_MODEL))
        for name in (
            "margin_over_violated",
            "padding_counts",
            "decay_whole_matrix",
            "fixed_contexts",
            "epsilon_as_trained",
            "easyedit_merge",
        ):
            check_switch(name, getattr(self, name))
        check_count("early_stop_patience", self.early_stop_patience)


def activation_of(model: Any) -> str:
    """The activation function that a model's configuration names, as EasyEdit looks for it.

    Raises:
        ValueError: it names none.
    """
    config = getattr(model, "config", None)
    found = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    if not isinstance(found, str):
        raise ValueError(
            f"score_activation is 'model', but the configuration of {type(model).__name__} names no activation "
            "function: name one, such as 'silu'."
        )
    return found
