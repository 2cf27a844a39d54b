"""One stream of edits with any settings, scored on the final model: how the tables of docs/experiments.md are made.

python -m benchmarks.try_settings --data zsre_mend_edit.json --start 200 --edits 20 optimizer=adam n_iter=24 ...
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import now, print_table, write_report
from benchmarks.workload import load_facts, load_smollm2
from easyedit_wise.easyedit.apply import stream_of
from easyedit_wise.editing.requests import EditRequest
from easyedit_wise.evaluation.final import collect_baseline, score_model
from easyedit_wise.hparams import WISEHyperParams
from easyedit_wise.presets import NOT_OF_THE_METHOD

_SCORES = (
    "reliability",
    "generalisation",
    "locality",
    "edit_exact",
    "rephrasing_exact",
    "unrelated_same",
    "nearby_kept",
    "perplexity",
)


def run(model: Any, tok: Any, hparams: WISEHyperParams, n: int, data: Path | None, start: int) -> dict[str, Any]:
    """Edit and score; the seconds are those of the stream alone."""
    records, requests = load_facts(n, data, start)
    baseline = collect_baseline(model, tok, records)
    stream = stream_of(model, tok, hparams)
    started = now()
    outcomes = stream.apply([EditRequest.from_easyedit(request, hparams.target_separator) for request in requests])
    seconds = (now() - started) / n
    scores = score_model(model, tok, records, baseline).to_dict()
    return {
        "edits": n,
        "seconds_an_edit": seconds,
        "iterations_an_edit": sum(len(outcome.losses) for outcome in outcomes) / n,
        **{name: scores[name] for name in _SCORES},
    }


def main() -> None:
    """Edit, score, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="EasyEdit's zsre_mend_edit.json; without it the demo's facts")
    parser.add_argument("--start", type=int, default=0, help="the first record of the file")
    parser.add_argument("--edits", type=int, default=14)
    parser.add_argument("--model", help="a causal language model; without it SmolLM2-135M-Instruct")
    parser.add_argument("--hparams", default="smollm2-135m")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/try_settings.json"))
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings that differ from --hparams")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    changes = {key: yaml.safe_load(value) for key, _, value in (one.partition("=") for one in arguments.settings)}
    base = WISEHyperParams.from_hparams(arguments.hparams).to_dict()
    if "preset" in changes:  # it says all of the method: only what is edited comes from --hparams
        base = {key: value for key, value in base.items() if key in NOT_OF_THE_METHOD}
    hparams = WISEHyperParams.from_dict({**base, **changes})
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
        tok = AutoTokenizer.from_pretrained(arguments.model)
    else:
        model, tok = load_smollm2()
    result = run(model, tok, hparams, arguments.edits, arguments.data, arguments.start)
    print_table(" ".join(arguments.settings) or "as packaged", list(result), [list(result.values())])
    write_report(arguments.out, {"changes": changes, "settings": hparams.to_dict(), "result": result})


if __name__ == "__main__":
    main()
