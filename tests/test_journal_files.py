"""A journal's file is not trusted, and what cannot be written is taken back."""

from __future__ import annotations

import copy
import json
import math
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from editing_helpers import settings, stream_on
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_consolidated import ON, about
from test_journal import closed, edited, memories, same

from easyedit_wise.easyedit.apply import apply_wise_to_model
from easyedit_wise.editing.open_shard import OpenShard
from easyedit_wise.editing.requests import EditRequest
from easyedit_wise.journal import recording
from easyedit_wise.journal.calls import resume
from easyedit_wise.journal.database import (
    JOURNAL_FILE,
    SCHEMA_VERSION,
    Database,
    JournalDamagedError,
    JournalError,
    digest_of,
)
from easyedit_wise.journal.entries import EditEntry, request_values
from easyedit_wise.journal.journal import Journal
from easyedit_wise.journal.restoring import attached
from easyedit_wise.journal.tensors import (
    from_bytes,
    mask_bytes,
    mask_from_bytes,
    pack_open_shard,
    to_bytes,
    unpack_open_shard,
)
from easyedit_wise.journal.writing import JournalWriter


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal of four edits, closed."""
    from conftest import build_model, build_tokenizer

    folder = tmp_path_factory.mktemp("whole")
    closed(edited(build_model("llama"), build_tokenizer(), folder, about(4), **ON))
    return folder


@pytest.fixture
def journal(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "journal")
    return tmp_path / "journal"


def everything(folder: Path, model: Any, tok: Any) -> None:
    """Read all that there is."""
    with Journal(folder) as journal:
        journal.calls(), journal.forgotten(), journal.facts()
        attached(model, tok, journal)
        for edit in journal.edits():
            for blob in (edit.mask, edit.rows):
                if blob is not None:
                    journal.blob(blob)


def altered(folder: Path, statement: str, *values: object) -> None:
    with sqlite3.connect(folder / JOURNAL_FILE) as connection:
        connection.execute(statement, values)
    connection.close()


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("UPDATE edits SET body = replace(body, 'Rome', 'Bonn') WHERE seq = 1", "edit was altered"),
        ("UPDATE snapshots SET body = replace(body, 'live', 'shard')", "snapshot was altered"),
        ("UPDATE facts SET value = value || ' '", "facts was altered"),
        ("UPDATE calls SET body = '{}'", "call was altered"),
        ("DELETE FROM edits WHERE seq = 2", "edits are missing"),
        ("DELETE FROM snapshots", "not the memories"),
        ("DELETE FROM blobs", "are missing"),
        ("UPDATE blobs SET data = zeroblob(length(data))", "were altered"),
        ("UPDATE blobs SET data = 'text'", "are missing"),
        ("DROP TABLE blobs", "no such table"),
    ],
)
def test_what_was_altered_is_refused(journal: Path, llama: Any, tok: Any, statement: str, says: str) -> None:
    altered(journal, statement)
    before = (journal / JOURNAL_FILE).read_bytes()
    with pytest.raises(JournalDamagedError, match=says):
        everything(journal, llama, tok)
    with pytest.raises(JournalDamagedError, match="is damaged"):
        resume(copy.deepcopy(llama), tok, journal)
    assert (journal / JOURNAL_FILE).read_bytes() == before


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_file(journal: Path, llama: Any, tok: Any, share: float) -> None:
    path = journal / JOURNAL_FILE
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(JournalError, match=r"is damaged|is empty"):
        everything(journal, llama, tok)


def test_flipped_bytes_never_pass_for_other_edits(journal: Path, tok: Any, make_model: Any) -> None:
    """Whatever is flipped: the same edits, or our error."""
    path, dice = journal / JOURNAL_FILE, np.random.default_rng(0)
    data, model = path.read_bytes(), make_model("llama")
    with Journal(journal) as intact:
        expected = intact.edits()
        stream = attached(model, tok, intact)
        wanted = memories(model)
    refused = 0
    for _ in range(60):
        broken = bytearray(data)
        for place in dice.integers(0, len(data), size=int(dice.integers(1, 30))):
            broken[place] ^= int(dice.integers(1, 256))
        path.write_bytes(broken)
        fresh = make_model("llama")
        try:
            with Journal(journal) as read:
                assert read.edits() == expected
                stream = attached(fresh, tok, read)
        except JournalError:
            refused += 1
            continue
        assert same(memories(fresh), wanted)
        assert len(stream.held) == 4
    assert refused > 5


def test_a_newer_journal(journal: Path) -> None:
    altered(journal, "PRAGMA user_version = 5")
    for write in (False, True):
        with pytest.raises(JournalError, match=r"has version 5, and this easyedit_wise reads up to 4: update it"):
            Database(journal, write)


@pytest.mark.parametrize("earlier", [1, 2])
def test_a_journal_of_an_earlier_version_is_read_and_goes_on_as_one_of_this(
    journal: Path, llama: Any, tok: Any, earlier: int
) -> None:
    """The first does not say what the weakest edit of a memory scores, the second not what it does with its target."""
    unsaid = ("weakest_edit", "weakest_answered")[earlier - 1 :]
    with sqlite3.connect(journal / JOURNAL_FILE) as connection:
        for line, seq, body in connection.execute("SELECT line, seq, body FROM snapshots").fetchall():
            values = json.loads(body)
            assert all(state.pop(name) > 0 for state in values["states"] for name in unsaid)
            body = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
            changed = (body, digest_of(body), line, seq)
            connection.execute("UPDATE snapshots SET body = ?, digest = ? WHERE line = ? AND seq = ?", changed)
        connection.execute(f"PRAGMA user_version = {earlier}")
    connection.close()

    def version() -> int:
        with sqlite3.connect(journal / JOURNAL_FILE) as connection:
            (found,) = connection.execute("PRAGMA user_version").fetchone()
        connection.close()
        return int(found)

    reader = copy.deepcopy(llama)
    with Journal(journal) as read:
        attached(reader, tok, read)
    known = memories(reader)
    assert all((memory[3] == math.inf) == (earlier == 1) and memory[4] == math.inf for memory in known)
    assert version() == earlier  # nobody has written to it
    writer = edited(llama, tok, journal, about(5)[4:], **ON)
    closed(writer)
    assert version() == SCHEMA_VERSION
    assert max(memories(writer)[-1][3:5]) < math.inf


def test_a_journal_that_names_no_separators_had_a_space_before_every_target(
    llama: Any, tok: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of version 3 and earlier; the first edit of an open shard is made again from its text, bit for bit."""
    asked = [{"prompt": "The file is http://", "target_new": "a.org"}, *about(2)]

    def unsaid(request: EditRequest) -> dict[str, Any]:
        return {name: value for name, value in request_values(request).items() if name != "separator"}

    with monkeypatch.context() as patched:
        patched.setattr(recording, "request_values", unsaid)
        model = edited(llama, tok, tmp_path / "old", asked, target_separator="space", **ON)
    closed(model)
    altered(tmp_path / "old", "PRAGMA user_version = 3")
    fresh = copy.deepcopy(llama)
    stream = resume(fresh, tok, tmp_path / "old")
    assert [held.request for held in stream.held] == [held.request for held in stream_on(model).held]
    assert stream.held[0].request.separator == "space"
    assert same(memories(fresh), memories(model))
    closed(fresh)


