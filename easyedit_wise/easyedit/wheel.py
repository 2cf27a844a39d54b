"""The bridge to EasyEdit's PyPI wheel, ``easyeditor`` 0.0.1.dev0 of October 2023.

It was written for transformers 4.30 and one CUDA device, and importing it imports every method and
the vision models. What keeps it from editing text today is put right while it is imported:

- packages that text editing never calls may be absent;
- three helpers are back in ``transformers.modeling_utils``;
- ``f"cuda:{device}"`` takes any device, also the CPU;
- ``BaseEditor`` reads a Llama tokenizer as transformers 5 means it, and knows ``loc_prompts`` and
  ``sequential_edit``, as EasyEdit's current code does; ``batch_edit`` and ``edit_dataset`` are ours
  (``wheel_batches``).

No file of the wheel is changed, and no other EasyEdit is touched.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .wheel_batches import batch_edit, edit_dataset

WHEEL_VERSION = "0.0.1.dev0"
_BRIDGED = "_easyedit_wise_bridged"


def is_wheel(spec: ModuleSpec) -> bool:
    """Whether this spec of ``easyeditor`` is the PyPI wheel 0.0.1.dev0.

    The version must stand in the metadata *beside the package found*, so that a checkout which
    shadows an installed wheel is not taken for it; and the package must lack ``util/device.py``,
    with which EasyEdit began to handle devices itself.
    """
    for location in spec.submodule_search_locations or []:
        package = Path(location)
        if (package / "util" / "device.py").exists():
            return False
        beside = importlib.metadata.distributions(name="easyeditor", path=[str(package.parent)])
        if any(distribution.version == WHEEL_VERSION for distribution in beside):
            return True
    return False


def is_bridged(host: ModuleType | None) -> bool:
    """Whether this imported (or just being imported) host package is the bridged wheel."""
    return getattr(host, _BRIDGED, False)


def prepare(host: ModuleType) -> None:
    """Before the wheel's package is executed."""
    if is_bridged(host):  # a reload: what is imported below it is ready
        return
    # Submodules that a failed earlier import has left behind were not rewritten.
    for name in [name for name in sys.modules if name.startswith(f"{host.__name__}.")]:
        del sys.modules[name]
    setattr(host, _BRIDGED, True)
    _restore_moved_helpers()


def complete() -> None:
    """After the wheel's package is executed: complete its ``BaseEditor``. Again changes nothing."""
    module = sys.modules["easyeditor.editors.editor"]
    editor = module.__dict__["BaseEditor"]
    if is_bridged(editor):
        return
    setattr(editor, _BRIDGED, True)
    editor._prepare_requests = _with_loc_prompts(editor._prepare_requests)
    editor.edit = _with_sequential_edit(editor.edit)
    editor.edit_requests = _with_sequential_edit(editor.edit_requests)
    editor.batch_edit, editor.edit_dataset = batch_edit, edit_dataset
    module.__dict__["LlamaTokenizer"] = _llama_tokenizer()


# --- transformers ----------------------------------------------------------------------------


def _restore_moved_helpers() -> None:
    """Put three helpers back where the wheel's Q-Former imports them from."""
    from transformers import modeling_utils, pytorch_utils

    ours = {"find_pruneable_heads_and_indices": find_pruneable_heads_and_indices}
    for name in ("apply_chunking_to_forward", "prune_linear_layer", "find_pruneable_heads_and_indices"):
        if not hasattr(modeling_utils, name):
            setattr(modeling_utils, name, getattr(pytorch_utils, name, None) or ours[name])


def find_pruneable_heads_and_indices(
    heads: Sequence[int] | set[int], n_heads: int, head_size: int, already_pruned_heads: set[int]
) -> tuple[set[int], torch.Tensor]:
    """The heads still to prune, and the indices of a projection's outputs that stay.

    transformers 5 dropped it. ``heads`` count in the unpruned layer, the indices in the layer as it
    is: ``n_heads`` heads of ``head_size`` outputs, without those in ``already_pruned_heads``.
    """
    to_prune = set(heads) - already_pruned_heads
    gone = {head - sum(pruned < head for pruned in already_pruned_heads) for head in to_prune}
    kept = [head for head in range(n_heads) if head not in gone]
    outputs = torch.arange(n_heads * head_size).view(n_heads, head_size)
    return to_prune, outputs[kept].reshape(-1)


