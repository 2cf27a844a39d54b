"""Time of an edit: EasyEdit's own WISE and this package, on SmolLM2-135M in fp32.

    python -m benchmarks.edit_speed [--short] [--parts abc] [--data zsre_mend_edit.json] [--out ...]

a. Equal settings: the same facts, layer, contexts, losses and number of iterations; seconds an iteration.
b. Each with its own settings: seconds an edit, and what the final model has kept of all edits.
c. The floor: the arithmetic that an iteration cannot do without, at the speed of this machine's matrix product.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import CONSOLE, matmul_rate, now, prefixes_of, print_table, summary, use_prefixes, write_report
from benchmarks.floor import Iteration, iteration_flops, product_shapes
from benchmarks.workload import Request, Uncached, layer_parameter, load_facts, load_smollm2
from easyedit_wise.data import neutral_prompts
from easyedit_wise.easyedit.apply import stream_of
from easyedit_wise.easyedit.upstream import EditTiming, UpstreamWise, load_upstream, why_not
from easyedit_wise.editing.contexts import context_groups
from easyedit_wise.editing.requests import EditRequest, encode_pair
from easyedit_wise.evaluation.final import Baseline, FactRecord, FinalScores, collect_baseline, score_model
from easyedit_wise.hparams import WISEHyperParams
from easyedit_wise.tuner.attach import detach

OURS, THEIRS = "easyedit_wise", "EasyEdit"
PACKAGED = "smollm2-135m"
# dW itself trained, as in the paper: what compares with EasyEdit's iterations and with the arithmetic that they need.
MARGIN = "preset margin"
_SCORES = ("reliability", "generalisation", "locality", "nearby_kept", "edit_exact", "rephrasing_exact")


def edit_ours(model: Any, tok: Any, request: Request, hparams: WISEHyperParams) -> EditTiming:
    """One more edit in the model's stream."""
    timing = EditTiming()
    started = now()
    stream = stream_of(model, tok, hparams)
    stream.apply(
        [EditRequest.from_easyedit(request, hparams.target_separator)],
        on_iteration=lambda *_: timing.marks.append(now()),
    )
    timing.seconds = now() - started
    return timing


def equal_settings(layer: int, n_iter: int) -> tuple[dict[str, Any], WISEHyperParams]:
    """EasyEdit's Llama settings for one layer, and the same for this package, with EasyEdit's losses and score."""
    theirs: dict[str, Any] = {
        "alg_name": "WISE",
        "model_name": "smollm2",
        "device": "cpu",
        "mask_ratio": 0.2,
        "edit_lr": 1.0,
        "n_iter": n_iter,
        "norm_constraint": 1.0,
        "act_margin": [5.0, 20.0, 10.0],
        "act_ratio": 0.88,
        "save_freq": 500,
        "merge_freq": 1000,
        "merge_alg": "ties",
        "objective_optimization": "only_label",
        "inner_params": [layer_parameter(layer)],
        "densities": 0.53,
        "weights": 1.0,
        "retrieve": True,
        "replay": False,
    }
    variants = {"score_activation": "silu", "margin_over_violated": True, "weight_decay": 1e-5}
    only_its_own = {"irrelevant_prompts": 0, "n_contexts": 10, "early_stop_loss": 0.0}
    return theirs, WISEHyperParams.from_dict({"preset": "paper", **theirs, **variants, **only_its_own})


def compare_iterations(
    models: Mapping[str, Any],
    tok: Any,
    requests: Sequence[Request],
    layer: int,
    n_iter: int,
    upstream: UpstreamWise | None,
    templates: Sequence[str],
) -> dict[str, Any]:
    """Part a, for one layer: both make the same edits in turn; the first edit of each warms up and is left out."""
    theirs, ours = equal_settings(layer, n_iter)
    timings: dict[str, list[EditTiming]] = {OURS: []}
    if upstream is not None:
        timings[THEIRS] = []
        upstream.start(models[THEIRS], tok, theirs, templates)
    for request in requests:
        timings[OURS].append(edit_ours(models[OURS], tok, request, ours))
        if upstream is not None:
            upstream.edit(models[THEIRS], tok, [request], theirs)
            timings[THEIRS].append(upstream.timings[-1])
    if upstream is not None:
        upstream.restore()
    detach(models[OURS])
    return {
        name: {
            "iteration_seconds": summary([seconds for timing in made[1:] for seconds in timing.iterations]),
            "edit_seconds": summary([timing.seconds for timing in made[1:]]),
            "iterations_an_edit": [len(timing.marks) for timing in made[1:]],
        }
        for name, made in timings.items()
    }


