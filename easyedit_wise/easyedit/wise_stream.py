"""This package's WISE in the middle of a stream, for the lifelong protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..editing.requests import EditRequest
from ..evaluation.datasets import Request
from ..evaluation.lifelong import RouteProbe
from ..hparams import WISEHyperParams
from ..journal.calls import apply_edits, close_journal
from ..journal.recording import JournalSink
from ..wording import Wording
from .apply import stream_of
from .probe import probe_routes


class WiseStream:
    """A stream of WISE edits; with a journal, one that goes on after a stop.

    Args:
        model: without edits; edited in place.
        tok: its tokenizer.
        hparams: the settings.
        journal: the folder in which each edit is kept when it is made. What it holds already is put on the model.

    Attributes:
        made: edits that the journal held already.
        made_seconds: what they had taken.

    Raises:
        ValueError: the layer or the settings do not fit.
        JournalError: the journal cannot be read or written, or is another model's.
    """

    one_by_one = False
    use_cache = True

    def __init__(self, model: nn.Module, tok: Any, hparams: WISEHyperParams, journal: Path | None = None) -> None:
        self.model: Any = model
        if journal is not None:
            hparams = replace(hparams, journal=str(journal))
        self._stream = stream_of(model, tok, hparams)
        self.route_probe: RouteProbe | None = partial(
            probe_routes, model, Wording(tok, hparams.use_chat_template, hparams.target_separator)
        )
        self.made, self.made_seconds = len(self._stream.held), 0.0
        if isinstance(self._stream.sink, JournalSink):
            self.made_seconds = sum(edit.seconds for edit in self._stream.sink.journal.edits())

    def edit(self, requests: Sequence[Request], on_edit: Callable[[], None]) -> None:
        """Make these edits on top of the earlier ones."""
        separator = self._stream.hparams.target_separator
        edits = [EditRequest.from_easyedit(one, separator) for one in requests]
        apply_edits(self._stream, edits, lambda *_: on_edit())

    def holders(self) -> list[str] | None:
        """The memory that holds each edit so far."""
        return [f"{self._stream.adapter_name}/{held.memory}" for held in self._stream.held]

    def close(self) -> None:
        """Let go of the journal; the model keeps its edits."""
        close_journal(self.model)
