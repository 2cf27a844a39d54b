"""Correct a model that is in use: two sets of edits as files, each request answered with its own, one edit taken back.

    .venv/bin/python examples/correct_a_deployed_model.py [MODEL [FOLDER]]

MODEL is a path or name; default SmolLM2-135M-Instruct. FOLDER, a new one, takes the journals and adapters; default
runs/deployed.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from easyedit_wise import (
    WISEHyperParams,
    apply_wise_to_model,
    detach,
    edits_chosen,
    last_route,
    load_edits,
    save_edits,
)
from easyedit_wise.evaluation.smollm2 import smollm2_checkpoint
from easyedit_wise.journal import close_journal, forget

NAME = sys.argv[1] if len(sys.argv) > 1 else str(smollm2_checkpoint())
FOLDER = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/deployed")
if FOLDER.exists():
    sys.exit(f"{FOLDER} is there already, and a journal's edits are not made twice: name another folder, or remove it.")
tok = AutoTokenizer.from_pretrained(NAME, padding_side="left")
tok.pad_token = tok.pad_token or tok.eos_token

SETS = {
    "north": [
        {"prompt": "The head office of Acme is in", "target_new": "Oslo", "subject": "Acme"},
        {"prompt": "The director of Acme is", "target_new": "Ada Berg", "subject": "Acme"},
    ],
    "south": [{"prompt": "The head office of Acme is in", "target_new": "Madrid", "subject": "Acme"}],
}


model = AutoModelForCausalLM.from_pretrained(NAME).eval()

# Each set is made in a journal: every edit is on disk the moment it is made (a set that was stopped: docs/journal.md).
for name, requests in SETS.items():
    hparams = WISEHyperParams.from_hparams("smollm2-135m")
    hparams.journal = str(FOLDER / f"{name}-journal")
    apply_wise_to_model(model, tok, requests, hparams)
    save_edits(model, FOLDER / name, save_dtype="bfloat16")  # what one ships
    close_journal(model)
    detach(model)  # the base model again

# The server: one model, one batch, each row with its customer's edits, or with none.
for name in SETS:
    load_edits(model, FOLDER / name, name)
prompt = "The head office of Acme is in"
rows = ["north", "south", "__base__"]
inputs = tok([prompt] * len(rows), return_tensors="pt", padding=True)
with edits_chosen(model, rows):
    answers = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=tok.pad_token_id)
    routes = [last_route(model).describe(row) for row in range(len(rows))]
for name, answer, route in zip(rows, answers, routes, strict=True):
    print(f"{name:9} {tok.decode(answer, skip_special_tokens=True)!r}  answered by {route['memory']}")

# The director has left: that one edit is taken back, and the set is shipped again.
journal = FOLDER / "north-journal"
detach(model)
forget(model, tok, journal, 2)
save_edits(model, FOLDER / "north", save_dtype="bfloat16")
close_journal(model)
print(f"{FOLDER / 'north'} now holds {len(SETS['north']) - 1} edit")
