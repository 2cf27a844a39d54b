"""Which edits a call asks for: named in the call itself, around it, and from threads and tasks."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from conftest import LAYERS
from edited_model import N
from peft import get_peft_model
from transformers import TextIteratorStreamer
from tuner_helpers import ALWAYS, PROMPTS, batch, config_for, generate, memory

from easyedit_wise import attach, edits_chosen, edits_disabled, last_route

LLAMA = LAYERS["llama"]
ONE = PROMPTS[1]


class Streamed:
    """A model edited in place with two sets of edits that answer everything, and what each says."""

    def __init__(self, model: Any) -> None:
        self.model = model
        for seed, name in enumerate(("law", "news")):
            layer = attach(model, config_for(LLAMA), name)
            layer.install(name, [memory(layer, seed, ALWAYS)])
        self.active = generate(model, batch(PROMPTS), N)
        self.said = {}
        for name in ("law", "news", "__base__"):
            with edits_chosen(model, name):
                self.said[name] = generate(model, batch(PROMPTS), N)
        assert self.active == self.said["news"]
        assert len({str(said) for said in self.said.values()}) == 3

    def mixed(self, names: Sequence[str]) -> list[list[int]]:
        return [self.said[name][row] for row, name in enumerate(names)]

    def in_thread(self, target: Callable[[], Any]) -> Any:
        """What a function returns or raises in a thread of its own."""
        results: queue.Queue[Any] = queue.Queue()

        def run() -> None:
            try:
                results.put(target())
            except Exception as error:
                results.put(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return results.get()


@pytest.fixture
def streamed(llama: Any) -> Streamed:
    return Streamed(llama)


NAMES = ["law", "__base__", "news", "law"]


@torch.no_grad()
def test_names_in_the_call_of_a_model_edited_in_place(streamed: Streamed) -> None:
    model, inputs = streamed.model, batch(PROMPTS)
    assert generate(model, inputs, N, adapter_names=NAMES) == streamed.mixed(NAMES)
    assert generate(model, inputs, N, adapter_names="law") == streamed.said["law"]
    assert generate(model, inputs, N, adapter_names=None) == streamed.active
    assert len(generate(model, inputs, N, adapter_names=NAMES, num_beams=2)) == 4
    with edits_chosen(model, NAMES):
        expected = model(**inputs).logits
    assert torch.equal(model(**inputs, adapter_names=NAMES).logits, expected)
    assert last_route(model).asked == tuple(NAMES)
    plain = model(**inputs).logits
    assert last_route(model).asked is None  # they hold for one call
    assert torch.equal(model(**inputs, adapter_names=None).logits, plain)
    with edits_chosen(model, "news"):  # the call's own count
        assert torch.equal(model(**inputs, adapter_names=NAMES).logits, expected)
    with edits_disabled(model):
        assert generate(model, inputs, N, adapter_names=NAMES) == streamed.said["__base__"]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["law"] * 3, ValueError, "3 adapter names for 4 rows"),
        ("lawn", ValueError, "did you mean 'law'"),
        (3, TypeError, "a list with a name for each row"),
        ([], ValueError, "empty"),
    ],
)
def test_names_in_the_call_that_do_not_fit_are_refused(
    streamed: Streamed, names: Any, error: type[Exception], message: str
) -> None:
    inputs = batch(PROMPTS)
    for ask in (lambda: generate(streamed.model, inputs, N, adapter_names=names), lambda: call(streamed.model, names)):
        with pytest.raises(error, match=message):
            ask()
    assert generate(streamed.model, inputs, N) == streamed.active


def call(model: Any, names: Any) -> Any:
    with torch.no_grad():
        return model(**batch(PROMPTS), adapter_names=names)


def test_names_in_a_decoding_loop_of_ones_own(streamed: Streamed) -> None:
    model, cache, tokens, said = streamed.model, None, list(ONE), []
    for _ in range(N):
        with torch.no_grad():
            output = model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True, adapter_names="law")
        cache, output.logits[0, -1, 0] = output.past_key_values, -torch.inf
        tokens = [int(output.logits[0, -1].argmax())]
        said += tokens
    assert said == streamed.said["law"][1]


def test_a_module_that_is_saved_whole_wants_the_peft_model_called(llama: Any) -> None:
    config = config_for(LLAMA, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    inner = get_peft_model(llama, config, "law").eval().get_base_model()
    with pytest.raises(ValueError, match="modules_to_save"):
        call(inner, "law")


def test_an_interrupted_call_leaves_no_names(streamed: Streamed) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = streamed.model.lm_head.register_forward_hook(interrupt)
    inputs = batch(PROMPTS)
    for ask in (lambda: call(streamed.model, "law"), lambda: generate(streamed.model, inputs, adapter_names="law")):
        with pytest.raises(KeyboardInterrupt):
            ask()
    handle.remove()
    assert generate(streamed.model, batch(PROMPTS), N) == streamed.active


def test_a_thread_that_streams_is_served_or_refused(streamed: Streamed, tok: Any) -> None:
    """As transformers' documentation streams: generate in a thread, read in this one."""
    model = streamed.model
    given = {key: value for key, value in batch([ONE]).items() if key != "position_ids"}
    options = {**given, "max_new_tokens": N, "min_new_tokens": N, "do_sample": False}
    expected = tok.decode(streamed.said["law"][1])
    streamer = TextIteratorStreamer(tok, skip_prompt=True, timeout=20)
    thread = threading.Thread(target=model.generate, kwargs={**options, "streamer": streamer, "adapter_names": "law"})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()
    with edits_chosen(model, "law"):
        for ask in (lambda: model.generate(**options), lambda: call(model, None)):
            refused = streamed.in_thread(ask)
            assert isinstance(refused, ValueError)
            assert "adapter_names" in str(refused)
            assert "copy_context" in str(refused)
        copied = contextvars.copy_context()
        own = streamed.in_thread(lambda: copied.run(lambda: model.generate(**options)))
        assert own[0, len(ONE) :].tolist() == streamed.said["law"][1]
    # The choice went along, and does not end with the block here.
    own = streamed.in_thread(lambda: copied.run(lambda: model.generate(**options)))
    assert own[0, len(ONE) :].tolist() == streamed.said["law"][1]
    assert streamed.in_thread(lambda: model.generate(**options))[0, len(ONE) :].tolist() == streamed.active[1]


