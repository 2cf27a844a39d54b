"""What the editing benchmarks edit: a small real model, a wide random one, and facts with irrelevant prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from easyedit_wise.data import demo_facts, neutral_prompts
from easyedit_wise.evaluation.asking import Query
from easyedit_wise.evaluation.final import FactRecord
from easyedit_wise.evaluation.smollm2 import smollm2_checkpoint

Request = dict[str, str]


def load_smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in fp32 and its tokenizer."""
    logging.disable_progress_bar()
    path = smollm2_checkpoint()
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def layer_parameter(index: int) -> str:
    """The value matrix of one layer of a Llama, as EasyEdit names it."""
    return f"model.layers[{index}].mlp.down_proj.weight"


def load_facts(n: int, path: Path | None = None, start: int = 0) -> tuple[list[FactRecord], list[Request]]:
    """Facts, and the edit request of each.

    A request's irrelevant prompt is never one that the fact is scored with: of the demo's facts it is a
    packaged neutral prompt, of ZsRE another record's ``loc`` and ``loc_ans``.

    Args:
        n: how many.
        path: a file in the form of EasyEdit's zsre_mend_edit.json; None takes the demo's facts.
        start: the first record of the file.

    Raises:
        ValueError: there are not as many.
    """
    if path is None:
        records = [FactRecord.from_dict(fact) for fact in demo_facts()[:n]]
        irrelevant: Sequence[str] = neutral_prompts()
    else:
        # Twice as many: the second half gives the irrelevant prompts.
        entries = json.loads(path.read_text(encoding="utf-8"))[start : start + 2 * n]
        records = [_from_zsre(entry) for entry in entries[:n]]
        irrelevant = [f"{entry['loc']} {entry['loc_ans']}" for entry in entries[n:]]
    if len(records) < n or len(irrelevant) < n:
        raise ValueError(f"{n} facts are wanted, but there are {min(len(records), len(irrelevant))}.")
    requests = [
        {"prompt": record.prompt, "target_new": record.target, "loc_prompt": prompt}
        for record, prompt in zip(records, irrelevant, strict=False)
    ]
    return records, requests


def _from_zsre(entry: dict[str, Any]) -> FactRecord:
    return FactRecord(
        prompt=entry["src"],
        target=entry["alt"],
        subject=entry["subject"],
        rephrasings=[entry["rephrase"]],
        unrelated=Query(entry["loc"], entry["loc_ans"]),
    )


class Uncached(nn.Module):
    """A model that generates without a cache, as EasyEdit's own evaluation lets its WISE.

    With a cache, EasyEdit's router would see one token at a time and answer differently.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.generation_config = model.generation_config

    def __call__(self, **inputs: Any) -> Any:
        """The model's own forward."""
        return self.model(**inputs)

    def generate(self, **options: Any) -> Any:
        """The model's own generation, recomputing every prefix."""
        return self.model.generate(**{**options, "use_cache": False})


def numbered_requests(n: int) -> list[Request]:
    """As many different edits as are wanted, for measurements that do not look at the answers."""
    irrelevant = neutral_prompts()
    return [
        {
            "prompt": f"The number of the house at the end of street {index} is",
            "target_new": str(7 * index + 3),
            "loc_prompt": irrelevant[index % len(irrelevant)],
        }
        for index in range(n)
    ]


def random_llama(hidden: int, inner: int, n_layers: int) -> tuple[Any, Any]:
    """A random Llama in fp32 with SmolLM2's tokenizer, so that prompts have the lengths that they have in earnest."""
    tok = AutoTokenizer.from_pretrained(smollm2_checkpoint())
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=n_layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval(), tok


def wide_llama() -> tuple[Any, Any]:
    """Four layers of hidden size 2048, of which the second is edited: half the widths of a 7B."""
    return random_llama(2048, 5504, 4)


def llama_7b_layers() -> tuple[Any, Any]:
    """Six layers of a Llama 7B, of which the second is edited: four follow, as in the 28th of 32."""
    return random_llama(4096, 11008, 6)
