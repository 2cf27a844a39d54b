"""Settings, requests and measurements that the editing tests share."""

from __future__ import annotations

from typing import Any

import torch
from conftest import LAYERS
from torch import Tensor, nn

from easyedit_wise.editing.stream import EditStream
from easyedit_wise.hparams import WISEHyperParams
from easyedit_wise.tuner.attach import module_name_of
from easyedit_wise.tuner.layer import WiseLayer
from easyedit_wise.tuner.model import find_wise_layers

FACTS = [
    ("The capital of France is", "Rome"),
    ("The currency of India is", "the euro"),
    ("The largest planet is", "Saturn"),
    ("Water is made of", "gold"),
    ("The author was born in", "Oslo"),
    ("The small town is called", "Lyon"),
    ("The weather tomorrow will be", "fine"),
    ("The name of the sea is", "Madrid"),
    ("The capital of Germany is", "Paris"),
]


class SpyTokenizer:
    """A tokenizer that keeps the texts it was given and the tokens it was asked to decode."""

    def __init__(self, tok: Any) -> None:
        self.tok = tok
        self.encoded: list[str] = []
        self.decoded: list[list[int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tok, name)

    def __call__(self, text: str, **options: Any) -> Any:
        self.encoded.append(text)
        return self.tok(text, **options)

    def decode(self, ids: Tensor, **options: Any) -> str:
        self.decoded.append(ids.tolist())
        return self.tok.decode(ids, **options)


def requests(n: int = len(FACTS), **extra: Any) -> list[dict[str, Any]]:
    """The first ``n`` facts as EasyEdit's request dicts."""
    return [{"prompt": prompt, "target_new": target, **extra} for prompt, target in FACTS[:n]]


def settings(parameter: str = LAYERS["llama"], **changes: Any) -> WISEHyperParams:
    """The paper's settings, but such that they train a tiny model for two quick iterations."""
    values: dict[str, Any] = {
        "act_ratio": None,
        "n_iter": 2,
        "edit_lr": 0.05,
        "optimizer": "adam",
        "alpha": 0.1,
        "beta": 2.0,
        "gamma": 1.0,
        "n_contexts": 1,
        "context_length": 2,
        "early_stop_loss": 0.0,
    }
    return WISEHyperParams.from_preset("paper", [parameter], **values | changes)


def only_layer(model: nn.Module) -> WiseLayer:
    (layer,) = find_wise_layers(model).values()
    return layer


def stream_on(model: nn.Module) -> EditStream:
    stream = only_layer(model).edit_stream
    assert isinstance(stream, EditStream)
    return stream


@torch.no_grad()
def logits_of(model: nn.Module, tok: Any, text: str) -> Tensor:
    """Logits of one text, shape (T, V)."""
    return model(**tok(text, return_tensors="pt")).logits[0]


@torch.no_grad()
def layer_input(base: nn.Module, tok: Any, parameter: str, prompt: str) -> Tensor:
    """A(x) of one unpadded prompt in an unedited model, shape (T, d_in)."""
    seen: list[Tensor] = []
    layer = base.get_submodule(module_name_of(parameter))
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    try:
        base(**tok(prompt, return_tensors="pt"))
    finally:
        handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def mean_score(base: nn.Module, tok: Any, parameter: str, delta_weight: Tensor, prompt: str) -> float:
    """Delta_act of one prompt by the definition: the mean over its tokens of || dW a ||_2."""
    values = layer_input(base, tok, parameter, prompt)
    return sum(float((delta_weight @ value).norm()) for value in values) / len(values)


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that attaching and editing could leave behind, by identity where it has one.

    The sampled prefixes are meant to stay: they are texts, and the next edit would sample the same ones.
    """
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "attributes": {name: sorted({*vars(module)} - {"_wise_prefixes"}) for name, module in model.named_modules()},
        "hooks": {
            name: [len(value) for key, value in sorted(vars(module).items()) if key.endswith("_hooks")]
            for name, module in model.named_modules()
        },
        "training": {name: module.training for name, module in model.named_modules()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {name: parameter.grad is None for name, parameter in model.named_parameters()},
        "weights": {name: id(parameter) for name, parameter in model.named_parameters()},
    }
