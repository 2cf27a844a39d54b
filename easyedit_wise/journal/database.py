"""The journal's file: an SQLite database that is written in transactions and read without trust.

A transaction is on disk as a whole or not at all, whenever the process is killed. Texts are JSON with a digest beside
them, tensors are safetensors named by their digest, so that what was altered is noticed; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

JOURNAL_FILE = "journal.sqlite3"
LOCK_FILE = "journal.lock"
# 2: a snapshot says what the weakest edit of each memory scores. 3: and what the weakest scores with its target.
# 4: a request says what stands between its prompt and its target.
SCHEMA_VERSION = 4
# "WISE": what tells a journal from another program's database.
_APPLICATION_ID = 0x57495345
# How long a reader waits for a commit under way; one writes some hundreds of megabytes at most.
_PATIENCE_S = 30.0

# "line" 0 is the stream, 1 the one that is under way in its place (an edit is taken back).
_SCHEMA = """
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL, digest TEXT NOT NULL);
CREATE TABLE calls (id INTEGER PRIMARY KEY, state TEXT NOT NULL, body TEXT NOT NULL, digest TEXT NOT NULL);
CREATE TABLE edits (
    line INTEGER NOT NULL, seq INTEGER NOT NULL, id INTEGER NOT NULL, body TEXT NOT NULL, digest TEXT NOT NULL,
    PRIMARY KEY (line, seq), UNIQUE (line, id));
CREATE TABLE snapshots (
    line INTEGER NOT NULL, seq INTEGER NOT NULL, kept INTEGER NOT NULL, body TEXT NOT NULL, digest TEXT NOT NULL,
    PRIMARY KEY (line, seq));
CREATE TABLE links (line INTEGER NOT NULL, owner TEXT NOT NULL, seq INTEGER NOT NULL, blob TEXT NOT NULL,
    PRIMARY KEY (line, owner, seq, blob));
CREATE INDEX links_of_blob ON links (blob);
CREATE TABLE blobs (digest TEXT PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE forgotten (id INTEGER PRIMARY KEY, body TEXT NOT NULL, digest TEXT NOT NULL);
"""


class JournalError(RuntimeError):
    """The journal cannot be used; nothing in it was changed."""


class JournalInUseError(JournalError):
    """Another process writes to the journal."""


class JournalDamagedError(JournalError):
    """A journal's file was truncated or altered."""


def digest_of(*parts: str | bytes) -> str:
    """SHA-256 over some texts or bytes, in hexadecimal; where one ends and the next begins enters."""
    sha = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8") if isinstance(part, str) else part
        sha.update(len(raw).to_bytes(8, "little"))
        sha.update(raw)
    return sha.hexdigest()


class Database:
    """One connection to a journal's file.

    Args:
        folder: the journal's folder.
        write: whether this process is the one that writes; there is one at a time. Makes a new journal where there
            is none.

    Raises:
        JournalInUseError: another process writes to it.
        JournalDamagedError: the file is no journal, or damaged.
        JournalError: there is none, it is of a newer version, or it cannot be opened.
    """

    def __init__(self, folder: str | Path, write: bool) -> None:
        self.folder = Path(folder).expanduser()
        self.path = self.folder / JOURNAL_FILE
        self._lock: FileLock | None = None
        self._connection: sqlite3.Connection | None = None
        if not write and not self.path.is_file():
            raise JournalError(f"{self.path} does not exist: name a folder that edits were journaled in.")
        try:
            if write:
                self._take_lock()
            self._open(write)
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise JournalError(f"{self.folder} is a file: a journal is a folder, so name another path.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # The system takes it off when the process ends, however it ends.
            self._lock = FileLock(self.folder / LOCK_FILE)
            self._lock.acquire(timeout=0)
        except Timeout:
            self._lock = None
            raise JournalInUseError(
                f"another process, or another model of this one, writes to the journal {self.folder}: wait until it is "
                "done (reading is possible meanwhile), or name another folder."
            ) from None
        except OSError as error:
            self._lock = None
            raise JournalError(f"{self.folder} cannot be written to ({error}): name another folder.") from error

    def _open(self, write: bool) -> None:
        with self._clear_errors():
            # Autocommit: transactions are begun and ended by name. Readers, too, may have to put back what a killed
            # writer left half-written, so they open for writing where they can.
            self._connection = sqlite3.connect(self.path, timeout=_PATIENCE_S, isolation_level=None)
            self._connection.executescript(
                "PRAGMA trusted_schema=OFF; PRAGMA cell_size_check=ON; PRAGMA synchronous=EXTRA;"
            )
            version, application = self._number("user_version"), self._number("application_id")
            tables = self.rows("SELECT name FROM sqlite_master")
        if not tables and write:
            with self.transaction():
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    self.run(statement)
                self.run(f"PRAGMA application_id={_APPLICATION_ID}")
                self.run(f"PRAGMA user_version={SCHEMA_VERSION}")
            return
        if not tables:  # a first process was killed before it had written anything
            raise JournalError(f"{self.path} is empty: no edit was journaled in it.")
        if application != _APPLICATION_ID:
            raise JournalDamagedError(
                f"{self.path} is a database, but no journal of edits: name another folder, or take the file away."
            )
        if version > SCHEMA_VERSION:
            raise JournalError(
                f"{self.path} has version {version}, and this easyedit_wise reads up to {SCHEMA_VERSION}: update it."
            )
        if version < 1:
            raise JournalDamagedError(self._damaged("it has no version"))
        # All that is there stays as it is, but an older version could not read what comes now.
        if write and version < SCHEMA_VERSION:
            self.run(f"PRAGMA user_version={SCHEMA_VERSION}")

    def _number(self, pragma: str) -> int:
        return int(str(self.rows(f"PRAGMA {pragma}")[0][0]))

    def close(self) -> None:
        """Close the file and let others write."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._connection is None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What is written inside is kept as a whole, or, if anything is raised, not at all."""
        self.run("BEGIN IMMEDIATE")
        try:
            yield
            self.run("COMMIT")
        except BaseException:
            if self._connection is not None and self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def run(self, statement: str, *values: object) -> None:
        """Run a statement that changes something."""
        with self._clear_errors():
            self._connected().execute(statement, values)

    def rows(self, query: str, *values: object) -> list[tuple[object, ...]]:
        """The rows of a query."""
        with self._clear_errors():
            return self._connected().execute(query, values).fetchall()

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            raise JournalError(f"the journal {self.folder} is closed: open it again.")
        return self._connection

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "full" in str(error) or "disk I/O" in str(error):
                raise JournalError(
                    f"{self.path} cannot be written ({error}): make room on the disk and go on; what was acknowledged "
                    "is in it."
                ) from error
            if "locked" in str(error) or "busy" in str(error):
                raise JournalInUseError(
                    f"{self.path} stays locked by another program ({error}): end that one, then try again."
                ) from error
            if "unable to open" in str(error) or "readonly" in str(error):
                raise JournalError(
                    f"{self.path} cannot be opened ({error}): check the folder's permissions."
                ) from error
            raise JournalDamagedError(self._damaged(str(error))) from error
        except (sqlite3.DatabaseError, OverflowError, UnicodeDecodeError) as error:
            raise JournalDamagedError(self._damaged(str(error))) from error

    def _damaged(self, why: str) -> str:
        return f"{self.path} is damaged ({why}): nothing was changed; take the folder from a backup."

    def damaged(self, why: str) -> JournalDamagedError:
        """The error that says so."""
        return JournalDamagedError(self._damaged(why))
