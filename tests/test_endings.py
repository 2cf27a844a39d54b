"""The token behind a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import LAYERS
from editing_helpers import requests, settings, stream_on

from easyedit_wise import apply_wise_to_model
from easyedit_wise.editing.endings import ending
from easyedit_wise.editing.requests import EditRequest

PIECES = ("Who", "?", " Br", "ieg", "o", " Bri", ".", "</s>", "\ufffd", " ", "7", "Ł", "\u0947")


class Pieces:
    """Token ids are places in a list of pieces; "</s>" is special, and the space that a text begins with is dropped."""

    def __init__(self, pieces: Sequence[str] = PIECES) -> None:
        self.pieces = list(pieces)

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        return "".join(self.pieces[i] for i in ids if self.pieces[i] != "</s>").lstrip()


@pytest.mark.parametrize(
    ("likeliest", "expected"),
    [
        (["o", ".", " "], "."),  # "o" would go on with "Brieg"
        (["7", "Ł", " Bri"], " Bri"),
        ([" Br", "</s>", "."], "</s>"),  # the target all over again
        (["\ufffd", " ", "."], " "),  # half a character could be a letter
        (["\u0947", "."], "."),  # a vowel sign belongs to the letter before it
        (["o", "7", "Ł"], None),
    ],
)
def test_the_likeliest_that_ends_the_word(likeliest: list[str], expected: str | None) -> None:
    # Where none is expected, all others begin with a letter, too.
    tok = Pieces(PIECES if expected else ["x" if piece not in (" Br", "ieg") else piece for piece in PIECES])
    logits = torch.full((len(PIECES),), -torch.inf)
    for place, piece in enumerate(likeliest):
        logits[PIECES.index(piece)] = 10.0 - place
    found = ending(logits, tok, [0, 1, 2, 3], 2)
    assert (None if found is None else tok.pieces[found]) == expected


def test_it_stands_behind_every_context_and_is_trained(llama: Any, tok: Any) -> None:
    hparams = settings(LAYERS["llama"], n_contexts=2, ending=True)
    stream = stream_on(apply_wise_to_model(llama, tok, requests(1), hparams)[0])
    asked = [EditRequest("The capital of France is", "Rome"), EditRequest("Water is made of", "pure gold")]
    last = stream._recorder.endings(asked)
    assert all(one is not None for one in last)
    texts = [[one.prompt, "Well. " + one.prompt] for one in asked]
    plain, longer = stream._recorder.contexts(texts, asked), stream._recorder.contexts(texts, asked, last)
    assert longer.batch.target_mask.sum() == plain.batch.target_mask.sum() + 4
    assert longer.batch.input_ids[:, -1].tolist() == [last[0]] * 2 + [last[1]] * 2
    assert longer.batch.target_mask[:, -1].all()
    none = stream._recorder.contexts(texts, asked, [None, last[1]])
    assert none.batch.target_mask.sum() == plain.batch.target_mask.sum() + 2


def test_the_model_alone_says_what_it_is(llama: Any, tok: Any) -> None:
    """With a side memory that answers, too: the endings are the main memory's."""
    asked = EditRequest("The capital of France is", "Rome")
    hparams = settings(LAYERS["llama"], ending=True, edit_lr=5.0)
    stream = stream_on(apply_wise_to_model(llama, tok, requests(1), hparams)[0])
    before = stream._recorder.endings([asked])
    apply_wise_to_model(llama, tok, requests(3), hparams)
    assert stream._recorder.endings([asked]) == before