def test_another_programs_database(tmp_path: Path) -> None:
    altered(tmp_path, "CREATE TABLE diary (day TEXT)")
    with pytest.raises(JournalDamagedError, match="no journal of edits"):
        JournalWriter(tmp_path)
    with sqlite3.connect(tmp_path / JOURNAL_FILE) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("diary",)]


def test_no_journal(tmp_path: Path, llama: Any, tok: Any) -> None:
    with pytest.raises(JournalError, match=r"does not exist: name a folder that edits were journaled in"):
        Journal(tmp_path / "none")
    with pytest.raises(JournalError, match="does not exist"):
        resume(llama, tok, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(JournalError, match="is a file"):
        JournalWriter(tmp_path / "file")


def test_a_full_disk_takes_the_edit_back(llama: Any, tok: Any, tmp_path: Path) -> None:
    hparams = settings(**ON, journal=str(tmp_path))
    apply_wise_to_model(llama, tok, about(2), hparams)
    before, database = memories(llama), stream_on(llama).sink.journal.database  # type: ignore[union-attr]
    pages = int(str(database.rows("PRAGMA page_count")[0][0]))
    database.run(f"PRAGMA max_page_count = {pages}")
    database.run("PRAGMA max_page_count")
    with pytest.raises(JournalError, match="make room on the disk and go on"):
        apply_wise_to_model(llama, tok, [{"prompt": "A long story " * 40, "target_new": "ends"}], hparams)
    assert same(memories(llama), before)
    assert len(stream_on(llama).held) == 2
    database.run("PRAGMA max_page_count = 1000000")
    apply_wise_to_model(llama, tok, about(3)[2:], hparams)
    closed(llama)
    with Journal(tmp_path) as journal:
        assert [edit.request["prompt"] for edit in journal.edits()] == [one["prompt"] for one in about(3)]


@pytest.mark.parametrize("step", ["keep_note", "commit"])
def test_whatever_cannot_be_written_model_and_journal_agree(
    llama: Any, tok: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: Any) -> None:
        raise JournalError("the disk is full")

    hparams = settings(**ON, journal=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(JournalWriter, step, full)
        with pytest.raises(JournalError, match="the disk is full"):
            apply_wise_to_model(llama, tok, about(2), hparams)
    with Journal(tmp_path) as journal:
        assert journal.edits() == []
    apply_wise_to_model(llama, tok, about(2), hparams)
    with Journal(tmp_path) as journal:
        assert len(journal.edits()) == len(stream_on(llama).held) == 2
    closed(llama)


def test_the_base_model_is_as_before_when_a_journal_is_damaged(journal: Path, llama: Any, tok: Any) -> None:
    altered(journal, "DELETE FROM blobs")
    with pytest.raises(JournalDamagedError):
        apply_wise_to_model(llama, tok, about(5)[4:], settings(**ON, journal=str(journal)))
    assert type(llama.model.layers[1].mlp.down_proj) is torch.nn.Linear


@given(
    st.integers(1, 7),
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["random", "columns", "none", "all"]),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_masks_come_back(d_out: int, d_in: int, seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(d_out, d_in, generator=generator) < {"none": 0.0, "all": 2.0}.get(kind, 0.4)
    if kind == "columns":
        mask = mask[:1].expand(d_out, d_in).clone()
    assert torch.equal(mask_from_bytes(mask_bytes(mask)), mask)


def test_tensors_come_back_bit_for_bit() -> None:
    values = {"a": torch.tensor([0.1, -0.0, float("inf")]), "b": torch.arange(3).view(1, 3), "c": torch.zeros(0, 4)}
    values["d"] = values["a"].bfloat16()
    back = from_bytes(to_bytes(values))
    assert set(back) == set(values)
    for name, value in values.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value)
    with pytest.raises(ValueError, match=r"."):
        from_bytes(b"no tensors")


def test_an_open_shard_comes_back(llama: Any, tok: Any, tmp_path: Path) -> None:
    model = edited(llama, tok, None, [{**one, "loc_prompt": "The sky is"} for one in about(2)], **ON)
    shard = stream_on(model).snapshot().open_shard
    assert shard is not None
    values, tensors = pack_open_shard(shard)
    back = unpack_open_shard(values, from_bytes(to_bytes(tensors)), torch.device("cpu"))
    for one, other in zip(leaves(back), leaves(shard), strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
        else:
            assert one == other


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor) or not (hasattr(value, "__dataclass_fields__") or isinstance(value, tuple)):
        yield value
    elif isinstance(value, tuple):
        for one in value:
            yield from leaves(one)
    else:
        assert isinstance(value, OpenShard) or value is not None
        for name in value.__dataclass_fields__:
            yield from leaves(getattr(value, name))


def test_an_entry_with_other_fields_is_refused() -> None:
    with pytest.raises(ValueError, match="other fields"):
        EditEntry.from_json('{"id": 1, "surprise": 2}')
