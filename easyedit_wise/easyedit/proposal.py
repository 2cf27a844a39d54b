"""The tree that is proposed to EasyEdit: WISE as one of its own methods, made from this package's modules.

Which modules go along is no list: the tree's ``models/wise/__init__.py`` (``data/upstream``) says what is offered
there, and its imports are followed through this package. What they do not find here is EasyEdit's own and stays as it
is. docs/upstream.md says what a maintainer does with the tree.
"""

from __future__ import annotations

import ast
import difflib
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..folders import replace_folder

PACKAGE = Path(__file__).parent.parent
TEMPLATES = PACKAGE / "data" / "upstream"
HOME = "easyeditor/models/wise"
EASYEDITS_OWN = ("wise_main", "wise_multimodal_hparams")
"""Modules beside ours in EasyEdit's ``models/wise`` that the tree's ``__init__`` imports: the multimodal entry."""
REPLACED = (f"{HOME}/__init__.py", "examples/WISE.md")
"""EasyEdit's files that the tree has another version of; it touches no other."""
PATCH, LETTER = "changes.patch", "PROPOSAL.md"

_OUR_NAME = re.compile(rf"\b{PACKAGE.name}\b")
_HEADER = (
    "# SPDX-License-Identifier: MIT\n"
    "# Copyright (c) 2026 The easyedit_wise developers: LICENSE in easyeditor/models/wise.\n"
)


@dataclass(frozen=True)
class LineChange:
    """A line of a file of EasyEdit's that has to change, found by a pattern: the file itself is not known here.

    Attributes:
        file: its path in a checkout.
        line: what exactly one of its lines matches.
        becomes: what it becomes, as ``re.sub`` has it.
    """

    file: str
    line: str
    becomes: str


_BATCH_EDITOR = "easyeditor/editors/batch_editor.py"
CHANGES = (
    LineChange("requirements.txt", r"peft\s*==.*", "peft>=0.21"),
    LineChange(_BATCH_EDITOR, r"( *)CORE = .*", r'\g<0>\n\1WISE = "WISE"'),
    LineChange(_BATCH_EDITOR, r"( *)or .*\.DPO\..*", r"\g<0>\n\1or alg_name == BatchEditor.WISE.value \\"),
    LineChange("README.md", r"\| \[WISE\]\((\S+)\) \|.*", r"| [WISE](\1) | | ✅ | ✅ |  |  |  | ✅ | |"),
    LineChange(
        "README.md",
        r"\|WISE\|(WISE: [^|]*)\|(.*)\|",
        r"|WISE|\1: edits are files, switch off, and can be taken back|\2|",
    ),
)


