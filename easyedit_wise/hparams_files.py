"""Settings in YAML files: on disk, or packaged."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .checks import nearest


def read_settings(name_or_path: str | Path) -> dict[str, Any]:
    """The mapping of a YAML file, or of a packaged one such as ``"llama-7b"``.

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
        packaged = resources.files("easyedit_wise") / "data" / "hparams" / "WISE" / path.name
        # Another folder's name means that folder: its file being absent must not pass unseen.
        is_name = path.parent.parts[-2:] in ((), ("hparams", "WISE"))
        if not is_name or not packaged.is_file():
            names = packaged_hparams()
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


def packaged_hparams() -> list[str]:
    """Names that :func:`read_settings` finds without a path."""
    folder = resources.files("easyedit_wise") / "data" / "hparams" / "WISE"
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))
