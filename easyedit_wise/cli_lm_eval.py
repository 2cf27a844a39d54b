"""The command that runs lm-evaluation-harness with saved edits.

The harness loads an adapter with PEFT and never imports this package, so that PEFT does not know the type "WISE". Here
it is imported, and what runs then is the harness's own command line.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from .tuner.registration import register_with_peft

HARNESS = "lm_eval"


def harness_command() -> Callable[[], None]:
    """The harness's own command line, which reads ``sys.argv``.

    Raises:
        ImportError: the harness is not installed; what to install is named.
    """
    module = f"{HARNESS}.__main__"
    try:
        command: Callable[[], None] = importlib.import_module(module).cli_evaluate
    except ModuleNotFoundError as error:
        if error.name not in (HARNESS, module):
            raise  # what the harness itself misses is its own error
        raise ImportError("lm-evaluation-harness is not installed: pip install lm-eval") from error
    return command


def run_lm_eval(command: Callable[[], None], arguments: Sequence[str]) -> None:
    """Run the harness's command line in this process, with ``peft=FOLDER`` understood for saved edits.

    Args:
        command: from :func:`harness_command`.
        arguments: what follows ``lm_eval`` on its command line.
    """
    register_with_peft()
    before = sys.argv
    sys.argv = [HARNESS, *arguments]
    try:
        command()
    finally:
        sys.argv = before
