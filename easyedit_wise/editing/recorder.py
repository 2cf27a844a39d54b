"""Record prompts at the layer to edit: what an edit trains on and what the router scores.

All of it comes from the main memory only, so it holds for as long as the base model does.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..data import neutral_prompts
from ..hparams import WISEHyperParams
from ..positions import position_limit
from ..tuner.devices import computing_device
from ..tuner.layer import WiseLayer
from ..wording import Wording
from .contexts import fixed_prefixes, generate_prefixes
from .continuation import continued, last_logits_only, likeliest, with_room
from .endings import endings
from .frozen_prefix import FrozenPrefix, layer_input_of
from .layer_units import LayerUnits
from .padded_batch import padded_contexts, padded_irrelevant
from .recorded import RecordedEdit
from .replay_plan import ReplayPlan
from .requests import EditRequest, TokenBatch, encode_pair, left_padded, pair_batch, prompt_batch
from .room import Room
from .scored import ScoredInputs
from .task import RecordedContexts
from .written import WrittenText, written_tokens

_SCORING_BATCH = 16
# Where texts that a model sampled are kept with it.
PREFIXES = "_wise_prefixes"
WRITTEN = "_wise_written"
# Tokens enough for their spread in a layer of some thousand inputs, and few enough to be written within seconds.
_WRITTEN_TEXTS, _WRITTEN_LENGTH = 64, 64


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
        self._neutral: dict[tuple[bool, bool], tuple[ScoredInputs, LayerUnits]] = {}
        self._written: dict[tuple[Any, ...], WrittenText] = {}
        self._plan: ReplayPlan | None = None

    def share_recordings(self, other: PromptRecorder) -> None:
        """Take over what ``other`` recorded on the same base model."""
        self._neutral.update(other._neutral)
        self._written.update(other._written)

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

    @property
    def wording(self) -> Wording:
        """How prompts are put to the model; it encodes all that :meth:`rendered` gives."""
        # EasyEdit's arithmetic has the special tokens that the template wrote, and the tokenizer's before them.
        hparams = self.hparams
        return Wording(self.tok, hparams.use_chat_template, hparams.target_separator, hparams.padding_counts)

    def rendered(self, prompt: str) -> str:
        """The prompt as the model is asked it: plain, or as a user's turn of a chat."""
        return self.wording.asked(prompt)

    def pair(self, request: EditRequest) -> tuple[list[int], int]:
        """The tokens of an edit's prompt with its target behind it, and how many are the prompt's."""
        return encode_pair(self.wording, self.rendered(request.prompt), request.target, request.separator)

    @cached_property
    def _limit(self) -> int | None:
        # Not when the recorder is made: a model that is just being copied has no modules yet.
        return position_limit(self.model)

    @property
    def room(self) -> Room:
        """What of a text the model has positions for."""
        return Room(self._limit, self.wording, self.hparams)

    def prefixes(self) -> list[str]:
        """The sampled prefixes of the augmentation, the same for every edit of a model.

        They are only texts, so they stay with the model when its edits are taken off: an editor that
        restores after every edit would sample them anew each time. Activations do not stay, since
        another method may change the weights in between.
        """
        cache: dict[tuple[Any, ...], list[str]] = self.model.__dict__.setdefault(PREFIXES, {})
        settings = (self.hparams.n_contexts, self.hparams.context_length, self.hparams.seed)
        if self.hparams.fixed_contexts:
            settings = (0, 0, 0)  # what they depend on does not enter
        key = (*self._tokenizer_key(), *settings)
        if key not in cache:
            n_contexts, length, seed = settings
            generator = torch.Generator().manual_seed(seed)
            with self.main_memory_only():
                cache[key] = (
                    fixed_prefixes(self.model, self.tok, self._limit)
                    if self.hparams.fixed_contexts
                    else generate_prefixes(self.model, self.tok, n_contexts, length, generator, limit=self._limit)
                )
        return cache[key]

    def written(self) -> WrittenText:
        """Texts that the model wrote, as the layer sees them.

        Like the prefixes the texts stay with the model, and what the layer makes of them does not.
        """
        key = (*self._tokenizer_key(), self.hparams.seed)
        if key not in self._written:
            texts: dict[tuple[Any, ...], Tensor] = self.model.__dict__.setdefault(WRITTEN, {})
            if key not in texts:
                generator = torch.Generator().manual_seed(self.hparams.seed)
                with self.main_memory_only():
                    texts[key] = written_tokens(
                        self.model, self.tok, _WRITTEN_TEXTS, _WRITTEN_LENGTH, generator, self._limit
                    )
            inputs = []
            for ids in texts[key].to(self._device()).split(_SCORING_BATCH):
                real = torch.ones_like(ids)
                inputs.append(self._scored_batch(TokenBatch(ids, real, real.bool(), ~real.bool()), real.bool()))
            self._written[key] = WrittenText.of(ScoredInputs.stack(inputs))
        return self._written[key]

    def _tokenizer_key(self) -> tuple[Any, ...]:
        return type(self.tok).__name__, getattr(self.tok, "name_or_path", None), getattr(self.tok, "vocab_size", None)

    def endings(self, requests: Sequence[EditRequest]) -> list[int | None]:
        """The token behind each target, as the main memory would go on, see :mod:`.endings`; none without room."""
        pairs = [self.pair(request) for request in requests]
        ids, mask = left_padded(self.tok, [tokens for tokens, _ in pairs], self._device())
        batch = TokenBatch(ids, mask, mask.bool(), torch.zeros_like(mask.bool()))
        inputs = {**self._model_inputs(batch), **last_logits_only(self.model)}
        with self.main_memory_only():
            found = endings(self.model, self.tok, inputs, pairs)
        full = [len(tokens) == self._limit for tokens, _ in pairs]
        return [None if is_full else last for last, is_full in zip(found, full, strict=True)]

    def after_answers(self, requests: Sequence[EditRequest], endings: Sequence[int | None] | None) -> ScoredInputs:
        """What the main memory would write behind each target and its ending, ``after_answer`` tokens at most.

        Args:
            requests: the edits.
            endings: one token more behind the target of each, where it has one; None: behind none.
        """
        endings = [None] * len(requests) if endings is None else endings
        texts = []
        for request, last in zip(requests, endings, strict=True):
            tokens, _ = self.pair(request)
            texts.append(tokens if last is None else [*tokens, last])
        ids, mask = left_padded(self.tok, texts, self._device())
        with self.main_memory_only():
            ids = continued(self.model, ids, mask, self.hparams.after_answer, likeliest, self._limit)
        n_tokens = ids.shape[1] - mask.shape[1]
        mask = with_room(mask, n_tokens, self._limit)
        # From the last token of the answer on, which says how to go on.
        behind = (torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - n_tokens - 1) & mask.bool()
        return self._scored_batch(TokenBatch(ids, mask, mask.bool(), ~mask.bool()), behind)

    def contexts(
        self,
        prompts: Sequence[Sequence[str]],
        requests: Sequence[EditRequest],
        endings: Sequence[int | None] | None = None,
    ) -> RecordedContexts:
        """Some contexts of each edit, as many of every one, each followed by its target.

        Args:
            prompts: of each edit.
            requests: the edits.
            endings: one token more behind the target of each, where it has one.

        Raises:
            ValueError: a target tokenises to nothing, or the layer does not run once in a forward.
        """
        texts = [self.rendered(prompt) for own in prompts for prompt in own]
        owners = [request for own, request in zip(prompts, requests, strict=True) for _ in own]
        if self.hparams.padding_counts:
            (request,) = requests
            irrelevant = None if request.loc_prompt is None else self.room.of(request.loc_prompt, str)
            batch = padded_contexts(self.tok, texts, request.target, irrelevant, self._device())
        else:
            last = None
            if endings is not None:
                last = [one for own, one in zip(prompts, endings, strict=True) for _ in own]
            targets, separators = [owner.target for owner in owners], [owner.separator for owner in owners]
            batch = pair_batch(self.wording, texts, targets, self._device(), owners, last, separators)
        inputs = self._model_inputs(batch)
        with self.main_memory_only():
            if self._plan is None:
                self._plan = ReplayPlan.of(self.model, self.layer, inputs)
            prefix = FrozenPrefix.record(self.model, self.layer, inputs, self._plan)
        return RecordedContexts.of(batch, prefix)

    def edits(self, requests: Sequence[EditRequest]) -> Iterator[list[RecordedEdit]]:
        """Edits as the router sees them, from their texts, some at a time: as many as it takes, none of them kept."""
        for start in range(0, len(requests), _SCORING_BATCH):
            some = requests[start : start + _SCORING_BATCH]
            prompts = [self.rendered(request.prompt) for request in some]
            targets, separators = [request.target for request in some], [request.separator for request in some]
            batch = pair_batch(self.wording, prompts, targets, self._device(), separators=separators)
            answered = self._scored_batch(batch, batch.attention_mask.bool())
            irrelevant = self.own_irrelevant(some)
            yield [
                RecordedEdit(answered.select(torch.tensor([row])), batch.prompt_mask[row : row + 1], irrelevant[row])
                for row in range(len(some))
            ]

    def own_irrelevant(self, requests: Sequence[EditRequest]) -> list[ScoredInputs | None]:
        """The irrelevant prompt of each request that has one."""
        own = [index for index, request in enumerate(requests) if request.loc_prompt is not None]
        texts = [self.room.of(prompt) for request in requests if (prompt := request.loc_prompt) is not None]
        scored = self.scored(texts) if texts else None
        found: list[ScoredInputs | None] = [None] * len(requests)
        for row, index in enumerate(own):
            found[index] = None if scored is None else scored.select(torch.tensor([row]))
        return found

    def padded_irrelevant(self, prompts: Sequence[str], request: EditRequest) -> ScoredInputs | None:
        """The irrelevant prompt of a request as a row of the batch with its contexts, where padding counts."""
        if request.loc_prompt is None:
            return None
        texts = [self.rendered(prompt) for prompt in prompts]
        # As it is, not as a user's turn: EasyEdit renders the contexts alone.
        irrelevant = self.room.of(request.loc_prompt, str)
        batch = padded_irrelevant(self.tok, texts, request.target, irrelevant, self._device())
        return self._scored_batch(batch, batch.counted_mask)

    def neutral(self) -> ScoredInputs:
        """The packaged neutral prompts."""
        return self._neutral_and_units()[0]

    def unseen(self) -> tuple[ScoredInputs, ScoredInputs | None]:
        """(neutral prompts, written texts) that no shard was trained to be quiet on: epsilon is set from these."""
        if not self.hparams.consolidation:
            return self.neutral(), None
        return self.neutral().halves()[1], self.written().held_out if self.hparams.written else None

    def units(self) -> LayerUnits:
        """The scale of the layer's input and output on the neutral prompts."""
        return self._neutral_and_units()[1]

    def _neutral_and_units(self) -> tuple[ScoredInputs, LayerUnits]:
        key = (self.hparams.use_chat_template, self.hparams.score_activation is not None)
        if key not in self._neutral:
            exact = self.scored([self.room.of(prompt) for prompt in neutral_prompts()])
            with self.main_memory_only(), torch.no_grad():
                units = LayerUnits.of(exact.activations, self.layer.base_layer(exact.activations))
            self._neutral[key] = (exact.in_16_bits(), units)
        return self._neutral[key]

    def scored(self, texts: Sequence[str]) -> ScoredInputs:
        """Rendered prompts as the router sees them; the forward goes no further than the layer."""
        inputs = []
        for start in range(0, len(texts), _SCORING_BATCH):
            batch = prompt_batch(self.wording, texts[start : start + _SCORING_BATCH], self._device())
            inputs.append(self._scored_batch(batch, batch.prompt_mask))
        return ScoredInputs.stack(inputs)

    @torch.no_grad()
    def _scored_batch(self, batch: TokenBatch, token_mask: Tensor) -> ScoredInputs:
        with self.main_memory_only():
            activations = layer_input_of(self.model, self.layer, self._model_inputs(batch))
            base = self.layer.base_layer(activations) if self.keeps_base_output else None
        return ScoredInputs.from_padded(activations, token_mask, base)

    def _model_inputs(self, batch: TokenBatch) -> dict[str, Any]:
        """No cache where the model has a switch for it: it would copy keys and values that nobody asks for again."""
        accepted = inspect.signature(type(self.model).forward).parameters
        return {**batch.model_inputs(), **({"use_cache": False} if "use_cache" in accepted else {})}

    @property
    def keeps_base_output(self) -> bool:
        """Only EasyEdit's score needs W_v a beside dW a."""
        return self.hparams.score_activation is not None

    def _device(self) -> torch.device:
        return computing_device(self.model)


def plain_edits(
    contexts: RecordedContexts, irrelevant: Sequence[ScoredInputs | None], keep_base: bool
) -> list[RecordedEdit]:
    """Each edit's plain prompt with its target, out of recorded contexts: copies, so that the batch can go."""
    n_edits, n_rows = len(irrelevant), contexts.batch.input_ids.shape[0]
    base = contexts.prefix.layer_output.flatten(0, 1)[contexts.positions] if keep_base else None
    every = ScoredInputs(contexts.activations, contexts.batch.counted_mask, base)
    rows = range(0, n_rows, n_rows // n_edits)
    return [
        RecordedEdit(every.select(torch.tensor([row])), contexts.batch.prompt_mask[row : row + 1].clone(), own)
        for row, own in zip(rows, irrelevant, strict=True)
    ]
