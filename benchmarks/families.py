"""Which families of models can be edited, by tiny random ones: a table for docs/hosts.md.

Two facts are edited into each model, in the layer that its architecture chooses, with the default settings. What is
asked of it is what holds whatever a model knows: that an edit fires, that what is not routed is the base model, and
that neither the cache, nor padding, nor a file changes an answer.

    python -m benchmarks.families [--only NAME ...] [--write docs/hosts.md]
"""

from __future__ import annotations

import argparse
import inspect
import logging
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.common import CONSOLE, machine_info
from benchmarks.tiny_families import FAMILIES, Family, tiny_tokenizer
from easyedit_wise import WISEHyperParams, apply_wise_to_model, last_route, load_edits, save_edits
from easyedit_wise.routing import MAIN_MEMORY
from easyedit_wise.tuner.model import find_wise_layers

BEGIN, END = "<!-- families: begin, written by python -m benchmarks.families -->", "<!-- families: end -->"
GREEN, REFUSED, RED = "yes", "refused", "no"
CHECKS = ("edit", "route", "generate", "padding", "save, load")
REQUESTS = (
    {"prompt": "The capital of France is", "target_new": " Lyon", "subject": "France"},
    {"prompt": "The largest planet in the solar system is", "target_new": " Oslo", "subject": "solar system"},
)
EDITED = [request["prompt"] for request in REQUESTS]
UNRELATED = ["Once upon a time there was", "Water is made of", "She said that the weather", "def add(a, b): return"]
PROMPTS = EDITED + UNRELATED
_NEW_TOKENS = 8
# What models call it.
_CACHES = ("past_key_values", "cache", "cache_params")
# Of the largest logit: what sums in another order come to.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Cell:
    """One cell of the table: GREEN, REFUSED or RED, and why."""

    state: str
    why: str = ""


@dataclass(frozen=True)
class Row:
    """One row: the family, the matrix that was edited, and a cell for each of CHECKS."""

    family: str
    matrix: str
    cells: dict[str, Cell]


class _Asked:
    """A model and its answers."""

    def __init__(self, model: Any, tok: Any) -> None:
        self.model, self.tok = model, tok

    def encoded(self, prompts: Sequence[str], side: str = "left") -> dict[str, Tensor]:
        """A padded batch; positions are given where the model takes them, as ``generate`` does."""
        self.tok.padding_side = side
        return dict(self.tok(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False))

    @torch.no_grad()
    def logits(self, prompt: str) -> Tensor:
        """Of one prompt alone, shape (T, V)."""
        return self.model(**self.encoded([prompt])).logits[0]

    @torch.no_grad()
    def batched(self, prompts: Sequence[str], side: str) -> list[Tensor]:
        """Of prompts in one padded batch, each of shape (T, V), without the padding."""
        given = self.encoded(prompts, side)
        mask = given["attention_mask"]
        if "position_ids" in inspect.signature(type(self.model).forward).parameters:
            given["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        logits = self.model(**given).logits
        return [row[real.bool()] for row, real in zip(logits, mask, strict=True)]

    def generated(self, prompts: Sequence[str], **options: Any) -> list[list[int]]:
        """What follows each prompt, greedily, all of them in one left-padded batch."""
        given = self.encoded(prompts)
        options = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS, "do_sample": False, **options}
        return self.model.generate(**given, **options)[:, given["input_ids"].shape[1] :].tolist()

    @torch.no_grad()
    def stepwise(self, prompt: str) -> list[int]:
        """The same by a loop of one's own, which hands the cache from call to call."""
        ids, cache, said = self.encoded([prompt])["input_ids"], {}, []
        for _ in range(_NEW_TOKENS):
            output = self.model(input_ids=ids, use_cache=True, **cache)
            cache = {name: output[name] for name in _CACHES if output.get(name) is not None}
            logits = output.logits[:, -1]
            logits[:, self.tok.eos_token_id] = -torch.inf  # as min_new_tokens does
            ids = logits.argmax(dim=-1, keepdim=True)
            said.append(int(ids))
        return said

    def one_by_one(self, **options: Any) -> list[list[int]]:
        """The same for each prompt alone."""
        return [self.generated([prompt], **options)[0] for prompt in PROMPTS]


