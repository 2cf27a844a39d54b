"""From a journal to a stream of edits: as it stands, or so that it goes on as if it had never stopped."""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..editing.elsewhere import with_elsewhere
from ..editing.held import HeldEdit, Snapshot
from ..editing.requests import EditRequest
from ..editing.stream import EditStream
from ..editing.trainer import EditOutcome
from ..hparams import WISEHyperParams
from ..separators import SPACE
from ..tuner.attach import attach, detach
from ..tuner.config import WiseConfig
from ..tuner.devices import computing_device
from ..tuner.memory import MemoryState
from ..tuner.model import find_wise_layers
from ..undisturbed import undisturbed
from .database import JournalError, digest_of
from .entries import NO_CHAIN, CallEntry, EditEntry, SnapshotEntry, request_from
from .journal import PENDING, STREAM, Journal
from .recording import JournalSink, put_back_texts
from .tensors import (
    from_bytes,
    mask_from_bytes,
    memory_bytes,
    memory_from_bytes,
    rows_from_bytes,
    unpack_open_shard,
)
from .writing import JournalWriter

LOG = logging.getLogger(__name__)

OnEdit = Callable[[int, EditRequest, EditOutcome], object]

# A call names all settings that there were: what these, which came later, are where nothing is done.
_AS_BEFORE: Mapping[str, Any] = MappingProxyType(
    {
        "prompt_gain": 1.0,
        "level_limit": 0.0,
        "after_answer": 0,
        "unfinished_names": 0.0,
        "unfinished_names_after": 0,
        "asked_again": 1,
        "asked_again_limit": 0,
        "target_separator": SPACE,
    }
)


@undisturbed
def attached(
    model: nn.Module, tok: Any, journal: Journal, adapter_name: str | None = None, any_base: bool = False
) -> EditStream:
    """A journal's edits on a model, as they stand: they answer, and the stream knows their texts.

    Args:
        model: the base model that they were made for.
        tok: its tokenizer.
        journal: the journal.
        adapter_name: the name that the set of edits gets; None: the one that it had.
        any_base: although the layer's weight is not the one that they were made beside.

    Raises:
        JournalError: no edit was ever asked for, or the journal is damaged.
        ValueError: the layer does not exist, or is another one.
    """
    with _no_trace_of_failure(model):
        stream = fresh_stream(model, tok, journal, adapter_name, any_base)
        snapshot, edits = journal.snapshot(), journal.edits()
        if snapshot is not None:
            put_into(stream, journal, snapshot, edits)
    return stream


@contextmanager
def _no_trace_of_failure(model: nn.Module) -> Iterator[None]:
    """A model that carried no edits before carries none after an error."""
    fresh = not find_wise_layers(model)
    try:
        yield
    except BaseException:
        if fresh:
            detach(model)
        raise


def fresh_stream(
    model: nn.Module, tok: Any, journal: Journal, adapter_name: str | None = None, any_base: bool = False
) -> EditStream:
    """A stream without edits on the layer that a journal's edits are in, with the settings of its first call.

    Raises:
        JournalError: no edit was ever asked for.
        ValueError: the layer does not exist, or is another one.
    """
    facts, calls = journal.facts(), journal.calls()
    if facts is None or not calls:
        raise JournalError(f"no edit was ever asked for in the journal {journal.folder}.")
    config = WiseConfig(
        **{key: value for key, value in facts.adapter.items() if key in WiseConfig.__dataclass_fields__}
    )
    config.memories = ["live"]
    if any_base:
        config.base_fingerprint = None
    name = adapter_name or facts.adapter_name
    layer = attach(model, config, name)
    put_back_texts(model, journal)
    stream = EditStream(model, tok, settings_of(calls[0][2]), layer, name)
    layer.edit_stream = stream
    return stream


def put_into(stream: EditStream, journal: Journal, snapshot: SnapshotEntry, edits: Sequence[EditEntry]) -> None:
    """Make a stream what it was at a snapshot.

    Args:
        stream: of the journal's layer.
        journal: the journal.
        snapshot: one of its snapshots.
        edits: all edits of the snapshot's line, of which it has the first.

    Raises:
        JournalDamagedError: the snapshot does not hold together.
    """
    device = computing_device(stream.layer.get_base_layer())
    shape = (stream.layer.out_features, stream.layer.in_features)
    held = edits[: snapshot.n_edits]
    try:
        states = []
        for one in snapshot.memories:
            mask = None if one.mask is None else mask_from_bytes(journal.blob(one.mask), shape)
            delta_weight = memory_from_bytes(journal.blob(one.delta_weight), shape, mask)
            states.append(
                MemoryState(
                    one.stage,
                    delta_weight.to(device),
                    None if mask is None else mask.to(device),
                    one.epsilon,
                    one.n_edits,
                    *one.weakest,
                )
            )
        if not len(held) == len(snapshot.held) == snapshot.n_edits or not all(
            0 <= place < len(states) for place in snapshot.held
        ):
            raise ValueError("its edits and its memories do not fit together")
        generator = torch.frombuffer(bytearray(base64.b64decode(snapshot.generator)), dtype=torch.uint8)
        torch.Generator().set_state(generator)  # refuses what is no generator's state
        open_shard = None
        if snapshot.open_shard is not None and snapshot.open_shard_blob is not None:
            tensors = from_bytes(journal.blob(snapshot.open_shard_blob))
            open_shard = unpack_open_shard(snapshot.open_shard, tensors, device)
        elsewhere = _elsewhere(journal, held, device) if snapshot.complete and snapshot.knows_elsewhere else None
        requests = [request_from(edit.request) for edit in held]
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        if isinstance(error, JournalError):
            raise
        raise journal.database.damaged(str(error)) from error
    stream.restore(
        Snapshot(
            tuple(states),
            tuple(map(HeldEdit, requests, snapshot.held)),
            generator,
            open_shard,
            None,
            elsewhere,
        )
    )


