"""Digests by which altered files are noticed.

``wise_edits.json`` holds the SHA-256 of the two files that PEFT reads, and one of its own contents. They tell that
files were damaged, or mixed from two saves. They do not tell who wrote them: whoever can write one can write all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .adapter_format import CONFIG_FILE, EDITS_FILE, WEIGHTS_FILE, AdapterFileError, damaged

_CHUNK = 2**20
_FILES, _OWN = "files", "digest"


def sealed(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A record of edits with the digests of the files in ``folder`` and of itself."""
    files = {name: file_digest(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    values = {**{key: value for key, value in record.items() if key != _OWN}, _FILES: files}
    return {**values, _OWN: _digest_of(values)}


def verify(record: Mapping[str, Any], folder: Path) -> None:
    """Compare a record's digests with what is in ``folder``; a file that is missing is its reader's business.

    Raises:
        AdapterFileError: the record or a file is not the one that was saved.
    """
    values = {key: value for key, value in record.items() if key != _OWN}
    files = record.get(_FILES)
    if record.get(_OWN) != _digest_of(values) or not isinstance(files, Mapping):
        raise damaged(folder / EDITS_FILE, "its contents do not have the digest that is written in it")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        path = folder / name
        if path.is_file() and files.get(name) != file_digest(path):
            raise AdapterFileError(
                f"{path} is not the file that was saved with {EDITS_FILE}, its SHA-256 is another one: take the "
                "folder from a backup or save the edits again. If another program saved an adapter here since, remove "
                f"{EDITS_FILE}, which belongs to the earlier one; PeftModel.from_pretrained compares nothing."
            )


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits.

    Raises:
        AdapterFileError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise damaged(path, error) from error
    return digest.hexdigest()


def _digest_of(values: Mapping[str, Any]) -> str:
    # Of the contents, not of the bytes: they are in the same file.
    text = json.dumps(values, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()