def write_tree(out: Path, head: Path | None = None) -> list[str]:
    """Write the tree that is to be copied over a checkout of EasyEdit.

    Args:
        out: a folder that does not exist, or is empty.
        head: a checkout of EasyEdit's GitHub version. With one, the tree is checked against it, and the lines of
            EasyEdit's own files that have to change come along as a patch.

    Returns:
        The written files, relative to ``out``, in order.

    Raises:
        ValueError: ``out`` holds something; ``head`` is no checkout, has a file where the tree has one that is new, or
            lacks a line that the patch changes. Nothing was written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: name a folder that does not exist, or is empty.")
    files = {**tree_files(), **({} if head is None else {PATCH: patch_for(head)})}
    status = {name: "new" if name not in REPLACED else "replaces EasyEdit's" for name in files}
    if head is not None:
        _check_fits(head, files)
    listed = "\n".join(f"| {name} | {status[name]} |" for name in sorted(files) if name != PATCH)
    files[LETTER] = _template("PROPOSAL.md.in").replace("{files}", listed)
    out.parent.mkdir(parents=True, exist_ok=True)
    # As a whole or not at all: a tree that lacks a module would be found out inside EasyEdit.
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        for name, text in files.items():
            path = made / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        made.chmod(0o755)
        replace_folder(made, out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return sorted(files)


def tree_files() -> dict[str, str]:
    """The text of each file of the tree by its path in a checkout of EasyEdit, but for the patch and the letter."""
    start = _template("__init__.py.in")
    texts = {Path("__init__.py"): start, **{path: _read(PACKAGE / path) for path in modules_behind(start)}}
    texts[Path("identity.py")] = _template("identity.py.in").replace("{version}", _version())
    files = {f"{HOME}/{path.as_posix()}": _HEADER + as_method(text) for path, text in texts.items()}
    for path in sorted((PACKAGE / "data").glob("*.json")):
        files[f"{HOME}/data/{path.name}"] = _read(path)
    files[f"{HOME}/LICENSE"] = _template("LICENSE")
    for path in sorted((PACKAGE / "data" / "hparams" / "WISE").glob("*.yaml")):
        text = _read(path)
        # Those that carry EasyEdit's published values EasyEdit has itself, and ours reads them.
        if "preset" in yaml.safe_load(text):
            files[f"hparams/WISE/{path.name}"] = as_method(text)
    files["examples/WISE.md"] = _template("WISE.md.in")
    files["examples/run_wise_facts.py"] = _HEADER + _template("run_wise_facts.py.in")
    return files


def modules_behind(source: str) -> list[Path]:
    """The modules of this package that a module at its root needs, directly or not, by their paths in the package.

    Imports inside functions count. A package's ``__init__`` belongs to each of its modules, the root's does not.

    Raises:
        RuntimeError: an import leads neither into this package nor to one of :data:`EASYEDITS_OWN`.
    """
    found: set[Path] = set()
    waiting = list(_imports(source, ()))
    while waiting:
        parts = waiting.pop()
        path = _module_file(parts)
        if path is None:
            if ".".join(parts) not in EASYEDITS_OWN:
                raise RuntimeError(f"{'.'.join(parts) or '.'!r} is imported, but is no module of {PACKAGE.name}.")
            continue
        if path in found:
            continue
        found.add(path)
        folder = parts if path.name == "__init__.py" else parts[:-1]
        waiting += _imports(_read(PACKAGE / path), folder)
        waiting += [parts[:depth] for depth in range(1, len(parts))]
    return sorted(found)


def as_method(text: str) -> str:
    """A text in which this package is called by its name inside EasyEdit."""
    return _OUR_NAME.sub(HOME.replace("/", "."), text)


def patch_for(head: Path) -> str:
    """The changes of EasyEdit's own lines as a patch without context: ``git apply --unidiff-zero``.

    Raises:
        ValueError: a file is missing, or no line, or more than one, is the one to change.
    """
    patches: list[str] = []
    for name in dict.fromkeys(change.file for change in CHANGES):
        path = head / name
        if not path.is_file():
            raise ValueError(f"{head} holds no {name}: it is no checkout of github.com/zjunlp/EasyEdit.")
        before = _read(path).splitlines(keepends=True)
        after = list(before)
        for change in CHANGES:
            if change.file != name:
                continue
            pattern = re.compile(rf"{change.line}\s*")
            at = [index for index, line in enumerate(after) if pattern.fullmatch(line)]
            if len(at) != 1:
                raise ValueError(
                    f"{path} has {len(at)} lines that match {change.line!r}, not one: this is not the EasyEdit that "
                    "the tree was made for. Leave --head out, and make the changes that PROPOSAL.md lists by hand."
                )
            line = after[at[0]]
            body = line.rstrip("\r\n")
            changed = re.sub(change.line, change.becomes, body.rstrip(), count=1) + line[len(body) :]
            after[at[0] : at[0] + 1] = changed.splitlines(keepends=True)
        patches += difflib.unified_diff(before, after, f"a/{name}", f"b/{name}", n=0)
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in patches)


def _check_fits(head: Path, files: dict[str, str]) -> None:
    for name in (f"{HOME}/{module}.py" for module in EASYEDITS_OWN):
        if not (head / name).is_file():
            raise ValueError(f"{head} holds no {name}, which the tree needs: it fits EasyEdit of commit 14cea82.")
    taken = [name for name in files if name not in REPLACED and (head / name).exists()]
    if taken:
        raise ValueError(
            f"{head} has a {taken[0]} already, and the tree brings one: name a checkout that it was not copied into."
        )


def _imports(source: str, folder: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Names of this package's modules, from its root, that a module in ``folder`` imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == PACKAGE.name:
                    raise RuntimeError(f"'import {alias.name}' cannot be followed: import from the module by name.")
        if not isinstance(node, ast.ImportFrom):
            continue
        named = tuple((node.module or "").split(".")) if node.module else ()
        if node.level:
            base = folder[: len(folder) - node.level + 1] + named
        elif named[0] == PACKAGE.name:
            base = named[1:]
        else:
            continue
        for alias in node.names:
            deeper = (*base, alias.name)
            yield deeper if _module_file(deeper) is not None else base


def _module_file(parts: tuple[str, ...]) -> Path | None:
    for path in (Path(*parts).with_suffix(".py"), Path(*parts, "__init__.py")) if parts else ():
        if (PACKAGE / path).is_file():
            return path
    return None


def _version() -> str:
    from .. import __version__

    return __version__


def _template(name: str) -> str:
    return _read(TEMPLATES / name)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
