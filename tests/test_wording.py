"""Prompts in a chat: a template that writes the special tokens, and a tokenizer that would add them again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import LAYERS, build_model, build_tokenizer
from editing_helpers import only_layer, settings, stream_on
from test_datasets import write
from tokenizers import processors
from typer.testing import CliRunner

from easyedit_wise import WISEHyperParams, apply_wise_to_model, last_route
from easyedit_wise.cli import app
from easyedit_wise.easyedit.probe import probe_routes
from easyedit_wise.editing.requests import encode_pair
from easyedit_wise.evaluation.asking import Query, greedy_answers, predict_texts, teacher_forced
from easyedit_wise.separators import NONE, SPACE
from easyedit_wise.wording import Wording, as_chat

CHATML = (
    "{% for m in messages %}<user>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<answer>\n{% endif %}"
)
# As Llama 2 and 3 and Mistral have it: a turn of the assistant stands behind the end of the user's.
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}GAP{{ m['content'] }}{{ eos_token }}"
    "{% elif m['role'] == 'system' %}({{ m['content'] }}){% else %}[A]{{ m['content'] }}[/A]{% endif %}{% endfor %}"
)
QUESTION = "What is the capital of France?"


def chat_tokenizer(template: str = INSTRUCT.replace("GAP", "")) -> Any:
    """The tests' tokenizer with a bos token, which it puts before every text, and a template that writes it, too."""
    tok = build_tokenizer()
    tok.add_special_tokens({"bos_token": "Ā"})  # the byte 0: the models know it, and no text has it
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="BOS $A", special_tokens=[("BOS", tok.bos_token_id)]
    )
    tok.chat_template = template
    return tok


def asked(tok: Any, *turns: str) -> Any:
    """Token ids as a user of the chat model has them, shape (1, T)."""
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    return tok.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def test_what_a_template_rendered_is_encoded_as_the_template_encodes_it() -> None:
    tok = chat_tokenizer()
    wording = Wording(tok, chat=True)
    ids = wording(wording.asked(QUESTION))["input_ids"]
    assert ids == asked(tok, QUESTION)["input_ids"][0].tolist()
    assert ids.count(tok.bos_token_id) == 1
    plain = Wording(tok)
    assert plain(plain.asked(QUESTION))["input_ids"] == tok(QUESTION)["input_ids"]
    assert tok(QUESTION)["input_ids"][0] == tok.bos_token_id


def test_a_wording_stands_in_for_its_tokenizer() -> None:
    tok = chat_tokenizer()
    wording = Wording(tok, chat=True)
    assert wording.eos_token_id == tok.eos_token_id
    assert Wording.of(wording) is wording
    assert Wording.of(tok).tok is tok
    assert copy.deepcopy(wording).chat
    with pytest.raises(AttributeError):
        _ = wording.no_such_attribute


@pytest.mark.parametrize(
    ("template", "between"),
    [
        (INSTRUCT.replace("GAP", " "), " "),
        (INSTRUCT.replace("GAP", ""), ""),
        (CHATML, ""),  # behind a line's end
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}", " "),
        ("{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}Q{% endfor %}", " "),
    ],
)
def test_the_answer_stands_where_the_template_puts_it(template: str, between: str) -> None:
    wording = Wording(chat_tokenizer(template), chat=True)
    text = wording.asked(QUESTION)
    assert wording.answered(text, "Rome") == f"{text}{between}Rome"
    assert wording.answered(text, " Rome") == f"{text} Rome"
    assert wording.answered(text, "Rome", NONE) == f"{text}Rome"
    assert wording.answered(text, "Rome", SPACE) == text + ("Rome" if template is CHATML else " Rome")


def test_a_chat_needs_a_template(tok: Any) -> None:
    with pytest.raises(ValueError, match="use_chat_template is on"):
        Wording(tok, chat=True).asked(QUESTION)
    with pytest.raises(ValueError, match="use_chat_template is on"):
        as_chat(tok, QUESTION)


# -- edits ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught() -> tuple[Any, Any]:
    """(a tiny model that was taught an answer in a chat, its tokenizer)."""
    model, tok = build_model("llama"), chat_tokenizer()
    hparams = WISEHyperParams(inner_params=[LAYERS["llama"]], capacity=0.0, use_chat_template=True)
    request = {"prompt": QUESTION, "target_new": "Rome", "subject": "France"}
    apply_wise_to_model(model, tok, request, hparams)
    return model, tok


