"""The command line, ``easyedit-wise``: demo, edit, log, show, resume, forget, evaluate, lm-eval, upstream-tree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(help="WISE lifelong model editing.", no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """WISE lifelong model editing: edits that hold, in a small folder."""


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """What the user can mend is printed without a traceback, and the exit status is 1."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        typer.secho(f"error: {' '.join(str(error).split())}", fg="red", err=True)
        raise typer.Exit(code=1) from error


def _console() -> Console:
    return Console(highlight=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the summary, the plot and the adapter.")] = Path("runs/demo"),
    model: Annotated[str | None, typer.Option(help="A causal language model; default SmolLM2-135M.")] = None,
    facts: Annotated[int | None, typer.Option(help="How many of the facts; default all.", min=1)] = None,
    hparams: Annotated[str, typer.Option(help="A YAML file, or a packaged name.")] = "smollm2-135m",
) -> None:
    """Edit a dozen facts into a small real model through EasyEdit and show what became of them."""
    from .demo import run_demo

    with _errors_in_one_line():
        run_demo(out, model, facts, hparams)


@app.command()
def edit(
    requests: Annotated[Path, typer.Argument(help="JSON: a list of {prompt, target_new[, subject, loc_prompt]}.")],
    model: Annotated[str, typer.Option(help="Path or name of a causal language model.")],
    hparams: Annotated[
        str | None, typer.Option(help="A YAML file, or a packaged name such as llama-7b; default: chosen by the model.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder that the edits are saved into.")] = None,
    journal: Annotated[
        Path | None, typer.Option(help="Folder of a journal: every edit is kept when it is made.")
    ] = None,
    save_dtype: Annotated[str | None, typer.Option(help="In --out: bfloat16 halves it, float32 is exact.")] = None,
) -> None:
    """Edit a model without EasyEdit; the edits are saved as a folder, or kept in a journal, or both."""
    from .cli_edit import run_edit

    with _errors_in_one_line():
        run_edit(requests, model, hparams, out, journal, _console(), save_dtype)


@app.command()
def log(journal: Annotated[Path, typer.Argument(help="Folder of a journal.")]) -> None:
    """List the edits of a journal."""
    from .cli_journal import run_log

    with _errors_in_one_line():
        run_log(journal, _console())


@app.command()
def show(
    journal: Annotated[Path, typer.Argument(help="Folder of a journal.")],
    edit_id: Annotated[int, typer.Argument(metavar="ID", help="Number of an edit, as log lists it.")],
) -> None:
    """Explain one edit of a journal."""
    from .cli_journal import run_show

    with _errors_in_one_line():
        run_show(journal, edit_id, _console())


@app.command()
def resume(
    journal: Annotated[Path, typer.Argument(help="Folder of a journal.")],
    model: Annotated[str | None, typer.Option(help="The base model; default the one that the journal names.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder that the edits are saved into, too.")] = None,
    skip: Annotated[int, typer.Option(help="Leave out so many edits, such as one that cannot be made.", min=0)] = 0,
) -> None:
    """Go on with a stream of edits that was stopped, or killed."""
    from .cli_journal import run_resume

    with _errors_in_one_line():
        run_resume(journal, model, out, skip, _console())


@app.command()
def forget(
    journal: Annotated[Path, typer.Argument(help="Folder of a journal.")],
    edit_id: Annotated[int, typer.Argument(metavar="ID", help="Number of an edit, as log lists it.")],
    model: Annotated[str | None, typer.Option(help="The base model; default the one that the journal names.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder that the edits are saved into, too.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Make only its own memory again, not all since.")] = False,
) -> None:
    """Take one edit back, exactly: what came after it is made again without it. Or --quick."""
    from .cli_journal import run_forget

    with _errors_in_one_line():
        run_forget(journal, edit_id, model, out, _console(), quick)


@app.command()
def evaluate(
    data: Annotated[list[Path], typer.Option(help="A file in EasyEdit's form; several make one mixed stream.")],
    edits: Annotated[list[int], typer.Option(help="How many edits: once, or once a file.", min=1)],
    alg: Annotated[list[str] | None, typer.Option(help="WISE, ROME, FT, MEMIT, upstream-WISE, ...")] = None,
    model: Annotated[str | None, typer.Option(help="A causal language model; default SmolLM2-135M.")] = None,
    hparams: Annotated[list[str] | None, typer.Option(help="Settings by name or file, or ALG=settings.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE or ALG.KEY=VALUE.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="0: the file's order; others: a random sample each.")] = None,
    start: Annotated[int, typer.Option(help="The first record, with seed 0.", min=0)] = 0,
    checkpoints: Annotated[str, typer.Option(help="Score after so many edits: 1,10,100; default powers of 10.")] = "",
    separately: Annotated[bool, typer.Option(help="Of several files, also each one's edits alone.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/evaluate"),
    again: Annotated[bool, typer.Option(help="Compute also what has a result, or was begun.")] = False,
    journal: Annotated[bool, typer.Option(help="Keep WISE's edits, so that a stopped run goes on.")] = True,
    unrelated: Annotated[Path | None, typer.Option(help="A file of far prompts, for CounterFact.")] = None,
    stats_text: Annotated[Path | None, typer.Option(help="Text for MEMIT's covariances.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model's weights.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    batch_size: Annotated[int, typer.Option(help="Prompts a forward in scoring.", min=1)] = 32,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.", min=1)] = None,
) -> None:
    """Make edits in a stream with any algorithm and score the final model on all of them."""
    from .evaluate import run_evaluate
    from .evaluate_options import EvaluateOptions

    with _errors_in_one_line():
        numbers = [int(part) for part in checkpoints.split(",") if part.strip()]
        options = EvaluateOptions(
            data=data,
            edits=edits,
            algs=tuple(dict.fromkeys(alg or ["WISE"])),
            out=out,
            model=model,
            hparams=tuple(hparams or ()),
            changes=tuple(set_ or ()),
            seeds=tuple(dict.fromkeys(seed or [0])),
            start=start,
            checkpoints=numbers,
            separately=separately,
            again=again,
            journal=journal,
            unrelated=unrelated,
            stats_text=stats_text,
            dtype=dtype,
            device=device,
            batch_size=batch_size,
            threads=threads,
        )
        run_evaluate(options)


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness's own command line, in which peft=FOLDER loads saved edits."""
    from .cli_lm_eval import harness_command, run_lm_eval

    with _errors_in_one_line():
        command = harness_command()
    run_lm_eval(command, context.args)


@app.command("upstream-tree")
def upstream_tree(
    out: Annotated[Path, typer.Argument(help="Folder that does not exist, or is empty.")],
    head: Annotated[Path | None, typer.Option(help="A checkout of EasyEdit: adds a patch for its own files.")] = None,
) -> None:
    """Write the files that would make this package EasyEdit's own WISE (docs/upstream.md)."""
    from .easyedit.proposal import write_tree

    with _errors_in_one_line():
        files = write_tree(out, head)
        _console().print(f"{len(files)} files written to {out}: PROPOSAL.md says what to do with them.", soft_wrap=True)


if __name__ == "__main__":
    app()
