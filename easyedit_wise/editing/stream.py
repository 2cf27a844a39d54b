"""A stream of edits: when a shard opens, closes and merges, and where its threshold lies.

WISE-Merge and WISE-Retrieve are one mechanism, a list of side memories. They differ only
in what a merge does: fold the shards into the one memory, or append one more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..hparams import WISEHyperParams
from ..separators import SPACE
from ..tuner.devices import computing_device
from ..tuner.layer import WiseLayer
from ..tuner.memory import LIVE, MERGED, MemoryState
from ..tuner.value_matrices import as_parameter
from ..undisturbed import undisturbed
from .asked_again import write_what_is_needed
from .consolidated import train_into
from .elsewhere import with_elsewhere
from .held import CommitSink, Committed, HeldEdit, Snapshot
from .level import recorded_answers, write_level
from .open_shard import OpenShard
from .overruled import overruled, standing, without_repeats
from .recorded import RecordedEdit
from .recorder import PromptRecorder, plain_edits
from .requests import EditRequest
from .shards import (
    close_shard,
    is_full,
    put_back,
    room,
    set_aside,
    settings_after,
    with_epsilon_as_trained,
    with_live_shard,
)
from .task import EditTask
from .task_maker import TaskMaker
from .thresholds import calibrated, stricter, with_thresholds
from .trainer import EditOutcome, train_edit


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
        # None: not known, as after loading; rebuilt from the edits' texts when the shard takes another edit.
        self._open_shard: OpenShard | None = None
        # Of all edits so far, for the next shard's problem; None: there are none, or not known, as after loading.
        self._elsewhere: Tensor | None = None
        self._generator = torch.Generator().manual_seed(hparams.seed)
        # Told of every batch; a copy of the stream has none, since two streams cannot be one record.
        self.sink: CommitSink | None = None
        self._recorder = PromptRecorder(model, tok, self._naming_its_layer(hparams), layer)
        self._tasks = TaskMaker(self._recorder, self._generator)

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
        self._recorder.tok, self._recorder.hparams = tok, self._naming_its_layer(hparams)

    def _naming_its_layer(self, hparams: WISEHyperParams) -> WISEHyperParams:
        """What is kept of a stream names its layer, also where the settings had left it out."""
        if hparams.inner_params is not None:
            return hparams
        name = next(name for name, module in self.model.named_modules() if module is self.layer)
        return replace(hparams, inner_params=[as_parameter(name)])

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
        copied.held, copied._open_shard = list(self.held), self._open_shard
        copied._elsewhere = self._elsewhere
        copied._generator.set_state(self._generator.get_state())
        copied._recorder.share_recordings(self._recorder)
        return copied

    # -- the stream ---------------------------------------------------------------------------

    @undisturbed
    def apply(
        self,
        requests: Sequence[EditRequest],
        on_edit: Callable[[int, EditRequest, EditOutcome], object] | None = None,
        on_iteration: Callable[[int, float], None] | None = None,
    ) -> list[EditOutcome]:
        """Make the edits in order, ``batch_size`` of them together. Each batch is committed as a whole.

        Args:
            requests: validated requests.
            on_edit: called after each commit with the index, the request and the outcome, edit by edit.
            on_iteration: called in each training iteration with its index and loss.

        Returns:
            The outcome of each edit, without dW: a list of them must not keep shards that are long merged. Those of
            one batch share their losses.

        Raises:
            EditDivergedError: the loss became NaN or infinite; that batch was taken back, the ones before it stand.
            ValueError: a target tokenises to nothing, or the model has no chat template but needs one, or has fewer
                positions than a prompt and its target have tokens; not one edit was made.
            Whatever the :attr:`sink` raises: the batch that it was told of was taken back.
        """
        self.check(requests)  # all of them before the first: a bad one must not stop a stream half-way
        outcomes: list[EditOutcome] = []
        while len(outcomes) < len(requests):
            done, states = len(outcomes), self.layer.memories(self.adapter_name)
            count = min(self.hparams.batch_size, room(states, self.hparams))
            del states
            batch = without_repeats(requests[done : done + count])
            before = self.snapshot()
            try:
                made = self._edit(batch, before.generator_state, on_iteration)
                if self.sink is not None:
                    self.sink.committed(self, made)
            except BaseException:  # also a KeyboardInterrupt: nothing is half-applied
                self.restore(before)
                raise
            del before  # or a dW that was replaced would live on
            outcomes += [replace(outcome, delta_weight=None) for outcome in made.outcomes]
            for index, (request, outcome) in enumerate(zip(batch, made.outcomes, strict=True), done):
                if on_edit is not None:
                    on_edit(index, request, outcome)
        return outcomes

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Whether edits can be asked for.

        Raises:
            ValueError: a target tokenises to nothing, the model has no chat template but needs one, or has fewer
                positions than a prompt and its target have tokens, or a request names a separator that EasyEdit's
                arithmetic does not have.
        """
        for request in requests:
            if self.hparams.padding_counts and request.separator != SPACE:
                raise ValueError(
                    f"the request {request.prompt!r} has target_separator: {request.separator}, but with "
                    "padding_counts, as in EasyEdit, there is a space before every target: leave it out, or set "
                    "target_separator: space."
                )
            self._recorder.room.check(request)

    @undisturbed
    def snapshot(self) -> Snapshot:
        """The present contents, to be put back by :meth:`restore`."""
        states = self.layer.memories(self.adapter_name)
        values = None
        if states and states[-1].stage == LIVE:
            states[-1], values = set_aside(states[-1])
        generator = self._generator.get_state()
        return Snapshot(tuple(states), tuple(self.held), generator, self._open_shard, values, self._elsewhere)

    @undisturbed
    def restore(self, snapshot: Snapshot) -> None:
        """Put contents back as they were at :meth:`snapshot`."""
        states = list(snapshot.states)
        if states and states[-1].stage == LIVE:
            states[-1] = put_back(states[-1], snapshot.live_values)
        self.layer.install(self.adapter_name, states)
        self.held, self._open_shard = list(snapshot.held), snapshot.open_shard
        self._elsewhere = snapshot.elsewhere
        self._generator.set_state(snapshot.generator_state)

    def _edit(
        self,
        requests: Sequence[EditRequest],
        generator_state: Tensor,
        on_iteration: Callable[[int, float], None] | None,
    ) -> Committed:
        """Train some edits together into the live shard, and commit them."""
        states = self._with_live_shard()
        self.layer.install(self.adapter_name, states)  # what it replaces need not stay in memory
        place, live = len(states) - 1, states[-1]
        shard = self._shard_so_far(place, live, requests)
        own = self._tasks.own_irrelevant(requests)
        task = self._tasks.task(requests, own, self._held_outside(place), shard, states, self._requests_in(place))
        recorded = plain_edits(task.contexts[0], own, self._recorder.keeps_base_output)
        with self._recorder.main_memory_only():
            if self.hparams.consolidation:
                shard, outcome = self._consolidate(task, recorded, shard, place, live, requests, on_iteration)
            else:
                outcome = self._train(task, live, self._label(requests), on_iteration)
                self._elsewhere = None  # it would lack these edits
        del task
        self.held += [HeldEdit(request, place) for request in requests]
        # Trained in place, as a rule: then this is live.delta_weight.
        learned = live.delta_weight if outcome.delta_weight is None else outcome.delta_weight
        per_edit = len(outcome.edit_scores) // len(requests)
        made = [
            replace(outcome, edit_scores=outcome.edit_scores[start : start + per_edit])
            for start in range(0, len(outcome.edit_scores), per_edit)
        ]
        shard, scores = shard.joined(recorded, learned, self.hparams)
        states[-1] = live.with_(delta_weight=learned, n_edits=live.n_edits + len(requests))
        if self.hparams.epsilon_as_trained:
            trained = [sum(one.edit_scores) / per_edit for one in made]
            states = with_epsilon_as_trained(states, trained, live.n_edits, self.hparams)
        else:
            held = self._requests_in(place)
            states[-1] = with_thresholds(self._recorder, states[-1], held, scores, self._n_earlier(place))
        self._open_shard = shard
        if is_full(states[-1], shard.n_tokens, self.hparams):
            states = self._closed(states)
        self.layer.install(self.adapter_name, states)
        new = scores[len(scores) - len(requests) :]
        return Committed(requests, made, recorded, new, live.mask, place, generator_state)

    def _train(
        self, task: EditTask, live: MemoryState, label: str, on_iteration: Callable[[int, float], None] | None
    ) -> EditOutcome:
        """The paper's iterations on dW itself."""
        hparams = self.hparams
        if hparams.layer_units:
            units = self._recorder.units()
            hparams, task.unit = units.resolved(hparams), units.score
        mask = live.mask if live.mask is not None else torch.ones_like(live.delta_weight, dtype=torch.bool)
        return train_edit(live.delta_weight, mask, task, hparams, label, on_iteration, in_place=True)

    def _consolidate(
        self,
        task: EditTask,
        recorded: Sequence[RecordedEdit],
        shard: OpenShard,
        place: int,
        live: MemoryState,
        requests: Sequence[EditRequest],
        on_iteration: Callable[[int, float], None] | None,
    ) -> tuple[OpenShard, EditOutcome]:
        """Train, and solve for dW with all edits of the shard, as loudly as they bear."""
        held, outside = self._requests_in(place), self._held_outside(place)
        if shard.equations is None:
            if self._elsewhere is None:
                elsewhere = self._tasks.elsewhere([one.request for one in outside]) if outside else None
                self._elsewhere = self._tasks.with_elsewhere(elsewhere, held)
            kept = standing(held, requests)
            inherited = self._tasks.inherited(kept, outside, self.layer.memories(self.adapter_name))
            equations = self._tasks.equations(live, held, kept, self._elsewhere, outside, inherited)
            shard = replace(shard, equations=equations).with_tokens_of(inherited)
        step = self.hparams.edit_lr * (self._recorder.units().output_norm if self.hparams.layer_units else 1.0)
        wording = self._recorder.wording
        n_tokens = min(len(wording(wording.asked(request.prompt))["input_ids"]) for request in requests)
        hparams = settings_after(self.hparams, self._n_earlier(place), n_tokens)
        shard, outcome = train_into(shard, task, recorded, hparams, step, self._label(requests), on_iteration)
        answers = recorded_answers(self._recorder, self._tasks.answered_by([*held, *requests], outside))
        shard = write_what_is_needed(shard, live.delta_weight, answers, hparams)
        if hparams.level_limit:
            write_level(answers, live.delta_weight, hparams)
        self._elsewhere = with_elsewhere(self._elsewhere, recorded)
        return shard, outcome

    def _label(self, requests: Sequence[EditRequest]) -> str:
        number, first = len(self.held) + 1, requests[0]
        if len(requests) == 1:
            return f"edit {number} ({first.prompt!r} -> {first.target!r})"
        return f"edits {number} to {number + len(requests) - 1} ({first.prompt!r} -> {first.target!r} and so on)"

    # -- shards -------------------------------------------------------------------------------

    def _with_live_shard(self) -> list[MemoryState]:
        device = computing_device(self.layer.get_base_layer())
        shape = (self.layer.out_features, self.layer.in_features)
        states = self.layer.memories(self.adapter_name)
        return with_live_shard(states, shape, device, self.hparams, self._generator)

    def _shard_so_far(self, place: int, live: MemoryState, requests: Sequence[EditRequest]) -> OpenShard:
        """What is remembered of the live shard's edits that hold; from their texts where they were loaded.

        Also where one of its prompts is edited again: what that one added to the problem cannot be taken out of it.
        """
        if live.n_edits == 0:
            return OpenShard()
        held = self._requests_in(place)
        again = self.hparams.consolidation and bool(overruled(held, requests))
        if self._open_shard is not None and not again:
            return self._open_shard
        shard = OpenShard()
        for recorded in self._recorder.edits(standing(held, requests)):
            shard, _ = shard.joined(recorded, live.delta_weight, self.hparams)
        return shard

    def _requests_in(self, place: int) -> list[EditRequest]:
        return [held.request for held in self.held if held.memory == place]

    def _held_outside(self, place: int) -> list[HeldEdit]:
        return [held for held in self.held if held.memory != place]

    @undisturbed
    def close_memory(self) -> None:
        """Fold the open shards into a memory now, although there is room for more edits; none open: nothing."""
        states = self.layer.memories(self.adapter_name)
        if states and states[-1].stage == LIVE and not states[-1].n_edits:
            states.pop()
        if states and states[-1].stage != MERGED:
            self.layer.install(self.adapter_name, self._closed(states, early=True))

    def _closed(self, states: list[MemoryState], early: bool = False) -> list[MemoryState]:
        closed = close_shard(states, self.hparams, self._generator, early)
        self._open_shard = None
        self.held = [replace(held, memory=closed.places[held.memory]) for held in self.held]
        if not self.hparams.epsilon_as_trained:
            state, requests = closed.states[closed.changed], self._requests_in(closed.changed)
            closed.states[closed.changed] = calibrated(self._recorder, state, requests, self._n_earlier(closed.changed))
        return stricter(closed.states, sum(state.stage == MERGED for state in states), self.hparams)

    def _n_earlier(self, place: int) -> int:
        # The shards of WISE-Merge become one memory before long.
        return place if self.hparams.retrieve else 0
