"""TIES and the masks of shards: this package, PEFT, EasyEdit and mergekit, on the matrix of a 7B model.

    python -m benchmarks.merge_speed [--short] [--out runs/benchmarks/merge_speed.json]

Two shards of edits are merged. ``masked`` are WISE's: each shard changed a random fifth of the entries, so
that fewer entries are non-zero than TIES keeps. ``dense`` changed all of them. PEFT's result is the yardstick
of equality. EasyEdit is timed on whole weights, as it keeps them; for the comparison its base weight is zero,
because the rounding of base + delta - base already changes what is trimmed.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.utils.merge_utils import ties as peft_ties
from torch import Tensor

from benchmarks.common import CONSOLE, alternate, print_table, summary, write_report
from easyedit_wise.easyedit.upstream import load_upstream, why_not
from easyedit_wise.merging import merge
from easyedit_wise.sharding import random_mask

DENSITY = 0.53
RHO = 0.2
FULL = (4096, 11008)
SHORT = (1024, 2752)
OURS = "easyedit_wise"

Merge = Callable[[], Tensor]


def shards(shape: tuple[int, int], kind: str) -> list[Tensor]:
    """Two random changes of a matrix, each dense or inside its own mask."""
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(shape, generator=generator).mul_(1e-3) for _ in range(2)]
    if kind == "masked":
        deltas = [delta * random_mask(shape, RHO, generator) for delta in deltas]
    return deltas


def merges(deltas: list[Tensor], base: Tensor) -> dict[str, Merge]:
    """Every TIES at hand as a call without arguments; ``base`` is the weight that EasyEdit's adds to."""
    found: dict[str, Merge] = {
        OURS: lambda: merge(deltas, method="ties", weights=[0.5, 0.5], density=DENSITY),
        "PEFT": lambda: peft_ties(deltas, torch.ones(2), DENSITY, majority_sign_method="total"),
    }
    upstream = load_upstream()
    if upstream is not None:
        gta = upstream.merging.GTA("magnitude", "sum", normalize=True)
        whole = [base + delta for delta in deltas]
        found["EasyEdit"] = lambda: gta.execute([0.5, 0.5], base, whole, densities=DENSITY)
    if importlib.util.find_spec("mergekit") is not None:
        found["mergekit"] = partial(_mergekit_ties, deltas)
    return found


def _mergekit_ties(deltas: list[Tensor]) -> Tensor:
    """mergekit's trimming and its sign mask; the disjoint mean around them needs its task graph, and is ours."""
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask
    from mergekit.sparsify import SparsificationMethod, sparsify

    trimmed = torch.stack([sparsify(d, density=DENSITY, method=SparsificationMethod.magnitude) for d in deltas])
    agrees = get_mask(trimmed, method="sum", mask_dtype=torch.float32)
    return (trimmed * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


def equality(deltas: list[Tensor]) -> dict[str, Any]:
    """How many entries of each result have the value of PEFT's, and the largest difference."""
    found = merges(deltas, torch.zeros_like(deltas[0]))
    reference = found.pop("PEFT")()
    result = {}
    for name, function in found.items():
        merged = function()
        result[name] = {
            "equal_entries": int((merged == reference).sum()),
            "entries": reference.numel(),
            "largest_difference": float((merged - reference).abs().max()),
            "largest_entry": float(reference.abs().max()),
        }
    return result


def announce_absent() -> None:
    """Say once what is not compared with, and why."""
    if load_upstream() is None:
        CONSOLE.print(f"EasyEdit's TIES is left out: {why_not()}", highlight=False)
    if importlib.util.find_spec("mergekit") is None:
        CONSOLE.print("mergekit's TIES is left out: mergekit is not installed.")


def masks(shape: tuple[int, int]) -> dict[str, Callable[[], Any]]:
    """The mask of one shard, here and as EasyEdit draws it: one numpy choice of 1 or 0 an entry."""
    generator = torch.Generator().manual_seed(0)
    numel = shape[0] * shape[1]
    return {
        OURS: lambda: random_mask(shape, RHO, generator),
        "EasyEdit": lambda: torch.from_numpy(np.random.choice([1, 0], size=numel, p=[RHO, 1 - RHO])),
    }


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--short", action="store_true", help=f"{SHORT[0]} x {SHORT[1]} and 3 repetitions")
    parser.add_argument("--repetitions", type=int, help="calls of each; 3 if short, else 5")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/merge_speed.json"))
    arguments = parser.parse_args()
    shape = SHORT if arguments.short else FULL
    repetitions = arguments.repetitions or (3 if arguments.short else 5)
    report: dict[str, Any] = {"shape": shape, "density": DENSITY, "rho": RHO, "repetitions": repetitions}
    announce_absent()
    for kind in ("masked", "dense"):
        deltas = shards(shape, kind)
        equal = equality(deltas)
        found = merges(deltas, torch.randn(shape).mul_(0.02))
        timed = {name: summary(times) for name, times in alternate(found, repetitions).items()}
        report[f"ties_{kind}"] = {"seconds": timed, "compared_with_peft": equal}
        ours = timed[OURS]["median"]
        print_table(
            f"TIES of two {kind} shards of {shape[0]} x {shape[1]}, density {DENSITY}",
            ["", "median s", "times ours", "entries equal to PEFT's", "largest difference"],
            [
                [
                    name,
                    times["median"],
                    times["median"] / ours,
                    f"{equal[name]['equal_entries'] / equal[name]['entries']:.6%}" if name in equal else "-",
                    equal[name]["largest_difference"] if name in equal else "-",
                ]
                for name, times in timed.items()
            ],
        )
        del found, deltas
    timed = {name: summary(times) for name, times in alternate(masks(shape), repetitions).items()}
    report["mask"] = {"seconds": timed}
    ours = timed[OURS]["median"]
    print_table(
        f"Mask of a shard, {shape[0]} x {shape[1]}, rho {RHO}",
        ["", "median s", "times ours"],
        [[name, times["median"], times["median"] / ours] for name, times in timed.items()],
    )
    write_report(arguments.out, report)


if __name__ == "__main__":
    main()
