"""The WISE layer: main memory, side memories, and the router between them."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn

from ..routing import MAIN_MEMORY
from ..sharding import random_mask
from ..undisturbed import without_autocast
from .config import WiseConfig
from .devices import computing_device
from .memory import LIVE, MemoryState, SideMemory
from .mixed import decide_mixed
from .route import Route
from .router import Candidate, decide, follow
from .scope import RoutingScope
from .sketches import SketchCache


class WiseLayer(nn.Module, BaseTunerLayer):
    """Wraps one value matrix W_v (Eq. 2) with side memories dW = W_v' - W_v (Eq. 6).

    The main memory is the untouched base layer: it is called, never read, so quantised, Conv1D and
    hooked layers work as they are, and what is not routed equals the base model bit for bit.

    Attributes:
        wisemem_memories: side memories of each adapter, in the order in which they were made.
        routing_scope: shared by the layers of one model; knows padding and what a call continues.
        last_route: the decision of the last prefill; None if the adapters were off.
        edit_streams: whoever edits this layer keeps the state of each adapter's edits here, so that it lives and
            dies with the adapter. The tuner does not look into it.
    """

    # PEFT names its adapter parameters by prefix and matches it as a substring; "wise_" is part of
    # "pointwise_", "depthwise_" and "elementwise_".
    adapter_layer_names = ("wisemem_memories",)
    # Inherited from PEFT, which mypy does not follow.
    active_adapters: list[str]
    disable_adapters: bool
    set_adapter: Callable[..., None]
    get_base_layer: Callable[[], nn.Module]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]

    other_param_names = ("wisemem_config",)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: WiseConfig, routing_scope: RoutingScope
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.wisemem_memories = nn.ModuleDict({})
        self.wisemem_config: dict[str, WiseConfig] = {}
        self.routing_scope = routing_scope
        self.last_route: Route | None = None
        self._sketches = SketchCache()
        self._listed: dict[tuple[str, ...], tuple[list[Any], list[Candidate]]] = {}
        self.edit_streams: dict[str, Any] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        shape = linear_map_shape(self.get_base_layer())
        if shape is None:
            raise ValueError(
                f"{type(base_layer).__name__} is not a linear map: a side memory needs one, such as mlp.down_proj."
            )
        self.in_features, self.out_features = shape
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    # -- memories ---------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: WiseConfig, inference_mode: bool = False) -> None:
        """Give ``adapter_name`` the side memories that ``config.memories`` lists; dW is 0 unless told otherwise."""
        device = computing_device(self.get_base_layer())
        generator = torch.Generator().manual_seed(config.seed)
        if not config.init_weights:  # of two adapters with one configuration each has its own random dW
            generator = torch.Generator().manual_seed(config.seed ^ zlib.crc32(adapter_name.encode()))
        states = [self._empty_state(stage, config, generator, device) for stage in config.memories]
        self.wisemem_config[adapter_name] = config
        self.wisemem_memories[adapter_name] = nn.ModuleList(map(SideMemory, states))
        self._listed = {}
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's, called after a load with ``low_cpu_mem_usage``; it would also cast to the base layer's dtype,
        and a memory rounded to bf16 routes differently, or move to an offloaded weight's meta device.
        """
        target = computing_device(self.get_base_layer()) if device is None else torch.device(device)
        memories = self.wisemem_memories[adapter_name] if adapter_name in self.wisemem_memories else nn.ModuleList()
        if all(tensor.device.type != "meta" for tensor in memories.state_dict().values()) and target.type != "meta":
            memories.to(target)

    def _empty_state(
        self, stage: str, config: WiseConfig, generator: torch.Generator, device: torch.device
    ) -> MemoryState:
        shape = (self.out_features, self.in_features)
        mask = random_mask(shape, config.mask_ratio, generator).to(device) if stage == LIVE else None
        delta_weight = torch.zeros(shape, dtype=torch.float32, device=device)
        if not config.init_weights:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device=generator.device)
            drawn = drawn / math.sqrt(self.in_features)
            delta_weight.copy_(drawn if mask is None else drawn * mask.to(drawn.device))
        # epsilon 0: a memory that was never calibrated answers as soon as it holds anything.
        return MemoryState(stage, delta_weight, mask, 0.0, 0)

    def memories(self, adapter_name: str) -> list[MemoryState]:
        """The side memories of an adapter, in order, sharing their tensors."""
        return [memory.state() for memory in self._side_memories(adapter_name)]

    def install(self, adapter_name: str, states: Sequence[MemoryState]) -> None:
        """Replace the side memories of an adapter at once. The old states' tensors are not written to."""
        trained = any(p.requires_grad for p in self.wisemem_memories[adapter_name].parameters())
        replacement = nn.ModuleList(map(SideMemory, states))
        replacement.requires_grad_(trained).train(self.training)
        self.wisemem_memories[adapter_name] = replacement
        self.wisemem_config[adapter_name].memories = [state.stage for state in states]
        self.last_route = None
        self._listed = {}

    def _side_memories(self, adapter_name: str) -> list[SideMemory]:
        return [memory for memory in self.wisemem_memories[adapter_name].children() if isinstance(memory, SideMemory)]

    def _candidates(self, asked: tuple[str, ...] | None = None) -> list[Candidate]:
        """The memories that may answer: the active adapters', or those that rows ask for.

        Listed once, since every decode step asks.
        """
        wanted = self.active_adapters if asked is None else [name for name in self.wisemem_config if name in asked]
        names = tuple(name for name in wanted if name in self.wisemem_config)
        sources = [(self.wisemem_memories[name], self.wisemem_config[name]) for name in names]
        listed = self._listed.get(names)
        if listed is None or listed[0] != sources:
            found = [
                Candidate(f"{name}/{index}", memory, self.wisemem_config[name])
                for name in names
                for index, memory in enumerate(self._side_memories(name))
            ]
            listed = (sources, found)
            self._listed[names] = listed
        return listed[1]

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's, and nothing stays that would keep the adapter's tensors or its stream of edits alive."""
        trained = any(parameter.requires_grad for parameter in self.wisemem_memories.parameters())
        super().delete_adapter(adapter_name)
        if not trained:  # PEFT makes the adapter that is active next trainable, which a frozen model's is not
            self.wisemem_memories.requires_grad_(False)
        self._forget()
        self.edit_streams = {name: stream for name, stream in self.edit_streams.items() if name != adapter_name}

    @property
    def edit_stream(self) -> Any:
        """The stream of the first active adapter, which is where edits go; None if it has none."""
        return self.edit_streams.get(next(iter(self.active_adapters), ""))

    @edit_stream.setter
    def edit_stream(self, stream: Any) -> None:
        name = getattr(stream, "adapter_name", next(iter(self.active_adapters), ""))
        # A new dict: whoever puts a layer back after a failure has kept the old one.
        self.edit_streams = {**self.edit_streams, name: stream}

    def _forget(self) -> None:
        """Drop what was derived from memories that are no longer there."""
        self.last_route = None
        self._listed = {}
        self._sketches.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> WiseLayer:
        # A cast rounds the memories in place; there and back again they look as before.
        self._sketches.clear()
        super()._apply(fn, recurse)
        return self

    # -- forward ----------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W_v a for what stays in the main memory, W_v a + dW a for what a side memory answers.

        Args:
            x: a = A(x), shape (B, T, d_in), or flat, (B * T, d_in).

        Returns:
            The base layer's output shape and dtype: (B, T, d_out) or (B * T, d_out).

        Raises:
            ValueError: rows ask for adapters, and there are other than B names; or the call goes on with a cache
                whose tokens were routed among other memories.
        """
        base_output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            self.last_route = None
            return base_output
        sequences = self.routing_scope.as_sequences(x)
        asked = self.routing_scope.asked_by(sequences.shape[0])
        candidates = self._candidates(asked)
        if not candidates:
            self.last_route = None
            return base_output
        result = base_output.reshape(*sequences.shape[:2], -1)
        trained = self._memory_in_training(candidates)
        if trained is not None:
            result = result + self._product(sequences, trained.delta_weight * trained.mask).to(result.dtype)
        else:
            with without_autocast(x.device.type):  # a threshold is compared with scores in fp32
                result = self._routed(sequences, result, candidates, asked)
        return result.reshape(base_output.shape)

    def may_answer(self) -> bool:
        """Whether the router has something to decide: the memories are on, there are some, and none is trained."""
        if self.disable_adapters:
            return False
        asked = self.routing_scope.asked()
        candidates = self._candidates((asked,) if isinstance(asked, str) else asked)
        return bool(candidates) and self._memory_in_training(candidates) is None

    def _memory_in_training(self, candidates: list[Candidate]) -> SideMemory | None:
        """Under ``model.train()`` the live memory answers everything: a routed-away row has no gradient."""
        if not self.training:
            return None
        return next((m for _, m, _ in candidates if m.stage == LIVE and m.delta_weight.requires_grad), None)

    def _product(self, x: Tensor, delta_weight: Tensor) -> Tensor:
        return F.linear(self._cast_input_dtype(x, delta_weight.dtype), delta_weight)

    def _routed(
        self, x: Tensor, base_output: Tensor, candidates: list[Candidate], asked: tuple[str, ...] | None
    ) -> Tensor:
        """Follow the route that this call goes on with, or decide and keep the decision for decoding."""
        held = self.routing_scope.held_route(self, x.shape[0])
        names = tuple(candidate.name for candidate in candidates)
        if held is not None and (held.memories, held.asked) != (names, asked):
            held = None
        if held is not None and held.decided is None:
            return follow(held, x, base_output, candidates, self._product)
        if held is None:
            self.routing_scope.check_begins()
        token_mask = self.routing_scope.token_mask(x.shape[0], x.shape[1], x.device)
        given = (token_mask, held, self._sketches)
        if asked is None:
            route, result = decide(x, base_output, candidates, self._product, *given)
        else:
            route, result = decide_mixed(x, base_output, candidates, asked, self._product, *given)
        self.last_route = route
        self.routing_scope.hold(self, route)
        return result

    # -- the rest of PEFT's contract ----------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> Tensor:
        """dW of an adapter with exactly one side memory, shape (d_out, d_in).

        Raises:
            ValueError: the adapter has several memories, so that no single difference stands for it.
        """
        memories = self._side_memories(adapter)
        if len(memories) != 1:
            raise ValueError(f"adapter {adapter!r} has {len(memories)} side memories: use memories({adapter!r}).")
        return memories[0].delta_weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible: whether the side memory answers depends on the query.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a routed memory cannot be merged into the base weight, it would answer every query: keep the adapter, "
            "or take it off with unload()."
        )

    def unmerge(self) -> None:
        """Nothing was merged, so there is nothing to do."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: a routed memory is not a fixed low-rank update."""
        return False

    def __repr__(self) -> str:
        return "wise." + super().__repr__()


def find_wise_layers(model: nn.Module) -> dict[str, WiseLayer]:
    """Every WISE layer of a model by its module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WiseLayer)}


def linear_map_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear map, quantised ones too; None for everything else."""
    if isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd, nn.MultiheadAttention)):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of each type that it does not know
        d_in, d_out = _get_in_out_features(module)
    return None if d_in is None or d_out is None else (d_in, d_out)


__all__ = ["MAIN_MEMORY", "MemoryState", "SideMemory", "WiseLayer", "find_wise_layers", "linear_map_shape"]
