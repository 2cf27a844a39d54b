"""Kill a process that edits, merges, saves and takes edits back, and look at what is on disk. Run as a program.

``python tests/kill_journal.py FOLDER KILLS SEED`` prints one JSON line: how many kills, in which operation, how many
edits had been acknowledged, and what was wrong. Children are forked: this process must have used one thread only.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from conftest import build_model, build_tokenizer
from editing_helpers import FACTS, settings
from test_consolidated import ON

from easyedit_wise.easyedit.apply import apply_wise_to_model
from easyedit_wise.journal.calls import resume, unfinished
from easyedit_wise.journal.database import Database, JournalError
from easyedit_wise.journal.forgetting import forget
from easyedit_wise.journal.journal import Journal
from easyedit_wise.journal.restoring import attached
from easyedit_wise.persistence import load_edits, save_edits

MERGED: dict[str, Any] = {"save_freq": 2, "merge_freq": 4, "retrieve": False, "n_iter": 2}
QUICK = {**ON, "n_iter": 2, "n_contexts": 1, "save_freq": 3, "merge_freq": 3, "retrieve": True}
MOST = 9  # edits in one journal, then a new one is begun
LONGEST = 3.0  # seconds that a child has at most


def slow_disk() -> None:
    """Each statement takes some milliseconds, or few of the kills would fall into a transaction."""
    real = Database.run

    def run(self: Database, statement: str, *values: object) -> None:
        time.sleep(random.random() * 0.01)
        real(self, statement, *values)

    Database.run = run  # type: ignore[method-assign]  # in this process only


def say(pipe: int, *message: Any) -> None:
    os.write(pipe, (json.dumps(message) + "\n").encode())


def work(model: Any, tok: Any, folder: Path, seed: int, pipe: int) -> None:
    """What is killed: go on with the journal, edit, save, take back, and say each time what is done."""
    dice = random.Random(seed)
    changes = MERGED if "merged" in folder.name else QUICK
    journal, saved = folder / "journal", folder / "saved"
    hparams = settings(**changes, journal=str(journal))
    say(pipe, "doing", "resume")
    try:
        stream = resume(model, tok, journal, on_edit=lambda *_: None)
        for edit in journal_ids(journal):
            say(pipe, "held", edit)
        del stream
    except Exception as error:
        if (
            (journal / "journal.sqlite3").exists()
            and "no edit was ever asked for" not in str(error)
            and "is empty" not in str(error)
        ):
            raise
    while True:
        held = journal_ids(journal)
        what = dice.choice(["edit", "save", "forget"]) if held else "edit"
        say(pipe, "doing", what)
        if what == "edit":
            facts = dice.sample(FACTS, dice.randint(1, 3))
            asked = [{"prompt": prompt, "target_new": target} for prompt, target in facts]
            apply_wise_to_model(model, tok, asked, hparams)
            for edit in journal_ids(journal):
                say(pipe, "held", edit)
        elif what == "save":
            save_edits(model, saved)
            say(pipe, "saved", len(held))
        else:
            gone = dice.choice(held)
            forget(model, tok, journal, gone, exactly=dice.random() < 0.5)
            say(pipe, "gone", gone)


def journal_ids(folder: Path) -> list[int]:
    """The edits that are held; none where a process was killed before the first one was asked for."""
    try:
        with Journal(folder) as journal:
            return [edit.id for edit in journal.edits()]
    except JournalError as error:
        if "does not exist" in str(error) or "is empty" in str(error):
            return []
        raise


def killed(model: Any, tok: Any, folder: Path, seed: int, after: float) -> list[list[Any]]:
    """Fork, work, kill: what the child had said by then."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 2)
            work(model, tok, folder, seed, write)
        except BaseException as error:
            say(write, "failed", f"{type(error).__name__}: {error}")
        finally:
            os._exit(1)
    os.close(write)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(read) as lines:
        return [json.loads(line) for line in lines.read().splitlines() if line.endswith("]")]


def look(make: Any, tok: Any, folder: Path, said: list[list[Any]], acknowledged: set[int], gone: set[int]) -> list[str]:
    """What is wrong on disk. An operation that was not acknowledged may have been done or not."""
    wrong = [message[1] for message in said if message[0] == "failed"]
    for kind, value in ((m[0], m[1]) for m in said):
        if kind == "held":
            acknowledged.add(value)
        elif kind == "gone":
            acknowledged.discard(value)
            gone.add(value)
    path = folder / "journal"
    if not (path / "journal.sqlite3").exists():
        return [*wrong, *(["acknowledged, but there is no journal"] if acknowledged else [])]
    try:
        with Journal(path) as journal:
            if not journal.calls():
                return [*wrong, *(["acknowledged, but the journal is empty"] if acknowledged else [])]
            held = {edit.id for edit in journal.edits()}
            unfinished(journal)
            model = make()
            attached(model, tok, journal)
            model(input_ids=torch.tensor([[5, 6, 7]]))
        under_way = {m[1] for m in said[-1:] if m[0] == "doing"}
        lost = acknowledged - held
        if len(lost) > (1 if "forget" in under_way else 0):
            wrong.append(f"lost {sorted(lost)}")
        if held & gone:
            wrong.append(f"back again {sorted(held & gone)}")
        acknowledged.intersection_update(held)
    except Exception as error:
        if acknowledged or "is empty" not in str(error):
            wrong.append(f"unreadable: {type(error).__name__}: {error}")
    if (folder / "saved").exists():
        try:
            load_edits(make(), folder / "saved")
        except Exception as error:
            wrong.append(f"saved edits unreadable: {type(error).__name__}: {error}")
    return wrong


def main(root: Path, kills: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    slow_disk()
    dice = random.Random(seed)
    tok, base = build_tokenizer(), build_model("llama")

    def make() -> Any:
        return copy.deepcopy(base)

    # Once without a journal, so that nothing is imported or compiled within the time that a child has.
    apply_wise_to_model(make(), tok, [{"prompt": FACTS[0][0], "target_new": FACTS[0][1]}], settings(**QUICK))
    wrong: list[str] = []
    during: Counter[str] = Counter()
    total, number = 0, 0
    folder, acknowledged, gone = root, set[int](), set[int]()
    for kill in range(kills):
        if kill == 0 or len(acknowledged) > MOST or (kill % 15 == 14):
            total += len(acknowledged)
            shutil.rmtree(folder, ignore_errors=True)
            number += 1
            folder, acknowledged, gone = root / f"{'merged' if number % 2 else 'quick'}{number}", set(), set()
            folder.mkdir(parents=True)
        said = killed(make(), tok, folder, seed * 100_000 + kill, dice.uniform(0.0, LONGEST))
        doing = [message[1] for message in said if message[0] == "doing"]
        during[doing[-1] if doing else "start"] += 1
        wrong += [f"kill {kill} in {folder.name}: {one}" for one in look(make, tok, folder, said, acknowledged, gone)]
    total += len(acknowledged)
    return {"kills": kills, "during": dict(during), "acknowledged": total, "wrong": wrong}


if __name__ == "__main__":
    result = main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.write(json.dumps(result) + "\n")
