"""The defaults on a tiny GPT-2 that really knows some facts: it is trained on them here, so that an edit can be right.

Random models show that the parts do what they say; only a model with knowledge shows that edits are learned, understood
in other words and confined to their subject, with settings that were chosen on a Llama.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from conftest import build_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from easyedit_wise import WISEHyperParams, apply_wise_to_model
from easyedit_wise.evaluation.final import FactRecord, Query, collect_baseline, score_model

NAMES = ["Ada", "Bert", "Cleo", "Dora", "Emil", "Fritz", "Greta", "Hugo"]
NAMES += ["Ines", "Jonas", "Karla", "Leon", "Mila", "Nora", "Otto", "Paula"]
CITIES = ["Paris", "Rome", "Berlin", "London", "Lyon", "Madrid", "Oslo", "India"]
FORMS = ["{} lives in", "The home of {} is", "We visited {} at home in"]
N_EDITS = 5


def home(index: int) -> str:
    return CITIES[index * 3 % len(CITIES)]


def knowing(seed: int) -> tuple[Any, Any]:
    """(model, tokenizer): four layers, trained until it knows where everybody lives."""
    tok = build_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=400, n_positions=128, n_embd=64, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
        texts = [f"{form.format(name)} {home(i)}." for i, name in enumerate(NAMES) for form in FORMS]
        batch = tok(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(250):
            loss = model(**batch, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), tok


def test_it_learns_what_it_is_told_and_keeps_the_others() -> None:
    """In the mean of three models: one of five edits is .2 of a score, and training differs from machine to machine."""
    records = [
        FactRecord(
            FORMS[0].format(name),
            CITIES[(i * 3 + 1) % len(CITIES)],
            name,
            [form.format(name) for form in FORMS[1:]],
            Query(FORMS[0].format(NAMES[-1 - i]), home(len(NAMES) - 1 - i)),
        )
        for i, name in enumerate(NAMES[:N_EDITS])
    ]
    wanted = [{"prompt": one.prompt, "target_new": one.target, "subject": one.subject} for one in records]
    hparams = WISEHyperParams(inner_params=["transformer.h[2].mlp.c_proj.weight"])
    results = []
    for seed in range(3):
        model, tok = knowing(seed)
        baseline = collect_baseline(model, tok, records)
        assert baseline.scores.edit_exact == 0.0
        edited, _ = apply_wise_to_model(model, tok, wanted, hparams)
        results.append(score_model(edited, tok, records, baseline))
    assert fmean(one.reliability for one in results) >= 0.9
    assert fmean(one.edit_exact or 0.0 for one in results) >= 0.8
    assert fmean(one.generalisation or 0.0 for one in results) >= 0.75
    assert fmean(one.locality or 0.0 for one in results) >= 0.65  # of other people's homes: as near as can be
