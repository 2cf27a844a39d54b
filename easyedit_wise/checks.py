"""Checks of settings: each names the value, the limit and the cure."""

from __future__ import annotations

import difflib
from typing import Any


def is_number(value: Any) -> bool:
    """A number, and not a switch."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number_from_scientific_notation(value: Any) -> Any:
    """YAML 1.1 reads ``1e-4`` as text; EasyEdit turns such text into a number, and so must we."""
    if isinstance(value, str) and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def nearest(name: str, known: tuple[str, ...] | list[str]) -> str:
    """The rest of a sentence that suggests the nearest known name, if there is one."""
    match = [one for one in known if one.casefold() == name.casefold()]
    match += difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f": did you mean {match[0]!r}?" if match else "."


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a whole number of at least 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} is {value!r}: it must be a whole number, 0 (none) or more.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}{nearest(str(value), choices)} Choose from: {', '.join(choices)}.")


def check_positive_int(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}: it must be a whole number of at least 1.")


def check_share(name: str, value: Any, meaning: str) -> None:
    """Raise ValueError unless ``value`` lies in (0, 1]."""
    if not is_number(value) or not 0.0 < value <= 1.0:
        raise ValueError(f"{name} is {value!r}, outside (0, 1]: it is {meaning}.")


def check_inner_params(inner_params: Any) -> None:
    """Raise ValueError unless it is a list of exactly one name."""
    if isinstance(inner_params, str) or not isinstance(inner_params, (list, tuple)) or not inner_params:
        raise ValueError(
            f"inner_params is {inner_params!r}: it must be a list with the one value matrix to edit, for instance "
            "[model.layers[27].mlp.down_proj.weight], or be left out: then it is chosen by the model's architecture."
        )
    if len(inner_params) > 1:
        raise ValueError(
            f"inner_params names {len(inner_params)} matrices ({', '.join(map(str, inner_params))}): WISE edits "
            "exactly one, so keep the one in the middle-to-late layer."
        )
    if not isinstance(inner_params[0], str) or not inner_params[0].strip():
        raise ValueError(
            f"inner_params names {inner_params[0]!r}: it must be the value matrix's name, "
            "for instance model.layers[27].mlp.down_proj.weight."
        )


def check_switch(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is true or false; the text "False" would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}: it must be true or false, without quotes.")
