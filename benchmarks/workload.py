"""What the editing benchmarks edit: the small real model, and facts with their irrelevant prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from easyedit_wise.data import demo_facts, neutral_prompts
from easyedit_wise.evaluation.final import FactRecord
from easyedit_wise.evaluation.metrics import Query
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


def load_facts(n: int, path: Path | None = None) -> tuple[list[FactRecord], list[Request]]:
    """Facts, and the edit request of each.

    A request's irrelevant prompt is never one that the fact is scored with: of the demo's facts it is a
    packaged neutral prompt, of ZsRE another record's ``loc`` and ``loc_ans``.

    Args:
        n: how many.
        path: a file in the form of EasyEdit's zsre_mend_edit.json; None takes the demo's facts.

    Raises:
        ValueError: there are not as many.
    """
    if path is None:
        records = [FactRecord.from_dict(fact) for fact in demo_facts()[:n]]
        irrelevant: Sequence[str] = neutral_prompts()
    else:
        # Twice as many: the second half gives the irrelevant prompts.
        entries = json.loads(path.read_text(encoding="utf-8"))[: 2 * n]
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
