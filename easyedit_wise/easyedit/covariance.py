"""Second moments E[k k^T] of a layer's inputs, which MEMIT and ROME weigh their updates with.

EasyEdit reads them from files made of 100,000 articles of Wikipedia, which it would download. Where there is no such
file they are computed here, from a text that the user gives or from what the model itself writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..positions import position_limit
from ..tuner.devices import computing_device

_SAMPLES, _SAMPLE_LENGTH, _BATCH = 128, 64, 64
_WINDOW = 256


class _ReachedLastLayer(Exception):  # noqa: N818 - a signal, not an error
    """What lies behind the layers is not needed."""


def second_moments_of_texts(
    model: nn.Module, tok: Any, modules: Sequence[str], texts: Sequence[str]
) -> tuple[dict[str, Tensor], int]:
    """E[k k^T] over all tokens of some texts, where k is the input of each module.

    Args:
        model: a causal language model.
        tok: its tokenizer.
        modules: names of linear modules.
        texts: read in windows of 256 tokens.

    Returns:
        ({module: (d_in, d_in) in fp32}, how many tokens were seen).

    Raises:
        ValueError: the texts have no token.
    """
    window = min(_WINDOW, position_limit(model) or _WINDOW)
    encoded = (tok(text)["input_ids"] for text in texts)
    windows = [ids[i : i + window] for ids in encoded for i in range(0, len(ids), window)]
    return _moments(model, modules, [[ids] for ids in windows])


@torch.no_grad()
def second_moments_of_samples(
    model: Any, tok: Any, modules: Sequence[str], seed: int = 0
) -> tuple[dict[str, Tensor], int]:
    """The same over 128 texts of 64 tokens that the model samples: its own distribution, and no data needed."""
    start = next((i for i in (tok.bos_token_id, tok.eos_token_id, tok.pad_token_id) if i is not None), 0)
    device = computing_device(model)
    prompt = torch.full((_BATCH, 1), start, device=device)
    length = min(_SAMPLE_LENGTH, (position_limit(model) or _SAMPLE_LENGTH + 1) - 1)
    written: list[list[list[int]]] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(_SAMPLES // _BATCH):
            rows = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                top_k=0,
                min_new_tokens=length,
                max_new_tokens=length,
                pad_token_id=start,
            )
            written.append(rows.tolist())
    return _moments(model, modules, written)


@torch.no_grad()
def _moments(
    model: nn.Module, modules: Sequence[str], batches: Sequence[list[list[int]]]
) -> tuple[dict[str, Tensor], int]:
    """Over batches of token rows of equal length."""
    if not batches:
        raise ValueError("the text for the covariance statistics has no token: give one with some thousand words.")
    device = computing_device(model)
    with _collecting(model, modules) as sums:
        for rows in batches:
            with contextlib.suppress(_ReachedLastLayer):
                model(input_ids=torch.tensor(rows, device=device), use_cache=False)
    counts = {count for _, count in sums.values()}
    return {name: (total / count).float() for name, (total, count) in sums.items()}, max(counts)


@contextlib.contextmanager
def _collecting(model: nn.Module, modules: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """Add up k k^T of everything that goes into the modules; a forward ends when all of them were reached."""
    sums: dict[str, tuple[Tensor, int]] = {}
    reached: set[str] = set()

    def hook(name: str) -> Any:
        def collect(module: nn.Module, args: tuple[Any, ...]) -> None:
            keys = args[0].detach().reshape(-1, args[0].shape[-1]).float()  # (tokens, d_in)
            total, count = sums.get(name, (torch.zeros(1, dtype=torch.float64), 0))
            sums[name] = total + (keys.T @ keys).cpu(), count + len(keys)
            reached.add(name)
            if len(reached) == len(modules):
                reached.clear()
                raise _ReachedLastLayer

        return collect

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in modules]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
