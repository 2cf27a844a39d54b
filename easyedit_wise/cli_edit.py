"""The command that edits a model without EasyEdit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from .easyedit.apply import apply_wise_to_model
from .editing.requests import EditRequest
from .hparams import WISEHyperParams
from .journal.calls import close_journal
from .persistence import save_edits
from .tuner.adapter_tensors import check_save_dtype
from .tuner.model import find_wise_layers


def run_edit(
    requests: Path,
    model: str,
    hparams: str | None,
    out: Path | None,
    journal: Path | None,
    console: Console,
    save_dtype: str | None = None,
) -> None:
    """Edit a model; save the edits into a folder, or keep them in a journal, or both.

    Without settings they are the defaults, and the layer is chosen by the model's architecture.

    Raises:
        ValueError: neither a folder nor a journal is named, or what is asked for does not fit.
    """
    if out is None and journal is None:
        raise ValueError("the edits would be lost: name a folder for them with --out, or a journal with --journal.")
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: edits are saved as a folder, so name another path.")
    if save_dtype is not None:
        check_save_dtype(save_dtype)
    settings = WISEHyperParams() if hparams is None else WISEHyperParams.from_hparams(hparams)
    wanted: Any = json.loads(requests.read_text(encoding="utf-8"))
    if not isinstance(wanted, list) or not wanted:
        raise ValueError(f"{requests} must hold a non-empty list of requests.")
    for request in wanted:  # before the model is loaded, which takes its time
        EditRequest.from_easyedit(request, settings.target_separator)
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.set_verbosity_error()
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    tok = AutoTokenizer.from_pretrained(model)
    settings.model_name = model
    if journal is not None:
        settings.journal = str(journal)
    edited, _ = apply_wise_to_model(base, tok, wanted, settings)
    close_journal(edited)
    if out is not None:
        save_edits(edited, out, save_dtype=save_dtype)
    kept = " and ".join([*([f"saved in {out}"] if out else []), *([f"journaled in {journal}"] if journal else [])])
    console.print(f"{len(wanted)} edits {kept}.", soft_wrap=True)
    if settings.inner_params is None:
        layer = next(iter(find_wise_layers(edited)))
        console.print(f"They are in {layer}, by the model's architecture: --hparams may name another.", soft_wrap=True)
