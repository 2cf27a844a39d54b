"""An edited model beside the same model without WISE, and a decoding loop as users write it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tuner_helpers import (
    ALWAYS,
    PROMPTS,
    batch,
    between,
    inputs_of,
    logits,
    logits_with,
    score_alone,
    set_thresholds,
    with_memories,
)

from easyedit_wise.routing import routing_activation

N = 6  # tokens to generate


class Edited:
    """A model with one side memory, and the same model without WISE to compare with."""

    def __init__(self, model: Any, parameter: str) -> None:
        self.base = copy.deepcopy(model)
        self.model = model
        self.parameter = parameter
        self.layer = with_memories(model, parameter, ALWAYS)
        self.delta_weight = self.layer.memories("default")[0].delta_weight
        self.scores = [score_alone(self.base, parameter, prompt, self.delta_weight) for prompt in PROMPTS]

    def split(self, n_routed: int = 2) -> list[bool]:
        """Set epsilon so that this many of the prompts are routed; tells which."""
        ranked = sorted(self.scores)
        epsilon = between(*ranked[-n_routed - 1 : len(ranked) - n_routed + 1])
        set_thresholds(self.layer, epsilon)
        return [score > epsilon for score in self.scores]

    def greedy(self, prompt: Sequence[int], routed: bool, n: int = N) -> list[int]:
        """What follows if the whole sequence is routed or not, by full forwards without WISE and without a cache."""
        tokens = list(prompt)
        for _ in range(n):
            inputs = batch([tokens])
            if routed:
                scores = logits_with(self.base, self.parameter, self.delta_weight, inputs)[0, -1]
            else:
                scores = logits(self.base, inputs)[0, -1]
            scores[0] = -torch.inf  # eos, as generate does below its least number of tokens
            tokens.append(int(scores.argmax()))
        return tokens[len(prompt) :]

    def token_scores(self, tokens: Sequence[int]) -> Tensor:
        activations = inputs_of(self.base, self.parameter, batch([tokens]))[0]
        return routing_activation(activations, self.delta_weight)


def decode(model: Any, prompt: Sequence[int], n: int = N, **options: Any) -> list[int]:
    """A decoding loop as users write it: one forward for the prompt, then one for each token."""
    return list(decoding(model, [prompt], n, **options))[-1][0]


@torch.no_grad()
def decoding(
    model: Any, prompts: Sequence[Sequence[int]], n: int = N, return_dict: bool = True
) -> Iterator[list[list[int]]]:
    """The same step by step: yields what each row has said so far."""
    given = batch(prompts)
    ids, mask = given["input_ids"], given["attention_mask"]
    cache, said = None, torch.zeros(len(prompts), 0, dtype=torch.long)
    for _ in range(n):
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            return_dict=return_dict,
        )
        scores, cache = (output.logits, output.past_key_values) if return_dict else output[:2]
        scores[:, -1, 0] = -torch.inf
        ids = scores[:, -1].argmax(dim=-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=-1)
        said = torch.cat([said, ids], dim=-1)
        yield said.tolist()
