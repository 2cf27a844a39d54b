"""Writing to a journal: each method is one transaction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from .database import digest_of
from .entries import NO_CHAIN, CallEntry, EditEntry, ForgottenEntry, SnapshotEntry, StreamFacts, chained
from .journal import DONE, LEFT, OPEN, PENDING, STREAM, Journal

# How long a snapshot stays: until the next one; until the next complete one; always.
_PASSING, _UNTIL_COMPLETE, _ALWAYS = 0, 2, 1


class JournalWriter(Journal):
    """A journal to write to; it is made where there is none. One process at a time holds it.

    Raises:
        JournalInUseError: another one does.
        JournalError: see :class:`.database.Database`.
    """

    _WRITES: ClassVar[bool] = True

    def begin(self, facts: StreamFacts, call: CallEntry) -> int:
        """Write down a call before its first edit; what an earlier one left undone stays undone.

        Returns:
            Its number.
        """
        with self.database.transaction():
            if self._fact("stream") is None:
                self._put_fact("stream", facts.to_json())
            self.database.run("UPDATE calls SET state = ? WHERE state = ?", LEFT, OPEN)
            body = call.to_json()
            self.database.run("INSERT INTO calls (state, body, digest) VALUES (?, ?, ?)", OPEN, body, digest_of(body))
            return int(str(self.database.rows("SELECT max(id) FROM calls")[0][0]))

    def end(self, call: int) -> None:
        """All edits of a call are made."""
        with self.database.transaction():
            self.database.run("UPDATE calls SET state = ? WHERE id = ?", DONE, call)

    def next_id(self) -> int:
        """The number of the next edit: no edit had it before, nor was it promised to one of a call."""
        highest = [0, *(call.first_id + len(call.requests) - 1 for _, _, call in self.calls())]
        for table in ("edits", "forgotten"):
            found = self.database.rows(f"SELECT max(id) FROM {table}")[0][0]
            highest.append(0 if found is None else int(str(found)))
        return max(highest) + 1

    def keep_note(self, key: str, values: Mapping[str, Any]) -> None:
        """Keep some values under a key."""
        with self.database.transaction():
            self._put_fact(key, json.dumps(dict(values)))

    def commit(
        self, edits: Sequence[EditEntry], snapshot: SnapshotEntry, blobs: Mapping[str, bytes], line: int = STREAM
    ) -> str:
        """One transaction: some more edits, the memories with them, and the tensors that are new.

        Args:
            edits: the edits.
            snapshot: the stream after them; its ``chain`` is that from before them.
            blobs: bytes by digest; those that are in the journal already are not written again.
            line: the stream, or the one under way in its place.

        Returns:
            The chain with them.
        """
        with self.database.transaction():
            chain, seq = snapshot.chain, snapshot.n_edits - len(edits)
            for data in blobs.values():
                self._put_blob(data)
            for edit in edits:
                seq += 1
                chain = self._put_edit(edit, chain, line, seq)
            self._put_snapshot(snapshot, chain, line)
        return chain

    def rewind(self, snapshot: SnapshotEntry, blobs: Mapping[str, bytes], when: str) -> str:
        """The stream was put back to where it had fewer edits: the others are taken back.

        Args:
            snapshot: the stream as it is.
            blobs: its tensors by digest.
            when: in UTC.

        Returns:
            The chain of the edits that are left.
        """
        with self.database.transaction():
            chain = NO_CHAIN
            for seq, (edit, digest) in enumerate(self._edits(STREAM), 1):
                if seq <= snapshot.n_edits:
                    chain = chained(chain, digest)
                else:
                    self._put_forgotten(ForgottenEntry(json.loads(edit.to_json()), when, "restore"))
            self._cut(STREAM, snapshot.n_edits, "seq > ?")
            for data in blobs.values():
                self._put_blob(data)
            if snapshot.n_edits:
                self._put_snapshot(snapshot, chain, STREAM)
            else:
                self._cut(STREAM, 0, "seq >= ?")
            self.database.run("UPDATE calls SET state = ? WHERE state = ?", LEFT, OPEN)
            self._drop_loose_blobs()
        return chain

    # -- a stream in place of the present one -------------------------------------------------

    def begin_pending(self, note: Mapping[str, Any]) -> None:
        """Begin another stream beside the present one, which stays what counts until :meth:`adopt_pending`."""
        with self.database.transaction():
            self._drop_line(PENDING)
            self._put_fact("pending", json.dumps(dict(note)))
            self._drop_loose_blobs()

    def fill_pending(
        self, n_kept: int, edits: Sequence[EditEntry], snapshots: Sequence[SnapshotEntry], blobs: Mapping[str, bytes]
    ) -> None:
        """Some edits of the line under way, which need not be made again; what it had before is dropped.

        Args:
            n_kept: edits of the stream that it begins with.
            edits: the next ones.
            snapshots: of the line after some of them, in order, the last one after all of them.
            blobs: bytes by digest, named by the first snapshot.
        """
        after = {snapshot.n_edits: snapshot for snapshot in snapshots}
        with self.database.transaction():
            self._drop_line(PENDING)
            for data in blobs.values():
                self._put_blob(data)
            chain = NO_CHAIN
            for _, digest in self._edits(STREAM)[:n_kept]:
                chain = chained(chain, digest)
            for seq, edit in enumerate(edits, n_kept + 1):
                chain = self._put_edit(edit, chain, PENDING, seq)
                if seq in after:
                    self._put_snapshot(after[seq], chain, PENDING)
            self._drop_loose_blobs()

    def drop_pending(self) -> None:
        """Give up what :meth:`begin_pending` began."""
        with self.database.transaction():
            self._drop_line(PENDING)
            self.database.run("DELETE FROM facts WHERE key = 'pending'")
            self._drop_loose_blobs()

    def adopt_pending(self, n_kept: int, forgotten: ForgottenEntry) -> None:
        """The stream is from now on its first ``n_kept`` edits and then those under way in place of the others."""
        with self.database.transaction():
            self._cut(STREAM, n_kept, "seq > ?")
            for table in ("edits", "snapshots", "links"):
                self.database.run(f"UPDATE {table} SET line = ? WHERE line = ?", STREAM, PENDING)
            if self.database.rows("SELECT 1 FROM snapshots WHERE line = ? AND seq > ?", STREAM, n_kept):
                self._drop_passing(STREAM)
            self._put_forgotten(forgotten)
            self.database.run("DELETE FROM facts WHERE key = 'pending'")
            self._drop_loose_blobs()

    # -- rows ---------------------------------------------------------------------------------

    def _put_fact(self, key: str, body: str) -> None:
        self.database.run(
            "INSERT OR REPLACE INTO facts (key, value, digest) VALUES (?, ?, ?)", key, body, digest_of(body)
        )

    def _put_forgotten(self, entry: ForgottenEntry) -> None:
        body = entry.to_json()
        self.database.run(
            "INSERT INTO forgotten (id, body, digest) VALUES (?, ?, ?)", entry.edit["id"], body, digest_of(body)
        )

    def _put_edit(self, edit: EditEntry, chain: str, line: int, seq: int) -> str:
        """The chain with it."""
        body = edit.to_json()
        digest = digest_of(body)
        self.database.run(
            "INSERT INTO edits (line, seq, id, body, digest) VALUES (?, ?, ?, ?, ?)",
            *(line, seq, edit.id, body, digest),
        )
        self._link(line, "edit", seq, {one for one in (edit.mask, edit.rows) if one is not None})
        return chained(chain, digest)

    def _put_blob(self, data: bytes) -> str:
        digest = digest_of(data)
        if not self.database.rows("SELECT 1 FROM blobs WHERE digest = ?", digest):
            self.database.run("INSERT INTO blobs (digest, data) VALUES (?, ?)", digest, data)
        return digest

    def _put_snapshot(self, snapshot: SnapshotEntry, chain: str, line: int) -> None:
        values = json.loads(snapshot.to_json())
        body = SnapshotEntry(**{**values, "chain": chain}).to_json()
        kept = _PASSING
        if snapshot.complete:
            kept = _ALWAYS if snapshot.open_shard is None else _UNTIL_COMPLETE
        self.database.run("DELETE FROM links WHERE line = ? AND owner = 'snapshot' AND seq = ?", line, snapshot.n_edits)
        self.database.run(
            "INSERT OR REPLACE INTO snapshots (line, seq, kept, body, digest) VALUES (?, ?, ?, ?, ?)",
            *(line, snapshot.n_edits, kept, body, digest_of(body)),
        )
        self._link(line, "snapshot", snapshot.n_edits, snapshot.blobs())
        self._drop_passing(line)
        self._drop_loose_blobs()

    def _link(self, line: int, owner: str, seq: int, blobs: set[str]) -> None:
        for blob in blobs:
            self.database.run(
                "INSERT OR REPLACE INTO links (line, owner, seq, blob) VALUES (?, ?, ?, ?)", line, owner, seq, blob
            )

    def _drop_passing(self, line: int) -> None:
        """Of a line's snapshots those stay that a stream can go on from, and the last one."""
        last = "(SELECT max(seq) FROM snapshots WHERE line = ?)"
        complete = f"(SELECT max(seq) FROM snapshots WHERE line = ? AND kept != {_PASSING})"
        going = (
            f"line = ? AND ((kept = {_PASSING} AND seq < {last}) OR (kept = {_UNTIL_COMPLETE} AND seq < {complete}))"
        )
        seqs = f"SELECT seq FROM snapshots WHERE {going}"
        self.database.run(
            f"DELETE FROM links WHERE owner = 'snapshot' AND line = ? AND seq IN ({seqs})", line, line, line, line
        )
        self.database.run(f"DELETE FROM snapshots WHERE {going}", line, line, line)

    def _cut(self, line: int, seq: int, which: str) -> None:
        self.database.run(f"DELETE FROM edits WHERE line = ? AND {which}", line, seq)
        self.database.run(f"DELETE FROM snapshots WHERE line = ? AND {which}", line, seq)
        self.database.run(f"DELETE FROM links WHERE owner IN ('edit', 'snapshot') AND line = ? AND {which}", line, seq)

    def _drop_line(self, line: int) -> None:
        for table in ("edits", "snapshots", "links"):
            self.database.run(f"DELETE FROM {table} WHERE line = ?", line)

    def _drop_loose_blobs(self) -> None:
        self.database.run("DELETE FROM blobs WHERE digest NOT IN (SELECT blob FROM links)")