def test_an_edit_fires_and_answers_when_it_is_asked_as_a_chat_model_is(taught: tuple[Any, Any]) -> None:
    model, tok = taught
    inputs = asked(tok, QUESTION)
    n_tokens = len(tok("Rome", add_special_tokens=False)["input_ids"])
    written = model.generate(**inputs, max_new_tokens=n_tokens, do_sample=False)
    assert tok.decode(written[0, inputs["input_ids"].shape[1] :]) == "Rome"
    route = last_route(model)
    assert route is not None
    assert route.describe()["memory"] == "default/0"


def test_the_evaluation_asks_likewise(taught: tuple[Any, Any]) -> None:
    model, tok = taught
    wording = Wording(tok, chat=True)
    (prediction,) = teacher_forced(model, wording, [Query(QUESTION, "Rome")])
    assert prediction.accuracy == 1.0
    assert prediction.answer == tuple(tok("Rome", add_special_tokens=False)["input_ids"])
    assert greedy_answers(model, wording, [QUESTION], max_new_tokens=len(prediction.answer)) == ["Rome"]
    (routed,) = probe_routes(model, wording, [QUESTION])
    assert routed.memory == "default/0"
    assert routed.score == pytest.approx(only_layer(model).memories("default")[0].weakest_edit, rel=1e-4)
    # A text is nobody's turn.
    (text,) = predict_texts(model, wording, ["Rome by the sea"])
    assert text.answer == tuple(tok("Rome by the sea")["input_ids"][1:])


def test_what_stands_before_the_question_changes_no_more_than_before(taught: tuple[Any, Any]) -> None:
    """A second turn, and one behind a system prompt, are one text each with one bos token."""
    model, tok = taught
    later = asked(tok, "Where?", "Here.", QUESTION)["input_ids"]
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    behind = tok.apply_chat_template(system, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    for ids in (later, behind["input_ids"]):
        assert ids[0].tolist().count(tok.bos_token_id) == 1
        with torch.no_grad():
            model(input_ids=ids)
        route = last_route(model)
        assert route is not None
        assert route.scores.isfinite().all()


def test_plain_prompts_keep_the_tokenizers_special_tokens(llama: Any) -> None:
    tok = chat_tokenizer()
    apply_wise_to_model(llama, tok, {"prompt": QUESTION, "target_new": "Rome"}, settings())
    recorder = stream_on(llama)._recorder
    (request,) = [held.request for held in stream_on(llama).held]
    assert recorder.pair(request) == encode_pair(tok, QUESTION, "Rome")
    assert recorder.pair(request)[0][0] == tok.bos_token_id


def test_easyedits_arithmetic_adds_them_to_what_the_template_wrote(llama: Any) -> None:
    """As its code does: ``preset: upstream`` follows it to the letter."""
    tok = chat_tokenizer()
    hparams = WISEHyperParams.from_preset("upstream", [LAYERS["llama"]], n_iter=1, edit_lr=0.02, use_chat_template=True)
    request = {"prompt": QUESTION, "target_new": "Rome"}
    apply_wise_to_model(llama, tok, request, hparams)
    recorder = stream_on(llama)._recorder
    tokens, _ = recorder.pair(stream_on(llama).held[0].request)
    assert tokens[:2] == [tok.bos_token_id] * 2


def test_the_evaluation_of_a_chat_model_asks_it_as_one(tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "llama", tmp_path / "out"
    build_model("llama").save_pretrained(checkpoint)
    chat_tokenizer().save_pretrained(checkpoint)
    hparams = tmp_path / "tiny.yaml"
    hparams.write_text(yaml.safe_dump({"inner_params": [LAYERS["llama"]], "use_chat_template": True, "capacity": 0}))
    data = write(tmp_path, "zsre", 3)
    arguments = (
        "--data",
        data,
        "--edits",
        1,
        "--model",
        checkpoint,
        "--hparams",
        hparams,
        "--out",
        out,
        "--no-journal",
    )
    done = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    (path,) = out.glob("*.json")
    last = json.loads(path.read_text(encoding="utf-8"))["checkpoints"][-1]
    assert last["scores"]["zsre"]["reliability"] == last["scores"]["zsre"]["edit_exact"] == 1.0
    assert last["routing"]["zsre"]["edits_fire"] == 1.0