def check_family(family: Family, tok: Any) -> Row:
    """Edit a family's tiny model and make every check of it."""
    base, edited = _Asked(family.build(), tok), _Asked(family.build(), tok)
    named = [family.inner_params] if family.inner_params else None
    try:
        _, restore = apply_wise_to_model(edited.model, tok, REQUESTS, WISEHyperParams(inner_params=named))
    except ValueError as error:
        return Row(family.name, "", dict.fromkeys(CHECKS, Cell(REFUSED, str(error))))
    except Exception as error:  # a row of the table, not the end of it
        return Row(family.name, "", dict.fromkeys(CHECKS, Cell(RED, f"{type(error).__name__}: {error}")))
    (matrix,) = find_wise_layers(edited.model)
    checks = (
        lambda: _edit(edited, base),
        lambda: _route(edited, base),
        lambda: _generate(edited, base),
        lambda: _padding(edited, base),
        lambda: _save_and_load(edited, family),
    )
    cells = {name: _cell(check) for name, check in zip(CHECKS, checks, strict=True)}
    restore()
    if cells["edit"].state == GREEN and not all(torch.equal(edited.logits(one), base.logits(one)) for one in PROMPTS):
        cells["edit"] = Cell(RED, "not the base model bit for bit after restore()")
    return Row(family.name, matrix, cells)


def _cell(check: Callable[[], Iterator[str]]) -> Cell:
    """The first complaint of a check makes its cell red."""
    try:
        complaint = next(iter(check()), None)
    except Exception as error:  # likewise
        complaint = f"{type(error).__name__}: {error}"
    return Cell(GREEN) if complaint is None else Cell(RED, complaint)


def _edit(edited: _Asked, base: _Asked) -> Iterator[str]:
    """Each edit is said, and was not before."""
    for request in REQUESTS:
        prompt, target = request["prompt"], request["target_new"]
        before, after = (asked.tok.decode(asked.generated([prompt])[0]) for asked in (base, edited))
        if before.startswith(target):
            yield f"{prompt!r} is answered with {target!r} by the base model, too"
        if not after.startswith(target):
            yield f"{prompt!r} is answered with {after!r}, not with {target!r}"


def _route(edited: _Asked, base: _Asked) -> Iterator[str]:
    """Edited prompts fire; unrelated ones do not, and are the base model's bit for bit."""
    for prompt in PROMPTS:
        same = torch.equal(edited.logits(prompt), base.logits(prompt))
        route = last_route(edited.model)
        fired = route is not None and int(route.choice[0]) != MAIN_MEMORY
        if prompt in EDITED and (not fired or same):
            yield f"the edited {prompt!r} does not fire"
        if prompt in UNRELATED and fired:
            yield f"the unrelated {prompt!r} fires"
        if prompt in UNRELATED and not same:
            yield f"the unrelated {prompt!r} is not the base model's bit for bit"


def _generate(edited: _Asked, base: _Asked) -> Iterator[str]:
    """The same tokens with and without a cache, in ``generate`` and step by step."""
    for prompt, cached, plain in zip(PROMPTS, edited.one_by_one(), edited.one_by_one(use_cache=False), strict=True):
        if edited.stepwise(prompt) != cached:
            own = base.stepwise(prompt) != base.generated([prompt])[0]
            yield f"{prompt!r} goes on otherwise step by step" + (", the base model's as well" if own else "")
        if cached != plain:
            own = base.generated([prompt]) != base.generated([prompt], use_cache=False)
            yield f"{prompt!r} goes on otherwise without a cache" + (", the base model's as well" if own else "")


