"""An EasyEdit script as it always was, with one added line.

    .venv/bin/python examples/easyedit_script.py [MODEL]

MODEL is a causal language model that EasyEdit's loader knows by its name; default SmolLM2-135M-Instruct.
"""

# ruff: noqa: I001  (the added line stands before easyeditor: it is what makes the PyPI wheel importable)
import sys

import easyedit_wise  # noqa: F401  the one added line
from easyeditor import BaseEditor, WISEHyperParams

from easyedit_wise.evaluation.smollm2 import smollm2_checkpoint

model_name = sys.argv[1] if len(sys.argv) > 1 else str(smollm2_checkpoint())

hparams = WISEHyperParams.from_hparams("smollm2-135m")  # or the path of a YAML file
hparams.model_name = model_name
hparams.device = "cpu"

editor = BaseEditor.from_hparams(hparams)
metrics, model, _ = editor.edit(
    prompts=["The capital of France is", "Nokia is a company from"],
    target_new=["Lyon", "Japan"],
    subject=["France", "Nokia"],
    rephrase_prompts=["France's capital city is", "The company Nokia comes from"],
    locality_inputs={"far": {"prompt": ["Water boils at", "The sun rises in the"], "ground_truth": ["100", "east"]}},
    sequential_edit=True,
)
for one in metrics:
    print(one["requested_rewrite"]["prompt"], one["post"])

editor.tok.padding_side = "left"
for prompt in ("The capital of France is", "Nokia is a company from", "Apple is a company from"):
    inputs = editor.tok(prompt, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=editor.tok.eos_token_id)
    print(editor.tok.decode(answer[0], skip_special_tokens=True))
