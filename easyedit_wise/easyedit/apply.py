"""``apply_wise_to_model``: WISE behind EasyEdit's contract for editing algorithms."""

from __future__ import annotations

import copy as copy_module
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from ..editing.held import Snapshot
from ..editing.requests import EditRequest
from ..editing.stream import EditStream
from ..hparams import WISEHyperParams
from ..journal.calls import apply_edits, close_journal, journaled
from ..journal.database import JOURNAL_FILE
from ..journal.journal import Journal
from ..journal.recording import JournalSink
from ..persistence import check_save_path, load_edits
from ..tuner.attach import attach, check_layer, detach
from ..tuner.config import WiseConfig
from ..tuner.model import find_wise_layers
from ..tuner.value_matrices import value_matrix_of
from ..undisturbed import undisturbed
from .saving import lend_save, saver_of

LOG = logging.getLogger(__name__)

ADAPTER_NAME = "default"


class RestoreWeights(Mapping[str, Tensor]):
    """Puts the model back as it was before one call of :func:`apply_wise_to_model`.

    EasyEdit's hosts restore in two ways: some call the object, others walk through ``.items()`` and
    copy weights. This one does both: either restores, and there is no weight to copy.
    """

    def __init__(self, restore: Callable[[], None]) -> None:
        self._restore: Callable[[], None] | None = restore

    def __call__(self) -> None:
        """Restore; a second call does nothing."""
        restore, self._restore = self._restore, None
        if restore is not None:
            restore()

    def items(self) -> Any:
        """Restore, and name no weights: none of the model's own was changed."""
        self()
        return {}.items()

    def __getitem__(self, key: str) -> Tensor:
        raise KeyError(f"{key}: WISE changes none of the model's own weights, so there is nothing to copy back.")

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        # Empty as a mapping, but not "nothing to restore".
        return True


@undisturbed
def apply_wise_to_model(
    model: nn.Module,
    tok: Any,
    requests: Sequence[Mapping[str, Any]] | Mapping[str, Any],
    hparams: Any,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    save: bool = True,
    **kwargs: Any,
) -> tuple[nn.Module, RestoreWeights]:
    """Edit a model with WISE, one request after the other.

    The model keeps its class: the chosen layer is wrapped in place. Calling it again with the same
    model goes on with the same stream of edits.

    Args:
        model: a Hugging Face causal language model.
        tok: its tokenizer.
        requests: EasyEdit's request dicts with ``prompt`` and ``target_new``, and optionally ``subject``
            and ``loc_prompt`` (an irrelevant prompt; without one packaged neutral prompts serve).
        hparams: :class:`WISEHyperParams`, or EasyEdit's own WISE settings object.
        copy: edit a deep copy and leave ``model`` alone.
        return_orig_weights: part of EasyEdit's contract; the restore object is always returned.
        keep_original_weight: likewise.
        save: whether the edits are written to the setting ``save_path`` before this returns. EasyEdit's editors, which
            call this once for each request, have them written when their own call is over. After a failure, too.
        **kwargs: what EasyEdit passes to other algorithms; not used.

    Returns:
        (the edited model, an object that restores it: call it, or walk through its ``.items()``). Until it is
        restored, the model has a method ``save(path)``, which EasyEdit's GitHub version calls.

    Raises:
        ValueError: a request, a setting or the layer does not fit, ``save_path`` cannot be saved to, or the model
            carries another PEFT method; the model is as before.
        EditDivergedError: an edit's loss became NaN or infinite; that edit was taken back, the ones
            before it stand.
    """
    settings = WISEHyperParams.from_any(hparams)
    if isinstance(requests, Mapping):
        requests = [requests]
    edits = [EditRequest.from_easyedit(request, settings.target_separator) for request in requests]
    _check_causal(model)
    if settings.inner_params is not None:
        check_layer(model, settings.inner_params[0])
    if settings.save_path:
        check_save_path(settings.save_path)
    if copy:
        model = copy_module.deepcopy(model)
    fresh = not find_wise_layers(model)
    n_made = 0
    try:
        stream = stream_of(model, tok, settings)
        before = stream.snapshot()
        with tqdm(total=len(edits), desc="WISE", unit="edit", disable=len(edits) < 2) as bar:

            def committed(*_: Any) -> None:
                nonlocal n_made
                n_made += 1
                bar.update()

            apply_edits(stream, edits, on_edit=committed)
    except BaseException:
        if n_made:
            saver = lend_save(model, stream.adapter_name)
            if save and settings.save_path:
                saver.after_a_failure(settings.save_path)
        elif fresh:
            close_journal(model)
            detach(model)  # not one edit was made: leave no trace, of loaded edits neither
        raise
    saver = lend_save(model, stream.adapter_name)
    if save and settings.save_path:
        saver(settings.save_path)
    return model, RestoreWeights(lambda: _restore(model, stream, before, fresh))


