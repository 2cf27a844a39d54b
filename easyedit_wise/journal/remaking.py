"""One side memory made again without an edit, and the rest of the stream as it is.

What comes out is not what a stream would be that never had the edit: there the next shard's first edit would have taken
its place. But no memory holds it, and it takes one shard's time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..calibration import stricter_threshold, strictness
from ..editing.requests import continued
from ..editing.stream import EditStream
from ..tuner.memory import MERGED
from .database import JournalError
from .entries import EditEntry, SnapshotEntry, StateEntry
from .journal import Journal
from .recording import state_entry
from .restoring import OnEdit, make_again, put_at
from .writing import JournalWriter


@dataclass(frozen=True)
class Alone:
    """An edit's memory, which can be made again without the others.

    Attributes:
        place: its index.
        n_before: edits before its first.
        others: its other edits, in order.
        stays: edits behind it that need not be made again: those of closed memories.
    """

    place: int
    n_before: int
    others: list[EditEntry]
    stays: int


def its_memory_alone(journal: Journal, edit: EditEntry) -> Alone | None:
    """What has to be made again for an edit to be in no memory.

    Returns:
        None where its memory cannot be made alone: it is not closed yet, or it holds all closed edits
        (``retrieve: false``), or a later one says what it says, since one's prompt goes on from the other's.
    """
    edits, last = journal.edits(), journal.snapshot()
    complete = journal.complete_snapshot(len(edits))
    if last is None or complete is None:
        return None
    place = last.held[edits.index(edit)]
    members = [index for index, held in enumerate(last.held) if held == place]
    first, behind = members[0], members[-1] + 1
    before = journal.complete_snapshot(first)
    if (
        last.memories[place].stage != MERGED
        or members != list(range(first, behind))
        or (0 if before is None else before.n_edits) != first
        or not _settings_of(journal, edit).get("retrieve", False)
        or any(continued(edit.request["prompt"], later.request["prompt"]) for later in edits[behind:])
    ):
        return None
    others = [edits[index] for index in members if edits[index].id != edit.id]
    return Alone(place, first, others, complete.n_edits - behind)


def put_without(
    stream: EditStream, journal: JournalWriter, edit: EditEntry, alone: Alone, on_edit: OnEdit | None
) -> None:
    """Make an edit's memory again without it, and write the stream as it is then into the line under way.

    The edits of the open shard are left out: what they are quiet on has changed.

    Args:
        stream: of the journal's layer; it has other contents afterwards.
        journal: the journal, in which the line was begun.
        edit: the edit.
        alone: its memory.
        on_edit: called after each edit that is made again.

    Raises:
        JournalError: the edits do not fill one memory again.
        EditDivergedError: an edit cannot be made again.
    """
    edits, first = journal.edits(), alone.n_before
    calibrated = _settings_of(journal, edit).get("act_ratio") is None
    blobs: dict[str, bytes] = {}
    state = _made_again(stream, journal, alone, blobs, on_edit) if alone.others else None
    snapshots = [
        _without(snapshot, edits.index(edit), alone.place, state, calibrated)
        for snapshot in journal.complete_snapshots(first + len(alone.others) + 1)
        if snapshot.n_edits - 1 > first
    ]
    n_edits = snapshots[-1].n_edits if snapshots else first
    kept = [one for one in edits if one.id != edit.id][first:n_edits]
    journal.fill_pending(first, kept, snapshots, blobs)


def _made_again(
    stream: EditStream, journal: Journal, alone: Alone, blobs: dict[str, bytes], on_edit: OnEdit | None
) -> StateEntry:
    place, others = alone.place, alone.others
    put_at(stream, journal, journal.complete_snapshot(alone.n_before), journal.edits())
    make_again(stream, journal, others, None, on_edit)
    stream.close_memory()
    memories = stream.layer.memories(stream.adapter_name)
    if len(memories) != place + 1 or memories[place].n_edits != len(others):
        raise JournalError(
            f"the edits beside it fill {len(memories) - place} memories and not one, as their settings differ: take "
            "the edit back exactly."
        )
    return state_entry(memories[place], blobs)


def _without(
    snapshot: SnapshotEntry, gone: int, place: int, state: StateEntry | None, calibrated: bool
) -> SnapshotEntry:
    """A later snapshot, in which the memory is another one, or is not there."""
    held = [memory for index, memory in enumerate(snapshot.held) if index != gone]
    states = [*snapshot.states]
    if state is None:
        del states[place]
        held = [memory - (memory > place) for memory in held]
    else:
        states[place] = vars(_grown(state, place, snapshot) if calibrated else state)
    return SnapshotEntry(**{**vars(snapshot), "n_edits": snapshot.n_edits - 1, "states": states, "held": held})


def _grown(state: StateEntry, place: int, snapshot: SnapshotEntry) -> StateEntry:
    """A memory that was just closed, with the threshold that it has after the memories behind it."""
    n_closed = sum(one.stage == MERGED for one in snapshot.memories)
    shall_be = strictness(place, n_closed)
    return replace(state, epsilon=stricter_threshold(state.epsilon, min(state.weakest), place, shall_be))


def _settings_of(journal: Journal, edit: EditEntry) -> dict[str, object]:
    return next(call.settings for number, _, call in journal.calls() if number == edit.call)
