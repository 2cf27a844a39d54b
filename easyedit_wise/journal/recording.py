"""A stream of edits writes its journal: each batch as one transaction, before it counts as made."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from ..editing.held import Committed
from ..editing.recorder import PREFIXES, WRITTEN
from ..editing.requests import EditRequest
from ..editing.stream import EditStream
from ..identity import DISTRIBUTIONS
from ..tuner.memory import LIVE, MemoryState
from .database import digest_of
from .entries import (
    NO_CHAIN,
    CallEntry,
    EditEntry,
    SnapshotEntry,
    StateEntry,
    StreamFacts,
    request_values,
)
from .journal import STREAM, Journal
from .tensors import mask_bytes, memory_bytes, pack_open_shard, rows_bytes, to_bytes
from .writing import JournalWriter

# A long shard's state is kept after so many edits, so that not all of it has to be made again.
_STATE_EVERY = 10
_PACKAGES = (*DISTRIBUTIONS, "torch", "transformers", "peft")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def facts_of(stream: EditStream, layer_name: str) -> StreamFacts:
    """What holds for a whole stream."""
    config = stream.layer.wisemem_config[stream.adapter_name]
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    model = getattr(stream.model, "name_or_path", "") or stream.hparams.model_name
    return StreamFacts(str(model), layer_name, stream.adapter_name, values, now(), versions)


class JournalSink:
    """Told by a stream of every batch of edits.

    Args:
        journal: the journal, open for writing.
        layer_name: of the layer that is edited.
        line: the stream, or the one under way in its place.
        chain: digest over the edits that the journal's line has so far.
        state_at: how many edits the last snapshot holds that a stream can go on from.
    """

    def __init__(
        self, journal: JournalWriter, layer_name: str, line: int = STREAM, chain: str = NO_CHAIN, state_at: int = 0
    ) -> None:
        self.journal = journal
        self.layer_name = layer_name
        self.line = line
        self.chain = chain
        self._call: tuple[int, list[int]] | None = None
        self._since = time.monotonic()
        self.state_at = state_at

    def begin(self, stream: EditStream, requests: Sequence[EditRequest]) -> int:
        """Write a call down before its first edit; the number of the call."""
        first = self.journal.next_id()
        settings = stream.hparams.to_dict()
        entry = CallEntry(now(), settings, [request_values(one) for one in requests], first)
        call = self.journal.begin(facts_of(stream, self.layer_name), entry)
        self.expect(call, list(range(first, first + len(requests))))
        return call

    def expect(self, call: int, ids: Sequence[int]) -> None:
        """The next edits are those of a call, with these numbers."""
        self._call = (call, list(ids))
        self._since = time.monotonic()

    def committed(self, stream: EditStream, batch: Committed) -> None:
        """Keep a batch; its numbers are those that were expected.

        Raises:
            RuntimeError: no call was begun.
            JournalError: it cannot be written; the journal is as before.
        """
        if self._call is None or len(self._call[1]) < len(batch.requests):
            raise RuntimeError("edits are made that no call was written down for: begin() comes first.")
        call, ids = self._call
        elapsed = time.monotonic() - self._since
        blobs: dict[str, bytes] = {}
        edits = _edit_entries(stream, batch, call, ids, elapsed, blobs)
        snapshot = self._snapshot(stream, blobs)
        # Before the edits: what failed behind their transaction would leave them in the journal, not on the model.
        self._keep_texts(stream.model)
        self.chain = self.journal.commit(edits, snapshot, blobs, self.line)
        self._complete_at(snapshot)
        self._call = (call, ids[len(edits) :])
        self._since = time.monotonic()

    def rewound(self, stream: EditStream) -> None:
        """The stream was put back to where it had fewer edits."""
        blobs: dict[str, bytes] = {}
        snapshot = self._snapshot(stream, blobs)
        self.chain = self.journal.rewind(snapshot, blobs, now())
        self._complete_at(snapshot)

    def _complete_at(self, snapshot: SnapshotEntry) -> None:
        if snapshot.complete:
            self.state_at = snapshot.n_edits

    def _snapshot(self, stream: EditStream, blobs: dict[str, bytes]) -> SnapshotEntry:
        held = stream.snapshot()
        n_edits = len(held.held)
        open_shard = held.open_shard
        values: dict[str, Any] | None = None
        packed: str | None = None
        memories = stream.layer.memories(stream.adapter_name)
        complete = not (memories and memories[-1].stage == LIVE and memories[-1].n_edits)
        if not complete and open_shard is not None and n_edits - self.state_at >= _STATE_EVERY:
            values, tensors = pack_open_shard(open_shard)
            packed, complete = _put(to_bytes(tensors), blobs), True
        states = [state_entry(state, blobs) for state in memories]
        return SnapshotEntry(
            n_edits,
            self.chain,
            [vars(state) for state in states],
            [edit.memory for edit in held.held],
            base64.b64encode(held.generator_state.numpy().tobytes()).decode("ascii"),
            complete,
            values,
            packed,
            held.elsewhere is not None,
        )

    def _keep_texts(self, model: nn.Module) -> None:
        """What the model sampled once for all of its edits: it would take its time to sample it again."""
        for name in (PREFIXES, WRITTEN):
            kept = model.__dict__.get(name, {})
            if kept and self.journal.note(name) is None:
                self.journal.keep_note(name, {"entries": [[list(key), _plain(value)] for key, value in kept.items()]})


def put_back_texts(model: nn.Module, journal: Journal) -> None:
    """Give a model what it sampled when the journal's edits were made."""
    for name in (PREFIXES, WRITTEN):
        for key, value in (journal.note(name) or {"entries": []})["entries"]:
            texts = torch.tensor(value["ids"]) if isinstance(value, dict) else value
            model.__dict__.setdefault(name, {}).setdefault(tuple(key), texts)


