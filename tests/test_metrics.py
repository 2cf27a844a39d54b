import copy
import math

import pytest
import torch
from eval_helpers import NextWord, tiny_gpt2, tiny_llama, token, word_tokenizer

from easyedit_wise.evaluation.asking import Query, TokenPrediction, greedy_answers, teacher_forced
from easyedit_wise.evaluation.metrics import (
    contains,
    exact_at_start,
    locality,
    perplexity,
    same_text,
    token_f1,
)

QUERIES = [
    Query("a", "b"),
    Query("the capital of France is", "Lyon"),
    Query("a b c", "d e f g"),
    Query("x y z w v u t s", "r q"),
    Query("k", "l m n o p"),
]
PROMPTS = [query.prompt for query in QUERIES]


@pytest.fixture(scope="module")
def tok():
    return word_tokenizer()


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gpt2])
def model(request):
    return request.param()


def predictions_of(*predicted):
    return [TokenPrediction(tuple(ids), (7,) * len(ids), (0.0,) * len(ids)) for ids in predicted]


# Teacher forcing


def test_accuracy_by_hand(tok):
    # a -> b is right; b -> x is wrong; c -> d is right, though the model would never write c here.
    model = NextWord({"a": "b", "b": "x", "c": "d"}).eval()
    (prediction,) = teacher_forced(model, tok, [Query("a", "b c d")])
    assert prediction.answer == tuple(map(token, "bcd"))
    assert prediction.predicted == (token("b"), token("x"), token("d"))
    assert prediction.accuracy == pytest.approx(2 / 3)


def test_perplexity_by_hand(tok):
    model = NextWord({"a": "b"}, height=2.0).eval()
    size = model.logits.shape[1]
    total = math.exp(2.0) + size - 1
    # "b" has probability e^2 / total; "c" after "b", of which the table says nothing, 1 / size.
    expected = math.sqrt(total / math.exp(2.0) * size)
    assert perplexity(model, tok, [Query("a", "b c")]) == pytest.approx([expected])


def test_perplexity_overflows_to_infinity():
    assert TokenPrediction((1,), (2,), (-1e4,)).perplexity == math.inf


