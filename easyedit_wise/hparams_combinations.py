"""Which settings of ``WISEHyperParams`` go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .separators import SPACE

if TYPE_CHECKING:
    from .hparams import WISEHyperParams


def check_together(hparams: WISEHyperParams) -> None:
    """EasyEdit's arithmetic, and consolidation, exist for some settings only.

    Raises:
        ValueError: naming two settings that do not go together, and the cure.
    """
    if (hparams.optimizer == "steepest") != (hparams.consolidation > 0):
        raise ValueError(
            f"optimizer is {hparams.optimizer!r} with consolidation: {hparams.consolidation}, but 'steepest' descends "
            "in the norm of a consolidated shard and is its only one: set both, or take preset: margin, whose shards "
            "are trained with margin losses by 'lion' or another optimizer."
        )
    for name in ("replay", "rehearsal", "weight_decay", "decay_whole_matrix", "subject_routing"):
        if hparams.consolidation and getattr(hparams, name):
            raise ValueError(
                f"{name} is {getattr(hparams, name)} with consolidation: {hparams.consolidation}, whose shards hold "
                "their earlier edits and are quiet on other memories' as they are, without a margin loss: leave it "
                "out, or take preset: margin."
            )
    if hparams.padding_counts and (hparams.batch_size != 1 or hparams.contexts_per_step is not None):
        raise ValueError(
            f"padding_counts goes with batch_size 1 and contexts_per_step null, not with {hparams.batch_size} and "
            f"{hparams.contexts_per_step}: EasyEdit trains one edit in one batch of all its contexts."
        )
    if hparams.padding_counts and hparams.ending:
        raise ValueError(
            "padding_counts is True with ending: True, but EasyEdit's batch ends with the target: set ending: false."
        )
    if hparams.padding_counts and hparams.target_separator != SPACE:
        raise ValueError(
            f"padding_counts is True with target_separator: {hparams.target_separator}, but EasyEdit's batch has a "
            "space before every target: set target_separator: space."
        )
    if hparams.decay_whole_matrix and hparams.optimizer != "sgd":
        raise ValueError(
            f"decay_whole_matrix goes with optimizer 'sgd', not with {hparams.optimizer!r}: it is EasyEdit's decay."
        )
    if hparams.epsilon_as_trained and hparams.act_ratio is None:
        raise ValueError("epsilon_as_trained needs an act_ratio: EasyEdit's files have 0.88, the paper 1.0.")
