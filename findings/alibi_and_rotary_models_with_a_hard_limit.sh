#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, tiny random models.
#
# Behaviour: whether a text longer than the configured length is an error does not follow from the kind of positions.
# MPT (ALiBi, no position table, no max_position_embeddings) and GPT-J, CodeGen (rotary) raise behind `max_seq_len` /
# `n_positions`: their biases, and sines and cosines, are made for that many tokens. Bloom (ALiBi), GPT-NeoX and Llama
# (rotary) read on, at three times `max_position_embeddings`.
#
# Output seen:
#   MptForCausalLM        32: reads 32, 33: RuntimeError
#   GPTJForCausalLM       32: reads 32, 33: RuntimeError
#   CodeGenForCausalLM    32: reads 32, 33: IndexError
#   BloomForCausalLM      96: reads 96
#   GPTNeoXForCausalLM    96: reads 96
#   LlamaForCausalLM      96: reads 96
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet "torch==2.13.0"
"$work/env/bin/python" -m pip install --quiet "transformers==5.23.0"
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PY'
import torch
import transformers

N = 32
wide = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
gpt = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": N, "rotary_dim": 4}


@torch.no_grad()
def read(model, n):
    try:
        model(input_ids=torch.arange(n)[None] % 50 + 2, use_cache=False)
    except Exception as error:
        return type(error).__name__
    return "reads"


def build(name, **config):
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config)).eval()


for model in (
    build("Mpt", vocab_size=60, d_model=32, n_layers=2, n_heads=4, max_seq_len=N),
    build("GPTJ", **gpt),
    build("CodeGen", **gpt),
):
    answers = read(model, N), read(model, N + 1)
    print(f"{type(model).__name__:<21} {N}: {answers[0]} {N}, {N + 1}: {answers[1]}")
    assert answers[0] == "reads" and answers[1] in ("RuntimeError", "IndexError"), answers
for model in (
    build("Bloom", vocab_size=60, hidden_size=32, n_layer=2, n_head=4),
    build("GPTNeoX", **wide, max_position_embeddings=N),
    build("Llama", **wide, num_key_value_heads=2, max_position_embeddings=N),
):
    print(f"{type(model).__name__:<21} {3 * N}: {read(model, 3 * N)} {3 * N}")
    assert read(model, 3 * N) == "reads"
PY
