"""The settings object that an algorithm of the installed EasyEdit wants, made by EasyEdit's own reader.

The readers do more than pass values on: some give a key another name, SimIE's reads its base method's file, too. So the
settings are written to a file and read back by the host.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ..checks import nearest
from .registry import ALG_NAME, HOST

BASE_METHOD, BASE_SETTINGS = "base_method", "base_hparams"
"""SimIE's setting that names another algorithm, and where our mapping holds that one's settings."""

# What an EasyEdit does that has no such setting: the wheel's FT and LoRA know one way each.
_WITHOUT_THE_SETTING: Mapping[str, Any] = {
    "objective_optimization": "prompt_last",
    "lora_type": "adalora",
    "model_parallel": False,
    "fp16": False,
}
_PATHS = ("_dir", "_loc", "_path", "_file")
# AlphaEdit and SPHERE look for their projections under the name that is set, and write them under this one.
_PROJECTIONS, _PROJECTIONS_FILE = "P_loc", "null_space_project.pt"

Algorithms = Mapping[str, Callable[..., Any]]


def host_settings(name: str, algorithms: Algorithms, config: Mapping[str, Any], model: nn.Module, folder: Path) -> Any:
    """The host's settings object of an algorithm.

    Args:
        name: of the algorithm.
        algorithms: the host's registry.
        config: settings by name; for SimIE with its base method's under ``base_hparams``.
        model: which is edited.
        folder: where the files are written. A relative path among the settings is looked for from here and, where there
            is no such file, means one in the folder that the algorithm runs in.

    Raises:
        ValueError: the host has no settings class for it, or the settings do not fit, or the base method is WISE.
    """
    own = {key: value for key, value in config.items() if key != BASE_SETTINGS}
    base = config.get(BASE_METHOD)
    if base == ALG_NAME:
        raise ValueError(
            f"{name} over {base} is not run: {name} mends the weights that its base method changed, and {base} changes "
            f"none. Name {base} itself, or another {BASE_METHOD}, such as ROME."
        )
    if base is not None:
        _write(base, algorithms, config.get(BASE_SETTINGS) or {}, model, folder)
    cls, fitted, path = _write(name, algorithms, own, model, folder)
    try:
        return cls.from_hparams(str(path)) if hasattr(cls, "from_hparams") else cls(**fitted)
    except TypeError as error:
        known = [one.name for one in dataclasses.fields(cls)]
        unknown = [key for key in own if key not in known and repr(key) in str(error)]
        if unknown:
            raise ValueError(f"unknown {name} setting {unknown[0]!r}{nearest(unknown[0], known)}") from error
        raise ValueError(f"the settings of {name} are not complete: {error}.") from error
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"{HOST} does not read the settings of {name}: {type(error).__name__}: {error}") from error


def method_of(name: str, config: Mapping[str, Any]) -> str:
    """The algorithm that makes the edits: SimIE's base method, or the algorithm itself."""
    return str(config.get(BASE_METHOD, name))


def _write(
    name: str, algorithms: Algorithms, config: Mapping[str, Any], model: nn.Module, folder: Path
) -> tuple[Any, dict[str, Any], Path]:
    """(settings class, settings that fit it, the file that they are in)."""
    if name not in algorithms:
        raise ValueError(f"the base method {name!r} is no algorithm{nearest(name, list(algorithms))}")
    cls = _settings_class(name, algorithms[name])
    fitted = _fitted(name, cls, config, model)
    path = folder / "hparams" / name / "settings.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(fitted, sort_keys=False), encoding="utf-8")
    return cls, fitted, path


def _settings_class(name: str, apply: Callable[..., Any]) -> Any:
    """Its class is called ``ROMEHyperParams``, ``R_ROMEHyperParams`` and the like. It is looked for beside the
    algorithm first: EasyEdit's MELO has a ``GRACEHyperParams``, too, which is not GRACE's."""
    wanted = _plain(f"{name}HyperParams")
    own = ".".join(apply.__module__.split(".")[:3])  # easyeditor.models.grace
    modules = [
        (key, module) for key, module in sys.modules.items() if key.split(".")[:2] == [HOST, "models"] and module
    ]
    modules.sort(key=lambda one: not f"{one[0]}.".startswith(f"{own}."))
    found = (value for _, module in modules for key, value in vars(module).items() if _plain(key) == wanted)
    cls: Any = next(found, None)
    if not hasattr(cls, "__dataclass_fields__"):
        raise ValueError(f"{HOST} has no settings class for {name}: it cannot be run in a stream.")
    return cls


def _plain(name: str) -> str:
    return name.casefold().replace("-", "").replace("_", "")


def _fitted(name: str, cls: Any, config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The settings as this host's class has them, for this model and its device."""
    fields = {one.name: one for one in dataclasses.fields(cls)}
    fitted = {**config, "device": str(next(model.parameters()).device)}
    if "alg_name" in fields:
        fitted.setdefault("alg_name", name)
    for key, only in _WITHOUT_THE_SETTING.items():
        if key in fields:
            if fields[key].default is dataclasses.MISSING:
                fitted.setdefault(key, only)
        elif fitted.pop(key, only) != only:
            raise ValueError(
                f"{key} of {name} is {config[key]!r}, but the installed EasyEdit has no such setting and does what "
                f"{only!r} means: set that, or run EasyEdit's GitHub version."
            )
    for key, value in fitted.items():
        if key in fields and typing.get_origin(fields[key].type) is list and isinstance(value, (str, int, float)):
            raise ValueError(f"{key} of {name} is {value!r}: it must be a list, such as [{value}].")
        if key.endswith(_PATHS) and isinstance(value, str):
            found = Path(value).exists()
            fitted[key] = str(Path(value).absolute()) if found else _PROJECTIONS_FILE if key == _PROJECTIONS else value
    # EasyEdit tells kinds of models by their names, and some methods compute another loss for a name that tells none.
    kind, called = getattr(model.config, "model_type", ""), fitted.get("model_name")
    if isinstance(called, str) and kind not in called.lower():
        fitted["model_name"] = f"{kind}-{called}"
    return fitted
