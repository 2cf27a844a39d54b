"""EasyEdit's other algorithms and WISE: what they cannot do together is refused, with the reason.

A side memory is no weight of the model. An algorithm that builds on another one's weights finds none to build on; the
weight of the layer that carries memories is called otherwise while it does, so that an algorithm that looks for it by
name finds nothing, or the memory in its place; and EasyEdit's LoRA takes a model with any PEFT method for one that has
its LoRA already, and trains nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..tuner.attach import module_name_of
from ..tuner.model import find_wise_layers

# PEFT methods. WISE refuses a model that carries one of them, too.
PEFT_ALGORITHMS = frozenset({"LoRA", "QLoRA", "DPO"})


def beside_wise(name: str, apply_algo: Callable[..., Any]) -> Callable[..., Any]:
    """An entry of EasyEdit's ``ALG_DICT`` that looks at the model and the settings before it goes on as it was.

    It raises ValueError where the algorithm builds on WISE, is another PEFT method on a model that carries WISE edits,
    or is to change the very weight that WISE's memories stand beside.
    """

    @functools.wraps(apply_algo)
    def apply(*args: Any, **kwargs: Any) -> Any:
        hparams = kwargs.get("hparams", args[3] if len(args) > 3 else None)
        if getattr(hparams, "base_method", None) == "WISE":
            refuse_as_base(name)
        model = kwargs.get("model", args[0] if args else None)
        if isinstance(model, nn.Module):
            _check_layer_free(name, model, hparams)
        return apply_algo(*args, **kwargs)

    return apply


def refuse_as_base(name: str) -> None:
    """WISE cannot be what another algorithm builds on.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"{name} over base_method 'WISE' is not possible: {name} takes the change that its base method makes to a "
        "weight of the model, and solves for a better one. WISE changes none of the weights: its edits are in side "
        "memories, which answer what is routed to them. Take ROME, MEMIT or FT as base_method, or alg_name: WISE by "
        "itself, which is made for sequences of edits."
    )


def _check_layer_free(name: str, model: nn.Module, hparams: Any) -> None:
    for carrier in find_wise_layers(model):
        if name in PEFT_ALGORITHMS:
            raise ValueError(
                f"{name} is a PEFT method, and this model carries WISE edits in {carrier}, which are one, too: "
                f"a model takes one of them. Restore the WISE edits first; or merge {name}'s weights into the model "
                "(merge_and_unload()) and make the WISE edits on that one."
            )
        for wanted in _modules_named(hparams):
            if carrier == wanted or carrier.startswith(f"{wanted}."):
                raise ValueError(
                    f"{name} is to change {wanted}, and this model carries WISE edits there, whose side memories "
                    f"stand beside that weight (it is called {carrier}.base_layer.weight meanwhile). Name another "
                    "layer; or restore the WISE edits first; or make the other edits before those of WISE."
                )


def _modules_named(hparams: Any) -> Iterator[str]:
    """The modules whose weights EasyEdit's settings name: by a pattern and layers, or in full."""
    layers, names = getattr(hparams, "layers", None), getattr(hparams, "inner_params", None)
    pattern = getattr(hparams, "rewrite_module_tmp", None)
    if isinstance(pattern, str) and isinstance(layers, (list, tuple)):
        yield from (module_name_of(pattern.format(layer)) for layer in layers)
    if isinstance(names, (list, tuple)):
        yield from (module_name_of(one) for one in names if isinstance(one, str))
