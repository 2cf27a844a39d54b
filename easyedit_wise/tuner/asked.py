"""Mixed batches: which adapter each row of a call asks for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

# PEFT's name for a row that no adapter shall answer.
BASE_MODEL = "__base__"

# One name for every row, or a name for each.
Asked = str | tuple[str, ...]


def checked(names: str | Sequence[str], known: Iterable[str], training: bool) -> Asked:
    """The adapters that rows ask for, known to exist.

    Args:
        names: one adapter's name for all rows, or one for each row; ``"__base__"`` is the unedited model.
        known: the adapters that there are.
        training: whether the model is in training mode.

    Raises:
        TypeError: ``names`` is neither a name nor a sequence of names.
        ValueError: a name that does not exist, no names at all, or the model is in training mode.
    """
    given = [names] if isinstance(names, str) else names
    if not isinstance(given, Sequence) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"adapter names are {names!r}: give one name for all rows, or a list with a name for each row.")
    if not given:
        raise ValueError("adapter names is an empty list: give a name for each row, or leave it out.")
    available = sorted(set(known))
    unknown = [name for name in given if name != BASE_MODEL and name not in available]
    if unknown:
        near = get_close_matches(unknown[0], available, n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"non-existing adapter(s): there is none called {unknown[0]!r}{meant}, only {', '.join(available)}. "
            f"Load it first, or ask for {BASE_MODEL!r}, the unedited model."
        )
    if training:
        raise ValueError(
            "adapter names pick the edits that a query sees, but the model is in training mode, where the live "
            "memory answers everything: call model.eval() first."
        )
    return names if isinstance(names, str) else tuple(names)


def check_count(asked: Asked, n_rows: int, repeated: bool = False) -> None:
    """Refuse a batch that does not have one row for each name.

    Args:
        asked: as :func:`checked` returns it.
        n_rows: sequences of the batch.
        repeated: each row may stand there several times in a row, once for each of its beams or samples.

    Raises:
        ValueError: another number of rows.
    """
    if isinstance(asked, str) or len(asked) == n_rows or (repeated and n_rows > 0 and n_rows % len(asked) == 0):
        return
    raise ValueError(
        f"there are {len(asked)} adapter names for {n_rows} rows: give one name for each row of the batch "
        f"({BASE_MODEL!r} for the unedited model), or a single name for all of them."
    )


def of_rows(asked: Asked, n_rows: int, repeated: bool = False) -> tuple[str, ...]:
    """The name of each row, those of beams and samples being their prompt's.

    Raises:
        ValueError: the number of names does not fit, see :func:`check_count`.
    """
    check_count(asked, n_rows, repeated)
    if isinstance(asked, str):
        return (asked,) * n_rows
    repeat = n_rows // len(asked)
    return asked if repeat == 1 else tuple(name for name in asked for _ in range(repeat))
