"""By what a base model's layer is known again: a digest of its weight, and some of its entries.

A memory dW was trained beside one weight W and means nothing beside another one of the same shape. The digest tells
the same bytes. The entries tell the same weight in another dtype, or quantised, where all bytes differ.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

N_SAMPLES = 256
# Quantisation to 4 bits moves the entries by about a tenth of their norm; the entries of another weight are no
# nearer than 1.
_QUANTISED_DISTANCE = 0.25
_NARROW = (torch.bfloat16, torch.float16)
# Relative rounding of a dtype; float16 has few exponents, so its smallest numbers are rounded absolutely.
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_FLOAT16_STEP = 2.0**-24
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, *_NARROW)}


def fingerprint(module: nn.Module) -> dict[str, Any] | None:
    """What is kept of a linear map's weight.

    Returns:
        ``shape`` and ``dtype`` of the weight, whether it is ``quantised`` (its values then are the dequantised ones),
        ``sha256`` of its bytes, and ``samples``: up to 256 entries at places that depend on the shape alone, float32
        in base64. None for a weight that cannot be read: on "meta", sharded, or of an unknown kind.
    """
    weight, quantised = _readable_weight(module)
    if weight is None:
        return None
    values = weight.contiguous()
    data: Any = values.view(torch.uint8).cpu().numpy()
    samples = values.view(-1)[_places(values.numel()).to(values.device)].float().cpu()
    return {
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "quantised": quantised,
        "sha256": hashlib.sha256(data).hexdigest(),
        "samples": base64.b64encode(samples.numpy().astype("<f4").tobytes()).decode("ascii"),
    }


def difference(known: Mapping[str, Any], module: nn.Module) -> str | None:
    """In what a weight is another one than the one of a fingerprint.

    Args:
        known: as :func:`fingerprint` returned it.
        module: a linear map.

    Returns:
        None if it is the same, if it is the same up to the rounding of the coarser dtype or to quantisation, or if
        it cannot be read.
    """
    here = fingerprint(module)
    if here is None:
        return None
    if here["shape"] != list(known["shape"]):
        return f"its weight has the shape {tuple(known['shape'])} there and {tuple(here['shape'])} here"
    if here["sha256"] == known["sha256"]:
        return None
    there_samples, here_samples = _decoded(known["samples"]), _decoded(here["samples"])
    if _same_up_to_rounding(known, there_samples, here, here_samples):
        return None
    differing = ~((there_samples == here_samples) | (there_samples.isnan() & here_samples.isnan()))
    furthest = float((there_samples - here_samples).abs().nan_to_num().max()) if differing.numel() else 0.0
    return (
        f"SHA-256 {known['sha256'][:12]}... ({known['dtype']}) there and {here['sha256'][:12]}... ({here['dtype']}) "
        f"here, and of {differing.numel()} sampled entries {int(differing.sum())} differ, by up to {furthest:.3g}"
    )


def check_fingerprint(value: Any) -> None:
    """Raise ValueError unless it has the form of a fingerprint; it may come from any file."""
    good = (
        isinstance(value, Mapping)
        and isinstance(value.get("shape"), (list, tuple))
        and len(value["shape"]) == 2
        and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in value["shape"])
        and isinstance(value.get("dtype"), str)
        and value["dtype"] in _DTYPES
        and isinstance(value.get("quantised"), bool)
        and isinstance(value.get("sha256"), str)
        and isinstance(value.get("samples"), str)
        and len(value["sha256"]) == 64
    )
    if good:
        try:
            n_samples = _decoded(value["samples"]).numel()
        except ValueError:
            n_samples = -1
        good = n_samples == min(N_SAMPLES, value["shape"][0] * value["shape"][1])
    if not good:
        raise ValueError(
            f"base_fingerprint holds {str(value)[:80]!r}, which is no fingerprint of a weight: take it from a backup, "
            "or set base_fingerprint to null for an adapter that goes onto any base."
        )


def _readable_weight(module: nn.Module) -> tuple[Tensor | None, bool]:
    """(the weight as a plain floating matrix or None, whether it is quantised)."""
    own = getattr(module, "weight", None)
    quantised = (
        hasattr(module, "W_q")  # HQQ
        or type(own).__name__ in ("Params4bit", "Int8Params")  # bitsandbytes
        or type(own).__module__.startswith("torchao.")
    )
    if isinstance(own, Tensor) and own.device.type == "meta":
        return None, quantised
    try:
        weight = dequantize_module_weight(module) if quantised else own
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError):
        return None, quantised  # a kind of quantisation that PEFT cannot undo here
    if weight is None or type(weight) not in (Tensor, nn.Parameter):
        return None, quantised
    weight = weight.detach()
    known = weight.dim() == 2 and weight.numel() > 0 and weight.dtype in _DTYPES.values()
    return (weight if known and weight.device.type != "meta" else None), quantised


def _places(numel: int) -> Tensor:
    """Up to 256 places in a flat weight, spread by the golden ratio: a fixed step could stay in one column."""
    if numel <= N_SAMPLES:
        return torch.arange(numel, device="cpu")
    places = [(index * 0x9E3779B97F4A7C15 % 2**64) * numel >> 64 for index in range(N_SAMPLES)]
    return torch.tensor(places, device="cpu")


def _decoded(samples: str) -> Tensor:
    data = bytearray(base64.b64decode(samples, validate=True))
    return torch.frombuffer(data, dtype=torch.float32) if data else torch.empty(0, dtype=torch.float32, device="cpu")


def _same_up_to_rounding(known: Mapping[str, Any], there: Tensor, found: Mapping[str, Any], here: Tensor) -> bool:
    if known["quantised"] or found["quantised"]:
        return float((there - here).norm()) <= _QUANTISED_DISTANCE * float(torch.maximum(there.norm(), here.norm()))
    dtypes = {_DTYPES[known["dtype"]], _DTYPES[found["dtype"]]}
    if dtypes == set(_NARROW):  # both were rounded, and of the exact values nothing is known
        step = sum(_ROUNDING[dtype] for dtype in dtypes) * 1.01
        return bool(((there - here).abs() <= step * torch.maximum(there.abs(), here.abs()) + _FLOAT16_STEP).all())
    if _bits_equal(there, here):
        return len(dtypes) == 2  # in a wider dtype; in the same one, entries that are not sampled differ
    # One is the other's rounding: to its own dtype, or to one that it went through before it was widened again.
    return any(
        _bits_equal(there.to(dtype).float(), here) or _bits_equal(here.to(dtype).float(), there) for dtype in _NARROW
    )


def _bits_equal(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
