"""Asking a language model. Nothing here knows how it was edited.

Two ways of asking are kept apart, because they can disagree. *Teacher-forced*: the model reads
the right answer and predicts each of its tokens in turn, as EasyEdit's token accuracy does; one
wrong token does not spoil the next. *Greedy*: the model writes its answer on its own, as it does
for a user.

``tok`` is the model's tokenizer, or a ``Wording`` of it, which puts prompts into a chat or says what stands between a
prompt and its answer; by itself a tokenizer means plain prompts and the default.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from easyedit_wise.positions import position_limit
from easyedit_wise.wording import Wording

_TOKENS_A_BATCH = 2048


@dataclass(frozen=True)
class Query:
    """A prompt and the answer that it is compared with."""

    prompt: str
    answer: str


class TextTooLongError(ValueError):
    """A model was asked a text that it has no positions for.

    Attributes:
        text: the text, or the prompt where an answer stands behind it.
    """

    def __init__(self, text: str, n_tokens: int, limit: int) -> None:
        start = text if len(text) <= 80 else f"{text[:77]}..."
        super().__init__(
            f"The text {start!r}, with the answer where there is one, has {n_tokens} tokens, but the model has "
            f"positions for {limit}: shorten it, leave its record out, or score a model that reads longer texts."
        )
        self.text = text


@dataclass(frozen=True)
class TokenPrediction:
    """What a model predicts at the positions of an answer that it is shown (teacher forcing).

    The three tuples have one entry a token of the answer: the model's most likely token, the
    answer's own token, and the natural logarithm of the probability that the model gives to it.
    """

    predicted: tuple[int, ...]
    answer: tuple[int, ...]
    log_probs: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        """Share of the answer's tokens that are the model's most likely ones, in [0, 1]."""
        return share_equal(self.predicted, self.answer)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log probability of the answer's tokens; inf when it overflows."""
        return math.exp(self.loss) if self.loss < 700.0 else math.inf

    @property
    def loss(self) -> float:
        """Mean negative log probability of the answer's tokens."""
        return -sum(self.log_probs) / len(self.log_probs)

    def share_below(self, loss: float) -> float:
        """Share of the answer's tokens whose negative log probability is below ``loss``, in [0, 1]."""
        return sum(-log_prob < loss for log_prob in self.log_probs) / len(self.log_probs)


def teacher_forced(model: Any, tok: Any, queries: Sequence[Query], batch_size: int = 16) -> list[TokenPrediction]:
    """Let the model predict every token of each query's answer from what stands before it.

    Prompt and answer are tokenised together, joined as an edit's are (``separators.joined``); the answer's tokens are
    those beyond the tokens that the prompt has on its own.
    The model's output needs ``.logits`` of shape (B, T, V). The result has the order of the
    queries; the tokenizer's padding side and token neither matter nor change.

    Raises:
        ValueError: no queries, an empty prompt or answer, or an answer without a token of its own.
        TextTooLongError: a query is longer than the model has positions for.
    """
    _require("queries", queries, batch_size)
    encoded = [_encode_query(tok, query) for query in queries]
    _require_room(model, [(query.prompt, len(ids)) for query, (ids, _) in zip(queries, encoded, strict=True)])
    return _predict(model, tok, encoded, batch_size)


def predict_texts(model: Any, tok: Any, texts: Sequence[str], batch_size: int = 16) -> list[TokenPrediction]:
    """Let the model predict every token of each text but the first from what stands before it.

    Raises:
        ValueError: no texts, or one of fewer than two tokens.
        TextTooLongError: a text is longer than the model has positions for.
    """
    _require("texts", texts, batch_size)
    plain = Wording.of(tok).tok  # a text is nobody's turn in a chat
    encoded = [(_encode(plain, text), 1) for text in texts]
    for text, (ids, _) in zip(texts, encoded, strict=True):
        if len(ids) < 2:
            raise ValueError(f"The text {text!r} has fewer than two tokens: there is nothing to predict.")
    _require_room(model, [(text, len(ids)) for text, (ids, _) in zip(texts, encoded, strict=True)])
    return _predict(model, tok, encoded, batch_size)


