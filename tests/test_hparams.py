"""WISEHyperParams: EasyEdit's files load as they are, and every value that does not fit is explained."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from easyedit_wise.hparams import WISEHyperParams, packaged_hparams
from easyedit_wise.hparams_files import read_settings


class Published(NamedTuple):
    """What EasyEdit publishes for one model; the settings that all nine share are in SHARED."""

    layer: str
    edit_lr: float
    n_iter: int
    act_margin: list[float]
    act_ratio: float
    device: int
    model: str
    use_chat_template: bool | None  # None: the file has no such key
    model_parallel: bool = True  # whether the file has the key, with the value False


PUBLISHED = {
    "gpt-j-6B": Published(
        "transformer.h[21].mlp.fc_out.weight", 1.0, 70, [15.0, 40.0, 20.0], 0.88, 1, "gpt-j-6B", None
    ),
    "gpt2-xl": Published(
        "transformer.h[8].mlp.c_fc.weight", 1.0, 40, [5.0, 20.0, 10.0], 0.8, 1, "gpt2", None, model_parallel=False
    ),
    "llama-7b": Published(
        "model.layers[27].mlp.down_proj.weight", 1.0, 70, [5.0, 20.0, 10.0], 0.88, 1, "llama-2-7b", None
    ),
    "llama3-8b": Published(
        "model.layers[29].mlp.down_proj.weight", 0.9, 30, [2.0, 20.0, 10.0], 0.5, 0, "llama-3-8b-instruct", True
    ),
    "llama3.1-8b": Published(
        "model.layers[29].mlp.down_proj.weight", 0.9, 30, [5.0, 10.0, 10.0], 0.88, 0, "llama-3.1-8b-instruct", True
    ),
    "llama3.2-3b": Published(
        "model.layers[27].mlp.down_proj.weight", 1.0, 70, [5.0, 20.0, 10.0], 0.88, 1, "llama-3.2-3b-instruct", False
    ),
    "mistral-7b": Published(
        "model.layers[27].mlp.down_proj.weight", 1.0, 70, [5.0, 20.0, 10.0], 0.88, 1, "mistral-7b", None
    ),
    "qwen2.5-7b": Published(
        "model.layers[23].mlp.down_proj.weight", 1.0, 70, [5.0, 20.0, 10.0], 0.88, 0, "Qwen2.5-7b-Instruct", True
    ),
    "qwen3.5-9b": Published(
        "model.layers[23].mlp.down_proj.weight", 1.0, 70, [5.0, 20.0, 10.0], 0.88, 0, "Qwen3.5-9B", True
    ),
}
SHARED: dict[str, Any] = {
    "mask_ratio": 0.2,
    "norm_constraint": 1.0,
    "save_freq": 500,
    "merge_freq": 1000,
    "merge_alg": "ties",
    "objective_optimization": "only_label",
    "densities": 0.53,
    "weights": 1.0,
    "retrieve": True,
    "replay": False,
}


def upstream_yaml(row: Published) -> str:
    """A file with the keys and values that EasyEdit's file of this model has."""
    config: dict[str, Any] = {
        "alg_name": "WISE",
        "model_name": f"./hugging_cache/{row.model}",
        "device": row.device,
        "edit_lr": row.edit_lr,
        "n_iter": row.n_iter,
        "act_margin": row.act_margin,
        "act_ratio": row.act_ratio,
        "inner_params": [row.layer],
        **SHARED,
    }
    if row.model_parallel:
        config["model_parallel"] = False
    if row.use_chat_template is not None:
        config["use_chat_template"] = row.use_chat_template
    return yaml.safe_dump(config)


def published_settings(row: Published) -> dict[str, Any]:
    """The settings of the method (not of the machine) that a file must give."""
    alpha, beta, gamma = row.act_margin
    return SHARED | {
        "inner_params": [row.layer],
        "edit_lr": row.edit_lr,
        "n_iter": row.n_iter,
        "alpha": alpha,
        "beta": beta,
        "gamma": gamma,
        "act_ratio": row.act_ratio,
        "use_chat_template": bool(row.use_chat_template),
        "model_parallel": False,
    }


def subset(hparams: WISEHyperParams, names: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(hparams, name) for name in names}


def valid(**changes: Any) -> dict[str, Any]:
    """A complete mapping; a value of ... takes the key out."""
    config = {"alg_name": "WISE", "inner_params": ["model.layers[1].mlp.down_proj.weight"], **changes}
    return {key: value for key, value in config.items() if value is not ...}


