"""What routing costs at inference: base model against 1, 4, 16 and 64 side memories, prefill and decoding.

    python -m benchmarks.inference_overhead [--short] [--model wide] [--cpu-time]

The memories are synthetic: each answers one prompt of its own (low rank), and a random-masked remainder makes
unrelated prompts score as real edits of SmolLM2 do (0.3 to 0.65 of epsilon). All models share their weights; each
takes turns with the base model in one process, and a figure is the median ratio of such neighbours. "base again" is
the base model against itself: what is smaller than its quartiles is noise. "in the layer" is the time that the
layer spends beside its base layer, over the rest of the same call: wall time between two models resolves some
percent on a busy machine, this a tenth of one.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import alternate, print_table, write_report
from easyedit_wise import WiseConfig, WiseLayer, attach, last_route
from easyedit_wise.data import neutral_prompts
from easyedit_wise.routing import routing_activation
from easyedit_wise.tuner.memory import MERGED, MemoryState

COUNTS = (1, 4, 16, 64)
MASK_RATIO = 0.2
# Measured on real edits: an edit scores about 1.4 epsilon, an unrelated prompt 0.46 on average.
EDIT_TO_EPSILON, UNRELATED_TO_EPSILON = 1.4, 0.46
BASE, BASE_AGAIN = "base", "base again"


@dataclass
class Setup:
    """A model, the layer to edit, prompts that the memories answer, and prompts that none answers."""

    name: str
    model: Any
    layer: str
    own: Tensor
    unrelated: Tensor


def load(name: str, n_tokens: int, dtype: torch.dtype) -> Setup:
    """SmolLM2-135M-Instruct, or a wide random Llama."""
    generator = torch.Generator().manual_seed(0)
    if name == "wide":
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=8000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16
        )
        model: Any = LlamaForCausalLM(config)
        pool = torch.arange(10, 8000)
        unrelated = pool[torch.randint(len(pool), (16, n_tokens), generator=generator)]
        layer = 8
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from easyedit_wise.evaluation.smollm2 import smollm2_checkpoint

        checkpoint = smollm2_checkpoint()
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        tok = AutoTokenizer.from_pretrained(checkpoint)
        pool = torch.tensor([token for prompt in neutral_prompts() for token in tok(prompt)["input_ids"]])
        unrelated = torch.stack([pool[(start := 16 * row) : start + n_tokens] for row in range(16)])
        layer = 20
    own = pool[torch.randint(len(pool), (max(COUNTS), n_tokens), generator=generator)]
    return Setup(name, model.to(dtype).eval(), f"model.layers.{layer}.mlp.down_proj", own, unrelated)


@torch.no_grad()
def activations(setup: Setup, prompts: Tensor) -> Tensor:
    """A(x) of the edited layer, shape (B, T, d_in)."""
    seen: list[Tensor] = []
    handle = setup.model.get_submodule(setup.layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    setup.model(prompts, logits_to_keep=1)
    handle.remove()
    return seen[0].float()


def memories(setup: Setup) -> list[MemoryState]:
    """One memory for each own prompt; the share of noise is found once, for the first."""
    own, unrelated = activations(setup, setup.own), activations(setup, setup.unrelated)
    d_in = own.shape[-1]
    d_out = setup.model.get_submodule(setup.layer).weight.shape[0]
    generator = torch.Generator().manual_seed(1)
    # An edit's routing loss pushes irrelevant prompts down: what prompts have in common excites no memory.
    common = torch.linalg.svd(unrelated.flatten(0, 1), full_matrices=False).Vh[:16]
    level, states = None, []
    for keys in own:
        keys = keys - keys @ common.T @ common
        mask = torch.rand(d_out, d_in, generator=generator) < MASK_RATIO
        keys = torch.nn.functional.normalize(keys, dim=-1)
        signal = torch.randn(d_out, len(keys), generator=generator) @ keys * mask
        signal /= signal.norm()
        noise = torch.randn(d_out, d_in, generator=generator) * mask
        noise /= noise.norm()
        if level is None:
            wanted = UNRELATED_TO_EPSILON / EDIT_TO_EPSILON
            low, high = 0.0, 100.0
            for _ in range(30):
                level = (low + high) / 2
                delta = signal + level * noise
                ratio = routing_activation(unrelated, delta).mean() / routing_activation(own[:1], delta).mean()
                low, high = (level, high) if ratio < wanted else (low, level)
        delta = signal + (level or 0.0) * noise
        score = float(routing_activation(own[len(states)], delta).mean())
        states.append(MemoryState(MERGED, delta, None, score / EDIT_TO_EPSILON, 1))
    return states


def edited(setup: Setup, states: list[MemoryState]) -> Any:
    """A model with these memories that shares its weights with the base model."""
    model = copy.deepcopy(setup.model, {id(p): p for p in setup.model.parameters()})
    layer: WiseLayer = attach(model, WiseConfig(target_modules=[setup.layer]))
    layer.install("default", states)
    return model


@torch.no_grad()
def prefill(model: Any, prompts: Tensor) -> Any:
    return model(input_ids=prompts, attention_mask=torch.ones_like(prompts), use_cache=True, logits_to_keep=1)


@torch.no_grad()
def decode(model: Any, output: Any, n_prompt: int, steps: int) -> None:
    """Greedy steps from a filled cache, which is then cut back for the next time."""
    cache, token = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
    mask = torch.ones(token.shape[0], n_prompt, dtype=torch.long)
    for _ in range(steps):
        mask = torch.cat([mask, torch.ones_like(token)], dim=-1)
        logits = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(dim=-1)
    cache.crop(-steps)


def check(model: Any, rows: int, routed: bool) -> dict[str, Any]:
    """What the router did, so that a figure is not one of another case."""
    route = last_route(model)
    assert route is not None
    if int((route.choice >= 0).sum()) != (rows if routed else 0):
        raise RuntimeError(f"{int((route.choice >= 0).sum())} of {rows} rows were routed, expected routed={routed}.")
    exact = route.scores.numel() if route.exact is None else int(route.exact.sum())
    return {"exact_products_per_row": exact / rows, "scores_to_epsilon": float((route.scores / route.epsilon).mean())}


@contextmanager
def timed_forward(module: nn.Module, spent: list[float], clock: Callable[[], float]) -> Iterator[None]:
    """While this is open, ``spent`` gets the seconds of each forward of a module."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        started = clock()
        try:
            return own(*args, **kwargs)
        finally:
            spent.append(clock() - started)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def share_in_layer(
    setup: Setup, model: Any, call: Callable[[], object], repetitions: int, clock: Callable[[], float]
) -> float:
    """What the layer spends beside its base layer, over the rest of the call: the median."""
    layer = model.get_submodule(setup.layer)
    shares = []
    for _ in range(repetitions):
        whole: list[float] = []
        base: list[float] = []
        with timed_forward(layer, whole, clock), timed_forward(layer.base_layer, base, clock):
            started = clock()
            call()
            total = clock() - started
        own = sum(whole) - sum(base)
        shares.append(own / (total - own))
    return statistics.median(shares)


