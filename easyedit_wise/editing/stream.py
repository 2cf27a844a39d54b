"""A stream of edits: when a shard opens, closes and merges, and where its threshold lies.

WISE-Merge and WISE-Retrieve are one mechanism, a list of side memories. They differ only
in what a merge does: fold the shards into the one memory, or append one more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..hparams import WISEHyperParams
from ..merging import merge
from ..routing import calibrated_threshold, minimum_threshold
from ..sharding import random_mask
from ..tuner.layer import WiseLayer
from ..tuner.memory import LIVE, MERGED, SHARD, MemoryState
from .contexts import context_groups
from .recorder import PromptRecorder, first_row
from .requests import EditRequest, encode_pair, join_target
from .trainer import EditOutcome, EditTask, ScoredInputs, train_edit

_PAST_EDITS_REPLAYED = 8


@dataclass(frozen=True)
class HeldEdit:
    """An edit that a side memory holds.

    Attributes:
        request: what was asked for.
        memory: index of the side memory.
        prompt: its plain prompt as the router sees it; kept while the shard is open, then None.
        answered: the prompt with the target behind it, as teacher-forced scoring asks; likewise.
        irrelevant: its own irrelevant prompt, if it has one; likewise.
        tokens: A(x) of the tokens that rehearsal protects, shape (N, d_in); likewise.
    """

    request: EditRequest
    memory: int
    prompt: ScoredInputs | None = None
    answered: ScoredInputs | None = None
    irrelevant: ScoredInputs | None = None
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Snapshot:
    """All that an edit changes, by reference: putting it back costs nothing."""

    states: tuple[MemoryState, ...]
    held: tuple[HeldEdit, ...]
    generator_state: Tensor


class EditStream:
    """Edits one layer of one model, one request after the other.

    Args:
        model: the model that carries ``layer``.
        tok: its tokenizer.
        hparams: settings; they may change between calls of :meth:`apply`.
        layer: the WISE layer to edit.
        adapter_name: the adapter that the edits go into.
    """

    def __init__(
        self,
        model: nn.Module,
        tok: Any,
        hparams: WISEHyperParams,
        layer: WiseLayer,
        adapter_name: str = "default",
    ) -> None:
        self.model = model
        self.layer = layer
        self.adapter_name = adapter_name
        self.held: list[HeldEdit] = []
        self._generator = torch.Generator().manual_seed(hparams.seed)
        self._recorder = PromptRecorder(model, tok, hparams, layer)

    @property
    def hparams(self) -> WISEHyperParams:
        """The settings of the edits to come."""
        return self._recorder.hparams

    @property
    def tok(self) -> Any:
        """The tokenizer."""
        return self._recorder.tok

    def use(self, tok: Any, hparams: WISEHyperParams) -> None:
        """Go on with another tokenizer object or other settings."""
        self._recorder.tok, self._recorder.hparams = tok, hparams

    def __deepcopy__(self, memo: dict[int, Any]) -> EditStream:
        # With a copied model the stream goes on independently; the tokenizer has no state and is shared.
        copied = type(self)(
            copy.deepcopy(self.model, memo),
            self.tok,
            replace(self.hparams),
            copy.deepcopy(self.layer, memo),
            self.adapter_name,
        )
        memo[id(self)] = copied
        copied.held = list(self.held)
        copied._generator.set_state(self._generator.get_state())
        copied._recorder.share_recordings(self._recorder)
        return copied

    # -- the stream ---------------------------------------------------------------------------

    def apply(
        self,
        requests: Sequence[EditRequest],
        on_edit: Callable[[int, EditRequest, EditOutcome], None] | None = None,
        on_iteration: Callable[[int, float], None] | None = None,
    ) -> list[EditOutcome]:
        """Make the edits in order. Each is committed as a whole; an error leaves the ones before it.

        Args:
            requests: validated requests.
            on_edit: called after each commit with the index, the request and the outcome.
            on_iteration: called in each training iteration with its index and loss.

        Raises:
            EditDivergedError: an edit's loss became NaN or infinite; that edit was taken back.
            ValueError: a target tokenises to nothing, or the model has no chat template but needs one;
                not one edit was made.
        """
        for request in requests:  # all of them before the first: a bad one must not stop a stream half-way
            encode_pair(self.tok, self._recorder.rendered(request.prompt), request.target)
        outcomes = []
        for index, request in enumerate(requests):
            before = self.snapshot()
            try:
                outcome = self._edit(request, on_iteration)
            except BaseException:  # also a KeyboardInterrupt: nothing is half-applied
                self.restore(before)
                raise
            outcomes.append(outcome)
            if on_edit is not None:
                on_edit(index, request, outcome)
        return outcomes

    def snapshot(self) -> Snapshot:
        """The present contents, to be put back by :meth:`restore`."""
        return Snapshot(tuple(self.layer.memories(self.adapter_name)), tuple(self.held), self._generator.get_state())

    def restore(self, snapshot: Snapshot) -> None:
        """Put contents back as they were at :meth:`snapshot`."""
        self.layer.install(self.adapter_name, snapshot.states)
        self.held = list(snapshot.held)
        self._generator.set_state(snapshot.generator_state)

    def _edit(self, request: EditRequest, on_iteration: Callable[[int, float], None] | None) -> EditOutcome:
        states = self._with_live_shard(self.layer.memories(self.adapter_name))
        own_irrelevant = None if request.loc_prompt is None else self._scored(request.loc_prompt)
        task = self._record(request, len(states) - 1, own_irrelevant)
        with self._recorder.main_memory_only():
            live = states[-1]
            label = f"edit {len(self.held) + 1} ({request.prompt!r} -> {request.target!r})"
            mask = live.mask if live.mask is not None else torch.ones_like(live.delta_weight, dtype=torch.bool)
            outcome = train_edit(live.delta_weight, mask, task, self.hparams, label, on_iteration)
        held = self._held(request, len(states) - 1, task, own_irrelevant)
        states[-1] = live.with_(delta_weight=outcome.delta_weight, n_edits=live.n_edits + 1)
        self.held.append(held)
        states[-1] = states[-1].with_(epsilon=self._threshold(states[-1], len(states) - 1))
        states = self._close_and_merge(states)
        self.layer.install(self.adapter_name, states)
        return outcome

    # -- shards -------------------------------------------------------------------------------

    def _with_live_shard(self, states: list[MemoryState]) -> list[MemoryState]:
        if states and states[-1].stage == LIVE:
            if states[-1].n_edits == 0:
                states[-1] = self._new_shard(states[-1].delta_weight)
            return states
        device = next(iter(self.layer.get_base_layer().parameters())).device
        shape = (self.layer.out_features, self.layer.in_features)
        zero = torch.zeros(shape, dtype=torch.float32, device=device)
        return [*states, self._new_shard(zero)]

    def _new_shard(self, zero: Tensor) -> MemoryState:
        mask = random_mask(tuple(zero.shape), self.hparams.mask_ratio, self._generator).to(zero.device)
        return MemoryState(LIVE, torch.zeros_like(zero), mask, 0.0, 0)

    def _close_and_merge(self, states: list[MemoryState]) -> list[MemoryState]:
        live = states[-1]
        if live.n_edits >= (self.hparams.save_freq or self.hparams.merge_freq):
            states[-1] = live.with_(stage=SHARD, mask=None)
            # Closed: the stored activations of its edits have served.
            last = len(states) - 1
            self.held = [HeldEdit(h.request, h.memory) if h.memory == last else h for h in self.held]
        shards = [index for index, state in enumerate(states) if state.stage == SHARD]
        if len(shards) < self.hparams.n_shards:
            return states
        return self._merge(states, shards)

    def _merge(self, states: list[MemoryState], shards: list[int]) -> list[MemoryState]:
        """Eq. 8: W' <- W + Ties({W^i - W}); the earlier memory of WISE-Merge is one more of the W^i."""
        folded = list(shards)
        if not self.hparams.retrieve:
            folded = [index for index, state in enumerate(states) if state.stage == MERGED] + folded
        n_edits = sum(states[index].n_edits for index in folded)
        scale = self.hparams.weights if self.hparams.weights is not None else 1.0
        merged = merge(
            [states[index].delta_weight for index in folded],
            method=self.hparams.merge_alg,
            # Shards of equal size weigh lambda / k as in the paper; an earlier memory weighs by what it holds.
            weights=[scale * states[index].n_edits / n_edits for index in folded],
            density=self.hparams.densities if self.hparams.densities is not None else 1.0,
            generator=self._generator,
        )
        kept = [index for index in range(len(states)) if index not in folded]
        place = {old: new for new, old in enumerate(kept)} | dict.fromkeys(folded, len(kept))
        self.held = [replace(h, memory=place[h.memory]) for h in self.held]
        result = [states[index] for index in kept]
        memory = MemoryState(MERGED, merged, None, max(states[index].epsilon for index in folded), n_edits)
        result.append(memory.with_(epsilon=self._threshold(memory, len(kept))))
        return result

    # -- what an edit trains on ---------------------------------------------------------------

    def _record(self, request: EditRequest, memory: int, own_irrelevant: ScoredInputs | None) -> EditTask:
        groups = context_groups(request.prompt, self._recorder.prefixes(), self.hparams.contexts_per_step)
        contexts = [self._recorder.contexts(prompts, request) for prompts in groups]
        irrelevant = self._irrelevant_inputs(own_irrelevant)
        past = self._past_inputs(memory) if self.hparams.replay else None
        earlier = [h.tokens for h in self.held if h.memory == memory and h.tokens is not None]
        return EditTask(contexts, irrelevant, past, torch.cat(earlier) if earlier else None)

    def _held(self, request: EditRequest, memory: int, task: EditTask, own_irrelevant: ScoredInputs | None) -> HeldEdit:
        """The edit with what later edits of the shard need of it: copies, so that the batch can go."""
        plain, keep_base = task.contexts[0], self._recorder.keeps_base_output
        real = plain.batch.attention_mask.bool()
        answered = first_row(plain, real, keep_base)
        return HeldEdit(
            request,
            memory,
            prompt=first_row(plain, plain.batch.prompt_mask, keep_base),
            answered=answered,
            irrelevant=own_irrelevant,
            # Its own prompt and target are what later edits should leave alone.
            tokens=answered.activations[real[:1]] if self.hparams.rehearsal > 0 else None,
        )

    def _scored(self, prompt: str) -> ScoredInputs:
        return self._recorder.scored([self._recorder.rendered(prompt)])

    def _irrelevant_inputs(self, own: ScoredInputs | None) -> ScoredInputs:
        """x_i of Eq. 5: the request's own irrelevant prompt, and packaged neutral ones."""
        n_neutral = max(self.hparams.irrelevant_prompts, 1 if own is None else 0)
        neutral = self._recorder.neutral()
        picked = torch.randperm(len(neutral), generator=self._generator)[:n_neutral]
        return ScoredInputs.stack([*([] if own is None else [own]), neutral.select(picked)])

    def _past_inputs(self, memory: int) -> ScoredInputs | None:
        """x_m of Appendix B.3: edits that other memories hold, drawn anew for every edit."""
        others = [self._recorder.rendered(h.request.prompt) for h in self.held if h.memory != memory]
        if not others:
            return None
        picked = torch.randperm(len(others), generator=self._generator)[:_PAST_EDITS_REPLAYED]
        return self._recorder.scored([others[index] for index in picked.tolist()])

    # -- thresholds ---------------------------------------------------------------------------

    def _threshold(self, state: MemoryState, memory: int) -> float:
        """epsilon of a memory, from what its edits and what irrelevant prompts score under its present dW."""
        rendered = self._recorder.rendered
        mine = [(h, rendered(h.request.prompt)) for h in self.held if h.memory == memory]
        if not mine:
            return state.epsilon
        edits = self._scores_of(state.delta_weight, [(h.prompt, prompt) for h, prompt in mine])
        if self.hparams.act_ratio is not None:
            return minimum_threshold(edits, self.hparams.act_ratio)
        edits += self._scores_of(
            state.delta_weight, [(h.answered, join_target(prompt, h.request.target)) for h, prompt in mine]
        )
        irrelevant = self._scores_of(
            state.delta_weight,
            [(h.irrelevant, rendered(h.request.loc_prompt)) for h, _ in mine if h.request.loc_prompt is not None],
        )
        irrelevant += self._recorder.neutral().scores(state.delta_weight, self.hparams).tolist()
        return calibrated_threshold(edits, irrelevant, self.hparams.epsilon_position)

    def _scores_of(self, delta_weight: Tensor, prompts: Sequence[tuple[ScoredInputs | None, str]]) -> list[float]:
        """Delta_act of prompts, from what is stored of them, or from their text where the shard was closed."""
        inputs = [stored for stored, _ in prompts if stored is not None]
        texts = [text for stored, text in prompts if stored is None]
        if texts:
            inputs.append(self._recorder.scored(texts))
        return list(ScoredInputs.stack(inputs).scores(delta_weight, self.hparams).tolist()) if inputs else []
