"""Edits of a prompt that is edited again: the last answer holds, whichever memory has the earlier ones.

In a least-squares problem an earlier answer would not go away by itself: the shard that holds it would say the mean of
both, and a later shard would be quiet on its own prompt, as on everything that other memories hold. Not in the paper.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .requests import EditRequest


def latest(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Of each prompt the last edit, in the order in which the prompts came first."""
    return list({request.prompt: request for request in requests}.values())


def standing(held: Sequence[EditRequest], requests: Collection[EditRequest]) -> list[EditRequest]:
    """What still holds of a shard's edits once some more are made: :func:`latest`, without the prompts of those.

    Args:
        held: the shard's edits, the earliest first.
        requests: those that are about to be made in it.
    """
    gone = {request.prompt for request in overruled(held, requests)}
    return [request for request in latest(held) if request.prompt not in gone]


def overruled(held: Sequence[EditRequest], requests: Collection[EditRequest]) -> list[EditRequest]:
    """Those of some edits, in their order, that have the very prompt of one that is about to be made."""
    again = {request.prompt for request in requests}
    return [request for request in held if request.prompt in again]


def without_repeats(requests: Sequence[EditRequest]) -> Sequence[EditRequest]:
    """The longest beginning in which no prompt comes twice: edits that are trained together cannot overrule."""
    seen: set[str] = set()
    for count, request in enumerate(requests):
        if request.prompt in seen:
            return requests[:count]
        seen.add(request.prompt)
    return requests