def put_at(stream: EditStream, journal: Journal, snapshot: SnapshotEntry | None, edits: Sequence[EditEntry]) -> None:
    """:func:`put_into`, or without a snapshot the stream as it begins."""
    if snapshot is None:
        stream.restore(Snapshot((), (), torch.Generator().manual_seed(stream.hparams.seed).get_state()))
    else:
        put_into(stream, journal, snapshot, edits)


def _elsewhere(journal: Journal, edits: Sequence[EditEntry], device: torch.device) -> Tensor | None:
    """What the next shard is quiet on: the sum that the stream had, added up in the same order."""
    summed: Tensor | None = None
    for edit in edits:
        if edit.rows is None:
            raise ValueError(f"edit {edit.id} lacks what later shards need of it")
        summed = with_elsewhere(summed, [rows_from_bytes(journal.blob(edit.rows), device)])
    return summed


def rebuild(
    stream: EditStream, journal: Journal, line: int = STREAM, n_kept: int = 0, on_edit: OnEdit | None = None
) -> int:
    """Make a stream what it was when the last edit of a line was made, so that the next one comes out the same.

    From the last complete snapshot on, edits are made again: at most those of the open shard, or some.

    Args:
        stream: of the journal's layer.
        journal: the journal.
        line: the stream, or the one under way in its place, which begins with ``n_kept`` edits of the stream.
        n_kept: see above; only for the line under way.
        on_edit: called after each edit that is made again.

    Returns:
        How many edits the complete snapshot has.

    Raises:
        JournalDamagedError: the journal does not hold together.
        EditDivergedError: an edit that could be made once cannot be made again.
    """
    edits = journal.edits()[: n_kept if line == PENDING else None]
    snapshot = journal.complete_snapshot(n_kept if line == PENDING else len(edits))
    if line == PENDING:
        edits += journal.edits(PENDING)
        snapshot = journal.complete_snapshot(len(edits), PENDING) or snapshot
    stream.sink = None
    put_at(stream, journal, snapshot, edits)
    done = snapshot.n_edits if snapshot is not None else 0
    make_again(stream, journal, edits[done:], None, on_edit)
    return done


def make_again(
    stream: EditStream,
    journal: Journal,
    edits: Sequence[EditEntry],
    sink: JournalSink | None,
    on_edit: OnEdit | None = None,
) -> None:
    """Make edits of a journal again, call by call, with the settings of each.

    Args:
        stream: where they go.
        journal: the journal.
        edits: which, in order.
        sink: told of them; None: nobody is.
        on_edit: called after each.
    """
    stream.sink = sink
    calls = {number: call for number, _, call in journal.calls()}
    for number, group in groupby(edits, key=lambda edit: edit.call):
        some = list(group)
        stream.use(stream.tok, settings_of(calls[number]))
        if sink is not None:
            sink.expect(number, [edit.id for edit in some])
        stream.apply([request_from(edit.request) for edit in some], on_edit)


def differs(stream: EditStream, snapshot: SnapshotEntry) -> bool:
    """Whether a rebuilt stream's memories are other ones, bit for bit, than a snapshot's."""
    states = stream.layer.memories(stream.adapter_name)
    made = [digest_of(memory_bytes(state.delta_weight, state.mask)) for state in states]
    return made != [state.delta_weight for state in snapshot.memories]


@undisturbed
def going_on(
    model: nn.Module,
    tok: Any,
    journal: JournalWriter,
    on_edit: OnEdit | None = None,
    adapter_name: str | None = None,
) -> EditStream:
    """A journal's stream on a model without edits, so that the next edit comes out as if it had never stopped.

    What an interrupted :func:`.forgetting.forget` left is given up.

    Args:
        model: the base model.
        tok: its tokenizer.
        journal: the journal, open for writing; the stream goes on writing to it.
        on_edit: called after each edit of the open shard, which are made again.
        adapter_name: the name that the set of edits gets; None: the one that it had.
    """
    if journal.note("pending") is not None:
        LOG.warning("an edit was about to be taken back when the journal was left: it is held as before.")
        journal.drop_pending()
    with _no_trace_of_failure(model):
        stream = fresh_stream(model, tok, journal, adapter_name)
        snapshot = journal.snapshot()
        state_at = rebuild(stream, journal, on_edit=on_edit)
    if snapshot is not None and differs(stream, snapshot):
        LOG.warning(
            "the open shard's edits came out otherwise than before (another machine, torch, or number of threads?): "
            "they hold all the same, and the stream goes on from here."
        )
    stream.sink = sink_of(journal, state_at)
    return stream


def sink_of(journal: JournalWriter, state_at: int, line: int = STREAM, n_kept: int = 0) -> JournalSink:
    """What writes the next edits of a line; arguments as for :func:`rebuild`, which returns ``state_at``."""
    facts, snapshot = journal.facts(), journal.snapshot(line)
    if facts is None:
        raise JournalError(f"no edit was ever asked for in the journal {journal.folder}.")
    if snapshot is None and line == PENDING:
        snapshot = journal.complete_snapshot(n_kept)
    return JournalSink(journal, facts.layer, line, NO_CHAIN if snapshot is None else snapshot.chain, state_at)


def settings_of(call: CallEntry) -> WISEHyperParams:
    """The settings that a call's edits were asked for with, also by an earlier version."""
    return WISEHyperParams.from_dict({**_AS_BEFORE, **call.settings})
