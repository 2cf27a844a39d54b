"""Attributes that somebody set on a settings object: none of them is dropped without a word.

EasyEdit's editors take any object with the right attributes, and users set attributes on it by hand. What is neither
a setting of ours nor one that EasyEdit itself reads is a slip, or somebody's own note.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from .multimodal_keys import OF_THE_HOST
from .presets import PAPER, UPSTREAM, implied_preset

# Read or written by EasyEdit's editors, scorers and its own WISE, and without a meaning here.
HOST_SETTINGS = frozenset(
    {"evaluation_type", "api_key", "sequential_edit", "hidden_act", "results_dir", "stats_dir", "max_output_length"}
)
# Of a vision-language model's settings alone.
_MULTIMODAL = frozenset({*OF_THE_HOST, "any_image"})
# Keys of a mapping that stand for several settings; no attribute of ours holds them.
COMPOUND = ("preset", "act_margin")


def check_attributes(names: Iterable[str], known: Collection[str]) -> None:
    """Look at the names of a settings object's attributes. Those with a leading underscore are somebody's own.

    Args:
        names: of all its attributes.
        known: settings of WISE.

    Raises:
        ValueError: one is spelled nearly as a setting.

    Warns:
        UserWarning: one is no setting of WISE, nor one that EasyEdit reads: it has no effect.
    """
    for name in names:
        if name in known or name in HOST_SETTINGS or name in _MULTIMODAL or name.startswith("_"):
            continue
        close = difflib.get_close_matches(name, [*known, *HOST_SETTINGS, *_MULTIMODAL], n=1, cutoff=0.8)
        if close:
            raise ValueError(
                f"the settings have an attribute {name!r}, which is no WISE setting: did you mean {close[0]!r}?"
            )
        warnings.warn(
            f"the settings have an attribute {name!r}, which is neither a WISE setting nor one that EasyEdit reads: "
            "it has no effect.",
            stacklevel=4,
        )


def values_of(hparams: Any, known: Collection[str]) -> dict[str, Any]:
    """The settings of WISE that another host's object holds, as the mapping of a YAML file.

    Raises:
        ValueError: an attribute is spelled nearly as a setting, or names a preset that the object's own values
            would contradict.
    """
    attributes: Mapping[str, Any] = vars(hparams)
    known = {*known, *COMPOUND}
    check_attributes(attributes, known)
    values = {name: value for name, value in attributes.items() if name in known}
    preset = values.get("preset")
    rest = {name: value for name, value in values.items() if name != "preset"}
    if "preset" in values and preset not in (PAPER, UPSTREAM) and implied_preset(rest) == PAPER:
        raise ValueError(
            f"preset {preset!r} was set on a {type(hparams).__name__}, which has values of its own for edit_lr, n_iter "
            "and the others, in EasyEdit's terms (SGD's learning rate), so they and the preset contradict each other: "
            f"make the settings with easyedit_wise's WISEHyperParams.from_preset({preset!r}, inner_params, "
            "model_name=...), or take preset 'paper' or 'upstream'."
        )
    return values
