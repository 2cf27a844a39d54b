"""What the benchmarks share: the machine, taking turns, and the report."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def machine_info() -> dict[str, Any]:
    """Cores, threads and versions: what a figure depends on beside the code."""
    return {
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "processor": _processor(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "command": " ".join(["python", *sys.argv]),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def alternate(
    functions: Mapping[str, Callable[[], None]], repetitions: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each function, which take turns, so that a busy moment of the machine meets all of them.

    One round before the first is not counted. Each round begins with another function. ``time.process_time`` as the
    clock leaves out the time in which other processes had the core; with one thread only.
    """
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(-1, repetitions):
        shift = repetition % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            functions[name]()
            if repetition >= 0:
                seconds[name].append(clock() - start)
    return seconds


def write_report(path: str | Path, payload: Mapping[str, Any]) -> Path:
    """Write a benchmark's figures as JSON."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(payload, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return target
