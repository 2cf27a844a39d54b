"""The WISE tuner model: which layer is wrapped, and how PEFT finds its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from .choosing import rows_asking
from .config import WiseConfig
from .hooks import install_hooks, remove_hooks
from .layer import WiseLayer
from .scope import RoutingScope

_CONTAINER = "wisemem_memories"


class WiseModel(BaseTuner):
    """WISE (arXiv 2405.14768) as a PEFT tuner: routed side memories on an FFN value matrix.

    Args:
        model: the model to adapt.
        config: a :class:`WiseConfig`.
        adapter_name: name of the adapter; one adapter is one set of edits.
    """

    prefix: str = "wisemem_"
    tuner_layer_cls = WiseLayer
    # The value matrix of the FFN by model type; users name one layer, this names the module in it.
    target_module_mapping: ClassVar[dict[str, list[str]]] = {
        "gemma3_text": ["down_proj"],
        "gpt2": ["mlp.c_proj"],
        "gpt_neox": ["dense_4h_to_h"],
        "gptj": ["fc_out"],
        "llama": ["down_proj"],
        "mistral": ["down_proj"],
        "opt": ["fc2"],
        "qwen2": ["down_proj"],
        "qwen3": ["down_proj"],
    }

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(target, WiseLayer):
            target.update_layer(adapter_name, peft_config)
            return
        new_module = WiseLayer(target, adapter_name, peft_config, self._routing_scope())
        new_module.train(target.training)  # a new module is in training mode, the model it joins need not be
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # The memories lie where the layer computes. PEFT's version moves them to where its weight lies, which for an
        # offloaded layer is nowhere: they would be lost.
        setattr(parent, child_name, new_module)

    def _routing_scope(self) -> RoutingScope:
        """One scope for the whole model, whichever tuner object wrapped the first layer."""
        layers = find_wise_layers(self.model)
        return next(iter(layers.values())).routing_scope if layers else RoutingScope()

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        layers = find_wise_layers(model)
        if layers:
            install_hooks(model, next(iter(layers.values())).routing_scope)

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "merging would make the side memory answer every query, since the router goes with it. "
            "Use unload() for the base model, or keep the adapter: it is a small file beside the model."
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Iterator[None]:
        """PEFT calls this around forward and generate: with ``adapter_names`` each row has its own adapter."""
        if adapter_names is None:
            yield
            return
        with rows_asking(self.model, find_wise_layers(self.model).values(), adapter_names):
            yield

    def unload(self) -> nn.Module:
        """The base model as it was: the layers, the hooks and ``generate``."""
        base = super().unload()
        remove_hooks(base)
        return base

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # The name stands in the middle of our keys: ....wisemem_memories.<adapter>.<index>.delta_weight
        marked = f".{_CONTAINER}.{adapter_name}."
        head, found, tail = key.rpartition(marked)
        if found:
            return f"{head}.{_CONTAINER}.{tail}"
        return super()._remove_adapter_name_from_key(key, adapter_name)


def find_wise_layers(model: nn.Module) -> dict[str, WiseLayer]:
    """Every WISE layer of a model by its module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WiseLayer)}


def other_tuners(model: nn.Module) -> list[str]:
    """Names of PEFT types other than WISE that a model carries."""
    names = {
        type(module).__module__.split(".")[2]
        if type(module).__module__.startswith("peft.tuners.")
        else type(module).__name__
        for module in model.modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, WiseLayer)
    }
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, dict):
        names |= {
            str(getattr(config.peft_type, "value", config.peft_type))
            for config in configs.values()
            if not isinstance(config, WiseConfig)
        }
    return sorted(names)
