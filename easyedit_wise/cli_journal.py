"""The commands that read and change a journal: log, show, resume, forget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm.auto import tqdm

from .hparams import WISEHyperParams
from .journal.calls import close_journal, resume, unfinished
from .journal.database import JournalError
from .journal.entries import EditEntry
from .journal.forgetting import Plan, forget, plan_of
from .journal.journal import Journal
from .journal.tensors import mask_from_bytes
from .persistence import save_edits
from .reports.journal import edit_table, log_table

# Settings that say where, not how.
_NOT_OF_THE_METHOD = ("model_name", "device", "save_path", "load_path", "journal")


def run_log(folder: Path, console: Console) -> None:
    """List a journal's edits."""
    with Journal(folder) as journal:
        edits, left, facts = journal.edits(), unfinished(journal), journal.facts()
        snapshot = journal.snapshot()
        console.print(log_table([vars(edit) for edit in edits], [vars(one) for one in journal.forgotten()]))
    n_memories = 0 if snapshot is None else len(snapshot.states)
    where = "" if facts is None else f" in {facts.layer} of {facts.model or 'a model without a name'}"
    memories = "1 side memory" if n_memories == 1 else f"{n_memories} side memories"
    console.print(f"{len(edits)} edits, {memories}{where}; times are in UTC", soft_wrap=True)
    if left is not None and left.requests:
        console.print(
            f"{len(left.requests)} edits of the last call are not made yet: easyedit-wise resume {folder}",
            style="yellow",
        )


def run_show(folder: Path, edit_id: int, console: Console) -> None:
    """Explain one edit of a journal."""
    with Journal(folder) as journal:
        console.print(edit_table(explained(journal, journal.edit(edit_id))))


def explained(journal: Journal, edit: EditEntry) -> dict[str, str]:
    """What a journal knows of one edit, in words, line by line."""
    snapshot, edits = journal.snapshot(), journal.edits()
    if snapshot is None:
        raise JournalError(f"the journal {journal.folder} holds no edit.")
    place = snapshot.held[edits.index(edit)]
    memory = snapshot.memories[place]
    request = edit.request
    call = next(call for number, _, call in journal.calls() if number == edit.call)
    prompt, answered, irrelevant = edit.scores
    lines = {
        "edit": f"{edit.id}, made {edit.made} in call {edit.call} of {call.started}, in {edit.seconds:.1f} s",
        "prompt": str(request["prompt"]),
        "target": str(request["target"]),
        "subject": str(request.get("subject") or "(not named)"),
        "irrelevant prompt": str(request.get("loc_prompt") or "(none of its own)"),
        "answered by": f"side memory {place} ({memory.stage}, {memory.n_edits} edits, epsilon {memory.epsilon:.4g})",
        "scores when made": f"its prompt {prompt:.4g}, with the target {answered:.4g}, "
        + ("" if irrelevant is None else f"its irrelevant prompt {irrelevant:.4g}, ")
        + f"epsilon {edit.epsilon:.4g}",
        "training": f"{edit.iterations} iterations"
        + ("" if edit.loss is None else f", L_edit {edit.loss:.4g} at the end"),
        "seed": f"{edit.seed}; random numbers before it {edit.generator[:12]}",
    }
    if edit.mask is not None:
        mask = mask_from_bytes(journal.blob(edit.mask))
        columns = mask.any(dim=0)
        whole = f", {int(columns.sum())} whole columns" if bool((mask.all(dim=0) == columns).all()) else ""
        lines["subspace"] = f"{mask.float().mean():.3g} of {mask.shape[0]} x {mask.shape[1]} entries{whole}"
    others = [one.id for one in edits if one.batch == edit.batch and one.id != edit.id]
    if others:
        lines["trained with"] = ", ".join(map(str, others))
    changes = WISEHyperParams.from_dict(call.settings).changes()
    named = [f"{name}: {value}" for name, value in changes.items() if name not in _NOT_OF_THE_METHOD]
    lines["settings"] = ", ".join(named) or "the defaults"
    return lines


def run_resume(folder: Path, model: str | None, out: Path | None, skip: int, console: Console) -> None:
    """Go on with a stream that was stopped."""
    base, tok = _loaded(folder, model)
    with tqdm(desc="WISE", unit="edit") as bar:

        def plan(n_again: int, n_left: int) -> None:
            bar.reset(total=n_again + n_left)
            if n_again:
                bar.write(f"{n_again} edits of the open shard are made again, then {n_left} are left.", file=sys.stderr)

        stream = resume(base, tok, folder, skip, on_edit=lambda *_: bar.update(), on_plan=plan)
    _saved(base, stream.adapter_name, out, console)
    console.print(f"{len(stream.held)} edits are held.")


def run_forget(
    folder: Path, edit_id: int, model: str | None, out: Path | None, console: Console, quick: bool = False
) -> None:
    """Take one edit back."""
    with Journal(folder) as journal:  # before the model is loaded, which takes its time
        alone = plan_of(journal, edit_id, exactly=False)
    base, tok = _loaded(folder, model)
    with tqdm(desc="WISE", unit="edit") as bar:

        def plan(needed: Plan) -> None:
            bar.reset(total=len(needed.to_make))
            hint = ""
            if not quick and 2 * alone.seconds < needed.seconds:
                hint = f" With --quick only its own memory is made again: {_duration(alone.seconds)}."
            bar.write(
                f"edit {edit_id} ({needed.edit.request['prompt']!r} -> {needed.edit.request['target']!r}): "
                f"{len(needed.to_make)} edits are made again without it, {_duration(needed.seconds)} by "
                f"what they took. Stopped, the same command goes on; until its end the edit is held.{hint}",
                file=sys.stderr,
            )

        stream = forget(base, tok, folder, edit_id, lambda *_: bar.update(), plan, exactly=not quick)
    _saved(base, stream.adapter_name, out, console)
    console.print(f"edit {edit_id} is taken back; {len(stream.held)} edits are held.")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} seconds"
    return f"about {seconds / 60:.0f} minutes" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"


def _loaded(folder: Path, name: str | None) -> tuple[Any, Any]:
    """The base model of a journal and its tokenizer."""
    with Journal(folder) as journal:
        facts = journal.facts()
    name = name or (facts.model if facts is not None else "")
    if not name:
        raise JournalError(f"the journal {folder} does not know its base model: name it with --model.")
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.set_verbosity_error()
    return AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)


def _saved(model: Any, adapter_name: str, out: Path | None, console: Console) -> None:
    close_journal(model)
    if out is not None:
        save_edits(model, out, adapter_name)
        console.print(f"saved in {out}.", soft_wrap=True)
