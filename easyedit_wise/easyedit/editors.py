"""EasyEdit's ``BaseEditor``, where one of its calls makes many edits with WISE.

It applies an algorithm once for each request. What concerns the call as a whole has its place around it: the settings
are checked before anything is computed; the edits are saved once, when the call is over, and also when it fails or is
interrupted, so that those made until then are not lost; and ``normal_edit`` gives back a model with the edits.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from ..hparams import WISEHyperParams
from ..persistence import check_save_path
from .saving import saver_of

LOG = logging.getLogger(__name__)

# Those of either EasyEdit that apply an algorithm.
CALLS = ("edit", "edit_requests", "batch_edit", "normal_edit", "generate_edit", "edit_dataset")


def around_wise(method: Callable[..., Any], apply_wise: Callable[..., Any]) -> Callable[..., Any]:
    """A method of ``BaseEditor`` that edits; unchanged for an editor with another algorithm.

    Args:
        method: one of :data:`CALLS`.
        apply_wise: the registered function; an editor that has it edits with WISE.

    Returns:
        The method. It raises ValueError where the settings do not fit or ``save_path`` cannot be saved to, before an
        edit is made.
    """
    keeps = method.__name__ == "normal_edit"

    @functools.wraps(method)
    def call(editor: Any, *args: Any, **kwargs: Any) -> Any:
        # Another algorithm; or one of these methods called from another, which is around it already.
        if getattr(editor, "apply_algo", None) is not apply_wise:
            return method(editor, *args, **kwargs)
        path = WISEHyperParams.from_any(editor.hparams).save_path
        if path:
            check_save_path(path)
        restores: list[Any] = []

        @functools.wraps(apply_wise)
        def apply(*given: Any, **named: Any) -> tuple[Any, Any]:
            model, restore = apply_wise(*given, save=False, **named)
            restores.append(restore)
            # normal_edit puts back what it is given before it returns the model, whatever it was asked.
            return model, {} if keeps else restore

        editor.apply_algo = apply
        try:
            result = method(editor, *args, **kwargs)
        except BaseException:
            saver = saver_of(editor.model)
            if path and saver is not None and saver.saved_to is None:
                saver.after_a_failure(path)
            raise
        finally:
            editor.apply_algo = apply_wise
        path = getattr(editor.hparams, "save_path", None)  # EasyEdit asks at the end, too
        if path:
            _save(editor.model, path)
        return (*result[:-1], restores[-1]) if keeps and restores else result

    return call


def _save(model: Any, path: str) -> None:
    saver = saver_of(model)
    if saver is None:
        LOG.warning(
            "save_path is %r, but nothing is saved there: the model carries no edits, since sequential_edit=False "
            "takes each one back. With sequential_edit=True they stay, and are saved.",
            path,
        )
    elif saver.saved_to != check_save_path(path):  # EasyEdit's GitHub version has saved those of edit() itself
        saver(path)
