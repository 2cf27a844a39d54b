"""What a shard says of edits that other memories hold, because its own prompts go on from theirs.

Of a text that is edited sentence by sentence, each prompt is the beginning of the next one. Up to there a causal
model sees no difference: the router can hardly tell such edits apart, and a shard cannot be quiet on the one and active
on the other. It need not be: where it says what the other memory says, either may answer.

As long as the two texts are the same, token by token, they ask the same layer input for different outputs, and the mean
of both answers neither. So each token is one edit's: that one's which has its answer there. Not in the paper.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .recorded import RecordedEdit
from .requests import EditRequest, continued

if TYPE_CHECKING:
    from .held import HeldEdit


@dataclass(frozen=True)
class Inherited:
    """The N tokens of some edits, prompts and targets, and what their own memories say.

    Attributes:
        activations: A(x), shape (N, d_in).
        outputs: dW a of the memory that holds the edit, shape (N, d_out).
        in_prompt: bool, shape (N,).
    """

    activations: Tensor
    outputs: Tensor
    in_prompt: Tensor

    @classmethod
    def of(cls, edits: Iterable[tuple[RecordedEdit, Tensor, Collection[int]]]) -> Inherited | None:
        """Of edits, each with dW of its memory, shape (d_out, d_in), and the tokens that are not its own.

        Returns:
            None without any edit.
        """
        parts = [cls._one(*edit) for edit in edits]
        if not parts:
            return None
        return cls(
            torch.cat([one.activations for one in parts]),
            torch.cat([one.outputs for one in parts]),
            torch.cat([one.in_prompt for one in parts]),
        )

    @classmethod
    @torch.no_grad()
    def _one(cls, edit: RecordedEdit, delta_weight: Tensor, left: Collection[int]) -> Inherited:
        kept = [place for place in range(len(edit.answered.activations)) if place not in left]
        tokens = edit.answered.activations[kept].to(delta_weight)
        return cls(tokens, F.linear(tokens, delta_weight), edit.prompt_mask[edit.answered.token_mask].bool()[kept])


def shared_beginning(tokens: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common before they differ."""
    for place, (own, its) in enumerate(zip(tokens, other, strict=False)):
        if own != its:
            return place
    return min(len(tokens), len(other))


def divided(own: tuple[Sequence[int], int], other: tuple[Sequence[int], int]) -> tuple[range, int]:
    """Whose the tokens are that the texts of a new edit and of an inherited one begin with.

    Where one of them has its answer, and at the token before, a token is that one's, and the new edit's where both do.
    Both prompts' are the shorter one's, which has nothing else.

    Args:
        own: the new edit's tokens, prompt and target, and how many are the prompt's.
        other: the inherited edit's.

    Returns:
        (the places that the inherited edit leaves to the new one; how many first places the new one leaves to it).
    """
    shared = shared_beginning(own[0], other[0])
    if other[1] > own[1]:
        return range(shared), 0
    left = min(shared, own[1] - 1)
    return range(left, shared), left


def inherited_by(
    requests: Sequence[EditRequest],
    elsewhere: Sequence[HeldEdit],
    count: int,
    shard: Sequence[EditRequest] = (),
) -> list[HeldEdit]:
    """Edits of other memories that one of these goes on from, or that go on from one of these.

    Args:
        requests: edits of one shard.
        elsewhere: edits of other memories, the earliest first.
        count: the latest of each request's, at most so many; of the same prompt the latest alone counts.
        shard: what the shard holds already.

    Returns:
        In the order of ``elsewhere``. None whose prompt is one of the requests' or the shard's: that one is overruled.
    """
    latest = {held.request.prompt: place for place, held in enumerate(elsewhere)}
    prompts = {request.prompt for request in requests}
    found: set[int] = set()
    for prompt in prompts:
        found.update(sorted(place for other, place in latest.items() if continued(prompt, other))[-count:])
    overruled = prompts | {held.prompt for held in shard}
    return [elsewhere[place] for place in sorted(found) if elsewhere[place].request.prompt not in overruled]