# -- EasyEdit's files -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_easyedit_files_load_unmodified(name: str, tmp_path: Path) -> None:
    row = PUBLISHED[name]
    path = tmp_path / f"{name}.yaml"
    path.write_text(upstream_yaml(row), encoding="utf-8")
    expected = published_settings(row)
    with_ending, without = WISEHyperParams.from_hparams(path), WISEHyperParams.from_hparams(str(tmp_path / name))
    assert subset(with_ending, expected) == expected
    assert with_ending == without
    assert (with_ending.model_name, with_ending.device) == (f"./hugging_cache/{row.model}", row.device)
    assert with_ending.n_shards == 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_packaged_settings_have_the_published_values(name: str) -> None:
    expected = published_settings(PUBLISHED[name])
    assert subset(WISEHyperParams.from_hparams(name), expected) == expected


@pytest.mark.upstream
@pytest.mark.skipif(not os.environ.get("EASYEDIT_HOME"), reason="EASYEDIT_HOME names no checkout of EasyEdit")
@pytest.mark.parametrize("name", PUBLISHED)
def test_files_of_a_checkout(name: str, tmp_path: Path) -> None:
    path = Path(os.environ["EASYEDIT_HOME"]) / "hparams" / "WISE" / f"{name}.yaml"
    ours = tmp_path / f"{name}.yaml"
    ours.write_text(upstream_yaml(PUBLISHED[name]), encoding="utf-8")
    assert WISEHyperParams.from_hparams(path) == WISEHyperParams.from_hparams(ours)


def test_every_packaged_name_loads_and_names_one_layer() -> None:
    names = packaged_hparams()
    assert set(PUBLISHED) < set(names)
    for name in names:
        assert len(WISEHyperParams.from_hparams(name).inner_params) == 1


def test_easyedits_own_path_finds_the_packaged_file_where_there_is_no_such_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = WISEHyperParams.from_hparams("llama3-8b")
    assert WISEHyperParams.from_hparams("./hparams/WISE/llama3-8b") == packaged
    assert WISEHyperParams.from_hparams("../hparams/WISE/llama3-8b.yaml") == packaged


def test_a_file_on_disk_goes_before_a_packaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama-7b.yaml").write_text(yaml.safe_dump(valid(n_iter=3)), encoding="utf-8")
    assert WISEHyperParams.from_hparams("llama-7b").n_iter == 3


def test_an_algorithm_without_packaged_settings_is_named() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no settings are packaged for an algorithm 'UltraEdit': did you mean 'ULTRAEDIT'"
    ):
        read_settings("smollm2-135m", "UltraEdit")


