"""What a stream of edits holds, what one batch of them gave, and who wants to be told of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from ..tuner.memory import MemoryState
from .open_shard import OpenShard
from .recorded import EditScores, RecordedEdit
from .requests import EditRequest
from .trainer import EditOutcome

if TYPE_CHECKING:
    from .stream import EditStream


@dataclass(frozen=True)
class HeldEdit:
    """An edit that a side memory holds.

    Attributes:
        request: what was asked for.
        memory: index of the side memory.
    """

    request: EditRequest
    memory: int


@dataclass(frozen=True)
class Snapshot:
    """All that an edit changes: by reference, but for the entries that a live shard may change.

    Attributes:
        states: the side memories. Edits go on in the live one's own dW, so of that tensor only what lies
            outside the mask is sure to stay.
        held: the edits.
        generator_state: of the stream's random numbers.
        open_shard: what is remembered of the live shard's edits.
        live_values: the live shard's masked entries, shape (n,); None without a live shard that edits were made in.
        elsewhere: what the next shard shall be quiet on.
    """

    states: tuple[MemoryState, ...]
    held: tuple[HeldEdit, ...]
    generator_state: Tensor
    open_shard: OpenShard | None = None
    live_values: Tensor | None = None
    elsewhere: Tensor | None = None


@dataclass(frozen=True)
class Committed:
    """A batch of edits that was just made: the stream holds it already.

    Attributes:
        requests: the edits, in order.
        outcomes: of each, with the shard's dW.
        recorded: each as the router sees it.
        scores: Delta_act of each in its memory.
        mask: of the shard that they went into, bool, shape (d_out, d_in).
        place: index of that shard among the memories, before it was closed.
        generator_state: of the stream's random numbers before them.
    """

    requests: Sequence[EditRequest]
    outcomes: Sequence[EditOutcome]
    recorded: Sequence[RecordedEdit]
    scores: Sequence[EditScores]
    mask: Tensor | None
    place: int
    generator_state: Tensor


class CommitSink(Protocol):
    """Who is told of every batch before it counts as made."""

    def committed(self, stream: EditStream, batch: Committed) -> None:
        """Keep the batch. If this raises, the stream takes the batch back."""
