"""Where WISE would answer each prompt, in the form that the evaluation asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..evaluation.routed import RoutedPrompt
from ..routing import MAIN_MEMORY
from ..tuner.devices import computing_device
from ..tuner.route import Route
from ..tuner.switch import last_route
from ..wording import Wording


@torch.no_grad()
def probe_routes(model: nn.Module, tok: Any, prompts: Sequence[str], batch_size: int = 16) -> list[RoutedPrompt]:
    """Ask every prompt once, in batches of similar length, and read back which memory answers it.

    Args:
        model: it carries edits.
        tok: its tokenizer, or a ``Wording`` of it.
        prompts: routed by themselves, without an answer, as a generation is.
        batch_size: prompts a forward.

    Raises:
        ValueError: the model carries no edits, or they are switched off.
    """
    device = computing_device(model)
    wording = Wording.of(tok)
    encoded = [list(wording(wording.asked(prompt))["input_ids"]) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    routed: dict[int, RoutedPrompt] = {}
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        width = max(len(encoded[i]) for i in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, width - len(encoded[i]) :] = torch.tensor(encoded[i])
            mask[row, width - len(encoded[i]) :] = 1
        model(input_ids=ids.to(device), attention_mask=mask.to(device))
        route = last_route(model)
        if route is None:
            raise ValueError("the edits are switched off, so no prompt was routed.")
        routed |= {i: routed_prompt(route, row) for row, i in enumerate(batch)}
    return [routed[i] for i in range(len(prompts))]


def routed_prompt(route: Route, row: int) -> RoutedPrompt:
    """One sequence's route; of a prompt that no memory answers, the memory nearest to its threshold."""
    choice, own = int(route.choice[row]), list(route.own(row))
    if not own:
        return RoutedPrompt(None, 0.0, 0.0)
    scores, epsilon = route.scores[row].float().cpu(), route.epsilon.float().cpu()
    factors = scores[own] / epsilon[own].clamp(min=1e-12)
    nearest = choice if choice != MAIN_MEMORY else own[int(factors.argmax())]
    return RoutedPrompt(
        memory=route.memories[choice] if choice != MAIN_MEMORY else None,
        score=float(scores[nearest]),
        epsilon=float(epsilon[nearest]),
        exact=route.exact is None or bool(route.exact[row, nearest]),
    )