def test_an_unknown_name_lists_the_packaged_ones(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'lama-7b'.*did you mean 'llama-7b'\?.*gpt-j-6B, gpt2-xl"):
        WISEHyperParams.from_hparams("lama-7b")
    # A file that is not in the folder named is not silently another one.
    with pytest.raises(FileNotFoundError, match="does not exist"):
        WISEHyperParams.from_hparams(tmp_path / "llama-7b.yaml")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words", "n_iter: [1\nn_iter: 2", "a: b: c", "\t"])
def test_a_file_that_holds_no_settings_is_a_value_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.yaml") as caught:
        WISEHyperParams.from_hparams(path)
    assert "\n" not in str(caught.value)


# -- values ---------------------------------------------------------------------------------------


def test_the_papers_preset_is_the_papers() -> None:
    hparams = WISEHyperParams.from_dict(valid(preset="paper"))
    assert (hparams.n_iter, hparams.act_ratio, hparams.save_freq, hparams.merge_freq) == (70, 1.0, 500, 1000)
    assert (hparams.layer_units, hparams.contexts_per_step, hparams.irrelevant_prompts) == (False, None, 0)
    assert (hparams.edit_lr, hparams.mask_ratio, hparams.n_shards) == (1.0, 0.2, 2)
    assert (hparams.alpha, hparams.beta, hparams.gamma) == (5.0, 20.0, 10.0)
    assert (hparams.optimizer, hparams.weight_decay, hparams.merge_alg) == ("sgd", 0.0, "ties")
    assert (hparams.n_contexts, hparams.context_length) == (10, 10)
    assert (hparams.retrieve, hparams.rehearsal, hparams.first_token_weight) == (False, 0.0, 1.0)
    assert (hparams.score_activation, hparams.margin_over_violated, hparams.pooling) == (None, False, "mean")


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        # margins
        ({"act_margin": [5.0, 20.0]}, ["act_margin", "[5.0, 20.0]", "three numbers", "[5.0, 20.0, 10.0]"]),
        ({"act_margin": [1, 2, 3, 4]}, ["act_margin", "[1, 2, 3, 4]", "three numbers"]),
        ({"act_margin": 5.0}, ["act_margin", "5.0", "three numbers"]),
        ({"act_margin": ["a", 20, 10]}, ["act_margin", "'a'", "three numbers"]),
        ({"act_margin": [True, 20, 10]}, ["act_margin", "True", "three numbers"]),
        ({"act_margin": None}, ["act_margin", "None", "three numbers"]),
        ({"act_margin": [20.0, 20.0, 10.0]}, ["beta (20.0)", "greater than alpha (20.0)", "[5.0, 20.0, 10.0]"]),
        ({"act_margin": [30.0, 20.0, 10.0]}, ["beta (20.0)", "greater than alpha (30.0)"]),
        ({"alpha": -1.0}, ["alpha", "-1.0", "at least 0"]),
        ({"beta": float("nan")}, ["beta", "nan", "finite"]),
        ({"gamma": float("inf")}, ["gamma", "inf", "finite"]),
        # masks and shards
        ({"mask_ratio": 0}, ["mask_ratio", "0", "(0, 1]", "0.2"]),
        ({"mask_ratio": 1.5}, ["mask_ratio", "1.5", "(0, 1]"]),
        ({"mask_ratio": -1}, ["mask_ratio", "-1", "(0, 1]"]),
        ({"mask_ratio": "x"}, ["mask_ratio", "'x'", "(0, 1]"]),
        ({"mask_ratio": True}, ["mask_ratio", "True", "(0, 1]"]),
        ({"mask_ratio": float("nan")}, ["mask_ratio", "nan", "(0, 1]"]),
        ({"save_freq": 3, "merge_freq": 10}, ["merge_freq (10)", "save_freq (3)", "9 or 12"]),
        ({"save_freq": 7, "merge_freq": 4}, ["merge_freq (4)", "save_freq (7)", "7 or 14"]),
        ({"save_freq": 0}, ["save_freq", "0", "at least 1"]),
        ({"save_freq": 2.0}, ["save_freq", "2.0", "whole number"]),
        ({"merge_freq": None}, ["merge_freq", "None", "whole number"]),
        ({"merge_freq": -5}, ["merge_freq", "-5", "at least 1"]),
        ({"merge_alg": "tie"}, ["merge_alg", "'tie'", "did you mean 'ties'?", "dare_linear"]),
        ({"merge_alg": "zzz"}, ["merge_alg", "'zzz'", "Choose from: ties"]),
        ({"merge_alg": ["ties"]}, ["merge_alg", "['ties']", "Choose from"]),
        ({"densities": 0.0}, ["densities", "0.0", "(0, 1]"]),
        ({"densities": 1.2}, ["densities", "1.2", "(0, 1]"]),
        ({"weights": 0}, ["weights", "0", "greater than 0", "null"]),
        ({"weights": float("inf")}, ["weights", "inf", "finite"]),
        # training
        ({"n_iter": 0}, ["n_iter", "0", "at least 1"]),
        ({"n_iter": "many"}, ["n_iter", "'many'", "whole number"]),
        ({"n_iter": True}, ["n_iter", "True", "whole number"]),
        ({"edit_lr": 0.0}, ["edit_lr", "0.0", "greater than 0"]),
        ({"edit_lr": float("nan")}, ["edit_lr", "nan", "finite"]),
        ({"edit_lr": "fast"}, ["edit_lr", "'fast'", "number"]),
        ({"first_token_weight": 0}, ["first_token_weight", "0", "greater than 0"]),
        ({"weight_decay": -1e-5}, ["weight_decay", "-1e-05", "at least 0"]),
        ({"rehearsal": -1}, ["rehearsal", "-1", "at least 0"]),
        ({"early_stop_loss": None}, ["early_stop_loss", "None", "at least 0"]),
        ({"early_stop_change": float("inf")}, ["early_stop_change", "inf", "finite"]),
        ({"norm_constraint": 0}, ["norm_constraint", "0", "greater than 0", "null"]),
        ({"norm_constraint": float("nan")}, ["norm_constraint", "nan", "null"]),
        ({"optimizer": "adamw"}, ["optimizer", "'adamw'", "did you mean 'adam'?", "sgd, adam"]),
        ({"objective_optimization": "only_labels"}, ["objective_optimization", "did you mean 'only_label'?"]),
        # routing
        ({"act_ratio": 0}, ["act_ratio", "0", "greater than 0", "null"]),
        ({"act_ratio": "0.5"}, ["act_ratio", "'0.5'", "number"]),
        ({"act_ratio": float("inf")}, ["act_ratio", "inf", "finite"]),
        ({"epsilon_position": 1.01}, ["epsilon_position", "1.01", "[0, 1]"]),
        ({"epsilon_position": "middle"}, ["epsilon_position", "'middle'", "[0, 1]"]),
        ({"pooling": "average"}, ["pooling", "'average'", "mean, max, last, loudest"]),
        ({"score_activation": "silo"}, ["score_activation", "'silo'", "did you mean 'silu'?"]),
        # contexts
        ({"n_contexts": -1}, ["n_contexts", "-1", "0 (none) or more"]),
        ({"n_contexts": 1.5}, ["n_contexts", "1.5", "whole number"]),
        ({"irrelevant_prompts": "all"}, ["irrelevant_prompts", "'all'", "whole number"]),
        ({"contexts_per_step": 0}, ["contexts_per_step", "0", "at least 1"]),
        ({"context_length": 0}, ["context_length", "0", "at least 1"]),
        ({"batch_size": 0}, ["batch_size", "0", "at least 1"]),
        ({"max_length": None}, ["max_length", "None", "whole number"]),
        ({"seed": "lucky"}, ["seed", "'lucky'", "whole number"]),
        ({"seed": 1.5}, ["seed", "1.5", "whole number"]),
        # switches and paths
        ({"retrieve": "False"}, ["retrieve", "'False'", "true or false"]),
        ({"subject_routing": "no"}, ["subject_routing", "'no'", "true or false"]),
        ({"replay": 1}, ["replay", "1", "true or false"]),
        ({"use_chat_template": None}, ["use_chat_template", "None", "true or false"]),
        ({"margin_over_violated": "yes"}, ["margin_over_violated", "'yes'", "true or false"]),
        ({"save_path": 5}, ["save_path", "5", "text"]),
        ({"load_path": Path("edits")}, ["load_path", "edits", "text"]),
        # the layer
        ({"inner_params": ["a.weight", "b.weight"]}, ["2 matrices", "a.weight, b.weight", "exactly one"]),
        ({"inner_params": "model.layers[1].weight"}, ["inner_params", "model.layers[1].weight", "a list"]),
        ({"inner_params": []}, ["inner_params", "[]", "a list", "or be left out"]),
        ({"inner_params": [""]}, ["inner_params", "''", "name"]),
        ({"inner_params": [27]}, ["inner_params", "27", "name"]),
        # the rest
        ({"alg_name": "ROME"}, ["alg_name", "'ROME'", "'WISE'"]),
        ({"mask_ration": 0.2}, ["'mask_ration'", "did you mean 'mask_ratio'?", "Known settings", "act_margin"]),
        ({"act_margins": [5, 20, 10]}, ["'act_margins'", "did you mean 'act_margin'?"]),
        ({5: "five"}, ["unknown WISE setting 5", "Known settings"]),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_a_value_that_does_not_fit(changes: dict[Any, Any], fragments: list[str]) -> None:
    config = {"alg_name": "WISE", "inner_params": ["model.layers[1].mlp.down_proj.weight"]} | changes
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the fragments are the match
        WISEHyperParams.from_dict({key: value for key, value in config.items() if value is not ...})
    message = str(caught.value)
    assert type(caught.value) is ValueError
    assert "\n" not in message
    assert message.endswith(".")
    for fragment in fragments:
        assert fragment in message


def test_a_field_that_is_assigned_later_is_checked_when_it_is_used() -> None:
    hparams = WISEHyperParams.from_dict(valid())
    hparams.mask_ratio = 2.0
    with pytest.raises(ValueError, match=r"mask_ratio \(rho\) is 2\.0"):
        WISEHyperParams.from_any(hparams)


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_ratio": 1, "densities": 1, "epsilon_position": 0},
        {"act_margin": [0, 1, 0]},
        {"save_freq": 5, "merge_freq": 5},
        {"norm_constraint": None, "act_ratio": None, "weights": None, "densities": None},
        {"n_contexts": 0, "contexts_per_step": 99, "n_iter": 1},
        {"seed": 0, "early_stop_loss": 0, "weight_decay": 0},
    ],
)
def test_values_on_the_edge_fit(changes: dict[str, Any]) -> None:
    config = valid(**changes)
    hparams = WISEHyperParams.from_dict(config)
    assert {key: getattr(hparams, key) for key in changes if key != "act_margin"} == {
        key: value for key, value in changes.items() if key != "act_margin"
    }


