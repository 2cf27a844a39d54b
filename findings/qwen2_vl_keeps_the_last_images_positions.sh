#!/usr/bin/env bash
# transformers 5.23.0, Qwen2VLForConditionalGeneration, torch 2.13.0, on a tiny random model.
#
# Behaviour: a forward with an image leaves `rope_deltas` on the module: by how much that image moved the positions of the
# text behind it. A later text alone that is prefilled and decoded by hand with a cache, without position_ids, is not told
# apart from the text behind that image: its decoded tokens get positions that are moved by the earlier image's delta. The
# same two calls on the same weights give other logits before and after an image was asked about; no error is raised.
# Giving position_ids in each call gives the same logits every time. (`generate` gives them itself.)
#
# Output seen:
#   rope_deltas after an image: -12
#   the same text, decoded with a cache: other logits than before the image
#   with position_ids given: the same logits as before the image
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet "torch==2.13.0"
"$work/env/bin/python" -m pip install --quiet "transformers==5.23.0"
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'PY'
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

IMAGE, VIDEO, START, END = 40, 41, 42, 43
torch.manual_seed(0)
text = {
    "vocab_size": 44, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}
tower = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=tower, **tokens)).eval()
prompt, next_token = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9]])


@torch.no_grad()
def ask_text(**second):
    first = model(input_ids=prompt, use_cache=True, **({"position_ids": torch.arange(4)[None]} if second else {}))
    return model(input_ids=next_token, past_key_values=first.past_key_values, use_cache=True, **second).logits[0, -1]


given = {"position_ids": torch.tensor([[4]])}
before, before_given = ask_text(), ask_text(**given)
grid = torch.tensor([[1, 8, 8]])
pixels = torch.randn(64, 3 * 2 * 4 * 4)
with_image = torch.tensor([[START, *[IMAGE] * 16, END, 5, 6, 7]])
with torch.no_grad():
    model(
        input_ids=with_image, pixel_values=pixels, image_grid_thw=grid,
        mm_token_type_ids=(with_image == IMAGE).long(), use_cache=True,
    )
print("rope_deltas after an image:", int(model.model.rope_deltas.flatten()[0]))
after, after_given = ask_text(), ask_text(**given)
same = torch.allclose(before, after, atol=1e-5)
print("the same text, decoded with a cache:", "the same logits as" if same else "other logits than", "before the image")
kept = torch.allclose(before_given, after_given, atol=1e-5)
print("with position_ids given:", "the same logits as" if kept else "other logits than", "before the image")
assert not same and kept, (before - after).abs().max()
PY
