"""The WISE tuner model: which layer is wrapped, and how PEFT finds its tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from .adapter_tensors import CONTAINER, packed, shapes_in, unpacked
from .base_check import check_base, take_fingerprints
from .choosing import rows_asking
from .config import WiseConfig
from .hooks import install_hooks, remove_hooks
from .layer import WiseLayer, find_wise_layers
from .native_loading import install_loading, remove_loading
from .scope import RoutingScope


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

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's injection, onto the base that the adapter was made for.

        Raises:
            ValueError: the configuration has the fingerprint of another base; nothing was changed.
        """
        # A copy: the layer writes into it, and the caller may use one configuration for several models.
        config = self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        try:
            check_base(model, config)
        except ValueError:
            del self.peft_config[adapter_name]
            raise
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        take_fingerprints(model, config, adapter_name)

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
            install_loading(model)

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
        remove_loading(base)
        return base

    # -- files: PEFT calls these in get_peft_model_state_dict and set_peft_model_state_dict ------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        state = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return packed(state, config.save_dtype)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state = unpacked(state_dict, shapes_in(find_wise_layers(model)))
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # The name stands in the middle of our keys: ....wisemem_memories.<adapter>.<index>.delta_weight
        marked = f".{CONTAINER}.{adapter_name}."
        head, found, tail = key.rpartition(marked)
        if found:
            return f"{head}.{CONTAINER}.{tail}"
        return super()._remove_adapter_name_from_key(key, adapter_name)


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