@pytest.mark.parametrize(
    ("save_freq", "merge_freq", "k"), [(500, 1000, 2), (None, 1000, 1), (1, 7, 7), (4, 4, 1), (50, 150, 3)]
)
def test_n_shards(save_freq: int | None, merge_freq: int, k: int) -> None:
    assert WISEHyperParams.from_dict(valid(save_freq=save_freq, merge_freq=merge_freq)).n_shards == k


def test_scientific_notation_that_yaml_reads_as_text(tmp_path: Path) -> None:
    path = tmp_path / "scientific.yaml"
    path.write_text(
        "inner_params: ['model.layers[1].mlp.down_proj.weight']\n"
        "edit_lr: 1e-4\nweight_decay: 1E-5\nearly_stop_loss: 2e-2\nmodel_name: ./cache/one\nact_ratio: 5e-1\n",
        encoding="utf-8",
    )
    hparams = WISEHyperParams.from_hparams(path)
    assert (hparams.edit_lr, hparams.weight_decay, hparams.early_stop_loss) == (1e-4, 1e-5, 0.02)
    assert (hparams.act_ratio, hparams.model_name) == (0.5, "./cache/one")


def test_from_dict_leaves_the_mapping_alone() -> None:
    config = valid(act_margin=[1.0, 2.0, 3.0], edit_lr="1e-1")
    before = dict(config)
    WISEHyperParams.from_dict(config)
    assert config == before