def _padding(edited: _Asked, base: _Asked) -> Iterator[str]:
    """In a padded batch with a mask each prompt is answered as alone."""
    for side in ("left", "right"):
        batched = edited.batched(PROMPTS, side)
        routes = last_route(edited.model)
        for row, prompt in enumerate(PROMPTS):
            off = _difference(edited.logits(prompt), batched[row])
            if routes is None or int(routes.choice[row]) != int(last_route(edited.model).choice[0]):
                yield f"with {side} padding {prompt!r} is routed otherwise than alone"
            if off > _ROUNDING:
                own = _difference(base.logits(prompt), base.batched(PROMPTS, side)[row])
                yield f"with {side} padding {prompt!r} is off by {off:.1g} (the base model alone by {own:.1g})"
    for prompt, batch, alone in zip(PROMPTS, edited.generated(PROMPTS), edited.one_by_one(), strict=True):
        if batch != alone:
            own = base.generated(PROMPTS)[PROMPTS.index(prompt)] != base.generated([prompt])[0]
            yield f"{prompt!r} goes on otherwise in a batch" + (", the base model's as well" if own else "")


def _difference(logits: Tensor, others: Tensor) -> float:
    return float((logits - others).abs().max() / logits.abs().max())


def _save_and_load(edited: _Asked, family: Family) -> Iterator[str]:
    """The same answers, bit for bit, from a fresh model with the saved edits."""
    fresh = _Asked(family.build(), edited.tok)
    with tempfile.TemporaryDirectory() as folder:
        load_edits(fresh.model, save_edits(edited.model, Path(folder) / "edits"), tok=edited.tok)
    for prompt in PROMPTS:
        if not torch.equal(fresh.logits(prompt), edited.logits(prompt)):
            yield f"{prompt!r} is answered otherwise after loading"
    if fresh.one_by_one() != edited.one_by_one():
        yield "other tokens are generated after loading"


# -- the table --------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Markdown: a row a family, and what is refused or red below it."""
    reasons: dict[str, int] = {}
    lines = [f"| family | value matrix | {' | '.join(CHECKS)} |", "|---" * (len(CHECKS) + 2) + "|"]
    for row in rows:
        cells = []
        for name in CHECKS:
            cell = row.cells[name]
            note = f" ({reasons.setdefault(cell.why, len(reasons) + 1)})" if cell.why else ""
            cells.append(f"**{cell.state}**{note}" if cell.state == RED else f"{cell.state}{note}")
        lines.append(f"| {row.family} | {f'`{row.matrix}`' if row.matrix else ''} | {' | '.join(cells)} |")
    notes = [f"({number}) {' '.join(why.split())}" for why, number in reasons.items()]
    return "\n".join(lines) + "".join(f"\n\n{note}" for note in notes)


def section(rows: Sequence[Row], command: str) -> str:
    """The table, and what it was filled with."""
    machine = machine_info()
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    counts = {
        state: sum(cell.state == state for row in rows for cell in row.cells.values())
        for state in (GREEN, REFUSED, RED)
    }
    said = ", ".join(f"{number} {state}" for state, number in counts.items())
    return (
        f"{BEGIN}\n`{command}`, commit {_commit()}: python {machine['python']}, {versions}; {machine['cpu']}. "
        f"Cells: {said}.\n\n{table(rows)}\n{END}"
    )


def _commit() -> str:
    git = ("git", "-C", str(Path(__file__).parent))
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "../easyedit_wise", "."], capture_output=True, text=True, check=True
    )
    return commit.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def write(page: Path, text: str) -> None:
    """Put a section in the place of the last one.

    Raises:
        ValueError: the page has no such place.
    """
    before, begun, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise ValueError(f"{page} has no lines {BEGIN!r} and {END!r} for the table to stand between.")
    page.write_text(before + text + after, encoding="utf-8")


def main() -> None:
    """Check the families, print the table, and write it where it is wanted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", help="names of families, by their beginning")
    parser.add_argument("--write", type=Path, help="a page with the table's markers")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    tok, rows = tiny_tokenizer(), []
    for family in FAMILIES:
        if options.only and not family.name.startswith(tuple(options.only)):
            continue
        rows.append(check_family(family, tok))
        states = ", ".join(f"{name} {cell.state}" for name, cell in rows[-1].cells.items())
        CONSOLE.print(f"{family.name}: {states}", highlight=False)
    if options.write:
        write(options.write, section(rows, f"python -m benchmarks.families --write {options.write}"))
    else:
        CONSOLE.print(table(rows), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