def measure(
    setup: Setup,
    rows: int,
    states: list[MemoryState],
    repetitions: int,
    steps: int,
    counts: Sequence[int] = COUNTS,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """All figures of one batch size."""
    n_tokens = setup.own.shape[1]
    cases: dict[str, tuple[Any, Tensor, dict[str, Any]]] = {
        name: (setup.model, setup.unrelated[:rows], {}) for name in (BASE, BASE_AGAIN)
    }
    for count in counts:
        model = edited(setup, states[:count])
        for routed in (False, True):
            # As many memories as can answer these rows do.
            prompts = setup.own[torch.arange(rows) % count] if routed else setup.unrelated[:rows]
            prefill(model, prompts)
            case = {"memories": count, "routed": routed, **check(model, rows, routed)}
            cases[f"{count} {'routed' if routed else 'unrouted'}"] = (model, prompts, case)
    calls: dict[str, dict[str, Callable[[], Any]]] = {"prefill": {}, "decode": {}}
    for name, (model, prompts, _) in cases.items():
        calls["prefill"][name] = partial(prefill, model, prompts)
        calls["decode"][name] = partial(decode, model, prefill(model, prompts), n_tokens, steps)
    figures = []
    for phase, functions in calls.items():
        per_call = steps if phase == "decode" else 1
        for name, (model, _, case) in cases.items():
            if name == BASE:
                continue
            seconds = alternate({BASE: functions[BASE], name: functions[name]}, repetitions, clock, warm=True)
            ratios = [own / base for own, base in zip(seconds[name], seconds[BASE], strict=True)]
            quarter = statistics.quantiles(ratios, n=4)
            median = statistics.median(seconds[name])
            figures.append(
                {
                    "phase": phase,
                    "batch": rows,
                    "case": name,
                    **case,
                    "ms": 1000 * median / per_call,
                    "base_ms": 1000 * statistics.median(seconds[BASE]) / per_call,
                    "tokens_per_s": rows * (n_tokens if phase == "prefill" else steps) / median,
                    "in_layer": share_in_layer(setup, model, functions[name], repetitions, clock) if case else None,
                    "ratio": statistics.median(ratios),
                    "ratio_quartiles": [quarter[0], quarter[2]],
                    "repetitions": len(ratios),
                }
            )
    return figures


def print_figures(figures: list[dict[str, Any]]) -> None:
    """One row a case."""
    columns = ["phase, batch, memories", "ms", "base ms", "over base", "quartiles", "in the layer", "products a row"]
    rows = []
    for one in figures:
        low, high = (100 * (ratio - 1) for ratio in one["ratio_quartiles"])
        exact = one.get("exact_products_per_row") if one["phase"] == "prefill" else None
        rows.append(
            [
                f"{one['phase']}, {one['batch']}, {one['case']}",
                f"{one['ms']:.1f}",
                f"{one['base_ms']:.1f}",
                f"{100 * (one['ratio'] - 1):+.1f} %",
                f"{low:+.1f} to {high:+.1f}",
                "" if one["in_layer"] is None else f"{100 * one['in_layer']:.2f} %",
                "" if exact is None else f"{exact:.2f}",
            ]
        )
    print_table("Inference: cost over the base model", columns, rows)


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("smollm2", "wide"), default="smollm2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=16, help="length of the prompts")
    parser.add_argument("--repetitions", type=int, default=21)
    parser.add_argument("--steps", type=int, default=2, help="decode steps in one measurement")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="at most 16")
    parser.add_argument("--short", action="store_true", help="only 1 and 64 memories, few repetitions")
    parser.add_argument("--cpu-time", action="store_true", help="count this process's time only, for a busy machine")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/inference_overhead.json"))
    options = parser.parse_args()
    if options.cpu_time:
        torch.set_num_threads(1)  # threads that wait for each other would count, too
    clock = time.process_time if options.cpu_time else time.perf_counter
    repetitions = 3 if options.short else options.repetitions
    counts = COUNTS[:: len(COUNTS) - 1] if options.short else COUNTS
    start = time.perf_counter()
    setup = load(options.model, options.tokens, getattr(torch, options.dtype))
    states = memories(setup)
    figures: list[dict[str, Any]] = []
    for rows in options.batches:
        # A small batch is soon measured and its figures are the noisier ones.
        figures += measure(setup, rows, states, repetitions * (5 if rows == 1 else 1), options.steps, counts, clock)
    print_figures(figures)
    report = {
        "model": setup.name,
        "layer": setup.layer,
        "parameters": sum(p.numel() for p in setup.model.parameters()),
        "dtype": options.dtype,
        "prompt_tokens": options.tokens,
        "clock": "process" if options.cpu_time else "wall",
        "decode_steps": options.steps,
        "seconds": round(time.perf_counter() - start, 1),
        "figures": figures,
    }
    write_report(options.out, report)


if __name__ == "__main__":
    main()
