"""Record prompts at the layer to edit: what an edit trains on and what the router scores.

All of it comes from the main memory only, so it holds for as long as the base model does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..data import neutral_prompts
from ..hparams import WISEHyperParams
from ..tuner.layer import WiseLayer
from .contexts import as_chat, generate_prefixes
from .frozen_prefix import FrozenPrefix, layer_input_of
from .requests import EditRequest, pair_batch, prompt_batch
from .trainer import RecordedContexts, ScoredInputs

_SCORING_BATCH = 16
_PREFIXES = "_wise_prefixes"


class PromptRecorder:
    """Records prompts of one model at one layer. What does not depend on the edit is recorded once.

    Args:
        model: the model that carries ``layer``.
        tok: its tokenizer.
        hparams: settings.
        layer: the WISE layer.
    """

    def __init__(self, model: nn.Module, tok: Any, hparams: WISEHyperParams, layer: WiseLayer) -> None:
        self.model = model
        self.tok = tok
        self.hparams = hparams
        self.layer = layer
        # By the settings that they depend on, which may change in the middle of a stream.
        self._neutral: dict[tuple[bool, bool], ScoredInputs] = {}

    def share_recordings(self, other: PromptRecorder) -> None:
        """Take over what ``other`` recorded on the same base model."""
        self._neutral.update(other._neutral)

    @contextmanager
    def main_memory_only(self) -> Iterator[None]:
        """The model as it was before any edit, in eval mode; both are put back afterwards."""
        in_training = [module for module in self.model.modules() if module.training]
        was_disabled = self.layer._disable_adapters
        self.model.eval()
        self.layer._disable_adapters = True
        try:
            yield
        finally:
            self.layer._disable_adapters = was_disabled
            for module in in_training:
                module.training = True

    def rendered(self, prompt: str) -> str:
        """The prompt as the model is asked it: plain, or as a user's turn of a chat."""
        return as_chat(self.tok, prompt) if self.hparams.use_chat_template else prompt

    def prefixes(self) -> list[str]:
        """The sampled prefixes of the augmentation, the same for every edit of a model.

        They are only texts, so they stay with the model when its edits are taken off: an editor that
        restores after every edit would sample them anew each time. Activations do not stay, since
        another method may change the weights in between.
        """
        cache: dict[tuple[Any, ...], list[str]] = self.model.__dict__.setdefault(_PREFIXES, {})
        settings = (self.hparams.n_contexts, self.hparams.context_length, self.hparams.seed)
        key = (
            type(self.tok).__name__,
            getattr(self.tok, "name_or_path", None),
            getattr(self.tok, "vocab_size", None),
            *settings,
        )
        if key not in cache:
            n_contexts, length, seed = settings
            generator = torch.Generator().manual_seed(seed)
            with self.main_memory_only():
                cache[key] = generate_prefixes(self.model, self.tok, n_contexts, length, generator)
        return cache[key]

    def contexts(self, prompts: Sequence[str], request: EditRequest) -> RecordedContexts:
        """Some contexts of an edit, each followed by its target.

        Raises:
            ValueError: the target tokenises to nothing, or the layer does not run once in a forward.
        """
        texts = [self.rendered(prompt) for prompt in prompts]
        batch = pair_batch(self.tok, texts, request.target, self._device(), request)
        with self.main_memory_only():
            return RecordedContexts(batch, FrozenPrefix.record(self.model, self.layer, batch.model_inputs()))

    def neutral(self) -> ScoredInputs:
        """The packaged neutral prompts."""
        key = (self.hparams.use_chat_template, self.hparams.score_activation is not None)
        if key not in self._neutral:
            self._neutral[key] = self.scored([self.rendered(prompt) for prompt in neutral_prompts()])
        return self._neutral[key]

    def scored(self, texts: Sequence[str]) -> ScoredInputs:
        """Rendered prompts as the router sees them; the forward goes no further than the layer."""
        inputs = []
        with self.main_memory_only(), torch.no_grad():
            for start in range(0, len(texts), _SCORING_BATCH):
                batch = prompt_batch(self.tok, texts[start : start + _SCORING_BATCH], self._device())
                activations = layer_input_of(self.model, self.layer, batch.model_inputs())
                base = self.layer.base_layer(activations) if self.keeps_base_output else None
                inputs.append(ScoredInputs(activations, batch.prompt_mask, base))
        return ScoredInputs.stack(inputs)

    @property
    def keeps_base_output(self) -> bool:
        """Only EasyEdit's score needs W_v a beside dW a."""
        return self.hparams.score_activation is not None

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def first_row(contexts: RecordedContexts, mask: Tensor, keep_base: bool) -> ScoredInputs:
    """The plain prompt of an edit under a token mask, shape (1, T): a copy, so that the batch can go."""
    prefix = contexts.prefix
    base = prefix.layer_output[:1].clone() if keep_base else None
    return ScoredInputs(prefix.layer_input[:1].clone(), mask[:1], base)
