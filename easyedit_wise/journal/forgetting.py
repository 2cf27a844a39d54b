"""Take one edit back: the stream is made again from the last snapshot before it, without it; or its memory alone.

The first is exact: what comes out is, bit for bit, what a stream would be that never had the edit. Until all of it is
made the journal is as before, and what is made already is kept beside it: after an interrupt the same call goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..editing.stream import EditStream
from ..tuner.attach import detach
from ..tuner.model import find_wise_layers
from ..undisturbed import undisturbed
from .database import JournalError
from .entries import EditEntry, ForgottenEntry
from .journal import PENDING, Journal
from .recording import JournalSink, now
from .remaking import Alone, its_memory_alone, put_without
from .restoring import OnEdit, fresh_stream, make_again, rebuild, settings_of, sink_of
from .writing import JournalWriter


@dataclass(frozen=True)
class Plan:
    """What taking an edit back asks for.

    Attributes:
        edit: which.
        n_kept: edits before it that stay as they are.
        again: those after these, without it, in order.
        done: how many of them are made, or need not be made, as an interrupted call has left it.
        alone: its memory, which is made again alone; None: all of ``again`` is made again, exactly.
    """

    edit: EditEntry
    n_kept: int
    again: list[EditEntry]
    done: int = 0
    alone: Alone | None = None

    @property
    def to_make(self) -> list[EditEntry]:
        """The edits that are made again, from now on."""
        if self.alone is None or self.done:
            return self.again[self.done :]
        return self.alone.others + self.again[len(self.alone.others) + self.alone.stays :]

    @property
    def seconds(self) -> float:
        """How long that takes, by what it took before."""
        return sum(edit.seconds for edit in self.to_make)


def plan_of(journal: Journal, edit_id: int, exactly: bool = True) -> Plan:
    """What taking an edit back asks for.

    Args:
        journal: the journal.
        edit_id: the edit's number.
        exactly: see :func:`forget`.

    Raises:
        JournalError: there is no edit of this number.
    """
    edit, edits = journal.edit(edit_id), journal.edits()
    alone = None if exactly else its_memory_alone(journal, edit)
    if alone is not None:
        n_kept = alone.n_before
    else:
        snapshot = journal.complete_snapshot(edits.index(edit))
        n_kept = 0 if snapshot is None else snapshot.n_edits
    again = [one for one in edits[n_kept:] if one.id != edit_id]
    plan = Plan(edit, n_kept, again, alone=alone)
    done = len(journal.edits(PENDING)) if journal.note("pending") == _note(plan) else 0
    return replace(plan, done=done)


def _note(plan: Plan) -> dict[str, Any]:
    note = {"forget": plan.edit.id, "kept": plan.n_kept, "again": [edit.id for edit in plan.again]}
    return note if plan.alone is None else {**note, "alone": True}


@undisturbed
def forget(
    model: nn.Module,
    tok: Any,
    folder: str | Path,
    edit_id: int,
    on_edit: OnEdit | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    exactly: bool = True,
) -> EditStream:
    """Take one edit of a journal back; what comes after it is made again without it.

    Args:
        model: the base model, or the one that carries the journal's edits and writes to it.
        tok: its tokenizer.
        folder: the journal's.
        edit_id: the edit's number.
        on_edit: called after each edit that is made again.
        on_plan: called with what it asks for, before the first.
        exactly: make all again that came after it, so that it is as if it had never been. False: make only its memory
            again, and the edits of the shard that is open. That is exact where the edit's own shard is open, and where
            all edits are in one memory (``retrieve: false``).

    Returns:
        The stream without the edit, on the model; it goes on writing to the journal.

    Raises:
        JournalError: there is no such edit, or another process writes to the journal, or the model's edits are not the
            journal's. The journal is as before.
        EditDivergedError: an edit cannot be made again; likewise.
    """
    Journal(folder).close()  # a journal is not made by forgetting in it
    layers = find_wise_layers(model)
    streams = (one for layer in layers.values() for one in layer.edit_streams.values())
    stream = next((one for one in streams if _writes_to(one, folder)), None)
    if layers and stream is None:
        raise JournalError(
            f"this model carries edits, but does not write to the journal {folder}: forget on a freshly loaded model, "
            "or restore this one first."
        )
    journal = stream.sink.journal if stream is not None else JournalWriter(folder)
    before = stream.snapshot() if stream is not None else None
    sink_before = stream.sink if stream is not None else None
    try:
        plan = plan_of(journal, edit_id, exactly)
        if on_plan is not None:
            on_plan(plan)
        if stream is None:
            stream = fresh_stream(model, tok, journal)
        _make_without(stream, journal, plan, on_edit)
    except BaseException:
        if stream is not None and before is not None:
            stream.restore(before)
            stream.sink = sink_before
        elif not layers:
            detach(model)
            journal.close()
        raise
    return stream


def _writes_to(stream: Any, folder: str | Path) -> bool:
    sink = stream.sink if isinstance(stream, EditStream) else None
    return isinstance(sink, JournalSink) and sink.journal.folder.resolve() == Path(folder).resolve()


def _make_without(stream: EditStream, journal: JournalWriter, plan: Plan, on_edit: OnEdit | None) -> None:
    if not plan.done and journal.note("pending") != _note(plan):
        journal.begin_pending(_note(plan))
    settings = stream.hparams
    try:
        stream.use(stream.tok, settings_of(journal.calls()[0][2]))
        done = plan.done
        if plan.alone is not None and not done:
            put_without(stream, journal, plan.edit, plan.alone, on_edit)
            done = len(journal.edits(PENDING))
        state_at = rebuild(stream, journal, PENDING, plan.n_kept)
        sink = sink_of(journal, state_at, PENDING, plan.n_kept)
        make_again(stream, journal, plan.again[done:], sink, on_edit)
    finally:
        stream.use(stream.tok, settings)
    journal.adopt_pending(
        plan.n_kept, ForgottenEntry(asdict(plan.edit), now(), "forget" if plan.alone is None else "quick")
    )
    stream.sink = sink_of(journal, sink.state_at)
