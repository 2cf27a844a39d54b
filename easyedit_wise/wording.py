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

    def pair(self, asked: str, target: str, separator: str | None = None) -> tuple[list[int], list[int]]:
        """Tokens of a prompt as the model is asked it, and of the prompt with its target behind it.

        A user asks the first, so the second begins with them: a target that the tokenizer would melt with the prompt's
        last token (``"p):\\n"`` and ``"    return"``) is tokenised behind it. Where that cannot be done without another
        text, behind a prompt that ends in a space, which belongs to the word that follows, and for
        :attr:`special_tokens_again`, the two are one text's tokens.

        Args:
            asked: as :meth:`asked` gives it.
            target: what follows.
            separator: see :meth:`answered`.
        """
        answered = self.answered(asked, target, separator)
        alone, whole = list(self(asked)["input_ids"]), list(self(answered)["input_ids"])
        eos = getattr(self.tok, "eos_token_id", None)
        if whole and alone and eos is not None and whole[-1] == alone[-1] == eos:
            whole, alone = whole[:-1], alone[:-1]  # tokenizers that end every text with eos
        if self.special_tokens_again or asked.endswith(" ") or whole[: len(alone)] == alone:
            return alone, whole
        behind = answered[len(asked) :]
        # Alone, some tokenizers put a space before a text: then it is looked for behind a sign.
        for sign in ("", "\n", "=", "x"):
            before, both = (
                list(self.tok(text, add_special_tokens=False)["input_ids"]) for text in (sign, sign + behind)
            )
            split = alone + both[len(before) :]
            if both[: len(before)] == before and self.tok.decode(split) == self.tok.decode(whole):
                return alone, split
        return alone, whole

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
