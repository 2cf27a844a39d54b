"""What a model has positions for: an edit's own prompt and target whole, of everything beside them the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..hparams import WISEHyperParams
from ..positions import shortened
from ..wording import Wording
from .requests import EditRequest, encode_pair

_QUOTED = 80


@dataclass(frozen=True)
class Room:
    """How much of a text a model can read.

    Attributes:
        limit: for how many tokens it has positions; None: there is no end, and no text is cut.
        wording: how prompts are put to it.
        hparams: settings.
    """

    limit: int | None
    wording: Wording
    hparams: WISEHyperParams

    def check(self, request: EditRequest) -> None:
        """Whether an edit can be asked for.

        Raises:
            ValueError: its target tokenises to nothing, or the model has no chat template but needs one, or has fewer
                positions than prompt and target have tokens.
        """
        n_tokens = self._n_tokens(request.prompt, request)
        if self.limit is not None and n_tokens > self.limit:
            raise ValueError(
                f"the prompt {_quoted(request.prompt)} and its target {_quoted(request.target)} are {n_tokens} tokens, "
                f"but this model has positions for {self.limit}: shorten them, or edit a model that reads longer texts."
            )

    def of(self, prompt: str, rendered: Callable[[str], str] | None = None) -> str:
        """The end of a prompt that the model has positions for, as the model is asked it.

        Args:
            prompt: cut at its beginning if it is too long.
            rendered: how the model is asked it; None: as :attr:`wording` says.
        """
        limit, rendered = self.limit, rendered or self.wording.asked
        if limit is not None:
            prompt = shortened(prompt, lambda text: len(self.wording(rendered(text))["input_ids"]) - limit)
        return rendered(prompt)

    def excess(self, request: EditRequest) -> Callable[[str], int] | None:
        """How many tokens a context with the edit's target, and one behind it, is too long; None: none ever is."""
        if self.limit is None:
            return None
        room = self.limit - int(self.hparams.ending)
        return lambda context: self._n_tokens(context, request) - room

    def _n_tokens(self, context: str, request: EditRequest) -> int:
        asked = self.wording.asked(context)
        n_tokens = len(encode_pair(self.wording, asked, request.target, request.separator)[0])
        if not self.hparams.padding_counts:
            return n_tokens
        return max(n_tokens, len(self.wording(f"{asked} {request.target}")["input_ids"]))  # EasyEdit's text


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _QUOTED else f"{text[: _QUOTED - 20]}...{text[-17:]}")