def lifelong(
    name: str,
    edit: Callable[[Request], EditTiming],
    scored: Callable[[], Any],
    tok: Any,
    facts: tuple[list[FactRecord], list[Request]],
    baseline: Baseline,
) -> dict[str, Any]:
    """Part b, for one editor: all edits in sequence, then the final model is asked about all of them."""
    records, requests = facts
    timings = []
    for index, request in enumerate(requests):
        timings.append(edit(request))
        CONSOLE.print(f"  {name}: edit {index + 1} of {len(requests)}, {timings[-1].seconds:.1f} s", highlight=False)
    # One prompt at a time: EasyEdit's router decides once for a whole batch.
    scores: FinalScores = score_model(scored(), tok, records, baseline, batch_size=1)
    return {
        "edit_seconds": summary([timing.seconds for timing in timings]),
        "iterations_an_edit": [len(timing.marks) for timing in timings],
        **{score: getattr(scores, score) for score in _SCORES},
    }


def own_settings(
    model: Any, tok: Any, facts: tuple[list[FactRecord], list[Request]], upstream: UpstreamWise | None, short: bool
) -> dict[str, Any]:
    """Part b."""
    baseline = collect_baseline(model, tok, facts[0], batch_size=1)
    ours = WISEHyperParams.from_hparams(PACKAGED)
    result = {
        f"{OURS} {PACKAGED}": lifelong(
            OURS, lambda request: edit_ours(model, tok, request, ours), lambda: model, tok, facts, baseline
        )
    }
    detach(model)
    if upstream is None:
        return result
    tuned = upstream.settings(inner_params=[layer_parameter(20)], edit_lr=0.1)
    untuned = upstream.settings(inner_params=[layer_parameter(25)])
    chosen = {"layer 20, lr 0.1": tuned} if short else {"layer 25": untuned, "layer 20, lr 0.1": tuned}
    for name, settings in chosen.items():
        upstream.start(model, tok, settings)

        def edit(request: Request, settings: dict[str, Any] = settings) -> EditTiming:
            upstream.edit(model, tok, [request], settings)
            return upstream.timings[-1]

        label = f"{THEIRS} llama-7b, {name}"
        result[label] = lifelong(label, edit, lambda: Uncached(model), tok, facts, baseline)
        upstream.restore()
    return result


def workload_of(
    tok: Any, request: Request, prefixes: Sequence[str], hparams: WISEHyperParams, n_neutral: float
) -> list[Iteration]:
    """The tokens of each kind of iteration: one a group of contexts."""
    neutral = statistics.fmean(len(tok(prompt)["input_ids"]) for prompt in neutral_prompts())
    n_scored = len(tok(request["loc_prompt"])["input_ids"]) + round(n_neutral * neutral)
    kinds = []
    for group in context_groups(request["prompt"], prefixes, hparams.contexts_per_step):
        pairs = [encode_pair(tok, prompt, request["target_new"]) for prompt in group]
        lengths = [len(tokens) for tokens, _ in pairs]
        kinds.append(Iteration(lengths, sum(len(tokens) - start for tokens, start in pairs), n_scored))
    return kinds


