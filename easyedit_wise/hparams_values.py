"""The range of each setting of ``WISEHyperParams``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .checks import (
    check_choice,
    check_count,
    check_inner_params,
    check_positive_int,
    check_share,
    check_switch,
    is_number,
)
from .merging import MERGE_METHODS
from .routing import POOLINGS
from .separators import SEPARATORS

if TYPE_CHECKING:
    from .hparams import WISEHyperParams

OBJECTIVES = ("only_label", "prompt_and_label")
OPTIMIZERS = ("steepest", "sgd", "adam", "lion")
_SWITCHES = (
    "retrieve",
    "replay",
    "subject_routing",
    "use_chat_template",
    "layer_units",
    "ending",
    "model_parallel",
    "fp16",
)


def check_values(hparams: WISEHyperParams) -> None:
    """Check every field by itself.

    Raises:
        ValueError: naming the first value that does not fit, the limit and the cure.
    """
    if hparams.inner_params is not None:
        check_inner_params(hparams.inner_params)
    if hparams.alg_name != "WISE":
        raise ValueError(f"alg_name is {hparams.alg_name!r}: these settings are WISE's, so it must be 'WISE'.")
    check_share(
        "mask_ratio (rho)",
        hparams.mask_ratio,
        "the share of the side memory that one shard may change; the paper uses 0.2",
    )
    for name in ("alpha", "beta", "gamma"):
        value = getattr(hparams, name)
        if not is_number(value) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} is {value!r}: the margins of Eq. 5 are finite numbers of at least 0.")
    if hparams.beta <= hparams.alpha:
        raise ValueError(
            f"beta ({hparams.beta}) must be greater than alpha ({hparams.alpha}): edits must score above beta and "
            "irrelevant prompts below alpha; the paper uses act_margin: [5.0, 20.0, 10.0]."
        )
    check_positive_int("n_iter", hparams.n_iter)
    check_positive_int("merge_freq", hparams.merge_freq)
    if hparams.save_freq is not None:
        check_positive_int("save_freq", hparams.save_freq)
        if hparams.merge_freq % hparams.save_freq:
            lower = max(hparams.save_freq, hparams.merge_freq // hparams.save_freq * hparams.save_freq)
            raise ValueError(
                f"merge_freq ({hparams.merge_freq}) must be a multiple of save_freq ({hparams.save_freq}), since a "
                f"merge folds whole shards: set it to {lower} or {lower + hparams.save_freq}, for instance."
            )
    check_choice("merge_alg", hparams.merge_alg, tuple(MERGE_METHODS))
    check_choice("objective_optimization", hparams.objective_optimization, OBJECTIVES)
    check_choice("optimizer", hparams.optimizer, OPTIMIZERS)
    check_choice("pooling", hparams.pooling, POOLINGS)
    check_choice("target_separator", hparams.target_separator, SEPARATORS)
    for name in ("edit_lr", "first_token_weight"):
        value = getattr(hparams, name)
        if not is_number(value) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} is {value!r}: it must be a finite number greater than 0.")
    for name in ("weight_decay", "rehearsal", "early_stop_loss", "early_stop_change"):
        value = getattr(hparams, name)
        if not is_number(value) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} is {value!r}: it must be a finite number of at least 0.")
    for name in ("norm_constraint", "act_ratio", "weights"):
        value = getattr(hparams, name)
        if value is not None and (not is_number(value) or not math.isfinite(value) or value <= 0):
            raise ValueError(
                f"{name} is {value!r}: it must be a finite number greater than 0, or null to switch it off."
            )
    if hparams.densities is not None:
        check_share("densities", hparams.densities, "the share of each shard that TIES keeps")
    check_share("lr_end", hparams.lr_end, "the last step as a share of the first one; 1 keeps edit_lr constant")
    if not is_number(hparams.epsilon_position) or not 0.0 <= hparams.epsilon_position <= 1.0:
        raise ValueError(f"epsilon_position is {hparams.epsilon_position!r}, outside [0, 1].")
    for name in ("n_contexts", "irrelevant_prompts"):
        check_count(name, getattr(hparams, name))
    for name in ("contexts_per_step", "context_tokens"):
        if getattr(hparams, name) is not None:
            check_positive_int(name, getattr(hparams, name))
    for name in ("context_length", "batch_size", "max_length"):
        check_positive_int(name, getattr(hparams, name))
    if not isinstance(hparams.seed, int) or isinstance(hparams.seed, bool):
        raise ValueError(f"seed is {hparams.seed!r}: it must be a whole number.")
    for name in _SWITCHES:
        check_switch(name, getattr(hparams, name))
    for name in ("save_path", "load_path", "journal"):
        value = getattr(hparams, name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}: it must be a path as text, or null.")
