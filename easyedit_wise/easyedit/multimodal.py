"""WISE for EasyEdit's ``MultimodalEditor``: the text side of a vision-language model.

A request of this editor always has an image. What is trained here is its text, so the answer is given whatever image
stands before the question. Where that is not what was meant, a request is refused rather than half understood.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from ..checks import check_switch

ALG_NAME = "WISE"
_RECORD = "_easyedit_wise_multimodal_record"
_UNREGISTER = "easyedit_wise.unregister() gives EasyEdit's own multimodal WISE back."


@dataclass(frozen=True)
class _Record:
    """What registering replaced, for :func:`unregister_multimodal`."""

    previous: Any
    listed: bool


def register_multimodal(alg_dict: ModuleType) -> None:
    """Make ``ALG_MULTIMODAL_DICT["WISE"]`` ours, where a host has such a table; again: nothing changes.

    Args:
        alg_dict: the host's module with its tables, which keeps what was there before.
    """
    table: dict[str, Any] | None = getattr(alg_dict, "ALG_MULTIMODAL_DICT", None)
    if table is None:
        return
    names: set[str] = getattr(alg_dict, "MULTIMODAL_EDIT_ALGS", set())
    if not hasattr(alg_dict, _RECORD):
        setattr(alg_dict, _RECORD, _Record(table.get(ALG_NAME), ALG_NAME in names))
    table[ALG_NAME] = apply_wise_to_multimodal_model
    names.add(ALG_NAME)


def unregister_multimodal(alg_dict: ModuleType) -> None:
    """Give a host its own multimodal WISE back, or take WISE out where it had none."""
    record: _Record | None = getattr(alg_dict, _RECORD, None)
    if record is None:
        return
    if record.previous is None:
        alg_dict.ALG_MULTIMODAL_DICT.pop(ALG_NAME, None)
    else:
        alg_dict.ALG_MULTIMODAL_DICT[ALG_NAME] = record.previous
    if not record.listed:
        getattr(alg_dict, "MULTIMODAL_EDIT_ALGS", set()).discard(ALG_NAME)
    delattr(alg_dict, _RECORD)


def apply_wise_to_multimodal_model(
    model: nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]] | Mapping[str, Any],
    hparams: Any,
    copy: bool = False,
    **kwargs: Any,
) -> tuple[nn.Module, Any]:
    """Edit what a vision-language model says to a text, with or without an image before it.

    Args:
        model: a Hugging Face vision-language model.
        tok: its processor, or its tokenizer.
        requests: one request or several, with ``prompt``, ``target``, ``image`` and optionally ``subject`` and
            ``loc_prompt``. An ``image`` goes with ``any_image`` only.
        hparams: ``WISEMultimodalHyperParams``, ours or EasyEdit's; ``any_image`` may be set on either.
        copy: edit a deep copy and leave ``model`` alone.
        **kwargs: what EasyEdit passes to other algorithms; not used.

    Returns:
        (the edited model, an object that restores it), as :func:`~easyedit_wise.apply_wise_to_model` does.

    Raises:
        ValueError: a request has an image and nothing says that its fact holds for any; the model is one of EasyEdit's
            own wrappers (BLIP-2, MiniGPT-4), or whatever ``apply_wise_to_model`` refuses. The model is as before.
    """
    from .apply import apply_wise_to_model

    wanted = [requests] if isinstance(requests, Mapping) else list(requests)
    _check_model(model)
    any_image = getattr(hparams, "any_image", False)
    check_switch("any_image", any_image)
    texts = [_text_of(request, any_image) for request in wanted]
    return apply_wise_to_model(model, text_side(tok), texts, hparams, copy=copy)


def _check_model(model: nn.Module) -> None:
    if "input_ids" in inspect.signature(type(model).forward).parameters:
        return
    parts = [name for name in ("opt_model", "llama_model") if hasattr(model, name)]
    inside = f" Its language model alone can be edited, by apply_wise_to_model on model.{parts[0]}." if parts else ""
    raise ValueError(
        f"{type(model).__name__} is not called with input_ids as Hugging Face models are, so the route cannot tell its "
        f"image from its text.{inside} For edits through MultimodalEditor {_UNREGISTER}"
    )


def _text_of(request: Mapping[str, Any], any_image: bool) -> dict[str, Any]:
    """A request of the multimodal editor as one of a text.

    Raises:
        ValueError: it has an image, and ``any_image`` is off.
    """
    if not isinstance(request, Mapping):
        raise ValueError(f"a request is {request!r}: it must be a dict with 'prompt' and 'target'.")
    if request.get("image") is not None and not any_image:
        raise ValueError(
            f"the edit {request.get('prompt')!r} has an image, but what is learned here is its text, so that the "
            "answer would be given for every image. If that is meant, since the fact holds whatever the image shows, "
            f"set hparams.any_image = True. For an edit of what this image shows {_UNREGISTER}"
        )
    text = {key: request[key] for key in ("prompt", "target_new", "subject", "loc_prompt") if key in request}
    return {"target_new": request["target"], **text} if "target" in request else text


def text_side(tok: Any) -> Any:
    """The tokenizer of a processor, with the processor's chat template; a tokenizer itself as it is."""
    return _TextSide(tok) if hasattr(tok, "tokenizer") else tok


class _TextSide:
    """A processor's tokenizer. Its template wants a turn's content in parts, where a tokenizer's wants a text."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer

    @property
    def chat_template(self) -> Any:
        return getattr(self._processor, "chat_template", None) or getattr(self._tokenizer, "chat_template", None)

    def apply_chat_template(self, turns: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """The processor's, of turns that are texts."""
        if not getattr(self._processor, "chat_template", None):
            return self._tokenizer.apply_chat_template(turns, **options)
        parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        return self._processor.apply_chat_template(parts, **options)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._tokenizer(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # not there yet, as while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self._tokenizer, name)
