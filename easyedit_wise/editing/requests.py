"""What an edit asks for, and its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice
from ..routing import LONG_TEXT
from ..separators import AUTO, NONE, SEPARATORS, gap
from ..wording import Wording
from .names import name_tokens


@dataclass(frozen=True)
class EditRequest:
    """One edit: the model shall continue ``prompt`` with ``target``.

    Attributes:
        prompt: x_e.
        target: y_e; white space that it begins with is a part of it.
        subject: what the prompt is about, if known; it occurs in the prompt.
        loc_prompt: an irrelevant prompt x_i, or None: packaged neutral prompts serve. Of one that is longer than the
            model has positions for, the end counts.
        separator: what stands between prompt and target, see :func:`..separators.gap`.
    """

    prompt: str
    target: str
    subject: str | None = None
    loc_prompt: str | None = None
    separator: str = AUTO

    def __post_init__(self) -> None:
        for name, value in (("prompt", self.prompt), ("target_new", self.target)):
            if not isinstance(value, str) or not value.strip():
                raise ValueError(
                    f"{name} is {value!r}: an edit needs a prompt and the text that shall follow it, both non-empty."
                )
        if self.subject is not None and (not isinstance(self.subject, str) or self.subject not in self.prompt):
            raise ValueError(
                f"the subject {self.subject!r} does not occur in the prompt {self.prompt!r}: give it as it is "
                "spelled there, or leave it out."
            )
        if self.loc_prompt is not None and not isinstance(self.loc_prompt, str):
            raise ValueError(f"loc_prompt is {self.loc_prompt!r}: it must be a text, or be left out.")
        check_choice("target_separator", self.separator, SEPARATORS)

    @classmethod
    def from_easyedit(cls, request: Mapping[str, Any], separator: str = AUTO) -> EditRequest:
        """From EasyEdit's request dict: ``prompt``, ``target_new`` and, if given, ``subject``, ``loc_prompt``.

        White space behind a target goes, unless nothing is put in before it either ("none"): what ends an answer is
        the model's to say. White space before it stays; a space that would stand there anyway is not held twice.

        Args:
            request: the dict. A ``target_separator`` of its own overrides ``separator``.
            separator: what stands between prompt and target, see :func:`..separators.gap`.

        Raises:
            ValueError: no dict, prompt or target is missing or empty, the subject is not in the prompt, or there is no
                such separator.
        """
        if not isinstance(request, Mapping):
            raise ValueError(f"a request is {request!r}: it must be a dict with 'prompt' and 'target_new'.")
        missing = [key for key in ("prompt", "target_new") if key not in request]
        if missing:
            raise ValueError(
                f"the request has no {missing[0]!r} (it has {', '.join(map(str, request)) or 'nothing'}): "
                "an edit needs a prompt and the text that shall follow it."
            )
        prompt, target, loc_prompt = request["prompt"], request["target_new"], request.get("loc_prompt")
        separator = request.get("target_separator", separator)
        check_choice("target_separator", separator, SEPARATORS)
        if isinstance(target, str) and separator != NONE:
            target = target.rstrip()
            bare = target.removeprefix(" ")
            target = bare if isinstance(prompt, str) and gap(prompt, bare, separator) else target
        return cls(
            prompt=prompt,
            target=target,
            subject=request.get("subject") or None,
            loc_prompt=None if isinstance(loc_prompt, str) and not loc_prompt.strip() else loc_prompt,
            separator=separator,
        )

    @property
    def answer(self) -> str:
        """The target as it is written behind a word: what its tokens are made of."""
        own = " " if self.prompt.endswith(" ") else gap(self.prompt, self.target, self.separator)
        return own + self.target


def related(request: EditRequest, others: Sequence[EditRequest], count: int) -> list[EditRequest]:
    """Edits about the same subject: what this one shall not answer.

    One whose prompt is this one's, or goes on from it, is left out: both hold all of this one's tokens. So is one that
    this one's goes on from, see :func:`continued`.

    Args:
        request: an edit.
        others: edits of other memories.
        count: the latest of them, at most so many.
    """
    if request.subject is None:
        return []
    subject = request.subject.casefold()
    found = [
        other
        for other in others
        if other.subject is not None
        and other.subject.casefold() == subject
        and not request.prompt.startswith(other.prompt)
        and not other.prompt.startswith(request.prompt)
    ]
    return found[-count:]


def continued(prompt: str, other: str) -> bool:
    """Whether one of two prompts goes on from the other, as two sentences of one text do; not where they are the same.

    Up to the shorter one's end a causal model sees no difference, so no router can tell such edits apart by the rest
    of the longer one, and they ask for different answers.
    """
    return prompt != other and (prompt.startswith(other) or other.startswith(prompt))


@dataclass(frozen=True)
class TokenBatch:
    """B sequences, padded on the left so that the targets end together.

    Attributes:
        input_ids: shape (B, T).
        attention_mask: shape (B, T), 1 where a token is real.
        prompt_mask: shape (B, T), True on the real tokens before the target: what a user's query has.
        target_mask: shape (B, T), True on the target's tokens.
        subject_mask: shape (B, T), True on the subject's tokens in the prompt; None where no subject is known.
        unfinished_mask: shape (B, T), True on the prompt's tokens of names that are not finished yet, see
            :mod:`.names`; None where there is none.
        beside_mask: shape (B, T), True on the prompt's tokens beside the name, but for the last one, which predicts the
            target; None where there is no name. None is beside it in a sequence without it, nor where the edit's prompt
            has ``routing.LONG_TEXT`` tokens or more: such a text is known by more than its name.
        pads_count: padding is as good as a token (``padded_batch``); ``prompt_mask`` is then what is scored, all of it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_mask: Tensor
    target_mask: Tensor
    subject_mask: Tensor | None = None
    unfinished_mask: Tensor | None = None
    beside_mask: Tensor | None = None
    pads_count: bool = False

    @property
    def counted_mask(self) -> Tensor:
        """Bool, shape (B, T): what is a token to the side memory, the real ones unless padding counts."""
        mask = self.attention_mask.bool()
        return torch.ones_like(mask) if self.pads_count else mask

    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward; positions start at each sequence's first real token.

        Where padding counts they are the model's own business, as in EasyEdit.
        """
        if self.pads_count:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        position_ids = (self.attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": position_ids,
        }


def encode_pair(tok: Any, prompt: str, target: str, separator: str = AUTO) -> tuple[list[int], int]:
    """Tokens of a prompt with its target behind it, and how many of them are the prompt's.

    The prompt's are those that a user asks, see :meth:`..wording.Wording.pair`; where the text's tokens are others, the
    prompt's part ends where they stop to agree.

    Args:
        tok: the tokenizer, or a :class:`..wording.Wording` of it.
        prompt: as the model is asked it.
        target: what follows.
        separator: what stands between the two, see :func:`..separators.gap`.

    Raises:
        ValueError: nothing of the target, or nothing of the prompt, is left as a token of its own.
    """
    alone, together = Wording.of(tok).pair(prompt, target, separator)
    n_prompt = 0
    while n_prompt < min(len(alone), len(together)) and alone[n_prompt] == together[n_prompt]:
        n_prompt += 1
    if n_prompt >= len(together):
        raise ValueError(
            f"the target {target!r} tokenises to nothing after the prompt {prompt!r}: choose a target with text."
        )
    if n_prompt == 0:
        raise ValueError(
            f"no token of the prompt {prompt!r} is left before the target {target!r}, so nothing predicts it: "
            "choose a longer prompt."
        )
    return together, n_prompt


def left_padded(
    tok: Any, sequences: Sequence[Sequence[int]], device: torch.device, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of sequences padded on the left, both of shape (B, T); None: T as is needed."""
    pad = next((i for i in (tok.pad_token_id, tok.eos_token_id) if i is not None), 0)
    length = max(map(len, sequences)) if length is None else length
    ids = [[pad] * (length - len(sequence)) + list(sequence) for sequence in sequences]
    mask = [[0] * (length - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def pair_batch(
    tok: Any,
    prompts: Sequence[str],
    targets: str | Sequence[str],
    device: torch.device,
    requests: EditRequest | Sequence[EditRequest] | None = None,
    endings: Sequence[int | None] | None = None,
    separators: str | Sequence[str] = AUTO,
) -> TokenBatch:
    """A batch of prompts, each followed by its target.

    Args:
        tok: the tokenizer, or a :class:`..wording.Wording` of it.
        prompts: contexts of one edit or of several; each holds its request's prompt.
        targets: what follows each of them, or all of them.
        device: where the tensors go.
        requests: the request of each prompt, or of all: names the subject, if its tokens are wanted.
        endings: one token more behind each target, where it has one.
        separators: what stands before each of the targets, or all of them, see :func:`..separators.gap`.

    Raises:
        ValueError: a target tokenises to nothing.
    """
    targets = [targets] * len(prompts) if isinstance(targets, str) else targets
    separators = [separators] * len(prompts) if isinstance(separators, str) else separators
    pairs = [encode_pair(tok, *one) for one in zip(prompts, targets, separators, strict=True)]
    if endings is not None:
        pairs = [
            (tokens if last is None else [*tokens, last], n) for (tokens, n), last in zip(pairs, endings, strict=True)
        ]
    input_ids, attention_mask = left_padded(tok, [tokens for tokens, _ in pairs], device)
    starts = torch.tensor([input_ids.shape[1] - (len(tokens) - n) for tokens, n in pairs], device=device)
    target_mask = torch.arange(input_ids.shape[1], device=device) >= starts[:, None]
    prompt_mask = attention_mask.bool() & ~target_mask
    if requests is None or isinstance(requests, EditRequest):
        requests = [requests] * len(prompts) if requests else []
    asked = list(zip(prompts, requests, strict=False))
    starts_at = [input_ids.shape[1] - len(tokens) for tokens, _ in pairs]

    def marked(places: Sequence[Sequence[int]]) -> Tensor:
        mask = torch.zeros_like(prompt_mask)
        for row, (start, own) in enumerate(zip(starts_at, places, strict=False)):
            mask[row, [start + place for place in own]] = True
        return mask & prompt_mask

    found = [subject_tokens(tok, prompt, request) for prompt, request in asked]
    subject_mask = marked(found) if found and all(found) else None
    names = [name_tokens(tok, prompt, request.subject) for prompt, request in asked]
    unfinished_mask = beside_mask = None
    if any(one.own for one in names):
        unfinished_mask = marked([one.unfinished for one in names])
        by_name = {request: len(tok(request.prompt)["input_ids"]) < LONG_TEXT for request in set(requests)}
        own = marked([one.own if by_name[request] else [] for one, request in zip(names, requests, strict=True)])
        beside_mask = prompt_mask & ~own & own.any(dim=1, keepdim=True)
        beside_mask[torch.arange(len(own), device=device), starts - 1] = False
    return TokenBatch(input_ids, attention_mask, prompt_mask, target_mask, subject_mask, unfinished_mask, beside_mask)


def subject_tokens(tok: Any, text: str, request: EditRequest) -> list[int]:
    """Positions of the subject's tokens in a text that ends with the request's prompt, or holds it last.

    Returns:
        An empty list where they cannot be told: no subject, or a tokenizer without character offsets.
    """
    if not request.subject or not getattr(tok, "is_fast", False):
        return []
    start = text.rfind(request.prompt)
    if start < 0:
        return []
    start += request.prompt.find(request.subject)
    end = start + len(request.subject)
    offsets = tok(text, return_offsets_mapping=True)["offset_mapping"]
    return [position for position, (first, last) in enumerate(offsets) if first < end and last > start]


def prompt_batch(tok: Any, prompts: Sequence[str], device: torch.device) -> TokenBatch:
    """A batch of prompts without a target, as a user's queries arrive.

    Raises:
        ValueError: a prompt tokenises to nothing.
    """
    sequences = [list(tok(prompt)["input_ids"]) for prompt in prompts]
    for prompt, tokens in zip(prompts, sequences, strict=True):
        if not tokens:
            raise ValueError(f"the prompt {prompt!r} tokenises to nothing: choose one with text.")
    input_ids, attention_mask = left_padded(tok, sequences, device)
    mask = attention_mask.bool()
    return TokenBatch(input_ids, attention_mask, mask, torch.zeros_like(mask))
