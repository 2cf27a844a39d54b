"""The method ``save`` of an edited model, which EasyEdit's GitHub version calls when a sequence of edits is over."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from ..persistence import save_edits
from ..tuner.attach import lend

LOG = logging.getLogger(__name__)

_NAME = "save"


class EditsSaver:
    """Saves a model's edits when it is called, and remembers where they are.

    Attributes:
        saved_to: the folder that holds the edits as they are now; None as long as they are in no folder.
    """

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self._model, self._adapter_name = model, adapter_name
        self.saved_to: Path | None = None

    def __call__(self, path: str | Path) -> None:
        """Write the edits into the folder ``path``.

        Raises:
            ValueError: it cannot be saved to, or the model carries no such edits any more.
        """
        save_edits(self._model, path, self._adapter_name)
        self.saved_to = Path(path).expanduser().resolve()

    def after_a_failure(self, path: str | Path) -> None:
        """Save what stands; if that fails, too, it is logged: what the user has to hear of is the first failure."""
        try:
            self(path)
        except Exception:
            LOG.exception("the edits that were made before the failure could not be saved in %s.", path)
        else:
            LOG.warning("the edits that were made before the failure are saved in %s.", path)


def lend_save(model: nn.Module, adapter_name: str) -> EditsSaver:
    """Give a model the method ``save`` for its edits as they are now, saved nowhere yet.

    It goes with the edits. A method ``save`` that the model's own class has stays.
    """
    saver = EditsSaver(model, adapter_name)
    if not hasattr(type(model), _NAME):
        lend(model, _NAME, saver)
    return saver


def saver_of(model: object) -> EditsSaver | None:
    """What :func:`lend_save` gave a model; None where no edits were made on it through EasyEdit's contract."""
    saver = getattr(model, "__dict__", {}).get(_NAME)
    return saver if isinstance(saver, EditsSaver) else None
