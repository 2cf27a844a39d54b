"""Seeded damage to a folder of saved edits."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILES = ("adapter_config.json", "adapter_model.safetensors", "wise_edits.json", "README.md")
_DEEP = "@@deep@@"
VALUES: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    1e308,
    -1e-308,
    float("nan"),
    float("inf"),
    2**31,
    2**63,
    2**64,
    10**400,
    "",
    "x",
    "live",
    "merged",
    "x" * 10_000,
    "(a+)+$",
    "[",
    "../../../etc/passwd",
    "\ud800",
    "\x00",
    [],
    {},
    [[]],
    ["merged"] * 3,
    ["merged"] * 100_000,
    {"": None},
    {"a": {"b": [1, 2, {"c": "d"}]}},
    _DEEP,
]


def mutate(folder: Path, rng: random.Random) -> str:
    """Damage one file of a folder in one way; returns what was done."""
    name = rng.choices(FILES, weights=(4, 4, 4, 1))[0]
    ways: list[Callable[[Path, random.Random], str]] = [_bytes, _bytes, _whole]
    if name.endswith(".json"):
        ways += [_json] * 4
    if name.endswith(".safetensors"):
        ways += [_header] * 3
    return f"{name}: {rng.choice(ways)(folder / name, rng)}"


def _bytes(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    # Half of the damage near the beginning, where headers are.
    end = len(data) if rng.random() < 0.5 else min(len(data), 400)
    place = rng.randrange(end)
    length = min(rng.choice([1, 1, 2, 8, 64, 1000]), len(data) - place)
    what = rng.choice(["flip", "cut", "insert", "delete", "repeat", "zero", "random", "digit"])
    if what == "flip":
        for _ in range(rng.choice([1, 1, 1, 3])):
            data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    elif what == "cut":
        del data[place:]
    elif what == "insert":
        data[place:place] = rng.randbytes(length)
    elif what == "delete":
        del data[place : place + length]
    elif what == "repeat":
        data[place:place] = data[place : place + length]
    elif what == "zero":
        data[place : place + length] = bytes(length)
    elif what == "random":
        data[place : place + length] = rng.randbytes(length)
    else:  # what is likely to stay readable
        digits = [index for index, byte in enumerate(data) if 48 <= byte < 58]
        if digits:
            data[rng.choice(digits)] = 48 + rng.randrange(10)
    path.write_bytes(bytes(data))
    return f"{what} at {place}"


def _whole(path: Path, rng: random.Random) -> str:
    what = rng.choice(["empty", "directory", "no file", "other file", "link to nothing", "link to a folder"])
    other = path.parent / rng.choice([name for name in FILES if name != path.name])
    data = other.read_bytes()
    path.unlink()
    if what == "empty":
        path.write_bytes(b"")
    elif what == "directory":
        path.mkdir()
    elif what == "other file":
        path.write_bytes(data)
    elif what == "link to nothing":
        path.symlink_to(path.parent / "nowhere")
    elif what == "link to a folder":
        path.symlink_to(path.parent)
    return what


def _json(path: Path, rng: random.Random) -> str:
    values = json.loads(path.read_text(encoding="utf-8"))
    what = _change(values, rng)
    path.write_text(_text(values), encoding="utf-8", errors="surrogatepass")
    return what


def _header(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    values = json.loads(data[8 : 8 + length])
    what = _change(values, rng)
    text = _text(values).encode("utf-8", errors="surrogatepass")
    size = len(text) if rng.random() < 0.9 else rng.choice([0, 1, len(text) + 1, 2**31, 2**63])
    path.write_bytes(size.to_bytes(8, "little") + text + data[8 + length :])
    return f"header {what}"


def _text(values: Any) -> str:
    depth = 100_000
    return json.dumps(values).replace(f'"{_DEEP}"', "[" * depth + "]" * depth)


def _change(values: Any, rng: random.Random) -> str:
    """One change of one place in nested lists and dicts."""
    places = _places(values)
    container, key = rng.choice(places)
    what = rng.choice(["replace", "replace", "replace", "delete", "rename", "swap", "wrap", "as text", "nearby"])
    old = container[key]
    if what == "replace":
        container[key] = rng.choice(VALUES)
    elif what == "delete":
        del container[key]
    elif what == "rename" and isinstance(container, dict):
        container[rng.choice([f"{key}_", "", str(key).upper(), "memories"])] = container.pop(key)
    elif what == "swap":
        other, other_key = rng.choice(places)
        container[key], other[other_key] = json.loads(json.dumps(other[other_key])), json.loads(json.dumps(old))
    elif what == "wrap":
        container[key] = rng.choice([[old], {"value": old}, [old, old]])
    elif what == "as text":
        container[key] = str(old)
    else:
        number = isinstance(old, (int, float))
        container[key] = old + rng.choice([1, -1, 0.5]) if number else (old[::-1] if isinstance(old, str) else old)
    return f"{what} {key!r}"


def _places(values: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    pending = [values]
    while pending:
        one = pending.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one))
        for key in keys:
            found.append((one, key))
            if isinstance(one[key], (dict, list)):
                pending.append(one[key])
    return found


def fresh_copy(source: Path, target: Path) -> Path:
    """An undamaged copy, in place of what is there."""
    if target.is_symlink() or target.is_file():
        target.unlink()
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target