def _predict(model: Any, tok: Any, encoded: Sequence[tuple[list[int], int]], batch_size: int) -> list[TokenPrediction]:
    """Predictions of each row's tokens from its start on; a row is (token ids, start)."""
    accepted = _forward_parameters(model)
    predictions: dict[int, TokenPrediction] = {}
    with _asking(model):
        for batch in _batches([len(ids) for ids, _ in encoded], batch_size):
            rows = [encoded[i] for i in batch]
            inputs = _left_padded(model, tok, [ids for ids, _ in rows])
            # Left padding puts all answers at the end: only there are logits needed, and the
            # logits of one more position, which predicts the longest answer's first token.
            kept = max(len(ids) - start for ids, start in rows) + 1
            positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)  # (B, T)
            wishes = {"position_ids": positions, "logits_to_keep": kept, "use_cache": False}
            inputs |= {name: value for name, value in wishes.items() if name in accepted}
            logits = model(**inputs).logits[:, -kept:-1]  # (B, longest answer, V)
            for i, (ids, start), row in zip(batch, rows, logits, strict=True):
                predictions[i] = _prediction(row[start - len(ids) :], ids[start:])
    return [predictions[i] for i in range(len(encoded))]


def greedy_answers(
    model: Any,
    tok: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 16,
    batch_size: int = 16,
    use_cache: bool = True,
) -> list[str]:
    """What the model writes after each prompt when it always takes its most likely token.

    The texts come in the order of the prompts, without the prompt, and end before an end-of-text
    token, or where the model has no position for more. Neither the tokenizer's padding side and token matter nor
    ``use_cache``.

    Raises:
        ValueError: no prompts or an empty one.
        TextTooLongError: a prompt is longer than the model has positions for.
    """
    _require("prompts", prompts, batch_size)
    encoded = [prompt_tokens(tok, prompt) for prompt in prompts]
    _require_room(model, [(prompt, len(ids)) for prompt, ids in zip(prompts, encoded, strict=True)])
    ends = _end_tokens(model, tok)
    answers: dict[int, str] = {}
    with _asking(model):
        for batch, n_new in _answered_batches([len(ids) for ids in encoded], batch_size, max_new_tokens, model):
            inputs = _left_padded(model, tok, [encoded[i] for i in batch])
            # A checkpoint's generation_config may ask for sampling or penalties, and would then
            # not give the model's most likely answer: what is named here overrules it.
            written = model.generate(
                **inputs,
                max_new_tokens=n_new,
                use_cache=use_cache,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                eos_token_id=ends or None,
                pad_token_id=_pad_token(tok),
            )
            for i, ids in zip(batch, written[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                length = next((n for n, token in enumerate(ids) if token in ends), len(ids))
                answers[i] = tok.decode(ids[:length], skip_special_tokens=True)
    return [answers[i] for i in range(len(encoded))]


def share_equal(left: Sequence[int], right: Sequence[int]) -> float:
    """Share of places at which two rows of tokens are the same, in [0, 1]."""
    return sum(a == b for a, b in zip(left, right, strict=True)) / len(left)


def nonempty(name: str, text: str) -> str:
    """The text; raises a ValueError with its name where it is blank."""
    if not text.strip():
        raise ValueError(f"A {name} is empty.")
    return text


def _require(name: str, values: Sequence[object], batch_size: int) -> None:
    if not values:
        raise ValueError(f"There are no {name} to ask the model.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")


def _require_room(model: Any, texts: Sequence[tuple[str, int]]) -> None:
    """Raise for the first text, given with its number of tokens, that the model has no positions for."""
    limit = position_limit(model)
    for text, n_tokens in texts:
        if limit is not None and n_tokens > limit:
            raise TextTooLongError(text, n_tokens, limit)


@contextmanager
def _asking(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: a tensor that the model keeps, such as a rotary cache or a router's
        # last scores, could then never again take part in training.
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _forward_parameters(model: Any) -> frozenset[str]:
    """Names of the arguments of the language model's own forward, below any wrapper around it."""
    while True:
        if hasattr(model, "get_base_model"):  # PEFT, whose forward is (*args, **kwargs)
            model = model.get_base_model()
        elif type(model).forward is nn.Module.forward and hasattr(model, "model"):
            model = model.model  # EasyEdit's editors, which have a __call__ and no forward
        else:
            return frozenset(inspect.signature(model.forward).parameters)


def prompt_tokens(tok: Any, prompt: str) -> list[int]:
    """The tokens of a prompt as the model is asked it.

    Raises:
        ValueError: it is blank.
    """
    wording = Wording.of(tok)
    return _encode(wording, wording.asked(nonempty("prompt", prompt)))


def _encode(tok: Any, text: str) -> list[int]:
    ids: list[int] = list(tok(text)["input_ids"])
    end = tok.eos_token_id
    # Some tokenizers close every text; a closed prompt would ask for a new text, not for an answer.
    if end is not None and ids[-1:] == [end] and not text.endswith(tok.eos_token):
        ids.pop()
    return ids


def _encode_query(tok: Any, query: Query) -> tuple[list[int], int]:
    """The tokens of prompt and answer together, and where the answer begins among them."""
    prompt, answer = nonempty("prompt", query.prompt), nonempty("answer", query.answer)
    wording = Wording.of(tok)
    asked = wording.asked(prompt)
    alone, joint = wording.pair(asked, answer)
    start = next((i for i, (a, b) in enumerate(zip(alone, joint, strict=False)) if a != b), len(alone))
    if not 0 < start < len(joint):
        raise ValueError(f"The answer {answer!r} has no token of its own after the prompt {prompt!r}.")
    return joint, start


def shared_tokens(tok: Any, prompt: str, text: str) -> int:
    """How many tokens a text begins with that are the prompt's own first ones; both plain."""
    plain = Wording.of(tok).tok
    pairs = zip(_encode(plain, prompt), _encode(plain, text), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, none more than twice another's, so that little of a batch is padding.

    A batch has at most ``batch_size`` texts, and fewer of long ones: logits of 2048 tokens are memory enough.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        full = len(batch) == batch_size or (len(batch) + 1) * lengths[index] > _TOKENS_A_BATCH
        if batch and (full or lengths[index] > 2 * lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _answered_batches(
    lengths: Sequence[int], batch_size: int, max_new_tokens: int, model: Any
) -> Iterator[tuple[list[int], int]]:
    """:func:`_batches`, each with how many tokens to write; what the model has positions for less of stands alone."""
    limit = position_limit(model)
    # The last token that is written is not read any more.
    room = [max_new_tokens if limit is None else min(max_new_tokens, limit - length + 1) for length in lengths]
    roomy = [i for i, one in enumerate(room) if one == max_new_tokens]
    for batch in _batches([lengths[i] for i in roomy], batch_size):
        yield [roomy[i] for i in batch], max_new_tokens
    for i, one in enumerate(room):
        if one < max_new_tokens:
            yield [i], one


def _pad_token(tok: Any) -> int:
    """Padding is masked, so any token will do: the tokenizer's own, its end of text, or 0."""
    return next((i for i in (tok.pad_token_id, tok.eos_token_id) if i is not None), 0)


def _end_tokens(model: Any, tok: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    ends = tok.eos_token_id if ends is None else ends
    return [ends] if isinstance(ends, int) else list(ends or ())


def _left_padded(model: Any, tok: Any, rows: Sequence[list[int]]) -> dict[str, Any]:
    """input_ids and attention_mask (B, T) of rows that all end at the last position."""
    width, pad = max(map(len, rows)), _pad_token(tok)
    ids = [[pad] * (width - len(row)) + row for row in rows]
    real = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    input_ids, mask = torch.tensor([ids, real], device=next(model.parameters()).device)
    return {"input_ids": input_ids, "attention_mask": mask}


def _prediction(logits: Tensor, answer: Sequence[int]) -> TokenPrediction:
    """Read logits (A, V) that predict the A tokens of an answer."""
    wanted = torch.tensor(answer, device=logits.device).unsqueeze(-1)  # (A, 1)
    log_probs = logits.float().log_softmax(dim=-1).gather(-1, wanted).squeeze(-1)  # (A,)
    return TokenPrediction(tuple(logits.argmax(dim=-1).tolist()), tuple(answer), tuple(log_probs.tolist()))
