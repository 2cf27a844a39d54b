"""``BaseEditor.batch_edit`` and ``edit_dataset`` of the PyPI wheel, as EasyEdit's current code means the former.

The wheel's own give the metrics of the last batch only, and score the model "before" a batch when its edits are taken
back, or, in a sequence, when they are made; its ``batch_edit`` takes no ``locality_inputs`` or ``portability_inputs``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from time import time
from typing import Any

import numpy as np
import torch

LOG = logging.getLogger(__name__)


def batch_edit(
    editor: Any,
    prompts: Sequence[str],
    target_new: Sequence[str],
    ground_truth: str | Sequence[str] | None = None,
    rephrase_prompts: str | Sequence[str] | None = None,
    locality_inputs: dict[str, Any] | None = None,
    portability_inputs: dict[str, Any] | None = None,
    keep_original_weight: bool | None = None,
    verbose: bool = True,
    sequential_edit: bool | None = None,
    **kwargs: Any,
) -> tuple[list[dict[str, Any]], Any, Any]:
    """Make edits, ``hparams.batch_size`` of them together, and score each batch right after it.

    Args:
        editor: the wheel's ``BaseEditor``.
        prompts: one of each edit.
        target_new: what shall follow each.
        ground_truth: what followed it before.
        rephrase_prompts: one of each edit, to score generalisation with.
        locality_inputs: by name, ``{"prompt": [...], "ground_truth": [...]}``, one of each edit.
        portability_inputs: likewise.
        keep_original_weight: the wheel's own name for the opposite of ``sequential_edit``, which goes before it.
        verbose: log each edit's scores.
        sequential_edit: True: no batch is taken back. False: each is, before the next. None, and no
            ``keep_original_weight`` either: what the algorithm gives back decides; the wheel's own give nothing.
        **kwargs: ``subject``, ``loc_prompts``, ``test_generation``.

    Returns:
        (the metrics of each edit, in order, the edited model, what restores the last batch).

    Raises:
        ValueError: lists of other lengths, the algorithm cannot edit in batches, or the wheel's names
            ``locality_prompts`` and ``locality_ground_truth``, which never meant what they say.
    """
    host = sys.modules["easyeditor.editors.editor"].__dict__
    for name in ("locality_prompts", "locality_ground_truth"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"batch_edit got {name}: write locality_inputs={{'neighborhood': {{'prompt': [...], 'ground_truth': "
                "[...]}}, with one prompt for each edit."
            )
        kwargs.pop(name, None)
    truths = ["<|endoftext|>"] * len(prompts) if ground_truth is None else ground_truth
    truths = [truths] if isinstance(truths, str) else truths
    if not len(prompts) == len(target_new) == len(truths):
        raise ValueError(
            f"batch_edit got {len(prompts)} prompts, {len(target_new)} target_new and {len(truths)} ground_truth: "
            "each edit needs one of each."
        )
    if not host["BatchEditor"].is_batchable_method(editor.alg_name):
        raise ValueError(f"{editor.alg_name} cannot edit in batches: use edit(), one request after the other.")
    requests = editor._prepare_requests(
        prompts, target_new, truths, rephrase_prompts, locality_inputs, portability_inputs, **kwargs
    )
    sequential = _sequential(sequential_edit, keep_original_weight)
    return _edit(editor, requests, editor.hparams.batch_size, sequential, verbose, kwargs.get("test_generation", False))


def edit_dataset(
    editor: Any,
    ds: Any,
    keep_original_weight: bool | None = None,
    verbose: bool = True,
    sequential_edit: bool | None = None,
) -> tuple[list[dict[str, Any]], Any, Any]:
    """Make the edits of one of the wheel's data sets; otherwise as :func:`batch_edit`.

    Raises:
        ValueError: it is none of the wheel's.
    """
    host = sys.modules["easyeditor.editors.editor"].__dict__
    known = tuple(host["DS_DICT"].values())
    if not isinstance(ds, known):
        names = ", ".join(one.__name__ for one in known)
        raise ValueError(f"edit_dataset got a {type(ds).__name__}: it takes {names}; use batch_edit() for others.")
    size = 1 if host["SingletonEditor"].is_singleton_method(editor.alg_name) else editor.hparams.batch_size
    requests = [ds[index] for index in range(len(ds))]
    return _edit(editor, requests, size, _sequential(sequential_edit, keep_original_weight), verbose, False)


def _sequential(sequential_edit: bool | None, keep_original_weight: bool | None) -> bool | None:
    """Whether edits stay; None: the algorithm decides."""
    if sequential_edit is None and keep_original_weight is not None:
        return not keep_original_weight
    return sequential_edit


def _edit(
    editor: Any, requests: Sequence[dict[str, Any]], size: int, sequential: bool | None, verbose: bool, generate: bool
) -> tuple[list[dict[str, Any]], Any, Any]:
    score = sys.modules["easyeditor.editors.editor"].__dict__["compute_edit_quality"]
    name, hparams, tok = editor.model_name, editor.hparams, editor.tok

    def scores(model: Any, request: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = score(model, name, hparams, tok, request, hparams.device, test_generation=generate)
        return found

    keep = sequential is False
    metrics: list[dict[str, Any]] = []
    edited, restore = editor.model, None
    for start in range(0, len(requests), size):
        batch = requests[start : start + size]
        before = [scores(editor.model, request) for request in batch]
        began = time()
        edited, restore = editor.apply_algo(
            editor.model, tok, batch, hparams, copy=False, return_orig_weights=True, keep_original_weight=keep
        )
        seconds = time() - began
        for number, (request, pre) in enumerate(zip(batch, before, strict=True), start):
            case = request.get("case_id", number)
            made = {"case_id": case, "requested_rewrite": request, "time": seconds, "pre": pre}
            metrics.append({**made, "post": scores(edited, request)})
            _compare_locality(metrics[-1])
            if verbose:
                LOG.info("%s editing: %s -> %s\n %s", case, request["prompt"], request["target_new"], metrics[-1])
        if not sequential:
            _take_back(editor, edited, restore, keep)
    return metrics, edited, restore


def _compare_locality(metric: dict[str, Any]) -> None:
    """``<name>_acc``: the share of tokens that are as before, in place of the tokens, as ``edit`` reports it."""
    before, after = metric["pre"].pop("locality", {}), metric["post"].get("locality", {})
    for key in [key for key in after if key.endswith("_output")]:
        pairs = zip(before[key], after.pop(key), strict=True)
        after[f"{key.removesuffix('_output')}_acc"] = [float(np.mean(np.equal(old, new))) for old, new in pairs]


def _take_back(editor: Any, edited: Any, restore: Mapping[str, torch.Tensor] | Callable[[], None], keep: bool) -> None:
    """As the wheel's ``edit`` does, of each algorithm."""
    if callable(restore):
        restore()
    elif editor.alg_name == "LoRA" and keep:
        edited.unload()
        del editor.model.peft_config
    else:
        weights = dict(editor.model.named_parameters())
        with torch.no_grad():
            for name, value in restore.items():
                weights[name].copy_(value)
