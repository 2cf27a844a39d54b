#!/usr/bin/env bash
# transformers 5.23.0, `generate_batch` (continuous batching), torch 2.13.0, on the CPU.
#
# Behaviour: the prompts of one call are prefilled neither in the order given nor by length: they are sorted by their
# token ids, largest first, and packed into ONE row. `forward` gets (1, sum of lengths) ids, position_ids that start
# again at each prompt, `cu_seq_lens_q`, and the paged cache as `cache`, with past_key_values absent. Neither ids nor
# names of the requests are among the arguments. And the tensors are buffers of the engine: the next step writes over
# them, so a hook that keeps `input_ids` without a copy finds other tokens in it afterwards. Code inside a model that
# takes a row for a request mixes users up, and no error is raised.
#
# Output seen:
#   given [[5, 6, 7, 8], [20, 21], [10, 11, 12]]
#   packed [20, 21, 10, 11, 12, 5, 6, 7, 8] positions [0, 1, 0, 1, 2, 0, 1, 2, 3] borders [0, 2, 5, 9]
#   cache PagedAttentionCache, past_key_values given: False
#   the same tensor two steps later: other tokens
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet "torch==2.13.0"
"$work/env/bin/python" -m pip install --quiet "transformers==5.23.0" "accelerate==1.15.0" "psutil==7.1.0"
cd "$work"
HF_HUB_OFFLINE=1 timeout 300 "$work/env/bin/python" - <<'PY'
import logging

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

logging.disable(logging.WARNING)
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
).eval()
kept = []


def keep(module, args, kwargs):
    copies = {key: kwargs[key].clone() for key in ("input_ids", "position_ids", "cu_seq_lens_q")}
    kept.append((kwargs["input_ids"], copies, kwargs))


model.register_forward_pre_hook(keep, with_kwargs=True)
prompts = [[5, 6, 7, 8], [20, 21], [10, 11, 12]]
config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
buffer, first, kwargs = kept[0]
ids, positions = first["input_ids"].tolist(), first["position_ids"].tolist()
borders = first["cu_seq_lens_q"].tolist()
print("given", prompts)
print("packed", *ids, "positions", *positions, "borders", borders)
assert ids == [[20, 21, 10, 11, 12, 5, 6, 7, 8]], ids
assert positions == [[0, 1, 0, 1, 2, 0, 1, 2, 3]] and borders == [0, 2, 5, 9]
cache = type(kwargs["cache"]).__name__
print(f"cache {cache}, past_key_values given:", "past_key_values" in kwargs)
assert cache == "PagedAttentionCache" and "past_key_values" not in kwargs
changed = not torch.equal(buffer, first["input_ids"])
print("the same tensor two steps later:", "other tokens" if changed else "as it was")
assert changed
PY
