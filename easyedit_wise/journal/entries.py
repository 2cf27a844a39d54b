"""What a journal says, as plain values: calls, edits, snapshots. Each is one JSON text with a digest."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from ..editing.requests import EditRequest
from ..separators import SPACE
from .database import digest_of

Entry = TypeVar("Entry", bound="JsonEntry")


@dataclass(frozen=True)
class JsonEntry:
    """A dataclass of plain values."""

    def to_json(self) -> str:
        """One line; floats come back as they were."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls: type[Entry], text: str) -> Entry:
        """Back from :meth:`to_json`.

        Raises:
            ValueError, TypeError, KeyError: it is not one of these.
        """
        values = json.loads(text)
        known = {one.name for one in fields(cls)}
        if not isinstance(values, dict) or set(values) - known:
            raise ValueError(f"a {cls.__name__} holds other fields than {', '.join(sorted(known))}")
        return cls(**values)


def request_values(request: EditRequest) -> dict[str, Any]:
    """A request as plain values."""
    return asdict(request)


def request_from(values: Mapping[str, Any]) -> EditRequest:
    """The request of :func:`request_values`. In journals of earlier versions there was a space before every target."""
    return EditRequest(**{"separator": SPACE, **values})


@dataclass(frozen=True)
class CallEntry(JsonEntry):
    """One call for edits, written before the first of them is made, so that what is left of it is known.

    Attributes:
        started: when, in UTC.
        settings: all of ``WISEHyperParams``.
        requests: all that was asked for.
        first_id: the id of the first edit; the others follow.
    """

    started: str
    settings: dict[str, Any]
    requests: list[dict[str, Any]]
    first_id: int


@dataclass(frozen=True)
class EditEntry(JsonEntry):
    """One edit.

    Attributes:
        id: its number, never given to another.
        call: which call asked for it.
        request: prompt, target, subject, loc_prompt, separator.
        batch: the id of the first edit that was trained together with it.
        memory: index of the side memory that it went into, as of then.
        shard_edit: its number in that shard, from 1.
        scores: Delta_act of the prompt, of prompt and target, of its irrelevant prompt (or None).
        epsilon: of its memory right after it.
        iterations: training iterations.
        loss: L_edit of the last one; None where there was none.
        seed: of the settings; the stream's random numbers go on from edit to edit.
        generator: digest of their state before the edit.
        mask: the blob of its shard's mask.
        rows: the blob of what the layer makes of it; None where no later shard needs it.
        seconds: that it took.
        made: when, in UTC.
    """

    id: int
    call: int
    request: dict[str, Any]
    batch: int
    memory: int
    shard_edit: int
    scores: list[float | None]
    epsilon: float
    iterations: int
    loss: float | None
    seed: int
    generator: str
    mask: str | None
    rows: str | None
    seconds: float
    made: str


@dataclass(frozen=True)
class StateEntry:
    """One side memory of a snapshot.

    Attributes:
        stage: live, shard or merged.
        n_edits: that it holds.
        epsilon: its threshold.
        delta_weight: the blob of dW.
        mask: the blob of a live shard's mask.
        weakest_edit: what its weakest edit's prompt scores; None where that is not known.
        weakest_answered: the same with the target behind it.
    """

    stage: str
    n_edits: int
    epsilon: float
    delta_weight: str
    mask: str | None = None
    weakest_edit: float | None = None
    weakest_answered: float | None = None

    @property
    def weakest(self) -> tuple[float, float]:
        """(``weakest_edit``, ``weakest_answered``), infinite where not known, as a side memory has them."""
        edit, answered = self.weakest_edit, self.weakest_answered
        return math.inf if edit is None else edit, math.inf if answered is None else answered


@dataclass(frozen=True)
class SnapshotEntry(JsonEntry):
    """The stream after some edits.

    Attributes:
        n_edits: how many.
        chain: digest over all of these edits, in order.
        states: the side memories.
        held: the memory of each edit.
        generator: state of the stream's random numbers, base64.
        complete: whether the stream can go on from here: at a shard's end, or with ``open_shard``.
        open_shard: what is remembered of the live shard's edits, see ``tensors.pack_open_shard``.
        open_shard_blob: the blob of its tensors.
        knows_elsewhere: whether the next shard knows of all edits (their ``rows``) what it shall be quiet on.
    """

    n_edits: int
    chain: str
    states: list[dict[str, Any]]
    held: list[int]
    generator: str
    complete: bool
    open_shard: dict[str, Any] | None = None
    open_shard_blob: str | None = None
    knows_elsewhere: bool = False

    @property
    def memories(self) -> list[StateEntry]:
        """The side memories."""
        return [StateEntry(**values) for values in self.states]

    def blobs(self) -> set[str]:
        """The blobs that it names."""
        named = {one for state in self.memories for one in (state.delta_weight, state.mask)}
        return {one for one in (*named, self.open_shard_blob) if one is not None}


@dataclass(frozen=True)
class ForgottenEntry(JsonEntry):
    """An edit that was taken back.

    Attributes:
        edit: as it was.
        when: it was taken back, in UTC.
        how: "forget", "quick" (its memory alone was made again) or "restore".
    """

    edit: dict[str, Any]
    when: str
    how: str


@dataclass(frozen=True)
class StreamFacts(JsonEntry):
    """What holds for the whole journal.

    Attributes:
        model: name or path of the base model, as it was loaded; empty if it has none.
        layer: the module that carries the edits.
        adapter_name: the name of the set of edits.
        adapter: the tuner's configuration.
        created: when, in UTC.
        versions: of the packages then.
    """

    model: str
    layer: str
    adapter_name: str
    adapter: dict[str, Any]
    created: str
    versions: dict[str, str] = field(default_factory=dict)


NO_CHAIN = digest_of("no edit")


def chained(chain: str, edit_digest: str) -> str:
    """The digest over all edits with one more."""
    return digest_of(chain, edit_digest)