def _llama_tokenizer() -> type:
    """A class for the wheel's name ``LlamaTokenizer``: loads the tokenizer that the checkpoint really has.

    Since transformers 5 the class of that name builds Llama 2's pipeline around any vocabulary,
    which loses the spaces of a byte-level one (Llama 3, SmolLM2). The wheel also asks
    ``isinstance(tok, LlamaTokenizer)`` to pad on the left: what was loaded here is an instance.
    """
    from transformers import AutoTokenizer

    class LoadedHere(type):
        def __instancecheck__(cls, tokenizer: object) -> bool:
            return getattr(tokenizer, _BRIDGED, False)

    class LlamaTokenizer(metaclass=LoadedHere):
        """AutoTokenizer under the name that the wheel uses."""

        @staticmethod
        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            tokenizer = AutoTokenizer.from_pretrained(*args, **kwargs)
            setattr(tokenizer, _BRIDGED, True)
            return tokenizer

    return LlamaTokenizer


# --- BaseEditor ------------------------------------------------------------------------------


class _Kept(dict[str, torch.Tensor]):
    """Nothing to restore, in each form that the wheel undoes an edit by: a mapping, or a call (KN)."""

    def __call__(self) -> None:
        """Restore nothing."""


def _with_loc_prompts(prepare_requests: Callable[..., list[dict[str, Any]]]) -> Callable[..., Any]:
    """Carry ``loc_prompts`` into the requests; a shorter list is used again from its start.

    EasyEdit's current code also shuffles a recycled list with the global generator; the order given
    is kept here, so that a run can be repeated.
    """

    @functools.wraps(prepare_requests)
    def prepare(
        editor: Any, *args: Any, loc_prompts: str | Sequence[str] | None = None, **kwargs: Any
    ) -> list[dict[str, Any]]:
        requests = prepare_requests(editor, *args, **kwargs)
        if loc_prompts is None:
            return requests
        prompts = [loc_prompts] if isinstance(loc_prompts, str) else list(loc_prompts)
        if not prompts:
            raise ValueError("loc_prompts is empty: give at least one irrelevant prompt, or leave it out")
        for request, prompt in zip(requests, itertools.cycle(prompts), strict=False):
            request["loc_prompt"] = prompt
        return requests

    return prepare


def _with_sequential_edit(edit: Callable[..., Any]) -> Callable[..., Any]:
    """Give ``edit`` the argument ``sequential_edit`` of EasyEdit's current code.

    True: no edit is taken back. False: every edit is taken back before the next one. Left out, the wheel's own
    ``keep_original_weight`` says the opposite. Where neither is given, the algorithm decides: FT and ROME accumulate,
    WISE is taken back, as at EasyEdit's current code.
    """
    signature = inspect.signature(edit)

    @functools.wraps(edit)
    def edit_in_order(editor: Any, *args: Any, sequential_edit: bool | None = None, **kwargs: Any) -> Any:
        call = signature.bind(editor, *args, **kwargs)
        if sequential_edit is None:
            if "keep_original_weight" not in call.arguments:
                return edit(editor, *args, **kwargs)
            sequential_edit = not call.arguments["keep_original_weight"]
        call.arguments["keep_original_weight"] = not sequential_edit
        if not sequential_edit:
            return edit(*call.args, **call.kwargs)
        with _edits_kept(editor):
            return edit(*call.args, **call.kwargs)

    return edit_in_order


@contextmanager
def _edits_kept(editor: Any) -> Iterator[None]:
    """While this is open, what the editor's algorithm returns leaves nothing to restore."""
    apply_algo = editor.apply_algo

    @functools.wraps(apply_algo)
    def apply_and_keep(*args: Any, **kwargs: Any) -> Any:
        result = apply_algo(*args, **kwargs)
        # IKE returns examples and FT-Api a name: they change no weights.
        if isinstance(result, tuple) and len(result) == 2 and _is_restore(result[1]):
            return result[0], _Kept()
        return result

    editor.apply_algo = apply_and_keep
    try:
        yield
    finally:
        editor.apply_algo = apply_algo


def _is_restore(value: object) -> bool:
    return isinstance(value, Mapping) or callable(value)
