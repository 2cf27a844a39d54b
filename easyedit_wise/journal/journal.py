"""A journal of edits: what was asked for, what was made, and the memories, in one file.

Every batch of edits is one transaction, with the side memories as they are after it. From the *complete* snapshots
among them, at a shard's end as a rule, a stream goes on as if it had never stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .database import Database, JournalError, digest_of
from .entries import (
    NO_CHAIN,
    CallEntry,
    EditEntry,
    ForgottenEntry,
    JsonEntry,
    SnapshotEntry,
    StreamFacts,
    chained,
)

STREAM, PENDING = 0, 1
# What a call comes to.
OPEN, DONE, LEFT = "open", "done", "left"
Entry = TypeVar("Entry", bound=JsonEntry)
Self = TypeVar("Self", bound="Journal")


class Journal:
    """The entries of one journal, to read. Nothing here knows of models.

    Args:
        folder: the journal's folder.

    Raises:
        JournalError: see :class:`.database.Database`.
    """

    _WRITES: ClassVar[bool] = False

    def __init__(self, folder: str | Path) -> None:
        self.database = Database(folder, self._WRITES)
        self.folder = self.database.folder

    def close(self) -> None:
        """Close it; another process may then write."""
        self.database.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- reading ------------------------------------------------------------------------------

    def facts(self) -> StreamFacts | None:
        """What holds for the whole journal; None before the first call."""
        found = self._fact("stream")
        return None if found is None else self._entry(StreamFacts, found, "facts")

    def edits(self, line: int = STREAM) -> list[EditEntry]:
        """All edits that are held, in order."""
        return [edit for edit, _ in self._edits(line)]

    def edit(self, edit_id: int) -> EditEntry:
        """One edit that is held.

        Raises:
            JournalError: there is none of this number.
        """
        edits = self.edits()
        for one in edits:
            if one.id == edit_id:
                return one
        known = f"it has {len(edits)}, from {edits[0].id} to {edits[-1].id}" if edits else "it holds none"
        taken = "; that one was taken back" if any(one.edit["id"] == edit_id for one in self.forgotten()) else ""
        raise JournalError(f"the journal {self.folder} holds no edit {edit_id}: {known}{taken}.")

    def forgotten(self) -> list[ForgottenEntry]:
        """The edits that were taken back, by number."""
        rows = self.database.rows("SELECT body, digest FROM forgotten ORDER BY id")
        return [self._entry(ForgottenEntry, (str(body), str(digest)), "forgotten edit") for body, digest in rows]

    def calls(self) -> list[tuple[int, str, CallEntry]]:
        """(number, state, call) of all calls; the state is "open", "done" or "left"."""
        rows = self.database.rows("SELECT id, state, body, digest FROM calls ORDER BY id")
        return [
            (int(str(number)), str(state), self._entry(CallEntry, (str(body), str(digest)), "call"))
            for number, state, body, digest in rows
        ]

    def snapshot(self, line: int = STREAM) -> SnapshotEntry | None:
        """The stream as it is; None before the first edit.

        Raises:
            JournalDamagedError: an edit is missing, or was altered.
        """
        found = self._snapshots(line, "ORDER BY seq DESC LIMIT 1")
        if not found:
            if line == STREAM and self.database.rows("SELECT 1 FROM edits WHERE line = ? LIMIT 1", line):
                raise self.database.damaged("it has edits, but not the memories that hold them")
            return None
        chain, count = NO_CHAIN, 0
        for _, digest in self._edits(line):
            chain, count = chained(chain, digest), count + 1
        if line == STREAM and (count, chain) != (found[0].n_edits, found[0].chain):
            raise self.database.damaged("edits are missing from it, or were altered")
        return found[0]

    def complete_snapshot(self, n_edits: int, line: int = STREAM) -> SnapshotEntry | None:
        """The last snapshot, with ``n_edits`` edits at most, from which a stream can go on; None: from the start."""
        found = self._snapshots(line, "AND kept > 0 AND seq <= ? ORDER BY seq DESC LIMIT 1", n_edits)
        return found[0] if found else None

    def complete_snapshots(self, n_edits: int) -> list[SnapshotEntry]:
        """All snapshots, with ``n_edits`` edits at least, from which the stream can go on, in order."""
        return self._snapshots(STREAM, "AND kept > 0 AND seq >= ? ORDER BY seq", n_edits)

    def blob(self, digest: str) -> bytes:
        """Some bytes by their digest.

        Raises:
            JournalDamagedError: they are missing, or were altered.
        """
        rows = self.database.rows("SELECT data FROM blobs WHERE digest = ?", digest)
        if not rows or not isinstance(rows[0][0], bytes):
            raise self.database.damaged(f"the tensors {digest[:12]} are missing")
        data = rows[0][0]
        if digest_of(data) != digest:
            raise self.database.damaged(f"the tensors {digest[:12]} were altered")
        return data

    def note(self, key: str) -> dict[str, Any] | None:
        """Some values that were kept under a key."""
        found = self._fact(key)
        if found is None:
            return None
        values = json.loads(self._checked(found, key))
        return dict(values) if isinstance(values, dict) else None

    # -- rows ---------------------------------------------------------------------------------

    def _fact(self, key: str) -> tuple[str, str] | None:
        rows = self.database.rows("SELECT value, digest FROM facts WHERE key = ?", key)
        return (str(rows[0][0]), str(rows[0][1])) if rows else None

    def _edits(self, line: int) -> list[tuple[EditEntry, str]]:
        rows = self.database.rows("SELECT body, digest FROM edits WHERE line = ? ORDER BY seq", line)
        return [(self._entry(EditEntry, (str(body), str(digest)), "edit"), str(digest)) for body, digest in rows]

    def _snapshots(self, line: int, rest: str, *values: object) -> list[SnapshotEntry]:
        rows = self.database.rows(f"SELECT body, digest FROM snapshots WHERE line = ? {rest}", line, *values)
        return [self._entry(SnapshotEntry, (str(body), str(digest)), "snapshot") for body, digest in rows]

    def _checked(self, row: tuple[str, str], what: str) -> str:
        body, digest = row
        if digest_of(body) != digest:
            raise self.database.damaged(f"{what} was altered")
        return body

    def _entry(self, kind: type[Entry], row: tuple[str, str], what: str) -> Entry:
        try:
            return kind.from_json(self._checked(row, what))
        except (ValueError, TypeError, KeyError) as error:
            raise self.database.damaged(f"{what} cannot be read: {error}") from error