def _check_causal(model: Any) -> None:
    """Raise for what is no model that continues a text; of one that is not transformers' own nothing is known."""
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    can_generate = getattr(model, "can_generate", None)
    if not isinstance(model, nn.Module) or encoder_decoder or (callable(can_generate) and not can_generate()):
        what = "an encoder-decoder model" if encoder_decoder else "no causal language model"
        raise ValueError(
            f"{type(model).__name__} is {what}, and an edit is what a causal one shall continue a prompt with: load "
            "one with AutoModelForCausalLM."
        )


@undisturbed
def stream_of(model: nn.Module, tok: Any, hparams: WISEHyperParams) -> EditStream:
    """The stream of edits that a model carries, or a new one on a freshly wrapped layer.

    Raises:
        ValueError: the layer does not fit, differs from the one that is wrapped already, or the
            model carries another PEFT method.
    """
    name = None if hparams.inner_params is None else check_layer(model, hparams.inner_params[0])
    hparams = hparams.for_model(model)
    layers = find_wise_layers(model)
    if not layers and hparams.load_path:
        if Path(hparams.load_path).expanduser().exists():
            load_edits(model, hparams.load_path, tok=tok, hparams=hparams)
            layers = find_wise_layers(model)
        else:  # the first run of a script that goes on with what it saved, or a slip
            warnings.warn(
                f"load_path {hparams.load_path!r} does not exist: nothing is loaded, and the edits begin on the model "
                "as it is.",
                stacklevel=3,
            )
    if name is None:
        name = next(iter(layers), None) or _chosen_layer(model, hparams)
    if layers and name not in layers:
        raise ValueError(
            f"this model's edits are in {next(iter(layers))}, but inner_params names {name}: a stream of edits stays "
            "in one layer. Restore the model first, or name the same layer."
        )
    if not layers:
        attach(model, wise_config(model, name, hparams), ADAPTER_NAME)
        layers = find_wise_layers(model)
    layer = layers[name]
    stream = layer.edit_stream
    if not isinstance(stream, EditStream) or stream.model is not model:
        # Edits that were loaded under another name go on under it.
        adapter_name = next(iter(layer.active_adapters), ADAPTER_NAME)
        stream = EditStream(model, tok, hparams, layer, adapter_name)
        layer.edit_stream = stream
    _check_routing_kept(layer.wisemem_config[stream.adapter_name], hparams)
    stream.use(tok, hparams)
    if hparams.journal:
        stream = journaled(stream, hparams.journal, name)
        _check_routing_kept(stream.layer.wisemem_config[stream.adapter_name], hparams)
    return stream


def _chosen_layer(model: nn.Module, hparams: WISEHyperParams) -> str:
    """The layer of a model without edits, where the settings name none: its journal's, or its architecture's."""
    if hparams.journal and (Path(hparams.journal).expanduser() / JOURNAL_FILE).is_file():
        with Journal(hparams.journal) as journal:
            facts = journal.facts()
        if facts is not None:
            return check_layer(model, facts.layer)
    return check_layer(model, value_matrix_of(model))


def _check_routing_kept(config: WiseConfig, hparams: WISEHyperParams) -> None:
    """The thresholds of earlier edits hold for the score that they were set with."""
    for name in ("pooling", "score_activation", "relative_scores"):
        kept, wanted = getattr(config, name), getattr(hparams, name)
        if kept != wanted:
            raise ValueError(
                f"this model's edits are routed with {name}={kept!r}, but the settings say {wanted!r}: "
                f"keep {kept!r}, or restore the model first and edit anew."
            )


def wise_config(model: nn.Module, module_name: str, hparams: WISEHyperParams) -> WiseConfig:
    """The tuner's configuration for one layer and these settings."""
    return WiseConfig(
        target_modules=[module_name],
        base_model_name_or_path=getattr(model, "name_or_path", None) or hparams.model_name or None,
        task_type="CAUSAL_LM",
        mask_ratio=hparams.mask_ratio,
        seed=hparams.seed,
        pooling=hparams.pooling,
        score_activation=hparams.score_activation,
        relative_scores=hparams.relative_scores,
    )


@undisturbed
def _restore(model: nn.Module, stream: EditStream, before: Snapshot, fresh: bool) -> None:
    sink = stream.sink if isinstance(stream.sink, JournalSink) and not stream.sink.journal.database.closed else None
    if sink is not None or not fresh:
        stream.restore(before)
    if sink is not None:
        sink.rewound(stream)
    if fresh:
        close_journal(model)
        detach(model)
    elif saver_of(model) is not None:
        lend_save(model, stream.adapter_name)  # what stands now is saved nowhere
