"""Named sets of settings, and which one fills up a mapping that does not name one.

"default" is this package's own: the defaults of ``WISEHyperParams``, which are written nowhere else. "margin" is the
paper's method, margin losses, random masks and TIES, with our optimiser, units and thresholds. "paper" is WISE as the
paper has it (arXiv 2405.14768, Table 10 and Section 3.1). "upstream" is EasyEdit's code with the values that its files
share. The latter three name *every* setting of the method, so that they stay when the defaults change.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .checks import check_choice

DEFAULT, MARGIN, PAPER, UPSTREAM = "default", "margin", "paper", "upstream"

# What is edited and where, not how: no preset names these.
NOT_OF_THE_METHOD = frozenset(
    {"inner_params", "model_name", "alg_name", "device", "use_chat_template", "seed", "batch_size", "max_length"}
    | {"model_parallel", "fp16", "save_path", "load_path", "journal"}
)

_PAPER: dict[str, Any] = {
    "edit_lr": 1.0,
    "n_iter": 70,
    "optimizer": "sgd",
    "lr_end": 1.0,
    "layer_units": False,
    "weight_decay": 0.0,
    "norm_constraint": 1.0,
    "objective_optimization": "only_label",
    "first_token_weight": 1.0,
    "ending": False,
    "early_stop_loss": 0.02,
    "early_stop_change": 1e-4,
    "early_stop_patience": 0,
    "alpha": 5.0,
    "beta": 20.0,
    "gamma": 10.0,
    "act_ratio": 1.0,
    "epsilon_position": 0.5,
    "pooling": "mean",
    "subject_routing": False,
    "score_activation": None,
    "margin_over_violated": False,
    "padding_counts": False,
    "epsilon_as_trained": False,
    "irrelevant_prompts": 0,
    "mask_ratio": 0.2,
    "save_freq": 500,
    "merge_freq": 1000,
    "merge_alg": "ties",
    "densities": 0.53,
    "weights": 1.0,
    "easyedit_merge": False,
    "decay_whole_matrix": False,
    "retrieve": False,
    "replay": False,
    "rehearsal": 0.0,
    "relative_scores": False,
    "mask": "random",
    "consolidation": 0.0,
    "other_subjects": 0,
    "scrambled": 0,
    "after_answer": 0,
    "unfinished_names": 0.0,
    "unfinished_names_after": 0,
    "capacity": 0.0,
    "written": 0.0,
    "gain": 1.0,
    "prompt_gain": 1.0,
    "level_limit": 0.0,
    "asked_again": 1,
    "asked_again_limit": 0,
    "varied_contexts": False,
    "n_contexts": 10,
    "context_length": 10,
    "contexts_per_step": None,
    "context_tokens": None,
    "fixed_contexts": False,
    "target_separator": "auto",
}

_UPSTREAM: dict[str, Any] = {
    **_PAPER,
    "retrieve": True,  # in all of EasyEdit's files
    "act_ratio": 0.88,
    "weight_decay": 1e-5,
    "decay_whole_matrix": True,
    "score_activation": "model",
    "margin_over_violated": True,
    "padding_counts": True,
    "epsilon_as_trained": True,
    "fixed_contexts": True,
    "easyedit_merge": True,
    "target_separator": "space",
    "early_stop_patience": 1,
}

_MARGIN: dict[str, Any] = {
    **_PAPER,
    "edit_lr": 0.45,
    "n_iter": 12,
    "optimizer": "lion",
    "lr_end": 0.1,
    "layer_units": True,
    "first_token_weight": 2.0,
    "act_ratio": None,
    "irrelevant_prompts": 40,
    "save_freq": 7,
    "merge_freq": 14,
    "rehearsal": 0.1,
    "contexts_per_step": 4,
}

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        DEFAULT: MappingProxyType({}),
        MARGIN: MappingProxyType(_MARGIN),
        PAPER: MappingProxyType(_PAPER),
        UPSTREAM: MappingProxyType(_UPSTREAM),
    }
)


def preset_values(name: Any) -> dict[str, Any]:
    """The values of a preset, to be overridden by what is named beside it.

    Raises:
        ValueError: no such preset.
    """
    check_choice("preset", name, tuple(PRESETS))
    return dict(PRESETS[name])


def implied_preset(config: Mapping[str, Any]) -> str:
    """Which preset fills up a mapping that names none.

    ``edit_lr`` says nothing without its unit. EasyEdit's files all name it, and cannot name its unit, since for
    EasyEdit there is but one: the learning rate of SGD. So a mapping with ``edit_lr`` but neither ``optimizer`` nor
    ``layer_units`` is written in EasyEdit's terms, and the paper's values are what it leaves out. Every other one is
    filled up with the defaults, but for one that switches ``consolidation`` off or names an optimiser that does not go
    with it: that is "margin".
    """
    if "edit_lr" in config and not {"optimizer", "layer_units"} & set(config):
        return PAPER
    without = config.get("optimizer", "steepest") != "steepest" or config.get("consolidation", 1.0) == 0
    return MARGIN if without else DEFAULT