# -- other hosts' objects -------------------------------------------------------------------------


@dataclasses.dataclass
class HostSettings:
    """A host's own WISE settings object, with fields that are not ours."""

    inner_params: list[str]
    alpha: float = 2.0
    beta: float = 9.0
    gamma: float = 4.0
    act_ratio: float = 0.5
    edit_lr: float = 0.9
    retrieve: bool = True
    alg_name: str = "WISE"
    model_name: str = "./hugging_cache/llama"
    device: Any = 0
    evaluation_type: str = "LLM-judge"
    api_key: str | None = None


def test_from_any_takes_a_foreign_object() -> None:
    host = HostSettings(["model.layers[1].mlp.down_proj.weight"])
    host.sequential_edit = True  # a field that somebody set by hand
    hparams = WISEHyperParams.from_any(host)
    assert (hparams.alpha, hparams.beta, hparams.gamma) == (2.0, 9.0, 4.0)
    assert (hparams.act_ratio, hparams.edit_lr, hparams.retrieve) == (0.5, 0.9, True)
    assert not hasattr(hparams, "api_key")


def test_from_any_checks_a_foreign_object() -> None:
    with pytest.raises(ValueError, match=r"beta \(1\.0\) must be greater than alpha \(2\.0\)"):
        WISEHyperParams.from_any(HostSettings(["a.weight"], beta=1.0))
    with pytest.raises(ValueError, match="alg_name is 'GRACE'"):
        WISEHyperParams.from_any(HostSettings(["a.weight"], alg_name="GRACE"))


def test_from_any_takes_our_own_as_it_is_and_a_mapping() -> None:
    hparams = WISEHyperParams.from_dict(valid(n_iter=9))
    assert WISEHyperParams.from_any(hparams) is hparams
    assert WISEHyperParams.from_any(valid(n_iter=9)) == hparams


@pytest.mark.parametrize("nothing", [None, "llama-7b", 3])
def test_from_any_explains_what_is_no_settings_object(nothing: Any) -> None:
    with pytest.raises(ValueError, match=r"hparams is .*from_hparams"):
        WISEHyperParams.from_any(nothing)


# -- as a file beside results ---------------------------------------------------------------------


@pytest.mark.parametrize("device", [0, None, "cuda:1", torch.device("cpu")])
def test_to_dict_is_plain_and_comes_back(device: Any) -> None:
    hparams = WISEHyperParams.from_dict(
        valid(device=device, act_margin=[1, 2, 3], save_freq=None, score_activation="silu")
    )
    again = WISEHyperParams.from_dict(json.loads(json.dumps(hparams.to_dict())))
    assert again == dataclasses.replace(hparams, device=device if not isinstance(device, torch.device) else "cpu")


