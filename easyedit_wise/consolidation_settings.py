"""Settings of what is not in the paper: the closed-form shard, and other forms of an edit's prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .checks import check_choice, check_count, check_switch, is_number

MASKS = ("random", "columns")


@dataclass(kw_only=True)
class ConsolidationSettings:
    """The part of ``WISEHyperParams`` that is about ``least_squares`` and ``editing.variations``.

    Raises:
        ValueError: from ``WISEHyperParams``, whose other fields these are checked against.
    """

    consolidation: float = 200.0
    """Over 0: after each edit the shard's dW is the least-squares solution that says what each of its edits was trained
    to and is quiet on irrelevant prompts, which count as this many tokens per 1000 columns; they need no margin loss
    (Eq. 5) then.
    0: dW stays as the iterations leave it (the paper's). Needs ``mask: columns``."""
    mask: str = "columns"
    """A shard's subspace: "random" entries of dW (the paper's) or random whole "columns"."""
    relative_scores: bool = True
    """True: Delta_act is divided by || A(x) ||, token by token, and of several memories the one answers that exceeds
    its own epsilon by the largest factor. Needs ``consolidation``: the margins of Eq. 5 are of the paper's score."""
    other_subjects: int = 8
    """Irrelevant prompts of ``consolidation`` that are the edit's own with another subject in its place."""
    scrambled: int = 8
    """Irrelevant prompts of ``consolidation`` that are tokens of the edit's target, out of order among others: a memory
    that answers with a year is else active wherever a digit stands."""
    after_answer: int = 12
    """Irrelevant tokens of ``consolidation`` that the model itself would write behind the target: the memory was picked
    for the prompt and goes on answering. 0: none are written."""
    unfinished_names: float = 1.0
    """Over 0: ``consolidation`` is quiet where a word of a known subject begins or a number in it goes on, as in many
    other names, with this share of the weight of a prompt's token, and words beside the subject are not trained to say
    anything (``editing.names``; docs/experiments.md, "S" and "U").
    0: these tokens say what they were trained to, as all others."""
    unfinished_names_after: int = 10
    """In memories with at least so many before them alone: among few hardly any unrelated prompt finds such a name."""
    written: float = 2000.0
    """What text at large, written by the model itself, counts as in ``consolidation``, in tokens per 1000 columns like
    that; 0: none is written."""
    capacity: float = 0.25
    """A shard of ``consolidation`` is also full when the tokens of its edits, prompts and targets, are this many for
    each of its columns: what so many are told apart by is hardly quiet on other text any more. It takes the edit that
    fills it; 0: only ``save_freq`` and ``merge_freq`` count."""
    varied_contexts: bool = True
    """True: the contexts are the prompt behind a prefix, the prompt with words left out, and its subject alone behind
    a prefix, in turn. Without a known subject the third is the second behind a prefix."""

    gain: float = 1.2
    """What an edit was trained to say, times this, is what its memory shall say with ``consolidation``, so that it also
    carries where another wording gets only a share of it; weaker edits of the shard get up to twice this. 1: as
    trained."""
    prompt_gain: float = 1.25
    """What its prompt's tokens say, times this as well, beside the target's: a query is scored by its prompt alone, and
    what the target's tokens say is loud in any text that has one of them. 1: both alike."""

    asked_again: int = 1
    """How often ``consolidation`` asks again for what the edits of a shard lack of what they shall say: the more, the
    better long targets are said, and the louder are unrelated prompts beside the weakest edit."""
    asked_again_limit: int = 4
    """Where an edit of a shard has a loss of over .1 nats a token all the same, it is asked twice as often, and so on
    up to this (``editing.asked_again``). At ``asked_again`` or below: every shard is asked that often."""

    level_limit: float = 3.0
    """dW of a memory is multiplied by the largest of .5, .65, .8, 1, 1.25, 1.5, 2 and 3, up to this, at which its own
    edits' answers hold: it decides how far an answer goes, not what is answered (``editing.level``). Goes with
    ``consolidation``. 0: dW as solved."""

    def validate_consolidation(self) -> None:
        """Check these fields alone.

        Raises:
            ValueError: naming the first value that does not fit, the limit and the cure.
        """
        value = self.consolidation
        if not is_number(value) or not math.isfinite(value) or value < 0:
            raise ValueError(f"consolidation is {value!r}: it must be a finite number of at least 0.")
        if not is_number(self.gain) or not math.isfinite(self.gain) or self.gain <= 0:
            raise ValueError(f"gain is {self.gain!r}: it must be a finite number over 0, such as 1.2.")
        if not is_number(self.prompt_gain) or not math.isfinite(self.prompt_gain) or self.prompt_gain < 1:
            raise ValueError(f"prompt_gain is {self.prompt_gain!r}: it must be a finite number >= 1, such as 1.25.")
        if not is_number(self.level_limit) or not (self.level_limit == 0 or 0.5 <= self.level_limit < math.inf):
            raise ValueError(
                f"level_limit is {self.level_limit!r}: it must be 0, which switches it off, or a finite number >= 0.5, "
                "such as 3."
            )
        if not is_number(self.written) or not math.isfinite(self.written) or self.written < 0:
            raise ValueError(f"written is {self.written!r}: it must be a finite number of at least 0.")
        if (
            not is_number(self.unfinished_names)
            or not math.isfinite(self.unfinished_names)
            or self.unfinished_names < 0
        ):
            raise ValueError(
                f"unfinished_names is {self.unfinished_names!r}: it must be a finite number of at least 0, such as 1."
            )
        if not is_number(self.capacity) or not math.isfinite(self.capacity) or self.capacity < 0:
            raise ValueError(f"capacity is {self.capacity!r}: it must be a finite number of at least 0, such as 0.25.")
        check_choice("mask", self.mask, MASKS)
        counts = ("other_subjects", "scrambled", "after_answer", "unfinished_names_after")
        for name in (*counts, "asked_again", "asked_again_limit"):
            check_count(name, getattr(self, name))
        for name in ("relative_scores", "varied_contexts"):
            check_switch(name, getattr(self, name))
        if value > 0 and self.mask != "columns":
            raise ValueError(
                f"consolidation is {value} with mask: {self.mask}, but only a shard of whole columns is one "
                "least-squares problem: set mask: columns, or consolidation: 0."
            )
        needing = ("relative_scores", "other_subjects", "scrambled", "after_answer", "unfinished_names", "written")
        for name in (*needing, "capacity"):
            if getattr(self, name) and value == 0:
                raise ValueError(
                    f"{name} is {getattr(self, name)} without consolidation: set consolidation: 200, too, or take "
                    "preset: margin, which has neither."
                )