def _plain(value: Any) -> Any:
    return {"ids": value.tolist()} if isinstance(value, Tensor) else value


def _put(data: bytes, blobs: dict[str, bytes]) -> str:
    digest = digest_of(data)
    blobs[digest] = data
    return digest


def state_entry(state: MemoryState, blobs: dict[str, bytes]) -> StateEntry:
    """A side memory as a snapshot names it; its tensors go into ``blobs`` by their digests."""
    mask = None
    if state.stage == LIVE and state.mask is not None:
        mask = _put(mask_bytes(state.mask), blobs)
    delta_weight = _put(memory_bytes(state.delta_weight, state.mask), blobs)
    weakest = (one if math.isfinite(one) else None for one in (state.weakest_edit, state.weakest_answered))
    return StateEntry(state.stage, state.n_edits, state.epsilon, delta_weight, mask, *weakest)


def _edit_entries(
    stream: EditStream, batch: Committed, call: int, ids: Sequence[int], elapsed: float, blobs: dict[str, bytes]
) -> list[EditEntry]:
    states = stream.layer.memories(stream.adapter_name)
    memory = stream.held[-1].memory
    mask = None if batch.mask is None else _put(mask_bytes(batch.mask), blobs)
    before = sum(1 for edit in stream.held if edit.memory == memory) - len(batch.requests)
    per_edit = zip(batch.requests, batch.outcomes, batch.recorded, batch.scores, strict=True)
    return [
        EditEntry(
            id=ids[index],
            call=call,
            request=request_values(request),
            batch=ids[0],
            memory=memory,
            shard_edit=before + index + 1,
            scores=[scores.prompt, scores.answered, scores.irrelevant],
            epsilon=states[memory].epsilon,
            iterations=len(outcome.losses),
            loss=outcome.edit_losses[-1] if outcome.edit_losses else None,
            seed=stream.hparams.seed,
            generator=digest_of(batch.generator_state.numpy().tobytes()),
            mask=mask,
            # EasyEdit's score and the margins' shards ask for the texts again.
            rows=_put(rows_bytes(recorded), blobs) if stream.hparams.consolidation else None,
            seconds=elapsed / len(batch.requests),
            made=now(),
        )
        for index, (request, outcome, recorded, scores) in enumerate(per_edit)
    ]
