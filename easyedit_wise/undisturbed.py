"""Torch's switches that a caller may have set around an edit, and that it must not depend on.

Gradients (``no_grad``, ``set_grad_enabled``), inference mode, autocast, the default dtype and the default device: an
edit has its own and puts the caller's back, so that the same memories come out wherever it is called.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
_CPU = torch.device("cpu")


@contextmanager
def own_modes(model: Any = None) -> Iterator[None]:
    """Gradients on, no inference mode, no autocast, fp32 and the CPU by default; afterwards all is as before.

    The default dtype is one for the whole process: where the caller's is another, other threads see fp32 meanwhile, and
    it is put back when the last thread leaves. Everything else is the calling thread's own.

    Args:
        model: what is edited. Its weights can be trained through inside, also where it was loaded in inference mode:
            they are then stood in for by ordinary tensors in the same memory.

    Raises:
        ValueError: it was loaded in inference mode, and a weight is of a kind that cannot be stood in for.
    """
    module = model if isinstance(model, nn.Module) else None
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.empty(0).device != _CPU:
            stack.enter_context(_CPU)
        for kind in _kinds_of_devices(module):
            stack.enter_context(without_autocast(kind))
        stack.enter_context(_FP32.by_default())
        stack.enter_context(_ordinary_tensors(module))
        yield


def undisturbed(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """A function whose body runs in :func:`own_modes` of its first argument: the model, or what has it as ``model``."""
    first = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def inside(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        given = args[0] if args else kwargs.get(first)
        with own_modes(given if isinstance(given, nn.Module) else getattr(given, "model", None)):
            return function(*args, **kwargs)

    return inside


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """No autocast for a kind of device, such as "cuda"; where it is off, nothing is done."""
    return torch.autocast(kind, enabled=False) if _has_autocast_on(kind) else nullcontext()


def _has_autocast_on(kind: str) -> bool:
    try:
        return bool(torch.is_autocast_enabled(kind))
    except RuntimeError:  # of a kind that has none: "meta", and "mps" in earlier versions
        return False


def _kinds_of_devices(module: nn.Module | None) -> set[str]:
    tensors = () if module is None else (*module.parameters(), *module.buffers())
    return {"cpu", "cuda", "mps", "xpu", *(tensor.device.type for tensor in tensors)}


class _Fp32ByDefault:
    """Who needs fp32 as the default dtype, which torch keeps for the process and not for each thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = torch.float32

    @contextmanager
    def by_default(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._before = torch.get_default_dtype()
            self._inside += 1
            if torch.get_default_dtype() != torch.float32:
                torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside and self._before != torch.float32:
                    torch.set_default_dtype(self._before)


# As many as there are default dtypes: one. Two edits that overlap must not each put back what the other one set.
_FP32 = _Fp32ByDefault()


@contextmanager
def _ordinary_tensors(module: nn.Module | None) -> Iterator[None]:
    """Inference mode's tensors, which autograd refuses to keep, stood in for by others in the same memory."""
    stood_in: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
    twins: dict[int, Tensor] = {}  # tied weights stay tied
    try:
        for part in () if module is None else module.modules():
            own: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for tensors in own:
                for name in [name for name, tensor in tensors.items() if tensor is not None and tensor.is_inference()]:
                    tensor = tensors[name]
                    if id(tensor) not in twins:
                        twins[id(tensor)] = _twin(tensor, name, part)
                    stood_in.append((tensors, name, tensor, twins[id(tensor)]))
                    tensors[name] = twins[id(tensor)]
        yield
    finally:
        for tensors, name, before, meanwhile in stood_in:
            if tensors.get(name) is not meanwhile:  # it was replaced
                continue
            tensors[name] = before
            if before.requires_grad != meanwhile.requires_grad:
                with torch.inference_mode():
                    before.requires_grad_(meanwhile.requires_grad)


def _twin(tensor: Tensor, name: str, module: nn.Module) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        raise ValueError(
            f"{name} of {type(module).__name__} was made inside torch.inference_mode(), and an edit cannot be trained "
            f"through a {type(tensor).__name__} of that kind: load the model outside of it."
        )
    twin = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    if tensor.device.type == "meta":  # offloaded: there is no memory to share
        twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    else:
        twin.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return nn.Parameter(twin, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
