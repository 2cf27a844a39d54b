"""One side memory made again without an edit, and the rest of the stream as it is.

What comes out is not what a stream would be that never had the edit: there the next shard's first edit would have taken
its place. But no memory holds it, and it takes one shard's time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..editing.held import Snapshot
from ..editing.stream import EditStream
from ..tuner.memory import MERGED
from .database import JournalError
from .entries import EditEntry, SnapshotEntry, StateEntry
from .journal import Journal
from .recording import state_entry
from .restoring import OnEdit, make_again, put_into
from .writing import JournalWriter


def others_of_its_memory(journal: Journal, edit: EditEntry) -> tuple[int, list[EditEntry]] | None:
    """What has to be made again for an edit to be in no memory.

    Returns:
        (how many edits come before its memory's, the memory's other edits in order); None where its memory cannot be
        made alone: it is not closed yet, or it holds all closed edits (``retrieve: false``).
    """
    edits, last = journal.edits(), journal.snapshot()
    if last is None:
        return None
    place = last.held[edits.index(edit)]
    members = [index for index, held in enumerate(last.held) if held == place]
    first = members[0]
    before = journal.complete_snapshot(first)
    if (
        last.memories[place].stage != MERGED
        or members != list(range(first, first + len(members)))
        or (0 if before is None else before.n_edits) != first
        or not _settings_of(journal, edit).get("retrieve", False)
    ):
        return None
    return first, [edits[index] for index in members if edits[index].id != edit.id]


def stays_behind(journal: Journal, edit: EditEntry) -> int:
    """How many of the edits behind an edit's memory need not be made again: those of closed memories."""
    edits, last = journal.edits(), journal.snapshot()
    complete = journal.complete_snapshot(len(edits))
    if last is None or complete is None:
        return 0
    place = last.held[edits.index(edit)]
    return complete.n_edits - 1 - max(index for index, held in enumerate(last.held) if held == place)


def put_without(stream: EditStream, journal: JournalWriter, edit: EditEntry, on_edit: OnEdit | None) -> None:
    """Make an edit's memory again without it, and write the stream as it is then into the line under way.

    The edits of the open shard are left out: what they are quiet on has changed.

    Args:
        stream: of the journal's layer; it has other contents afterwards.
        journal: the journal, in which the line was begun.
        edit: in a memory that :func:`others_of_its_memory` can make.
        on_edit: called after each edit that is made again.

    Raises:
        JournalError: the edits do not fill one memory again.
        EditDivergedError: an edit cannot be made again.
    """
    found, edits, last = others_of_its_memory(journal, edit), journal.edits(), journal.snapshot()
    if found is None or last is None:
        raise JournalError(f"edit {edit.id} cannot be taken out of its memory alone: take it back exactly.")
    first, others = found
    gone, place = edits.index(edit), last.held[edits.index(edit)]
    blobs: dict[str, bytes] = {}
    state = _made_again(stream, journal, first, others, place, blobs, on_edit) if others else None
    behind = first + len(others) + 1
    snapshots = [
        _without(snapshot, gone, place, state)
        for snapshot in journal.complete_snapshots(behind)
        if snapshot.n_edits - 1 > first
    ]
    n_edits = snapshots[-1].n_edits if snapshots else first
    kept = [one for one in edits if one.id != edit.id][first:n_edits]
    journal.fill_pending(first, kept, snapshots, blobs)


def _made_again(
    stream: EditStream,
    journal: Journal,
    first: int,
    others: Sequence[EditEntry],
    place: int,
    blobs: dict[str, bytes],
    on_edit: OnEdit | None,
) -> StateEntry:
    snapshot = journal.complete_snapshot(first)
    if snapshot is None:
        stream.restore(Snapshot((), (), torch.Generator().manual_seed(stream.hparams.seed).get_state()))
    else:
        put_into(stream, journal, snapshot, journal.edits())
    make_again(stream, journal, others, None, on_edit)
    stream.close_memory()
    memories = stream.layer.memories(stream.adapter_name)
    if len(memories) != place + 1 or memories[place].n_edits != len(others):
        raise JournalError(
            f"the edits beside it fill {len(memories) - place} memories and not one, as their settings differ: take "
            "the edit back exactly."
        )
    return state_entry(memories[place], blobs)


def _without(snapshot: SnapshotEntry, gone: int, place: int, state: StateEntry | None) -> SnapshotEntry:
    """A later snapshot, in which the memory is another one, or is not there."""
    held = [memory for index, memory in enumerate(snapshot.held) if index != gone]
    states = [*snapshot.states]
    if state is None:
        del states[place]
        held = [memory - (memory > place) for memory in held]
    else:
        states[place] = vars(state)
    return SnapshotEntry(**{**vars(snapshot), "n_edits": snapshot.n_edits - 1, "states": states, "held": held})


def _settings_of(journal: Journal, edit: EditEntry) -> dict[str, object]:
    return next(call.settings for number, _, call in journal.calls() if number == edit.call)
