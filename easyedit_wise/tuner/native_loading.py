"""transformers' own ``model.load_adapter``, which reads adapter files without asking PEFT.

It injects the adapter by PEFT and then lets the model's ``_load_pretrained_model`` set each tensor of the file whose
name the model knows. Packed tensors are under names that it does not know, so a model that carries WISE has a
``_load_pretrained_model`` of its own, which unpacks them first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .adapter_tensors import shapes_in, tensor_name, unpacked
from .layer import find_wise_layers
from .packing import PackingError

_METHOD = "_load_pretrained_model"
_BEFORE = "_wise_load_pretrained_model_before"


def install_loading(model: nn.Module) -> None:
    """Let ``model.load_adapter`` read packed tensors. Once; further calls, and other models, change nothing."""
    own = model.__dict__.get(_METHOD)
    if not callable(getattr(type(model), _METHOD, None)) or getattr(own, "func", None) is _load:
        return
    if own is not None:
        model.__dict__[_BEFORE] = own
    # A partial survives pickling and a deep copy, and then belongs to the copy.
    model.__dict__[_METHOD] = partial(_load, model)


def remove_loading(model: nn.Module) -> None:
    """The model's own method again."""
    if getattr(model.__dict__.get(_METHOD), "func", None) is _load:
        del model.__dict__[_METHOD]
        if _BEFORE in model.__dict__:
            model.__dict__[_METHOD] = model.__dict__.pop(_BEFORE)


def _load(wise_model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The model's own loading, given unpacked tensors.

    Raises:
        ValueError: parts do not fit (see ``unpacked``), or they are in a file that is no safetensors file.
    """
    load = wise_model.__dict__.get(_BEFORE) or getattr(type(wise_model), _METHOD)
    layers = find_wise_layers(wise_model)
    state = kwargs.get("state_dict")
    if state is None:
        state = _packed_files(kwargs.get("checkpoint_files"))
    if layers and state is not None and _any_packed(state):
        try:
            kwargs["state_dict"] = unpacked(state, shapes_in(layers))
        except PackingError:
            _withdraw_newest(wise_model)
            raise
    result = load(*args, **kwargs)
    info = result[0] if isinstance(result, tuple) else result
    left = [key for key in getattr(info, "unexpected_keys", ()) if tensor_name(key) != key]
    if layers and left:
        raise ValueError(
            f"{sorted(left)[0]} is packed, and transformers unpacks safetensors files only: load it with "
            "PeftModel.from_pretrained, or save it with safe_serialization=True."
        )
    return result


def _packed_files(files: Sequence[str] | None) -> dict[str, Tensor] | None:
    """What safetensors files hold if something in them is packed; None leaves the reading to transformers."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return None
    state: dict[str, Tensor] = {}
    try:
        for file in files:
            with safe_open(file, framework="pt") as content:
                if not any(tensor_name(key) != key for key in content.keys()):  # noqa: SIM118  # it is no mapping
                    return None
                state.update({key: content.get_tensor(key) for key in content.keys()})  # noqa: SIM118  # likewise
    except SafetensorError as error:
        raise ValueError(f"{files[0]} is damaged ({error}): take it from a backup or save it again.") from error
    return state


def _withdraw_newest(model: Any) -> None:
    """Take off the adapter that was just made room for: nothing has been loaded into it."""
    newest = next(reversed(model.peft_config), None)
    if newest is not None and callable(getattr(model, "delete_adapter", None)):
        model.delete_adapter(newest)


def _any_packed(state: Mapping[str, Any]) -> bool:
    return any(tensor_name(key) != key for key in state)