def test_teacher_forcing_matches_a_plain_forward(model, tok):
    for query, prediction in zip(QUERIES, teacher_forced(model, tok, QUERIES), strict=True):
        ids = tok(f"{query.prompt} {query.answer}")["input_ids"]
        start = len(tok(query.prompt)["input_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        assert prediction.answer == tuple(ids[start:])
        assert prediction.predicted == tuple(logits.argmax(-1).tolist())
        expected = logits.log_softmax(-1)[range(len(ids) - start), ids[start:]]
        torch.testing.assert_close(torch.tensor(prediction.log_probs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_size", [2, 16])
def test_batched_equals_one_by_one(model, tok, batch_size):
    together = teacher_forced(model, tok, QUERIES, batch_size)
    alone = [teacher_forced(model, tok, [query])[0] for query in QUERIES]
    assert [p.predicted for p in together] == [p.predicted for p in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, rel=1e-4, abs=1e-4)
    assert greedy_answers(model, tok, PROMPTS, 6, batch_size) == [
        greedy_answers(model, tok, [prompt], 6)[0] for prompt in PROMPTS
    ]


def test_white_space_joins_prompt_and_answer_once(tok):
    model = NextWord({}).eval()
    variants = [Query("a", "b"), Query("a ", "b"), Query("a\n", "b"), Query("a", " b")]
    assert {p.answer for p in teacher_forced(model, tok, variants)} == {(token("b"),)}


def test_answer_that_repeats_the_prompt(tok):
    (prediction,) = teacher_forced(NextWord({}).eval(), tok, [Query("a a", "a a a")])
    assert prediction.answer == (token("a"),) * 3


def test_tokenizer_that_closes_every_text(tok):
    class Closing:
        eos_token, eos_token_id, pad_token_id = "<eos>", token("<eos>"), None

        def __call__(self, text):
            return {"input_ids": [*tok(text)["input_ids"], self.eos_token_id]}

        def decode(self, ids, skip_special_tokens):
            return tok.decode(ids, skip_special_tokens=skip_special_tokens)

    model = NextWord({"a": "b", "b": "c"}).eval()
    assert teacher_forced(model, Closing(), [Query("a", "b c")]) == teacher_forced(model, tok, [Query("a", "b c")])
    assert greedy_answers(model, Closing(), ["a"], 2) == ["b c"]


def test_wrappers_hide_no_argument(tok):
    class Wrapper(torch.nn.Module):  # as EasyEdit's editors: __call__ without forward
        def __init__(self, model):
            super().__init__()
            self.model = model

        def __call__(self, **kwargs):
            return self.model(**kwargs)

    model = tiny_gpt2()
    assert [p.predicted for p in teacher_forced(Wrapper(model), tok, QUERIES)] == [
        p.predicted for p in teacher_forced(model, tok, QUERIES)
    ]


# What must not change


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_matter_and_the_tokenizer_stays(model, side):
    reference, tok = word_tokenizer(), word_tokenizer()
    tok.padding_side = side
    before = (tok.padding_side, tok.pad_token, tok.backend_tokenizer.to_str(), copy.deepcopy(tok.init_kwargs))
    forced, texts = teacher_forced(model, tok, QUERIES), greedy_answers(model, tok, PROMPTS, 6)
    assert forced == teacher_forced(model, reference, QUERIES)
    assert texts == greedy_answers(model, reference, PROMPTS, 6)
    assert before == (tok.padding_side, tok.pad_token, tok.backend_tokenizer.to_str(), tok.init_kwargs)


@pytest.mark.parametrize(("pad", "eos"), [(False, True), (False, False)])
def test_tokenizer_without_padding_token(model, tok, pad, eos):
    bare = word_tokenizer(pad, eos)
    assert [p.predicted for p in teacher_forced(model, bare, QUERIES)] == [
        p.predicted for p in teacher_forced(model, tok, QUERIES)
    ]
    assert greedy_answers(model, bare, ["a", "a b c"], 1) == greedy_answers(model, tok, ["a", "a b c"], 1)
    assert bare.pad_token is None


def test_modules_keep_their_modes(tok):
    model = NextWord({"a": "b"}).train()
    model.dropout.eval()
    teacher_forced(model, tok, [Query("a", "b")])
    greedy_answers(model, tok, ["a"], 1)
    assert model.training
    assert not model.dropout.training


def test_modes_come_back_after_an_error(tok):
    class Broken(NextWord):
        def forward(self, input_ids, attention_mask):
            raise RuntimeError("broken")

    model = Broken({}).train()
    with pytest.raises(RuntimeError, match="broken"):
        teacher_forced(model, tok, [Query("a", "b")])
    assert model.training


def test_the_model_is_asked_without_dropout(tok):
    model = NextWord({"a": "b"}).train()
    results = {teacher_forced(model, tok, [Query("a", "b")])[0] for _ in range(5)}
    assert len(results) == 1


def test_tensors_that_the_model_keeps_can_still_take_part_in_training(tok):
    class Keeping(NextWord):
        def forward(self, input_ids, attention_mask):
            self.kept = self.logits[input_ids]
            return super().forward(input_ids, attention_mask)

    model = Keeping({"a": "b"}).train()
    for ask in (
        lambda: teacher_forced(model, tok, [Query("a", "b")]),
        lambda: greedy_answers(model, tok, ["a"]),
    ):
        ask()
        (model.kept[:, -1] * model.logits[0]).sum().backward()
        assert not model.kept.requires_grad


# Greedy answers


def test_greedy_answer_by_hand_ends_before_the_end_of_text(tok):
    model = NextWord({"a": "b", "b": "c", "c": "<eos>", "d": "e", "e": "d"}).eval()
    assert greedy_answers(model, tok, ["x a", "d", "c"], 5) == ["b c", "e d e d e", ""]


def test_use_cache_does_not_matter(model, tok):
    assert greedy_answers(model, tok, PROMPTS, 8, use_cache=True) == greedy_answers(
        model, tok, PROMPTS, 8, use_cache=False
    )


def test_greedy_overrules_the_checkpoints_own_settings(tok):
    model = tiny_llama()
    expected = greedy_answers(model, tok, PROMPTS, 8)
    model.generation_config.update(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1, num_beams=3
    )
    assert greedy_answers(model, tok, PROMPTS, 8) == expected


def test_greedy_stops_at_the_models_own_end_tokens(tok):
    model = tiny_llama()
    words = greedy_answers(model, tok, ["a b"], 6)[0].split()
    model.generation_config.eos_token_id = [token("<eos>"), token(words[2])]
    assert greedy_answers(model, tok, ["a b"], 6) == [" ".join(words[: words.index(words[2])])]


# Texts


@pytest.mark.parametrize(
    ("answer", "target", "expected"),
    [
        (" Lyon, in the east", "Lyon", True),
        ("Lyon", "Lyon", True),
        ("  LYON.\n\nThe", "lyon", True),
        ("Lyonnais cooking", "Lyon", False),
        ("the city of Lyon", "Lyon", False),
        ("Jane\n  Austen wrote", "Jane Austen", True),
        ("Jane", "Jane Austen", False),
        ("19", "19", True),
        ("1989", "19", False),
        ("Straße", "STRASSE", True),
        ("Caf\u0065\u0301 noir", "caf\u00e9", True),
        ("C++ is", "C++", True),
        ("C++11", "C++", True),
        ("巴黎是首都", "巴黎", True),
        ("", "Lyon", False),
    ],
)
def test_exact_at_start(answer, target, expected):
    assert exact_at_start(answer, target) is expected


@pytest.mark.parametrize(
    ("answer", "target", "expected"),
    [
        ("the city of Lyon.", "Lyon", True),
        ("Lyonnais, from Lyon", "Lyon", True),
        ("Lyonnais", "Lyon", False),
        ("a Babylyon", "lyon", False),
        ("首都是巴黎。", "巴黎", True),
        ("aaa a", "a", True),
        ("x.x.x", "x.x", True),
        ("", "Lyon", False),
    ],
)
def test_contains(answer, target, expected):
    assert contains(answer, target) is expected


def test_token_f1():
    assert token_f1("The city of Lyon!", "Lyon") == pytest.approx(2 / 5)
    assert token_f1("lyon", "Lyon.") == 1.0
    assert token_f1("a a b", "a b b") == pytest.approx(2 / 3)
    assert token_f1("", "Lyon") == 0.0


def test_locality_and_same_text():
    assert locality(predictions_of([1, 2, 3, 4], [5]), predictions_of([1, 2, 9, 9], [6])) == [0.5, 0.0]
    assert same_text(["a  b", "c"], ["a b\n", "C"]) == [True, False]


# Errors


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda m, t: teacher_forced(m, t, []), "no queries"),
        (lambda m, t: perplexity(m, t, []), "no queries"),
        (lambda m, t: greedy_answers(m, t, []), "no prompts"),
        (lambda m, t: teacher_forced(m, t, [Query("", "a")]), "prompt is empty"),
        (lambda m, t: teacher_forced(m, t, [Query("a", " ")]), "answer is empty"),
        (lambda m, t: greedy_answers(m, t, [" "]), "prompt is empty"),
        (lambda m, t: greedy_answers(m, t, ["a"], batch_size=0), "batch_size"),
        (lambda m, t: locality([], []), "at least one"),
        (lambda m, t: locality(predictions_of([1]), predictions_of([1], [2])), "equally many"),
        (lambda m, t: locality(predictions_of([1]), predictions_of([1, 2])), "different answers"),
        (lambda m, t: same_text(["a"], []), "equally many"),
        (lambda m, t: exact_at_start("a", ""), "target is empty"),
        (lambda m, t: contains("a", " "), "target is empty"),
        (lambda m, t: token_f1("a", "?!"), "no word"),
    ],
)
def test_errors_say_what_is_wrong(tok, ask, message):
    with pytest.raises(ValueError, match=message):
        ask(NextWord({}).eval(), tok)


def test_answer_without_a_token_of_its_own(tok):
    class Deaf:
        eos_token_id = pad_token_id = None

        def __call__(self, text):
            return {"input_ids": tok(text)["input_ids"][:1]}

    with pytest.raises(ValueError, match="no token of its own after the prompt 'a'"):
        teacher_forced(NextWord({}).eval(), Deaf(), [Query("a", "b")])