def against_floor(
    model: Any, tok: Any, requests: Sequence[Request], prefixes: Sequence[str], hparams: WISEHyperParams
) -> dict[str, Any]:
    """Part c: our iterations against the floor; the first edit warms up and is left out."""
    layer = int(hparams.inner_params[0].split("[")[1].split("]")[0])
    kinds = [
        kind
        for request in requests[1:]
        for kind in workload_of(tok, request, prefixes, hparams, hparams.irrelevant_prompts)
    ]
    shapes = product_shapes(model.config, layer, kinds[0])
    rate = matmul_rate(shapes)
    timings = [edit_ours(model, tok, request, hparams) for request in requests][1:]
    detach(model)
    parts = [iteration_flops(model.config, layer, kind) for kind in kinds]
    flops = statistics.fmean(sum(part.values()) for part in parts)
    # Before and after, and the better one: other work on the machine must not lift the floor.
    rate = max(rate, matmul_rate(shapes))
    best_rate = matmul_rate([(1024, 1024, 1024)])
    measured = summary([seconds for timing in timings for seconds in timing.iterations])
    return {
        "flops": flops,
        "flops_by_part": {name: statistics.fmean(part[name] for part in parts) for name in parts[0]},
        "contexts_an_iteration": len(kinds[0].lengths),
        "tokens_an_iteration": statistics.fmean(kind.n_tokens for kind in kinds),
        "rate_at_these_shapes": rate,
        "rate_at_1024_cubed": best_rate,
        "floor_seconds": flops / rate,
        "floor_seconds_at_best_rate": flops / best_rate,
        "measured_seconds": measured["median"],
        "least_measured_seconds": measured["min"],
        "measured_over_floor": measured["median"] * rate / flops,
        "edit_seconds": statistics.median(timing.seconds for timing in timings),
    }


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--short", action="store_true", help="fewer edits, and only the tuned settings of EasyEdit")
    parser.add_argument("--parts", default="abc", help="which of a, b and c to run")
    parser.add_argument("--data", type=Path, help="EasyEdit's zsre_mend_edit.json; without it the demo's facts")
    parser.add_argument("--edits", type=int, help="of part b; 10 without it, 1 in the short form")
    parser.add_argument("--iterations", type=int, default=6, help="of each edit in parts a and c")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/edit_speed.json"))
    arguments = parser.parse_args()
    n_timed, n_lifelong = (3, 1) if arguments.short else (6, 10)
    n_lifelong = arguments.edits or n_lifelong
    facts = load_facts(max(n_timed, n_lifelong), arguments.data)
    timed, lived = facts[1][:n_timed], (facts[0][:n_lifelong], facts[1][:n_lifelong])
    upstream = load_upstream()
    if upstream is None:
        CONSOLE.print(f"Without EasyEdit's own WISE: {why_not()}", highlight=False)
    model, tok = load_smollm2()
    report: dict[str, Any] = {"easyedit": upstream and upstream.commit, "data": str(arguments.data or "demo facts")}

    if "a" in arguments.parts:
        models = {OURS: model} | ({THEIRS: load_smollm2()[0]} if upstream else {})
        texts = prefixes_of(upstream.context_templates(model, tok)) if upstream else None
        templates = use_prefixes(model, texts) if texts else []
        for layer in (25, 20):
            part = compare_iterations(models, tok, timed, layer, arguments.iterations, upstream, templates)
            report[f"equal_settings_layer_{layer}"] = part
            _print_equal(layer, part)
        del models
        model.__dict__.pop("_wise_prefixes", None)
    if "b" in arguments.parts:
        part = report["own_settings"] = own_settings(model, tok, lived, upstream, arguments.short)
        _print_own(part)
    if "c" in arguments.parts:
        texts = prefixes_of(upstream.context_templates(model, tok)) if upstream else None
        prefixes = texts or [" ".join(prompt.split()[:6]) for prompt in neutral_prompts()[:10]]
        use_prefixes(model, prefixes)
        equal = equal_settings(25, arguments.iterations)[1]
        margin = WISEHyperParams.from_preset("margin", [layer_parameter(20)])
        margin.n_iter, margin.early_stop_loss = 2 * arguments.iterations, 0.0
        part = report["floor"] = {
            name: against_floor(model, tok, timed, prefixes, hparams)
            for name, hparams in (("equal settings, layer 25", equal), (f"{MARGIN}, layer 20", margin))
        }
        _print_floor(part)
    write_report(arguments.out, report)


def _print_equal(layer: int, part: Mapping[str, Any]) -> None:
    ours = part[OURS]
    print_table(
        f"a. The same edits, layer {layer}: medians",
        ["", "s an iteration", "times ours", "s an edit", "times ours"],
        [
            [
                name,
                *(
                    value
                    for key in ("iteration_seconds", "edit_seconds")
                    for value in (row[key]["median"], row[key]["median"] / ours[key]["median"])
                ),
            ]
            for name, row in part.items()
        ],
    )


def _print_own(part: Mapping[str, Any]) -> None:
    rows = [
        [name, row["edit_seconds"]["median"], *("-" if row[s] is None else float(row[s]) for s in _SCORES)]
        for name, row in part.items()
    ]
    print_table("b. Each with its own settings; scores of the final model", ["", "s an edit", *_SCORES], rows)


def _print_floor(part: Mapping[str, Any]) -> None:
    columns = ["flops", "rate_at_these_shapes", "floor_seconds", "measured_seconds", "measured_over_floor"]
    rows = [[name, *(float(row[column]) for column in columns)] for name, row in part.items()]
    print_table("c. Our iteration against the floor", ["", *(c.replace("_", " ") for c in columns)], rows)


if __name__ == "__main__":
    main()
