#!/usr/bin/env bash
# lm-evaluation-harness 0.4.13, model type "hf", torch 2.13.0, transformers 5.23.0.
#
# Behaviour: for a causal model its log-likelihood requests reach `forward` padded on the RIGHT with token id 0 and with
# no attention_mask at all, although the tokenizer is set to padding_side "left" and has a pad token of its own. (Its
# generation requests are padded on the left and do bring a mask.) A causal model's real tokens never see what stands
# behind them, so plain scores are right; a layer that looks at a sequence as a whole (a router, pooling, a prompt
# classifier) takes the padding for text, and its answer depends on the batch size.
# Likewise two continuations of one token behind one context are ONE row of the batch, not two.
#
# Output seen:
#   row lengths and padding: [[9, 0], [3, 6]] mask: None
#   rows for two one-token continuations of one context: 1
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet "torch==2.13.0"
"$work/env/bin/python" -m pip install --quiet "lm_eval[hf]==0.4.13" "transformers==5.23.0" "accelerate==1.15.0"
cd "$work"
HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$work/env/bin/python" - <<'PY'
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = ["<pad-0>", "<eos>", "<pad>", *(f"w{i}" for i in range(20))]
backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tok = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", padding_side="left")
tok.model_input_names = ["input_ids", "attention_mask"]
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
).eval()
model.config._name_or_path = "tiny"
calls = []
model.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)


def ask(pairs, batch_size):
    calls.clear()
    lm = HFLM(pretrained=model, tokenizer=tok, backend="causal", batch_size=batch_size, device="cpu")
    calls.clear()
    lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True)
    return [(args[0] if args else kwargs["input_ids"], kwargs.get("attention_mask")) for args, kwargs in calls]


long, short = ("w1 w2 w3 w4 w5 w6 w7 w8", " w9 w10"), ("w1 w2", " w3 w4")
((ids, mask),) = ask([long, short], 2)
padding = [[int((row != 0).sum()), int((row == 0).sum())] for row in ids]
print("row lengths and padding:", padding, "mask:", mask)
assert mask is None and padding == [[9, 0], [3, 6]], (ids, mask)
assert ids[1, :3].ne(0).all() and ids[1, 3:].eq(0).all(), "padded on the right with id 0"
assert tok.pad_token_id == 2 and tok.padding_side == "left"

shared = ask([("w1 w2", " w3"), ("w1 w2", " w4")], 2)
n_rows = sum(ids.shape[0] for ids, _ in shared)
print("rows for two one-token continuations of one context:", n_rows)
assert n_rows == 1, shared
PY
