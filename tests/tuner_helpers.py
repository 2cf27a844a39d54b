"""Prompts, memories and measurements that the tests of the tuner share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from easyedit_wise import WiseConfig, WiseLayer, attach
from easyedit_wise.routing import choose_memory, routing_activation
from easyedit_wise.tuner.attach import module_name_of
from easyedit_wise.tuner.memory import MERGED, SCORES, MemoryState
from easyedit_wise.tuner.model import find_wise_layers

ALWAYS, NEVER = -1.0, float("inf")
# Token ids; 0 is eos and 1 is padding in the tiny models.
PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16, 30], [40, 300, 22, 371, 90, 8], [77, 201, 350, 3, 118]]


def config_for(parameter: str, **changes: Any) -> WiseConfig:
    return WiseConfig(target_modules=[module_name_of(parameter)], **changes)


def memory(
    layer: WiseLayer, seed: int, epsilon: float = ALWAYS, scale: float = 0.3, stage: str = MERGED, n_edits: int = 1
) -> MemoryState:
    """A random side memory, large enough to change what a tiny model says."""
    generator = torch.Generator().manual_seed(seed)
    delta_weight = torch.randn(layer.out_features, layer.in_features, generator=generator) * scale
    mask = torch.rand(delta_weight.shape, generator=generator) < 0.3 if stage == "live" else None
    if mask is not None:
        delta_weight = delta_weight * mask
    return MemoryState(stage, delta_weight, mask, epsilon, n_edits)


def with_memories(model: nn.Module, parameter: str, *epsilons: float, **config: Any) -> WiseLayer:
    """Attach WISE and give it one random memory for each threshold (seeds 0, 1, ...)."""
    layer = attach(model, config_for(parameter, **config))
    set_thresholds(layer, *epsilons)
    return layer


def set_thresholds(layer: WiseLayer, *epsilons: float, adapter_name: str = "default") -> None:
    layer.install(adapter_name, [memory(layer, seed, epsilon) for seed, epsilon in enumerate(epsilons)])


def share_out(model: nn.Module, adapter_name: str = "default", first_seed: int = 0) -> list[MemoryState]:
    """Install a memory of each stage, with thresholds by which the PROMPTS go to as many of them as can be."""
    layer = only_layer(model)
    states = [
        memory(layer, first_seed, scale=0.3, stage="merged", n_edits=3),
        memory(layer, first_seed + 1, scale=0.3, stage="shard", n_edits=2),
        memory(layer, first_seed + 2, scale=0.55, stage="live", n_edits=1),
    ]
    layer.install(adapter_name, states)
    active = layer.active_adapters
    layer.set_adapter(adapter_name)
    logits(model, batch(PROMPTS))
    layer.set_adapter(active)
    scores = layer.last_route.scores
    middles = [((s[1:] + s[:-1]) / 2).tolist() for s in scores.T.sort(dim=-1).values]

    def n_answering(epsilons: Sequence[float]) -> int:
        return len(choose_memory(scores, torch.tensor(epsilons)).unique())

    best = max(product(*middles), key=n_answering)
    states = [replace(state, epsilon=epsilon) for state, epsilon in zip(states, best, strict=True)]
    layer.install(adapter_name, states)
    return states


def same_memories(one: Sequence[MemoryState], other: Sequence[MemoryState]) -> bool:
    """Bit for bit the same memories; thresholds as the layer keeps them, in fp32."""
    return len(one) == len(other) and all(
        (a.stage, a.n_edits) == (b.stage, b.n_edits)
        and a.delta_weight.dtype == b.delta_weight.dtype
        and torch.equal(a.delta_weight, b.delta_weight)
        and (a.mask is None) == (b.mask is None)
        and (a.mask is None or torch.equal(a.mask, b.mask))
        and all(torch.equal(torch.tensor(getattr(a, name)), torch.tensor(getattr(b, name))) for name in SCORES)
        for a, b in zip(one, other, strict=True)
    )


def only_layer(model: nn.Module) -> WiseLayer:
    (layer,) = find_wise_layers(model).values()
    return layer


def batch(prompts: Sequence[Sequence[int]], side: str = "left", pad: int = 1) -> dict[str, Tensor]:
    """Model inputs of prompts, padded on one side; positions count real tokens."""
    length = max(map(len, prompts))

    def padded(values: list[int], filling: int) -> list[int]:
        missing = [filling] * (length - len(values))
        return missing + values if side == "left" else values + missing

    mask = torch.tensor([padded([1] * len(prompt), 0) for prompt in prompts])
    return {
        "input_ids": torch.tensor([padded(list(prompt), pad) for prompt in prompts]),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=-1) - 1).clamp(min=0),
    }


def inputs_of(model: nn.Module, parameter: str, inputs: dict[str, Tensor]) -> Tensor:
    """What the layer is given, a = A(x), shape (B, T, d_in), in a model with or without WISE."""
    seen: list[Tensor] = []
    module = model.get_submodule(module_name_of(parameter))
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
    return seen[0].reshape(*inputs["input_ids"].shape, -1)


def score_alone(base: nn.Module, parameter: str, prompt: Sequence[int], delta_weight: Tensor) -> float:
    """Delta_act of one prompt by its definition: the mean over its tokens of || dW a ||."""
    activations = inputs_of(base, parameter, batch([prompt]))[0]
    return float(routing_activation(activations, delta_weight).mean())


def logits_with(base: nn.Module, parameter: str, delta_weight: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of an unedited model whose layer gives W_v a + dW a for every token, computed without WISE."""
    module = base.get_submodule(module_name_of(parameter))
    handle = module.register_forward_hook(
        lambda module, args, output: output + F.linear(args[0].float(), delta_weight).to(output.dtype)
    )
    try:
        return logits(base, inputs)
    finally:
        handle.remove()


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


@torch.no_grad()
def generate(model: Any, inputs: dict[str, Tensor], n: int = 6, **options: Any) -> list[list[int]]:
    """The n tokens that a model says next, for each row; greedy unless told otherwise."""
    given = {key: value for key, value in inputs.items() if key != "position_ids"}
    options = {"do_sample": False, "max_new_tokens": n, "min_new_tokens": n, **options}
    tokens = model.generate(**given, **options)
    return tokens[:, given["input_ids"].shape[1] :].tolist()


def between(low: float, high: float) -> float:
    assert low < high
    return (low + high) / 2
