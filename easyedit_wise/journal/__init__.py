"""The journal: every edit kept the moment it is made, streams that go on, single edits taken back (docs/journal.md)."""

from .calls import Unfinished, close_journal, resume, unfinished
from .database import JournalDamagedError, JournalError, JournalInUseError
from .entries import CallEntry, EditEntry, ForgottenEntry
from .forgetting import Plan, forget, plan_of
from .journal import Journal

__all__ = [
    "Journal",
    "resume",
    "forget",
    "close_journal",
    "unfinished",
    "plan_of",
    "Plan",
    "Unfinished",
    "CallEntry",
    "EditEntry",
    "ForgottenEntry",
    "JournalError",
    "JournalDamagedError",
    "JournalInUseError",
]
