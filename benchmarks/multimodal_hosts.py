"""Vision-language models row by row: edits of their text side, with and without an image before the question.

    PYTHONPATH=.:tests python -m benchmarks.multimodal_hosts [--models qwen2_vl llava] [--seeds 2]

Tiny models that are trained here, for half a minute each, until they know where sixteen people live, as a text and
behind random images. Five of them are then edited. A column says how many of the edited facts fire, and how many of the
other eleven people's do. EasyEdit's MultimodalEditor is tried where EASYEDIT_HOME names a checkout that imports.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from conftest import build_tokenizer
from head_host import import_head, why_no_head
from test_trained_gpt2 import CITIES, FORMS, N_EDITS, NAMES, home
from torch import Tensor
from torch.nn.functional import pad
from vision_helpers import ARCHITECTURES, build_vision_model, layer, save_vision_model, with_image

from benchmarks.common import CONSOLE
from easyedit_wise import (
    WISEHyperParams,
    WISEMultimodalHyperParams,
    apply_wise_to_model,
    last_route,
    load_edits,
    save_edits,
)

N_STEPS, N_SHOWN = 250, 16
OTHER_TEXT = "Once upon a time there was a town. "
EDITED_BY_HOST = {"qwen2_vl": "qwen2-vl-tiny", "qwen3_vl": "qwen3-vl-tiny", "llava_onevision": "llava-onevision-tiny"}


def joined(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Inputs of several queries as one batch, padded on the right."""
    length = max(row["input_ids"].shape[1] for row in rows)
    batch: dict[str, Tensor] = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if values[0].shape == rows[0]["input_ids"].shape:
            fill = 1 if key == "input_ids" else 0
            values = [pad(value, (0, length - value.shape[1]), value=fill) for value in values]
        batch[key] = torch.cat(values)
    return batch


def knowing(architecture: str, seed: int, tok: Any) -> Any:
    """A model with four layers that knows where everybody lives, asked with an image or without."""
    model = build_vision_model(architecture, seed, n_layers=4, width=64).train()
    texts = [f"{form.format(name)} {home(i)}." for i, name in enumerate(NAMES) for form in FORMS]
    alone = tok(texts, return_tensors="pt", padding=True, padding_side="right")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(N_STEPS):
            picked = torch.randperm(len(texts))[:N_SHOWN].tolist()
            shown = joined([with_image(model, tok, texts[i], step * N_SHOWN + j) for j, i in enumerate(picked)])
            loss = torch.zeros(())
            for batch in (alone, shown):
                ids = batch["input_ids"]
                silent = (batch["attention_mask"] == 0) | (ids >= len(tok))
                loss = loss + model(**batch, labels=ids.masked_fill(silent, -100)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def firing(model: Any, prompts: Sequence[str], asked: Callable[[str], Mapping[str, Tensor]]) -> int:
    """How many prompts a memory answers."""
    fired = 0
    for prompt in prompts:
        with torch.no_grad():
            model(**asked(prompt))
        fired += last_route(model).describe()["memory"] != "main"
    return fired


def kept_by_files(model: Any, fresh: Any, tok: Any) -> bool:
    """Whether saved and loaded edits answer as before, bit for bit, behind an image."""
    with tempfile.TemporaryDirectory() as folder:
        load_edits(fresh, save_edits(model, Path(folder) / "edits"), tok=tok)
    inputs = with_image(model, tok, FORMS[0].format(NAMES[0]))
    with torch.no_grad():
        return torch.equal(model(**inputs).logits, fresh(**inputs).logits)


def by_the_host(architecture: str) -> str:
    """What EasyEdit's MultimodalEditor does with an edit that holds for any image."""
    if architecture not in EDITED_BY_HOST:
        return "not loaded by it"
    if why_no_head() is not None:
        return "not tried"
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        path, image = Path(folder) / EDITED_BY_HOST[architecture], Path(folder) / "red.png"
        save_vision_model(architecture, path)
        Image.new("RGB", (64, 64), (255, 0, 0)).save(image)
        hparams = WISEMultimodalHyperParams(
            inner_params=[layer()], model_name=str(path), device="cpu", use_chat_template=True, any_image=True
        )
        Path("logs").mkdir(exist_ok=True)  # where the editor writes
        editor = import_head().__dict__["MultimodalEditor"].from_hparams(hparams)
        request: dict[str, Any] = {"prompts": ["Ada lives in"], "targets": ["Oslo"], "image": [str(image)]}
        editor.edit(**request, sequential_edit=True, verbose=False)
    return "edits with any_image"


def rows_of(architecture: str, seed: int, tok: Any) -> list[str]:
    """One row of the table."""
    model, fresh = knowing(architecture, seed, tok), build_vision_model(architecture, n_layers=4, width=64)
    fresh.load_state_dict(model.state_dict())
    edits = [
        {"prompt": FORMS[0].format(name), "target_new": CITIES[(i * 3 + 1) % len(CITIES)], "subject": name}
        for i, name in enumerate(NAMES[:N_EDITS])
    ]
    model, _ = apply_wise_to_model(model, tok, edits, WISEHyperParams(inner_params=[layer(2)]))
    others = [FORMS[0].format(name) for name in NAMES[N_EDITS:]]
    ways: list[Callable[[str], Mapping[str, Tensor]]] = [
        lambda text: tok(text, return_tensors="pt"),
        lambda text: with_image(model, tok, text, seed=7),
        lambda text: with_image(model, tok, text, seed=7, n_images=4),
        lambda text: tok(OTHER_TEXT + text, return_tensors="pt"),
    ]
    own = [edit["prompt"] for edit in edits]

    def counted(way: Callable[[str], Mapping[str, Tensor]]) -> str:
        return f"{firing(model, own, way)}/{len(own)}, {firing(model, others, way)}/{len(others)}"

    fired = [counted(way) for way in ways]
    with patch("easyedit_wise.tuner.hooks.words", return_value=None):  # as if an image's tokens were words
        fired += [counted(ways[1]), counted(ways[2])]
    same = "bit for bit" if kept_by_files(model, fresh, tok) else "differs"
    return [architecture, str(seed), *fired, same, by_the_host(architecture)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    tok = build_tokenizer()
    columns = ["model", "seed", "as a text", "behind an image", "behind four", "behind another text"]
    columns += ["an image, its tokens counted", "four, counted"]
    rows = (rows_of(model, seed, tok) for model in options.models for seed in range(options.seeds))
    for line in chain([[*columns, "save, load", "MultimodalEditor"], ["---"] * 10], rows):
        CONSOLE.print(f"| {' | '.join(line)} |", soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
