"""What the editing benchmarks edit: a small real model, a wide random one, and facts with irrelevant prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
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


def wide_llama() -> tuple[Any, Any]:
    """A random Llama of 4 layers with hidden size 1024, and a byte-level tokenizer of at most 2000 tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(neutral_prompts(), trainer)
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<eos>", eos_token="<eos>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), tok
