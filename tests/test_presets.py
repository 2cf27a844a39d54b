"""Presets: which settings a name stands for, and which ones fill up a mapping that names none."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from easyedit_wise.hparams import WISEHyperParams, packaged_hparams
from easyedit_wise.presets import DEFAULT, MARGIN, NOT_OF_THE_METHOD, PAPER, PRESETS, UPSTREAM

LAYER = ["model.layers[1].mlp.down_proj.weight"]
FIELDS = {field.name for field in dataclasses.fields(WISEHyperParams)}
# What an EasyEdit file names of the method, with values that are nobody's defaults.
EASYEDITS: dict[str, Any] = {
    "alg_name": "WISE",
    "model_name": "./hugging_cache/llama",
    "device": 1,
    "inner_params": LAYER,
    "edit_lr": 0.9,
    "n_iter": 31,
    "act_margin": [4.0, 17.0, 9.0],
    "act_ratio": 0.6,
    "mask_ratio": 0.3,
    "norm_constraint": 0.8,
    "save_freq": 30,
    "merge_freq": 90,
    "merge_alg": "sign",
    "objective_optimization": "prompt_and_label",
    "densities": 0.4,
    "weights": 0.5,
    "retrieve": True,
    "replay": True,
}


def method(hparams: WISEHyperParams) -> dict[str, Any]:
    return {name: getattr(hparams, name) for name in FIELDS - NOT_OF_THE_METHOD}


def changed(hparams: WISEHyperParams, base: WISEHyperParams) -> dict[str, Any]:
    """The settings of the method that differ."""
    return {name: value for name, value in method(hparams).items() if value != getattr(base, name)}


@pytest.mark.parametrize("name", [MARGIN, PAPER, UPSTREAM])
def test_a_preset_names_every_setting_of_the_method(name: str) -> None:
    # Else a new default would change what it stands for.
    assert set(PRESETS[name]) == FIELDS - NOT_OF_THE_METHOD


def test_the_constructor_has_the_defaults_and_so_has_a_mapping_that_says_nothing() -> None:
    plain = WISEHyperParams(inner_params=LAYER)
    assert WISEHyperParams.from_preset(DEFAULT, LAYER) == plain
    assert WISEHyperParams.from_dict({"inner_params": LAYER}) == plain
    assert (plain.optimizer, plain.layer_units, plain.act_ratio) == ("steepest", True, None)


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_our_packaged_files_are_the_defaults(name: str) -> None:
    assert changed(WISEHyperParams.from_hparams(name), WISEHyperParams(inner_params=LAYER)) == {}


@pytest.mark.parametrize("name", [n for n in packaged_hparams() if n not in ("smollm2-135m", "gemma-3-270m")])
def test_easyedits_packaged_files_are_the_papers_but_for_what_they_name(name: str) -> None:
    path = Path(__file__).parents[1] / "easyedit_wise" / "data" / "hparams" / "WISE" / f"{name}.yaml"
    named = {"alpha", "beta", "gamma", *yaml.safe_load(path.read_text(encoding="utf-8"))}
    hparams = WISEHyperParams.from_hparams(name)
    assert set(changed(hparams, WISEHyperParams.from_preset(PAPER, LAYER))) <= named
    assert (hparams.optimizer, hparams.layer_units, hparams.rehearsal) == ("sgd", False, 0.0)


def test_a_mapping_in_easyedits_terms_gets_the_papers_values() -> None:
    expected = {key: value for key, value in EASYEDITS.items() if key not in {*NOT_OF_THE_METHOD, "act_margin"}}
    expected |= {"alpha": 4.0, "beta": 17.0, "gamma": 9.0}
    assert changed(WISEHyperParams.from_dict(EASYEDITS), WISEHyperParams.from_preset(PAPER, LAYER)) == expected


@pytest.mark.parametrize(
    "own", [{"irrelevant_prompts": 3}, {"pooling": "max"}, {"rehearsal": 0.5}, {"seed": 1}], ids=str
)
def test_one_more_key_does_not_turn_easyedits_terms_into_ours(own: dict[str, Any]) -> None:
    paper = WISEHyperParams.from_dict(EASYEDITS)
    assert changed(WISEHyperParams.from_dict({**EASYEDITS, **own}), paper) == {
        key: value for key, value in own.items() if key != "seed"
    }


@pytest.mark.parametrize("unit", [{"layer_units": True}, {"optimizer": "steepest"}], ids=str)
def test_a_step_with_its_unit_is_in_our_terms(unit: dict[str, Any]) -> None:
    hparams = WISEHyperParams.from_dict({"inner_params": LAYER, "edit_lr": 0.2, **unit})
    assert changed(hparams, WISEHyperParams(inner_params=LAYER)) == {"edit_lr": 0.2}


@pytest.mark.parametrize("own", [{"optimizer": "adam", "edit_lr": 0.2}, {"consolidation": 0}], ids=str)
def test_what_goes_without_consolidation_is_trained_with_margins(own: dict[str, Any]) -> None:
    hparams = WISEHyperParams.from_dict({"inner_params": LAYER, **own})
    assert changed(hparams, WISEHyperParams.from_preset(MARGIN, LAYER)) == {k: v for k, v in own.items() if v}


def test_a_setting_that_needs_no_unit_leaves_the_defaults() -> None:
    hparams = WISEHyperParams.from_dict({"inner_params": LAYER, "n_iter": 5, "retrieve": True})
    assert hparams == WISEHyperParams(inner_params=LAYER, n_iter=5, retrieve=True)


@pytest.mark.parametrize("name", list(PRESETS))
def test_what_is_named_overrides_the_preset(name: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    theirs = {**EASYEDITS, "preset": name}
    if name == DEFAULT:
        theirs.pop("replay")  # a margin loss
    path.write_text(yaml.safe_dump(theirs), encoding="utf-8")
    base = WISEHyperParams.from_preset(name, LAYER)
    read = (
        WISEHyperParams.from_hparams(path)
        if name != UPSTREAM
        else WISEHyperParams.from_dict({**EASYEDITS, "preset": name})
    )
    assert set(changed(read, base)) <= {"alpha", "beta", "gamma", *EASYEDITS}
    assert (read.edit_lr, read.n_iter, read.beta) == (0.9, 31, 17.0)
    assert read.optimizer == base.optimizer


def test_upstream_differs_from_the_paper_in_easyedits_arithmetic_alone() -> None:
    upstream, paper = WISEHyperParams.from_preset(UPSTREAM, LAYER), WISEHyperParams.from_preset(PAPER, LAYER)
    assert changed(upstream, paper) == {
        "retrieve": True,
        "act_ratio": 0.88,
        "weight_decay": 1e-5,
        "decay_whole_matrix": True,
        "score_activation": "model",
        "margin_over_violated": True,
        "padding_counts": True,
        "epsilon_as_trained": True,
        "fixed_contexts": True,
        "easyedit_merge": True,
        "target_separator": "space",
        "early_stop_patience": 1,
    }


def test_from_preset_takes_changes_and_easyedits_margin() -> None:
    hparams = WISEHyperParams.from_preset(PAPER, LAYER, n_iter=3, act_margin=[1.0, 2.0, 3.0], device="cpu")
    assert (hparams.n_iter, hparams.alpha, hparams.beta, hparams.gamma, hparams.device) == (3, 1.0, 2.0, 3.0, "cpu")


@pytest.mark.parametrize(
    ("preset", "changes", "fragments"),
    [
        ("papers", {}, ["preset is 'papers'", "did you mean 'paper'?", "default, margin, paper, upstream"]),
        (None, {}, ["preset is None", "default, margin, paper, upstream"]),
        (["paper"], {}, ["preset is ['paper']"]),
        (PAPER, {"n_iters": 3}, ["'n_iters'", "did you mean 'n_iter'?"]),
        (UPSTREAM, {"batch_size": 4}, ["padding_counts", "batch_size 1", "not with 4"]),
        (UPSTREAM, {"contexts_per_step": 3}, ["padding_counts", "contexts_per_step null", "and 3"]),
        (UPSTREAM, {"ending": True}, ["padding_counts", "ending: True", "ending: false"]),
        (UPSTREAM, {"optimizer": "lion"}, ["decay_whole_matrix", "'sgd'", "'lion'"]),
        (UPSTREAM, {"act_ratio": None}, ["epsilon_as_trained", "act_ratio"]),
        (UPSTREAM, {"padding_counts": 1}, ["padding_counts is 1", "true or false"]),
        (UPSTREAM, {"early_stop_patience": -1}, ["early_stop_patience is -1", "0 (none) or more"]),
        (UPSTREAM, {"score_activation": "modell"}, ["did you mean 'model'?"]),
    ],
    ids=str,
)
def test_what_does_not_fit_a_preset(preset: Any, changes: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the fragments are the match
        WISEHyperParams.from_preset(preset, LAYER, **changes)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


def test_easyedits_own_object_is_in_its_terms() -> None:
    fields = [(key, Any) for key in EASYEDITS if key != "act_margin"] + [
        (key, Any) for key in ("alpha", "beta", "gamma")
    ]
    values = {key: value for key, value in EASYEDITS.items() if key != "act_margin"}
    host = dataclasses.make_dataclass("Host", fields)(**values, alpha=4.0, beta=17.0, gamma=9.0)
    assert WISEHyperParams.from_any(host) == WISEHyperParams.from_dict(EASYEDITS)


@pytest.mark.upstream
@pytest.mark.skipif(not os.environ.get("EASYEDIT_HOME"), reason="EASYEDIT_HOME names no checkout of EasyEdit")
def test_heads_own_dataclass_is_in_its_terms() -> None:
    from easyedit_wise.easyedit.upstream import load_upstream

    upstream = load_upstream()
    assert upstream is not None
    values = upstream.settings("llama3-8b")
    values["alpha"], values["beta"], values["gamma"] = values.pop("act_margin")
    head = upstream._hparams_class(**values)
    assert WISEHyperParams.from_any(head) == WISEHyperParams.from_dict(
        {**upstream.settings("llama3-8b"), "device": "cpu"}
    )


def test_the_settings_of_a_run_come_back_from_their_file() -> None:
    for name in PRESETS:
        hparams = WISEHyperParams.from_preset(name, LAYER, seed=3)
        assert WISEHyperParams.from_dict(hparams.to_dict()) == hparams