# -- what somebody sets on an object later --------------------------------------------------------


def test_a_preset_cannot_be_assigned_later() -> None:
    hparams = WISEHyperParams.from_dict(valid())
    with pytest.raises(
        ValueError, match=r"preset 'default' was assigned to settings that are made already.*from_preset"
    ):
        hparams.preset = "default"
    with pytest.raises(ValueError, match="preset is 'papr': did you mean 'paper'"):
        hparams.preset = "papr"
    assert not hasattr(hparams, "preset")


def test_act_margin_can() -> None:
    hparams = WISEHyperParams.from_dict(valid())
    hparams.act_margin = [1, 7, 3]
    assert (hparams.alpha, hparams.beta, hparams.gamma) == (1.0, 7.0, 3.0)
    assert hparams.act_margin == [1.0, 7.0, 3.0]
    with pytest.raises(ValueError, match="act_margin is 3: it must be three numbers"):
        hparams.act_margin = 3  # type: ignore[assignment]


def foreign(**attributes: Any) -> Any:
    host = HostSettings(["model.layers[1].mlp.down_proj.weight"])
    vars(host).update(attributes)
    return host


def ours(**attributes: Any) -> Any:
    hparams = WISEHyperParams.from_dict(valid())
    vars(hparams).update(attributes)
    return hparams


OBJECTS = pytest.mark.parametrize("make", [foreign, ours], ids=["host's", "ours"])


@OBJECTS
@pytest.mark.parametrize("name", ["n_iters", "optimiser", "save_paths", "evaluation_types"])
def test_a_slip_is_an_error(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"attribute '{name}', which is no WISE setting: did you mean '"):
        WISEHyperParams.from_any(make(**{name: 1}))


@OBJECTS
def test_what_nobody_knows_is_said_to_have_no_effect(make: Any) -> None:
    with pytest.warns(
        UserWarning, match="attribute 'temperature', which is neither a WISE setting nor one that EasyEdit"
    ):
        WISEHyperParams.from_any(make(temperature=0.7))


@OBJECTS
def test_what_easyedit_sets_or_reads_passes(make: Any, recwarn: pytest.WarningsRecorder) -> None:
    host_names = {"evaluation_type": "LLM-judge", "api_key": "k", "sequential_edit": True, "hidden_act": "silu"}
    WISEHyperParams.from_any(make(**host_names, _simie_instance=None, exact_match=True, dtype=torch.float16))
    assert not recwarn.list


def test_our_settings_hold_on_a_foreign_object() -> None:
    hparams = WISEHyperParams.from_any(foreign(journal="j", optimizer="adam", act_margin=[1.0, 3.0, 2.0], seed=7))
    assert (hparams.journal, hparams.optimizer, hparams.seed) == ("j", "adam", 7)
    assert hparams.act_margin == [1.0, 3.0, 2.0]


def test_a_preset_in_the_hosts_terms_holds_on_a_foreign_object() -> None:
    hparams = WISEHyperParams.from_any(foreign(preset="upstream"))
    assert (hparams.padding_counts, hparams.edit_lr) == (True, 0.9)  # the preset's, and the object's own


@pytest.mark.parametrize("preset", ["default", "margin"])
def test_a_preset_that_its_values_contradict_is_refused(preset: str) -> None:
    with pytest.raises(ValueError, match=rf"preset '{preset}' was set on a HostSettings.*contradict.*from_preset"):
        WISEHyperParams.from_any(foreign(preset=preset))


def test_a_preset_beside_units_is_meant() -> None:
    hparams = WISEHyperParams.from_any(foreign(preset="margin", layer_units=True))
    assert (hparams.optimizer, hparams.edit_lr) == ("lion", 0.9)


@pytest.mark.parametrize("key", ["name", "dtype", "qformer_checkpoint"])
def test_a_multimodal_file(key: str) -> None:
    with pytest.raises(ValueError, match=rf"vision-language model \(they have {key}\).*WISEMultimodalHyperParams"):
        WISEHyperParams.from_dict(valid(sequential_edit=False, **{key: "."}))


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_our_own_files_leave_the_device_to_the_host(name: str) -> None:
    # EasyEdit's GitHub version takes 0 for a GPU, also where there is none; without a name it looks.
    assert WISEHyperParams.from_hparams(name).device is None
