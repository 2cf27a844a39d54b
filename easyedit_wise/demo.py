"""The demo: a dozen facts edited into a real small model through EasyEdit, then looked at from all sides."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from .data import demo_facts
from .evaluation.asking import greedy_answers
from .evaluation.final import Baseline, FactRecord, FinalScores, collect_baseline, score_model
from .evaluation.smollm2 import smollm2_checkpoint
from .hparams import WISEHyperParams
from .persistence import load_edits, save_edits
from .reports.plots import plot_routing
from .reports.tables import answer_rows, answers_table, scores_table
from .tuner.switch import last_route

TARGETS: Mapping[str, float] = {
    "reliability": 0.95,
    "generalisation": 0.80,
    "locality": 1.00,
    "edit_exact": 0.80,
}


@dataclass(frozen=True)
class RoutedPrompt:
    """Which memory answered a prompt, with what score, against what threshold."""

    kind: str
    prompt: str
    memory: str
    score: float
    epsilon: float
    exact: bool = True


def run_demo(
    out: Path, model_path: str | None = None, n_facts: int | None = None, hparams_name: str = "smollm2-135m"
) -> dict[str, Any]:
    """Edit the demo's facts one after the other with ``alg_name="WISE"`` and report on the final model.

    Args:
        out: folder for summary.json, the plot and the adapter.
        model_path: a causal language model that EasyEdit's loader knows; None takes SmolLM2-135M-Instruct.
        n_facts: how many of the facts; None takes all.
        hparams_name: a packaged name or a YAML file.

    Returns:
        What summary.json holds.
    """
    console = Console()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("easyeditor").setLevel(logging.WARNING)
    from easyeditor import BaseEditor  # importing easyedit_wise alone must not import EasyEdit

    path = model_path or str(smollm2_checkpoint())
    hparams = WISEHyperParams.from_hparams(hparams_name)
    hparams.model_name = path
    hparams.device = 0 if torch.cuda.is_available() else "cpu"
    facts = demo_facts()[:n_facts]
    records = [FactRecord.from_dict(fact) for fact in facts]

    editor = _editor_of(BaseEditor, hparams)
    logging.getLogger("easyeditor.editors.editor").setLevel(logging.WARNING)
    console.rule(f"{len(facts)} facts into {Path(path).name}")
    console.print("Asking the unedited model ...")
    baseline = collect_baseline(editor.model, editor.tok, records)
    started = time.perf_counter()
    model = _edit(editor, facts)
    seconds = (time.perf_counter() - started) / len(facts)
    console.print("Asking the final model ...")
    scores = score_model(model, editor.tok, records, baseline)
    routed = route_prompts(model, editor.tok, records)

    out.mkdir(parents=True, exist_ok=True)
    plot = _plot(routed, out / "routing.png")
    adapter = save_edits(model, out / "adapter")
    console.print("Loading the saved edits into a fresh base model ...")
    same = _answers_the_same(path, adapter, editor.tok, scores, baseline)
    console.print(answers_table(answer_rows(baseline, scores)))
    console.print(routing_table(routed))
    console.print(scores_table(baseline.scores.to_dict(), scores.to_dict(), dict(TARGETS)))
    summary = _summary(hparams, baseline, scores, routed, seconds, same)
    (out / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
    size = sum(file.stat().st_size for file in adapter.iterdir()) / 1e6
    console.print(f"{seconds:.1f} s an edit (with EasyEdit's own scoring before and after each).")
    console.print(f"Adapter: {adapter} ({size:.1f} MB). Loaded into a fresh base model it answers the same: {same}.")
    console.print(f"Plot: {plot}. Summary: {out / 'summary.json'}.")
    return summary


def _editor_of(base_editor: Any, hparams: WISEHyperParams) -> Any:
    """EasyEdit's editor, which loads the model.

    Raises:
        ValueError: EasyEdit's wheel has no loader for a model of that name; what it raises itself says nothing.
    """
    try:
        return base_editor.from_hparams(hparams)
    except NotImplementedError as error:
        raise ValueError(
            f"EasyEdit has no loader for {hparams.model_name!r}: it goes by words in the name, such as gpt, llama or "
            "baichuan. Name a link to the model's folder that has one: with 'baichuan' transformers finds out the rest."
        ) from error


def _edit(editor: Any, facts: Sequence[Mapping[str, Any]]) -> Any:
    """One ``BaseEditor.edit`` for all facts, in sequence, with a progress bar."""
    apply_algo = editor.apply_algo
    with tqdm(total=len(facts), desc="editing", unit="edit") as bar:

        def with_progress(*args: Any, **kwargs: Any) -> Any:
            result = apply_algo(*args, **kwargs)
            bar.update()
            return result

        editor.apply_algo = with_progress
        try:
            _, model, _ = editor.edit(
                prompts=[fact["prompt"] for fact in facts],
                target_new=[fact["target_new"] for fact in facts],
                ground_truth=[fact["ground_truth"] for fact in facts],
                subject=[fact["subject"] for fact in facts],
                rephrase_prompts=[fact["rephrasings"][0] for fact in facts],
                sequential_edit=True,
                verbose=False,
            )
        finally:
            editor.apply_algo = apply_algo
    return model


@torch.no_grad()
def route_prompts(model: Any, tok: Any, records: Sequence[FactRecord]) -> list[RoutedPrompt]:
    """Ask every prompt once and read back which memory answered."""
    asked: list[tuple[str, str]] = []
    for record in records:
        asked.append(("edit", record.prompt))
        asked += [("rephrasing", prompt) for prompt in record.rephrasings]
        if record.nearby is not None:
            asked.append(("nearby", record.nearby.prompt))
        if record.unrelated is not None:
            asked.append(("unrelated", record.unrelated.prompt))
    routed = []
    device = next(model.parameters()).device
    for kind, prompt in asked:
        tokens = tok(prompt, return_tensors="pt").to(device)
        model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        route = last_route(model)
        if route is not None and route.memories:
            routed.append(RoutedPrompt(kind, prompt, **route.describe()))
    return routed


def routing_table(routed: Sequence[RoutedPrompt]) -> Table:
    """Which memory answered each prompt."""
    table = Table("asked", "prompt", "memory", title="Which memory answered")
    table.add_column("score", justify="right")
    table.add_column("epsilon", justify="right")
    for one in routed:
        table.add_row(one.kind, one.prompt, one.memory, f"{one.score:.2f}", f"{one.epsilon:.2f}")
    return table


def _plot(routed: Sequence[RoutedPrompt], path: Path) -> Path:
    kinds = ("edit", "rephrasing", "nearby", "unrelated")
    epsilons = {one.epsilon for one in routed}
    if len(epsilons) == 1:
        groups = {kind: [one.score for one in routed if one.kind == kind] for kind in kinds}
        return plot_routing(groups, epsilons.pop(), path)
    groups = {kind: [one.score / one.epsilon for one in routed if one.kind == kind] for kind in kinds}
    return plot_routing(groups, None, path, normalised=True)


def _answers_the_same(path: str, adapter: Path, tok: Any, scores: FinalScores, baseline: Baseline) -> bool:
    """Load the saved edits into a fresh base model and compare its greedy answers with the edited one's."""
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    load_edits(fresh, adapter)
    asked = [(record.prompt, row.edit_text) for record, row in zip(baseline.records, scores.rows, strict=True)]
    asked += [
        (record.unrelated.prompt, row.unrelated_text)
        for record, row in zip(baseline.records, scores.rows, strict=True)
        if record.unrelated is not None
    ]
    prompts, expected = [prompt for prompt, _ in asked], [text for _, text in asked]
    return greedy_answers(fresh, tok, prompts, baseline.max_new_tokens) == expected


def _summary(
    hparams: WISEHyperParams,
    baseline: Baseline,
    scores: FinalScores,
    routed: Sequence[RoutedPrompt],
    seconds: float,
    same: bool,
) -> dict[str, Any]:
    after = scores.to_dict()
    return {
        "protocol": "final model after all edits; teacher-forced and greedy (generate with a cache)",
        "edits": len(baseline.records),
        "seconds_per_edit": round(seconds, 2),
        "before": baseline.scores.to_dict(),
        "after": after,
        "targets": {name: {"target": value, "met": after[name] >= value} for name, value in TARGETS.items()},
        "routing": [vars(one) for one in routed],
        "fresh_model_with_the_adapter_answers_the_same": same,
        "settings": hparams.to_dict(),
        "machine": {
            "cpu_threads": torch.get_num_threads(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "easyeditor")},
        },
    }
