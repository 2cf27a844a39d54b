"""Where a module computes, which is not where its weights lie if they are offloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def computing_device(module: nn.Module) -> torch.device:
    """The device on which a layer or a model takes its input.

    An offloaded weight (accelerate's ``cpu_offload``, a ``device_map`` with "cpu" or "disk") is on the meta device
    until a hook loads it for a call; the hook knows to where.

    Returns:
        The device of the module's first parameter or buffer, or that of its hook; the CPU if it has none of them.
    """
    for part in module.modules():
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            if tensor.device.type != "meta":
                return tensor.device
            return _execution_device(getattr(part, "_hf_hook", None)) or tensor.device
    return torch.device("cpu")


def _execution_device(hook: Any) -> torch.device | None:
    for one in getattr(hook, "hooks", [hook]):  # several hooks of one module are one, with a list
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None
