"""WISE as a PEFT tuner: config, layer, model, and the registration with PEFT."""

from .config import WiseConfig, WisePeftType
from .layer import WiseLayer
from .memory import MemoryState, SideMemory
from .model import WiseModel, find_wise_layers
from .registration import register_with_peft
from .route import Route
from .scope import RoutingScope

__all__ = [
    "MemoryState",
    "Route",
    "RoutingScope",
    "SideMemory",
    "WiseConfig",
    "WiseLayer",
    "WiseModel",
    "WisePeftType",
    "find_wise_layers",
    "register_with_peft",
]
