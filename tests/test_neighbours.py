"""EasyEdit's other algorithms on a model that carries WISE edits, and over WISE."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from editing_helpers import requests, settings

from easyedit_wise import apply_wise_to_model
from easyedit_wise.easyedit.neighbours import beside_wise

CARRIER = "model.layers.1.mlp.down_proj"


def algorithm(model: Any, tok: Any, wanted: Any, hparams: Any, **options: Any) -> Any:
    return "called", options


@pytest.mark.parametrize(
    "settings_of_the_other",
    [
        {"rewrite_module_tmp": "model.layers.{}.mlp.down_proj", "layers": [0, 1]},
        {"rewrite_module_tmp": "model.layers.{}.mlp.down_proj.weight", "layers": [1]},
        {"rewrite_module_tmp": "model.layers.{}.mlp", "layers": [1]},
        {"inner_params": ["model.layers[1].mlp.down_proj.weight"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("by_name", [True, False])
def test_the_layer_that_carries_edits(
    llama: Any, tok: Any, settings_of_the_other: dict[str, Any], by_name: bool
) -> None:
    apply, hparams = beside_wise("ROME", algorithm), SimpleNamespace(**settings_of_the_other)

    def call() -> Any:
        if by_name:
            return apply(model=llama, tok=tok, wanted=[], hparams=hparams)
        return apply(llama, tok, [], hparams, copy=False)

    assert call()[0] == "called"
    _, restore = apply_wise_to_model(llama, tok, requests(1), settings())
    with pytest.raises(ValueError, match=rf"ROME is to change .*, and this model carries WISE edits .*{CARRIER}\.base"):
        call()
    restore()
    assert call()[0] == "called"


@pytest.mark.parametrize(
    "settings_of_the_other",
    [
        {"rewrite_module_tmp": "model.layers.{}.mlp.down_proj", "layers": [0, 2, 11]},
        {"inner_params": ["model.layers[1].mlp.up_proj.weight"]},
        {"inner_params": None, "layers": None},
        {},
    ],
    ids=str,
)
def test_another_layer(llama: Any, tok: Any, settings_of_the_other: dict[str, Any]) -> None:
    apply_wise_to_model(llama, tok, requests(1), settings())
    apply = beside_wise("FT", algorithm)
    assert apply(llama, tok, [], SimpleNamespace(**settings_of_the_other), copy=False) == ("called", {"copy": False})


@pytest.mark.parametrize("name", ["LoRA", "QLoRA", "DPO"])
def test_another_peft_method(llama: Any, tok: Any, name: str) -> None:
    apply, hparams = beside_wise(name, algorithm), SimpleNamespace(layers=[], target_modules=["q_proj"])
    assert apply(llama, tok, [], hparams)[0] == "called"
    apply_wise_to_model(llama, tok, requests(1), settings())
    with pytest.raises(ValueError, match=rf"{name} is a PEFT method, and this model carries WISE edits in {CARRIER}"):
        apply(llama, tok, [], hparams)


def test_over_wise() -> None:
    apply = beside_wise("SimIE", algorithm)
    with pytest.raises(ValueError, match="SimIE over base_method 'WISE' is not possible"):
        apply(None, None, [], SimpleNamespace(base_method="WISE"))
    assert apply(None, None, [], SimpleNamespace(base_method="ROME"))[0] == "called"


def test_an_algorithm_of_another_shape() -> None:
    apply = beside_wise("FT-Api", lambda wanted, hparams: (wanted, hparams))
    assert apply([], "settings") == ([], "settings")
    assert apply.__name__ == "<lambda>"
