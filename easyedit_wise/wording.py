"""How a prompt is put to a model: plain, or as a user's turn of a chat; and its target behind it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from .separators import AUTO, joined


class Wording:
    """A tokenizer, and how texts are put to it. It stands in for the tokenizer wherever prompts are encoded.

    A chat template writes the special tokens that a text begins with, so what it rendered is encoded without adding
    them again, as ``apply_chat_template(..., tokenize=True)`` does. A plain text gets the tokenizer's own.

    Args:
        tok: the tokenizer.
        chat: prompts are a user's turns in the tokenizer's chat template.
        separator: what stands between a prompt and its target, see :func:`.separators.gap`.
        special_tokens_again: encode what the template rendered as any other text, as EasyEdit does.
    """

    def __init__(self, tok: Any, chat: bool = False, separator: str = AUTO, special_tokens_again: bool = False) -> None:
        self.tok = tok
        self.chat = chat
        self.separator = separator
        self.special_tokens_again = special_tokens_again

    @classmethod
    def of(cls, tok: Any) -> Wording:
        """A wording as it is, a tokenizer with plain prompts."""
        return tok if isinstance(tok, cls) else cls(tok)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "tok":  # of a copy under way
            raise AttributeError(name)
        return getattr(self.tok, name)

    def __call__(self, text: str, **options: Any) -> Any:
        """What the tokenizer makes of a text as :meth:`asked` gives it."""
        if self.chat and not self.special_tokens_again:
            options = {"add_special_tokens": False, **options}
        return self.tok(text, **options)

    def asked(self, prompt: str) -> str:
        """The prompt as the model is asked it.

        Raises:
            ValueError: it is a chat, and the tokenizer has no chat template.
        """
        return as_chat(self.tok, prompt) if self.chat else prompt

    def answered(self, text: str, target: str, separator: str | None = None) -> str:
        """A text as :meth:`asked` gives it, with the target behind it.

        Args:
            text: the prompt, rendered.
            target: what follows.
            separator: None takes the wording's own. In a chat "auto" is what the template writes before an answer.
        """
        how = self.separator if separator is None else separator
        if self.chat and how == AUTO and self._template_gap is not None and not target[:1].isspace():
            return text + self._template_gap + target
        return joined(text, target, how)

    @cached_property
    def _template_gap(self) -> str | None:
        """What the chat template writes between the start of an answer and the answer; None where it does not show."""
        question, answer = "Question", "Answer"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        try:
            whole = str(self.tok.apply_chat_template(turns, tokenize=False))
        except Exception:  # a template is a program of its author's: it may refuse these turns in any way
            return None
        asked = self.asked(question)
        behind = whole[len(asked) :]
        space = behind[: len(behind) - len(behind.lstrip())]
        return space if whole.startswith(asked) and behind[len(space) :].startswith(answer) else None


def as_chat(tok: Any, prompt: str) -> str:
    """The prompt as a user's turn in the tokenizer's chat template, up to where the answer starts.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not getattr(tok, "chat_template", None):
        raise ValueError(
            "use_chat_template is on, but this tokenizer has no chat template: switch it off, or use the "
            "instruct version of the model."
        )
    turn = [{"role": "user", "content": prompt}]
    return str(tok.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
