"""What a model has positions for: an edit's own prompt and target whole, of everything beside them the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..hparams import WISEHyperParams
from ..positions import shortened
from .requests import EditRequest, encode_pair

_QUOTED = 80


@dataclass(frozen=True)
class Room:
    """How much of a text a model can read.

    Attributes:
        limit: for how many tokens it has positions; None: there is no end, and no text is cut.
        tok: its tokenizer.
        hparams: settings.
        rendered: a prompt as the model is asked it.
    """

    limit: int | None
    tok: Any
    hparams: WISEHyperParams
    rendered: Callable[[str], str]

    def check(self, request: EditRequest) -> None:
        """Whether an edit can be asked for.

        Raises:
            ValueError: its target tokenises to nothing, or the model has no chat template but needs one, or has fewer
                positions than prompt and target have tokens.
        """
        n_tokens = self._n_tokens(request.prompt, request.target)
        if self.limit is not None and n_tokens > self.limit:
            raise ValueError(
                f"the prompt {_quoted(request.prompt)} and its target {_quoted(request.target)} are {n_tokens} tokens, "
                f"but this model has positions for {self.limit}: shorten them, or edit a model that reads longer texts."
            )

    def of(self, prompt: str, rendered: Callable[[str], str] | None = None) -> str:
        """The end of a prompt that the model has positions for, as the model is asked it.

        Args:
            prompt: cut at its beginning if it is too long.
            rendered: how the model is asked it; None: as :attr:`rendered` says.
        """
        limit, rendered = self.limit, rendered or self.rendered
        if limit is not None:
            prompt = shortened(prompt, lambda text: len(self.tok(rendered(text))["input_ids"]) - limit)
        return rendered(prompt)

    def excess(self, target: str) -> Callable[[str], int] | None:
        """How many tokens a context with this target, and one behind it, is too long; None: none ever is."""
        if self.limit is None:
            return None
        room = self.limit - int(self.hparams.ending)
        return lambda context: self._n_tokens(context, target) - room

    def _n_tokens(self, context: str, target: str) -> int:
        n_tokens = len(encode_pair(self.tok, self.rendered(context), target)[0])
        if not self.hparams.padding_counts:
            return n_tokens
        return max(n_tokens, len(self.tok(f"{self.rendered(context)} {target}")["input_ids"]))  # EasyEdit's text


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _QUOTED else f"{text[: _QUOTED - 20]}...{text[-17:]}")
