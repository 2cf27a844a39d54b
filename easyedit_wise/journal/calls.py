"""Calls for edits: written down before their first edit, so that what a killed process left is known and done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..editing.requests import EditRequest
from ..editing.stream import EditStream
from ..tuner.model import find_wise_layers
from ..undisturbed import undisturbed
from .database import JournalError
from .entries import CallEntry, request_from, request_values
from .journal import OPEN, Journal
from .recording import JournalSink
from .restoring import OnEdit, going_on, settings_of
from .writing import JournalWriter


@dataclass(frozen=True)
class Unfinished:
    """What is left of the last call.

    Attributes:
        number: of the call.
        call: the call.
        requests: those that are still to be made.
        ids: their numbers.
    """

    number: int
    call: CallEntry
    requests: list[EditRequest]
    ids: list[int]


def unfinished(journal: Journal) -> Unfinished | None:
    """What is left of the last call; None where all of it is made, or where there was none."""
    calls = journal.calls()
    if not calls or calls[-1][1] != OPEN:
        return None
    number, _, call = calls[-1]
    seen = [edit.id for edit in journal.edits() if edit.call == number]
    seen += [int(one.edit["id"]) for one in journal.forgotten() if one.edit["call"] == number]
    done = max([0, *(one - call.first_id + 1 for one in seen)])
    left = call.requests[done:]
    first = call.first_id + done
    return Unfinished(number, call, list(map(request_from, left)), list(range(first, first + len(left))))


@undisturbed
def journaled(stream: EditStream, folder: str | Path, layer_name: str) -> EditStream:
    """The stream that goes on in a journal: the journal's own, or this one, which has no edits yet, in a new one.

    Args:
        stream: of a model; without edits, or one that writes to this journal already.
        folder: the journal's.
        layer_name: of the layer that it edits.

    Raises:
        JournalError: the model has edits that are not in the journal, or the journal cannot be written to.
    """
    if isinstance(stream.sink, JournalSink):
        if stream.sink.journal.folder.resolve() != Path(folder).expanduser().resolve():
            raise JournalError(
                f"this model's edits are journaled in {stream.sink.journal.folder}, but the settings name {folder}: "
                "a stream has one journal. Name that one, or restore the model first."
            )
        return stream
    if stream.held:
        raise JournalError(
            f"this model has {len(stream.held)} edits that are not in the journal {folder}: a journal holds a stream "
            "from its first edit on. Restore the model first, or edit without a journal."
        )
    journal = JournalWriter(folder)
    try:
        if journal.facts() is None:
            stream.sink = JournalSink(journal, layer_name)
            return stream
        settings, adapter_name = stream.hparams, stream.adapter_name
        going = going_on(stream.model, stream.tok, journal, adapter_name=adapter_name)
        going.use(stream.tok, settings)
        return going
    except BaseException:
        journal.close()
        raise


def close_journal(model: nn.Module) -> None:
    """Let another process write to the journals of a model's edits, which the model keeps."""
    for layer in find_wise_layers(model).values():
        for stream in layer.edit_streams.values():
            sink = stream.sink if isinstance(stream, EditStream) else None
            if isinstance(sink, JournalSink):
                sink.journal.close()


def apply_edits(stream: EditStream, requests: Sequence[EditRequest], on_edit: OnEdit | None = None) -> None:
    """Make edits, in the stream's journal if it has one: see ``EditStream.apply`` and :func:`apply_journaled`."""
    if stream.sink is None:
        stream.apply(requests, on_edit)
    else:
        apply_journaled(stream, requests, on_edit)


def apply_journaled(stream: EditStream, requests: Sequence[EditRequest], on_edit: OnEdit | None = None) -> None:
    """Make edits, each batch of them a transaction of the journal.

    If the last call asked for the same edits with the same settings and was stopped, or for more and just these are
    left of it, what is left of it is made: a script that is run again goes on where it was killed.

    Args:
        stream: with a journal.
        requests: validated requests.
        on_edit: called after each edit that is made here.

    Raises:
        JournalError: the stream has no journal, or it cannot be written to.
    """
    sink = stream.sink
    if not isinstance(sink, JournalSink):
        raise JournalError("the stream has no journal: name a folder for it.")
    left = unfinished(sink.journal)
    values = [request_values(one) for one in requests]
    values_left = [] if left is None else [request_values(one) for one in left.requests]
    if (
        left is not None
        and values in ([request_values(request_from(one)) for one in left.call.requests], values_left)
        and left.call.settings == stream.hparams.to_dict()
    ):
        sink.expect(left.number, left.ids)
        _finish(stream, sink, left.number, left.requests, on_edit)
        return
    stream.check(requests)
    _finish(stream, sink, sink.begin(stream, requests), requests, on_edit)


def _finish(
    stream: EditStream, sink: JournalSink, call: int, requests: Sequence[EditRequest], on_edit: OnEdit | None
) -> None:
    stream.apply(requests, on_edit)
    sink.journal.end(call)


@undisturbed
def resume(
    model: nn.Module,
    tok: Any,
    folder: str | Path,
    skip: int = 0,
    on_edit: OnEdit | None = None,
    on_plan: Callable[[int, int], None] | None = None,
) -> EditStream:
    """Go on with a stream that was stopped: its last call's edits that are not made yet.

    The memories come out bit for bit as if it had not been stopped, on the same machine with the same packages.

    Args:
        model: the base model, without edits.
        tok: its tokenizer.
        folder: the journal's.
        skip: leave out so many of the edits that are left, such as one that cannot be made.
        on_edit: called after each edit; those of the open shard are made again first.
        on_plan: called with how many edits are made again, and how many are left, before the first.

    Returns:
        The stream; it goes on writing to the journal.

    Raises:
        JournalError: there is no journal, or another process writes to it, or the model has edits.
        EditDivergedError: an edit could not be made; those before it stand.
    """
    if find_wise_layers(model):
        raise JournalError("this model carries edits: resume on a freshly loaded one, or restore this one first.")
    Journal(folder).close()  # a journal is not made by resuming it
    journal = JournalWriter(folder)
    try:
        left = unfinished(journal)
        n_left = 0 if left is None else max(0, len(left.requests) - skip)
        held = len(journal.edits())
        complete = journal.complete_snapshot(held)
        if on_plan is not None:
            on_plan(held - (0 if complete is None else complete.n_edits), n_left)
        stream = going_on(model, tok, journal, on_edit)
        sink = stream.sink
        if left is not None and isinstance(sink, JournalSink):
            sink.expect(left.number, left.ids[skip:])
            stream.use(tok, settings_of(left.call))
            _finish(stream, sink, left.number, left.requests[skip:], on_edit)
        return stream
    except BaseException:
        journal.close()
        raise
