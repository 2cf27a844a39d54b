"""The least arithmetic that one iteration of a WISE edit needs, in a Llama-like decoder.

Everything before the side memory is the same in every iteration, and behind it only activations need a
gradient, so the floor is: the layers behind the side memory forward and backward, the vocabulary at the
positions that predict a target token, and the side memory's own products. Elementwise work counts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Iteration:
    """What one iteration runs on.

    Attributes:
        lengths: tokens of each context with its target, without padding.
        n_targets: supervised tokens of all contexts.
        n_scored: tokens of irrelevant and earlier prompts, which meet only the side memory.
    """

    lengths: Sequence[int]
    n_targets: int
    n_scored: int

    @property
    def n_tokens(self) -> int:
        """Tokens of all contexts."""
        return sum(self.lengths)


def layer_products(config: Any) -> list[tuple[int, int]]:
    """(inputs, outputs) of the linear maps of one decoder layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    return [
        (hidden, queries),
        (hidden, keys),
        (hidden, keys),
        (queries, hidden),
        *[(hidden, inner)] * 2,
        (inner, hidden),
    ]


def iteration_flops(config: Any, layer: int, iteration: Iteration) -> dict[str, float]:
    """Floating-point operations of one iteration, by part; a product of (m, k) and (k, n) counts 2 m k n.

    - layers: each linear map behind the side memory, forward and the gradient of its input: 4 a weight and token.
    - attention: two products forward and four backward over all causal pairs, the token itself among them.
    - vocabulary: the projection at positions that predict a target, forward and the gradient of its input.
    - side memory: dW a and the gradient of dW, over the contexts' tokens and the scored ones.

    Args:
        config: of the model.
        layer: index of the edited layer; its own value matrix carries the side memory.
        iteration: the tokens.
    """
    products = layer_products(config)
    behind = config.num_hidden_layers - layer - 1
    weights = sum(inputs * outputs for inputs, outputs in products)
    queries = products[0][1]
    pairs = sum(length * (length + 1) // 2 for length in iteration.lengths)
    memory_in, memory_out = products[-1]
    return {
        "layers": 4.0 * behind * weights * iteration.n_tokens,
        "attention": 12.0 * behind * queries * pairs,
        "vocabulary": 4.0 * config.hidden_size * config.vocab_size * iteration.n_targets,
        "side memory": 4.0 * memory_in * memory_out * (iteration.n_tokens + iteration.n_scored),
    }


def product_shapes(config: Any, layer: int, iteration: Iteration) -> list[tuple[int, int, int]]:
    """(m, k, n) of the forward's products, each as often as it occurs, to measure their rate."""
    tokens = iteration.n_tokens
    behind = [(tokens, inputs, outputs) for inputs, outputs in layer_products(config)]
    memory_in, memory_out = layer_products(config)[-1]
    return [
        *behind * (config.num_hidden_layers - layer - 1),
        (iteration.n_targets, config.hidden_size, config.vocab_size),
        (tokens + iteration.n_scored, memory_in, memory_out),
    ]
