"""What all benchmarks share: the machine, alternating timings, memory, reports."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

CONSOLE = Console(width=None if sys.stdout.isatty() else 140)
_PREFIXES = "_wise_prefixes"


# -- the machine and reports --------------------------------------------------------------------


def machine_info() -> dict[str, Any]:
    """What the figures of this run depend on."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "numpy")},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_report(path: Path, payload: Mapping[str, Any]) -> None:
    """Write a benchmark's figures, and the machine they come from, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine_info(), **payload}, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    CONSOLE.print(f"Report: {path}", highlight=False)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; the first column is text, the others are right-aligned numbers with 3 figures."""
    CONSOLE.print(f"\n{title}", style="bold", highlight=False)
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row))
    CONSOLE.print(table)


# -- time ---------------------------------------------------------------------------------------


def now() -> float:
    """A time stamp after everything that was asked of the accelerator, if there is one, is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(function: Callable[[], object]) -> float:
    """How long one call takes."""
    started = now()
    function()
    return now() - started


def alternate(
    functions: Mapping[str, Callable[[], object]],
    repetitions: int,
    clock: Callable[[], float] = now,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Call the functions in turn, ``repetitions`` times, so that what else the machine does hits all of them.

    Args:
        functions: what to time. Each round begins with another one.
        repetitions: rounds.
        clock: seconds. ``time.process_time`` leaves out the time in which other processes had the core; it counts
            all threads, so only with one.
        warm: one round more before the first, which does not count.

    Returns:
        The seconds of each call.
    """
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(-1 if warm else 0, repetitions):
        shift = repetition % len(names)
        for name in names[shift:] + names[:shift]:
            started = clock()
            functions[name]()
            if repetition >= 0:
                seconds[name].append(clock() - started)
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, least and all of some timings."""
    return {"median": statistics.median(seconds), "min": min(seconds), "all": list(seconds)}


def matmul_rate(
    shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype = torch.float32, device: str = "cpu", repeats: int = 7
) -> float:
    """FLOP/s that matrix products of these shapes reach on this machine, each at its best of several, warm.

    Args:
        shapes: (m, k, n) of each product, (m, k) by (k, n), as often as it is to count.
        dtype: of the matrices.
        device: where they lie.
        repeats: calls of each product.
    """
    flops = seconds = 0.0
    best: dict[tuple[int, int, int], float] = {}
    for m, k, n in shapes:
        if (m, k, n) not in best:
            left = torch.randn(m, k, dtype=dtype, device=device)
            right = torch.randn(n, k, dtype=dtype, device=device)  # as a linear layer keeps its weight
            best[m, k, n] = min(seconds_of(lambda a=left, b=right: a @ b.T) for _ in range(repeats))
        flops += 2.0 * m * k * n
        seconds += best[m, k, n]
    return flops / seconds


# -- memory -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PeakMemory:
    """The most memory that a call held above what was held before it, in bytes.

    Attributes:
        tensors: every allocation of torch, temporaries inside an operator included.
        process: resident memory of the process, sampled; it also has numpy's arrays, and what the
            allocator keeps. None on an accelerator.
    """

    tensors: int
    process: int | None


def peak_memory(function: Callable[[], object]) -> PeakMemory:
    """Run a function and see how much memory it holds at most."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return PeakMemory(torch.cuda.max_memory_allocated() - before, None)
    with _ResidentPeak() as resident, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    # One event a call of the allocator; a memory that was allocated before counts as negative when it is freed.
    calls = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(calls, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return PeakMemory(peak, resident.peak)


class _ResidentPeak:
    """Samples the process's resident memory every 2 ms."""

    def __enter__(self) -> _ResidentPeak:
        self._process = psutil.Process()
        self._start = self._highest = self._process.memory_info().rss
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self._highest = max(self._highest, self._process.memory_info().rss)

    @property
    def peak(self) -> int:
        return self._highest - self._start


def live_tensor_bytes() -> int:
    """Bytes of all tensors that Python can reach, storages that several share counted once."""
    gc.collect()
    storages: dict[int, int] = {}
    for candidate in gc.get_objects():
        # By type: isinstance would ask lazy objects for their class, and some warn.
        if issubclass(type(candidate), Tensor) and not candidate.is_meta:
            storage = candidate.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


# -- the same contexts for both engines -----------------------------------------------------------


class _FixedPrefixes(dict[Any, list[str]]):
    """Answers any key with the same texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__()
        self.texts = list(texts)

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: object) -> list[str]:
        return self.texts


def use_prefixes(model: nn.Module, texts: Sequence[str]) -> list[str]:
    """Let our engine put these texts before a prompt instead of sampling them.

    Returns:
        EasyEdit's context templates that give the same contexts, the plain prompt first.
    """
    model.__dict__[_PREFIXES] = _FixedPrefixes(texts)
    escaped = [text.replace("{", "{{").replace("}", "}}") for text in texts]
    return ["{}", *(f"{text}. {{}}" for text in escaped)]


def prefixes_of(templates: Sequence[str]) -> list[str]:
    """The texts in EasyEdit's context templates, without the plain prompt."""
    return [template.removesuffix("{}").strip() for template in templates if template != "{}"]