def test_threads_beside_one_that_chooses(streamed: Streamed) -> None:
    model, inputs = streamed.model, batch(PROMPTS)

    def choose(names: Any) -> Any:
        with edits_chosen(model, names):
            return generate(model, inputs, N)

    with edits_chosen(model, "law"):
        assert streamed.in_thread(lambda: choose("news")) == streamed.said["news"]
        assert streamed.in_thread(lambda: choose(NAMES)) == streamed.mixed(NAMES)
        assert streamed.in_thread(lambda: choose(None)) == streamed.active
        assert streamed.in_thread(lambda: generate(model, inputs, N, adapter_names=NAMES)) == streamed.mixed(NAMES)
        assert generate(model, inputs, N) == streamed.said["law"]
        with edits_disabled(model):
            assert streamed.in_thread(lambda: generate(model, inputs, N)) == streamed.said["__base__"]
    with edits_chosen(model, None):  # nothing that another thread could miss
        assert streamed.in_thread(lambda: generate(model, inputs, N)) == streamed.active


def test_a_task_beside_one_that_chooses(streamed: Streamed) -> None:
    """Tasks of one thread take turns; each has its own choice, and asyncio.to_thread takes it along."""
    model, inputs = streamed.model, batch(PROMPTS)

    async def ask(names: Any, chosen: asyncio.Event, asked: asyncio.Event) -> list[list[int]]:
        with edits_chosen(model, names):
            chosen.set()
            await asked.wait()
            return await asyncio.to_thread(generate, model, inputs, N)

    async def serve() -> list[Any]:
        first, second = asyncio.Event(), asyncio.Event()
        tasks = [asyncio.create_task(ask("law", first, second)), asyncio.create_task(ask(NAMES, second, first))]
        await first.wait()
        with pytest.raises(ValueError, match="another thread or task"):
            generate(model, inputs, N)
        return await asyncio.gather(*tasks)

    assert asyncio.run(serve()) == [streamed.said["law"], streamed.mixed(NAMES)]
    assert generate(model, inputs, N) == streamed.active


def test_a_generator_that_is_closed_elsewhere_leaves_no_choice(streamed: Streamed) -> None:
    """A web framework may take each next() of a stream in another context."""

    def stream() -> Iterator[list[list[int]]]:
        with edits_chosen(streamed.model, "law"):
            yield generate(streamed.model, batch(PROMPTS), N)

    answers = stream()
    assert contextvars.copy_context().run(lambda: next(answers)) == streamed.said["law"]
    with pytest.raises(ValueError, match="another thread or task"):
        generate(streamed.model, batch(PROMPTS), N)
    contextvars.copy_context().run(answers.close)
    assert generate(streamed.model, batch(PROMPTS), N) == streamed.active
