"""From requests to what they train on: contexts, irrelevant prompts, edits of other memories."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data import neutral_prompts, other_subjects
from ..hparams import WISEHyperParams
from ..least_squares import NormalEquations
from ..tuner.memory import MemoryState
from .consolidated import opened, rebuilt, with_inherited
from .contexts import context_groups, in_groups
from .elsewhere import with_elsewhere, without_answered, without_own
from .held import HeldEdit
from .inherited import Inherited, divided, inherited_by
from .open_shard import OpenShard
from .overruled import latest, overruled
from .recorder import PromptRecorder
from .requests import EditRequest, continued, related
from .scored import ScoredInputs
from .task import EditTask
from .variations import about_others, scrambled, varied_contexts
from .whole_matrix import base_weight

_PAST_EDITS_REPLAYED = 8
# The share of `context_tokens` that one iteration may have.
STEP_SHARE = 4
# Edits of other memories about the same subject that one is quiet on by name.
_RELATED = 16
# Edits whose activations are recorded anew to be quiet on them: after loading only.
_REMEMBERED_FROM_TEXTS = 1024


class TaskMaker:
    """Makes the tasks of one stream.

    Args:
        recorder: records prompts at the layer, with the present settings.
        generator: the stream's random numbers.
    """

    def __init__(self, recorder: PromptRecorder, generator: torch.Generator) -> None:
        self._recorder = recorder
        self._generator = generator

    @property
    def hparams(self) -> WISEHyperParams:
        """The settings of the edits to come."""
        return self._recorder.hparams

    def task(
        self,
        requests: Sequence[EditRequest],
        own: Sequence[ScoredInputs | None],
        elsewhere: Sequence[HeldEdit],
        shard: OpenShard,
        memories: Sequence[MemoryState] = (),
        held: Sequence[EditRequest] = (),
    ) -> EditTask:
        """What some edits of one shard train on.

        Args:
            requests: the edits.
            own: the irrelevant prompt of each that has one.
            elsewhere: edits that other memories hold.
            shard: what is remembered of the shard's earlier edits.
            memories: all of them, as ``elsewhere`` counts them.
            held: the shard's earlier edits.
        """
        outside = [one.request for one in elsewhere]
        size, n_groups = self._within_budget(requests)
        groups = list(zip(*(self._context_groups(request, size) for request in requests), strict=True))[:n_groups]
        endings = self._recorder.endings(requests) if self.hparams.ending else None
        contexts = [self._recorder.contexts(prompts, requests, endings) for prompts in groups]
        inherited = inherited_by(requests, elsewhere, _RELATED, held) if self.hparams.consolidation else []
        others = self._about_others(requests)
        irrelevant, irrelevant_of = self._irrelevant_inputs(own)
        past = self._past_inputs(requests, outside) if self.hparams.replay else None
        whole = base_weight(self._recorder.layer.get_base_layer()) if self.hparams.decay_whole_matrix else None
        return EditTask(
            contexts,
            irrelevant,
            past,
            shard.rehearsed,
            irrelevant_of,
            about_others=others,
            related=self._related(requests, outside) if self.hparams.consolidation else None,
            inherited=self.inherited(requests, elsewhere, memories, held) if inherited else None,
            n_inherited=[self._left_to(request, inherited) for request in requests],
            scrambled_targets=self._scrambled_targets(requests),
            base_weight=whole,
            after_answers=self._recorder.after_answers(requests, endings) if self.hparams.after_answer else None,
            overruled=self._overruled(requests, outside) if self.hparams.consolidation else None,
        )

    def own_irrelevant(self, requests: Sequence[EditRequest]) -> list[ScoredInputs | None]:
        """The irrelevant prompt of each request that has one."""
        if not self.hparams.padding_counts:
            return self._recorder.own_irrelevant(requests)
        groups = [self._context_groups(one, self._within_budget([one])[0]) for one in requests]
        return [self._recorder.padded_irrelevant(own[0], one) for own, one in zip(groups, requests, strict=True)]

    def elsewhere(self, requests: Sequence[EditRequest]) -> Tensor | None:
        """:func:`with_elsewhere` of edits of which only the texts are known, as after loading: of some where there are
        very many."""
        picked = torch.randperm(len(requests), generator=self._generator)[:_REMEMBERED_FROM_TEXTS].tolist()
        return self.with_elsewhere(None, [requests[index] for index in picked])

    def with_elsewhere(self, elsewhere: Tensor | None, requests: Sequence[EditRequest]) -> Tensor | None:
        """:func:`with_elsewhere` of edits from their texts, so that they need not be kept."""
        for some in self._recorder.edits(requests):
            elsewhere = with_elsewhere(elsewhere, some)
        return elsewhere

    def equations(
        self,
        live: MemoryState,
        held: Sequence[EditRequest],
        kept: Sequence[EditRequest],
        elsewhere: Tensor | None,
        others: Sequence[HeldEdit],
        inherited: Inherited | None,
    ) -> NormalEquations:
        """The least-squares problem of a shard that was just begun, or that is known by its edits' texts.

        Args:
            live: the shard.
            held: the edits that were made in it.
            kept: those of them that shall hold, see :func:`.overruled.standing`.
            elsewhere: :func:`with_elsewhere` of all edits, ``held`` among them.
            others: edits that other memories hold.
            inherited: what ``kept`` inherited, see :meth:`inherited`.

        Raises:
            ValueError: its mask is not of whole columns.
        """
        if live.mask is None:
            raise ValueError("the open shard has no mask: restore the model, or go on with consolidation: 0.")
        written = self._recorder.written().spread if self.hparams.written else None
        equations = opened(live.mask, self._recorder.neutral(), written, elsewhere if others else None, self.hparams)
        if others:
            for some in self._recorder.edits(held):
                equations = without_own(equations, some)
            equations = without_answered(equations, self._overruled(kept, [one.request for one in others]))
        for some in self._recorder.edits(kept):
            equations = rebuilt(equations, some, live.delta_weight, self.hparams)
        return with_inherited(equations, inherited, self.hparams)

    def answered_by(self, shard: Sequence[EditRequest], elsewhere: Sequence[HeldEdit]) -> list[EditRequest]:
        """What a shard shall answer: other memories' edits that it inherited, and its own; of one prompt the latest."""
        return [*(one.request for one in inherited_by(shard, elsewhere, _RELATED, shard)), *latest(shard)]

    def _within_budget(self, requests: Sequence[EditRequest]) -> tuple[int | None, int | None]:
        """How many contexts of an edit ``context_tokens`` leaves a group, and how many groups; None: all.

        A group keeps the plain prompt and one context, and there is one group, however long the texts are.
        """
        size, budget = self.hparams.contexts_per_step, self.hparams.context_tokens
        if budget is None:
            return size, None
        length = max(len(self._tokens(one)[0]) for one in requests)
        affordable = max(2, budget // STEP_SHARE // length)
        size = affordable if size is None else min(size, affordable)
        return size, max(1, budget // (length * size))

    def _context_groups(self, request: EditRequest, size: int | None) -> list[list[str]]:
        prefixes, excess = self._recorder.prefixes(), self._recorder.room.excess(request)
        if not self.hparams.varied_contexts:
            return context_groups(request.prompt, prefixes, size, self.hparams.fixed_contexts, excess)
        varied = varied_contexts(request.prompt, request.subject, prefixes, self._generator, excess=excess)
        return in_groups(request.prompt, varied, size)

    def _about_others(self, requests: Sequence[EditRequest]) -> ScoredInputs | None:
        """The prompt of each request whose subject is known, about other subjects."""
        texts: list[str] = []
        for request in requests:
            if request.subject is not None:
                count, named = self.hparams.other_subjects, other_subjects()
                texts += about_others(request.prompt, request.subject, named, count, self._generator)
        return self._recorder.scored([self._recorder.room.of(text) for text in texts]) if texts else None

    def _related(self, requests: Sequence[EditRequest], elsewhere: Sequence[EditRequest]) -> ScoredInputs | None:
        """Edits of other memories, with their targets, that share tokens with one of these."""
        found = list(dict.fromkeys(one for request in requests for one in related(request, elsewhere, _RELATED)))
        return self._answered(found)

    def _overruled(self, requests: Sequence[EditRequest], elsewhere: Sequence[EditRequest]) -> ScoredInputs | None:
        """Edits of other memories, with their targets, that one of these is made instead of."""
        return self._answered(overruled(elsewhere, requests)[-_RELATED:])

    def _answered(self, requests: Sequence[EditRequest]) -> ScoredInputs | None:
        recorded = [edit.answered for some in self._recorder.edits(requests) for edit in some]
        return ScoredInputs.stack(recorded) if recorded else None

    def inherited(
        self,
        requests: Sequence[EditRequest],
        elsewhere: Sequence[HeldEdit],
        memories: Sequence[MemoryState],
        shard: Sequence[EditRequest] = (),
    ) -> Inherited | None:
        """What other memories say of their edits that one of these goes on from, or that go on from one of these.

        Without the tokens that are these edits' own, see :func:`.inherited.divided`.
        """
        found = inherited_by(requests, elsewhere, _RELATED, shard)
        recorded = (edit for some in self._recorder.edits([held.request for held in found]) for edit in some)
        own = [(request.prompt, self._tokens(request)) for request in requests]
        return Inherited.of(
            (edit, memories[held.memory].delta_weight, self._left_by(held.request, own))
            for edit, held in zip(recorded, found, strict=True)
        )

    def _left_by(self, other: EditRequest, own: Sequence[tuple[str, tuple[list[int], int]]]) -> set[int]:
        """The places in an inherited edit's text that are one of some new edits', given by their prompts and tokens."""
        its = self._tokens(other)
        shared = [divided(tokens, its)[0] for prompt, tokens in own if continued(prompt, other.prompt)]
        return {place for places in shared for place in places}

    def _left_to(self, request: EditRequest, others: Sequence[HeldEdit]) -> int:
        """How many first tokens of a new edit's text are those of edits that it inherits."""
        own = self._tokens(request)
        goes_on = [one.request for one in others if continued(request.prompt, one.request.prompt)]
        return max((divided(own, self._tokens(other))[1] for other in goes_on), default=0)

    def _tokens(self, request: EditRequest) -> tuple[list[int], int]:
        return self._recorder.pair(request)

    def _scrambled_targets(self, requests: Sequence[EditRequest]) -> ScoredInputs | None:
        """The tokens of each request's target out of order among those of neutral prompts."""
        neutral, count, tok = neutral_prompts(), self.hparams.scrambled, self._recorder.tok
        targets = [one.answer for one in requests]
        mixed = [text for one in targets for text in scrambled(one, neutral, count, tok, self._generator)]
        return self._recorder.scored([self._recorder.room.of(text) for text in mixed]) if mixed else None

    def _irrelevant_inputs(self, own: Sequence[ScoredInputs | None]) -> tuple[ScoredInputs, list[Tensor]]:
        """x_i of Eq. 5: each request's own irrelevant prompt, and packaged neutral ones for all of them.

        Returns:
            (the prompts, which of them are each request's).
        """
        n_neutral = max(self.hparams.irrelevant_prompts, 1 if None in own else 0)
        neutral = self._recorder.neutral()
        picked = torch.randperm(len(neutral), generator=self._generator)[:n_neutral]
        given = [one for one in own if one is not None]
        shared = list(range(len(given), len(given) + n_neutral))
        numbers = iter(range(len(given)))
        device = neutral.activations.device  # an index on the host would be copied over in every iteration
        rows = [torch.tensor(shared if one is None else [next(numbers), *shared], device=device) for one in own]
        # In the dtype of dW, so that the iterations need no second copy.
        return ScoredInputs.stack([*given, neutral.select(picked)]).to(torch.float32), rows

    def _past_inputs(self, requests: Sequence[EditRequest], elsewhere: Sequence[EditRequest]) -> ScoredInputs | None:
        """x_m of Appendix B.3: edits that other memories hold, drawn anew for every edit."""
        again = {request.prompt for request in requests}  # or one would be quiet on its own prompt
        elsewhere = [other for other in elsewhere if other.prompt not in again]
        if not elsewhere:
            return None
        picked = torch.randperm(len(elsewhere), generator=self._generator)[:_PAST_EDITS_REPLAYED]
        return self._recorder.scored([self._recorder.rendered(elsewhere[index].prompt) for index in picked.tolist()])
