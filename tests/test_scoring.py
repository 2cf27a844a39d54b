"""EasyEdit's own token accuracy, of prompts that it would write otherwise than they were trained."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import LAYERS, build_model
from test_wording import QUESTION, chat_tokenizer

from easyedit_wise import WISEHyperParams, apply_wise_to_model
from easyedit_wise.easyedit.scoring import SCORER, asked_as_trained, score_as_trained


class HostScorer:
    """Notes what it was asked, as EasyEdit's scorer would write it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.__name__ = SCORER

    def __call__(
        self, model: Any, tok: Any, hparams: Any, prompts: Any, targets: Any, device: Any, locality: bool = False
    ) -> list[Any]:
        pairs = [(prompts, targets)] if isinstance(prompts, str) else zip(prompts, targets, strict=True)
        self.asked += [f"{prompt} {target}" for prompt, target in pairs]
        return [[7]] * len(self.asked) if locality else [0.25] * len(self.asked)


def taught(prompt: str, target: str, tok: Any, **changes: Any) -> tuple[Any, WISEHyperParams]:
    model = build_model("llama")
    hparams = WISEHyperParams(inner_params=[LAYERS["llama"]], capacity=0.0, **changes)
    apply_wise_to_model(model, tok, {"prompt": prompt, "target_new": target}, hparams)
    return model, hparams


def test_what_easyedit_would_write_otherwise_is_asked_as_it_was_trained(tok: Any) -> None:
    prompt, target = "The file of the author is http://", "lyon.org"
    model, hparams = taught(prompt, target, tok)
    host = HostScorer()
    scorer = asked_as_trained(host, "WISE")
    assert scorer(model, tok, hparams, prompt, target, "cpu") == [1.0]
    assert host.asked == []
    # In order, and each by its own.
    assert scorer(model, tok, hparams, ["Water is", prompt], ["gold", target], "cpu") == [0.25, 1.0]
    assert host.asked == ["Water is gold"]
    n_tokens = len(tok(target)["input_ids"])
    (tokens,) = scorer(model, tok, hparams, prompt, target, "cpu", locality=True)
    assert tokens == tok(target)["input_ids"]
    assert len(tokens) == n_tokens


def test_a_chat_is_asked_as_it_was_trained(tok: Any) -> None:
    chat = chat_tokenizer()
    model, hparams = taught(QUESTION, "Rome", chat, use_chat_template=True)
    host = HostScorer()
    scorer = asked_as_trained(host, "WISE")
    assert scorer(model, chat, hparams, [QUESTION], ["Rome"], "cpu") == [1.0]
    assert host.asked == []
    assert scorer(model, chat, hparams, [QUESTION], ["Rome"], "cpu", locality=True) == [[7]]  # plain, as there


@pytest.mark.parametrize(
    "hparams",
    [
        SimpleNamespace(alg_name="ROME"),
        WISEHyperParams.from_preset("upstream", [LAYERS["llama"]]),
        WISEHyperParams(inner_params=[LAYERS["llama"]], target_separator="space"),
    ],
    ids=["another algorithm", "EasyEdit's arithmetic", "a space before every target"],
)
def test_what_it_writes_as_it_was_trained_it_scores_itself(tok: Any, hparams: Any) -> None:
    host = HostScorer()
    assert asked_as_trained(host, "WISE")(None, tok, hparams, ["http://"], ["a.org"], "cpu") == [0.25]
    assert host.asked == ["http:// a.org"]


def test_english_prompts_stay_easyedits(tok: Any) -> None:
    host, hparams = HostScorer(), WISEHyperParams(inner_params=[LAYERS["llama"]])
    assert asked_as_trained(host, "WISE")(None, tok, hparams, "Water is", "gold", "cpu") == [0.25]
    assert host.asked == ["Water is gold"]


def test_it_is_put_wherever_the_host_has_the_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    utils, user, other = (ModuleType(f"somehost.evaluate.{name}") for name in ("evaluate_utils", "evaluate", "other"))
    own = HostScorer()
    for module in (utils, user):
        setattr(module, SCORER, own)
    setattr(other, SCORER, len)
    for module in (utils, user, other):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    replaced: list[tuple[Any, str, Any]] = []
    score_as_trained("somehost", "WISE", lambda *one: replaced.append(one))
    assert [(module, name) for module, name, _ in replaced] == [(utils, SCORER), (user, SCORER)]
    assert replaced[0][2].__wrapped__ is own
    score_as_trained("nohost", "WISE", lambda *one: pytest.fail("it has no such module"))
