"""Memory of editing: EasyEdit's own WISE and this package, in units of the edited matrix in fp32.

    python -m benchmarks.edit_memory [--short] [--models wide,smollm2] [--out runs/benchmarks/edit_memory.json]

Peak: the most that the first and the second edit hold above the loaded model, by torch's allocator and by the
process. EasyEdit draws its masks with numpy, which only the process's figure sees while it happens.
Growth: tensors that are still there after each of many edits in one shard.

Each figure comes from a process of its own, so that none inherits what another one's allocator kept.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import CONSOLE, live_tensor_bytes, peak_memory, print_table, use_prefixes, write_report
from benchmarks.edit_speed import MARGIN, OURS, THEIRS, edit_ours, equal_settings
from benchmarks.workload import Request, layer_parameter, llama_7b_layers, load_smollm2, numbered_requests, wide_llama
from easyedit_wise.data import neutral_prompts
from easyedit_wise.easyedit.upstream import load_upstream, why_not
from easyedit_wise.hparams import WISEHyperParams

MODELS: dict[str, tuple[Callable[[], tuple[Any, Any]], int]] = {
    "wide": (wide_llama, 1),
    "smollm2": (load_smollm2, 20),
    "7b": (llama_7b_layers, 1),
}
# The same settings as EasyEdit's, and our margin preset: more irrelevant prompts, rehearsal.
OURS_MARGIN = f"{OURS}, {MARGIN}"
ENGINES = (OURS, OURS_MARGIN, THEIRS)
# Edits stay in one shard however many there are.
_ONE_SHARD = 100_000
_MEASUREMENTS = 10


def prepared(model_name: str, engine: str, n_iter: int) -> tuple[Callable[[Request], object], int]:
    """Load a model: a function that makes one more edit in it, and the bytes of the edited matrix in fp32."""
    load, layer = MODELS[model_name]
    model, tok = load()
    prefixes = [" ".join(prompt.split()[:6]) for prompt in neutral_prompts()[-10:]]
    templates = use_prefixes(model, prefixes)
    theirs, ours = equal_settings(layer, n_iter)
    theirs |= {"save_freq": _ONE_SHARD, "merge_freq": _ONE_SHARD}
    unit = 4 * model.config.hidden_size * model.config.intermediate_size
    if engine == THEIRS:
        upstream = load_upstream()
        if upstream is None:
            raise ValueError(why_not())
        upstream.start(model, tok, theirs, templates)
        return lambda request: upstream.edit(model, tok, [request], theirs), unit
    if engine == OURS_MARGIN:
        ours = WISEHyperParams.from_preset("margin", [layer_parameter(layer)], n_iter=n_iter)
    ours.save_freq = ours.merge_freq = _ONE_SHARD
    return lambda request: edit_ours(model, tok, request, ours), unit


def peak(model_name: str, engine: str, n_iter: int, n_threads: int) -> dict[str, float]:
    """What the first two edits hold at most above the loaded model, in units of the edited matrix."""
    torch.set_num_threads(n_threads)
    edit, unit = prepared(model_name, engine, n_iter)
    first_request, second_request = numbered_requests(2)
    loaded = live_tensor_bytes()
    first = peak_memory(lambda: edit(first_request))
    held = live_tensor_bytes() - loaded
    second = peak_memory(lambda: edit(second_request))
    return {
        "first_edit": first.tensors / unit,
        "first_edit_process": float("nan") if first.process is None else first.process / unit,
        "second_edit": (held + second.tensors) / unit,
        "held_after_one": held / unit,
    }


def growth(model_name: str, engine: str, n_edits: int, n_iter: int, n_threads: int) -> dict[str, Any]:
    """Tensors alive above the loaded model after more and more edits, in units of the edited matrix."""
    torch.set_num_threads(n_threads)
    edit, unit = prepared(model_name, engine, n_iter)
    loaded = live_tensor_bytes()
    every = max(1, n_edits // _MEASUREMENTS)
    held = {}
    for index, request in enumerate(numbered_requests(n_edits), start=1):
        edit(request)
        if index == 1 or index % every == 0:
            held[index] = (live_tensor_bytes() - loaded) / unit
    counts = sorted(held)
    first, last = counts[0], counts[-1]
    per_edit = (held[last] - held[first]) / (last - first)
    return {"held": held, "matrices_an_edit": per_edit, "kilobytes_an_edit": per_edit * unit / 1e3}


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--short", action="store_true", help="the wide model's peak only, 20 edits instead of 200")
    parser.add_argument("--models", help=f"of {', '.join(MODELS)}, separated by commas; growth is measured on the last")
    parser.add_argument("--edits", type=int, help="edits of the growth")
    parser.add_argument("--iterations", type=int, default=2, help="of each edit")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/edit_memory.json"))
    arguments = parser.parse_args()
    n_edits = arguments.edits or (20 if arguments.short else 200)
    chosen = (arguments.models or ("wide,smollm2" if arguments.short else "7b,wide,smollm2")).split(",")
    engines = [engine for engine in ENGINES if engine != THEIRS or load_upstream() is not None]
    if THEIRS not in engines:
        CONSOLE.print(f"Without EasyEdit's own WISE: {why_not()}", highlight=False)
    upstream = load_upstream()
    n_threads = torch.get_num_threads()
    report: dict[str, Any] = {"easyedit": upstream and upstream.commit, "edits": n_edits}
    for name in chosen[:1] if arguments.short else chosen:
        peaks = {engine: _alone(peak, name, engine, arguments.iterations, n_threads) for engine in engines}
        report[f"peak_{name}"] = peaks
        columns = list(peaks[OURS])
        print_table(
            f"Peak above the loaded model ({name}), in matrices of fp32",
            ["", *(column.replace("_", " ") for column in columns)],
            [[engine, *(row[column] for column in columns)] for engine, row in peaks.items()],
        )
    for name in chosen[-1:]:
        grown = {engine: _alone(growth, name, engine, n_edits, 1, n_threads) for engine in engines}
        report[f"growth_{name}"] = grown
        print_table(
            f"Tensors held after edits in one shard ({name}), in matrices of fp32",
            ["", *(f"{count} edits" for count in (1, n_edits)), "matrices an edit", "kB an edit"],
            [
                [
                    engine,
                    row["held"][1],
                    row["held"][max(row["held"])],
                    row["matrices_an_edit"],
                    row["kilobytes_an_edit"],
                ]
                for engine, row in grown.items()
            ],
        )
    write_report(arguments.out, report)


if __name__ == "__main__":
    main()
