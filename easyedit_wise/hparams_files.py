"""Settings in YAML files: on disk, or packaged."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .checks import nearest


def read_settings(name_or_path: str | Path, alg_name: str = "WISE") -> dict[str, Any]:
    """The mapping of a YAML file, or of an algorithm's packaged one such as ``"llama-7b"``.

    The ending ``.yaml`` may be left out, as in EasyEdit. A file on disk goes before a packaged one,
    and EasyEdit's own ``hparams/WISE/llama-7b`` names the packaged one where no such folder is.

    Raises:
        FileNotFoundError: neither a file nor a packaged name; the packaged names are listed.
        ValueError: the file is not a YAML mapping.
    """
    name = str(name_or_path)
    path = Path(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        packaged = resources.files(__package__) / "data" / "hparams" / alg_name / path.name
        # Another folder's name means that folder: its file being absent must not pass unseen.
        is_name = path.parent.parts[-2:] in ((), ("hparams", alg_name))
        if not is_name or not packaged.is_file():
            names = packaged_hparams(alg_name)
            if not names:  # of this algorithm, or of any, as inside EasyEdit
                others = _packaged_algorithms()
                none = f", and no settings are packaged for an algorithm {alg_name!r}{nearest(alg_name, others)}"
                none += f" There are some for {', '.join(others)}."
                raise FileNotFoundError(
                    f"{path} does not exist{none if others else '.'} Name the YAML file of the settings."
                )
            raise FileNotFoundError(
                f"{path} does not exist and no packaged settings are called {path.stem!r}"
                f"{nearest(path.stem, names)} Packaged: {', '.join(names)}."
            )
        text = packaged.read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} does not hold settings: expected 'key: value' lines.")
    return config


def _packaged_algorithms() -> list[str]:
    folder = resources.files(__package__) / "data" / "hparams"
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


def packaged_hparams(alg_name: str = "WISE") -> list[str]:
    """Names of an algorithm's settings that are found without a path; none for an algorithm without any."""
    folder = resources.files(__package__) / "data" / "hparams" / alg_name
    if not folder.is_dir():
        return []
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))
