"""Files from anywhere: whatever is done to a folder of edits, it loads as it was saved, or is refused by name.

The short form makes some hundred and fifty changes, the long one (``make soak``) 2,000 of each kind, or as many as
the environment variable SOAK_MUTATIONS says.
"""

from __future__ import annotations

import builtins
import json
import os
import pickle
import random
import signal
import subprocess
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LAYERS, build_model, build_tokenizer
from editing_helpers import requests, settings
from fuzzing import fresh_copy, mutate
from peft import get_peft_model
from torch import nn
from tuner_helpers import PROMPTS, batch, config_for, logits, only_layer, same_memories, share_out

from easyedit_wise import AdapterFileError, apply_wise_to_model, detach, load_edits, save_edits
from easyedit_wise.adapter_digests import sealed
from easyedit_wise.tuner.layer import find_wise_layers
from easyedit_wise.tuner.memory import MemoryState

LLAMA = LAYERS["llama"]
INPUTS = batch(PROMPTS)
EDITS = "wise_edits.json"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a stream of edits: two memories, one of them live, and a list of five edits."""
    model = build_model("llama")
    apply_wise_to_model(
        model, build_tokenizer(), requests(5), settings(save_freq=2, merge_freq=4, retrieve=True, n_iter=2)
    )
    return save_edits(model, tmp_path_factory.mktemp("saved") / "edits")


@pytest.fixture(scope="module")
def of_peft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that PEFT wrote, with no digests in it; a list of edits is there for the mutations' sake."""
    model = get_peft_model(build_model("llama"), config_for(LLAMA, task_type="CAUSAL_LM")).eval()
    share_out(model)
    folder = tmp_path_factory.mktemp("peft")
    model.save_pretrained(folder)
    (folder / EDITS).write_text(json.dumps({"format_version": 1, "edits": []}), encoding="utf-8")
    return folder


def contents(model: nn.Module) -> tuple[list[MemoryState], dict[str, Any]]:
    """All that is loaded of a folder."""
    layer = only_layer(model)
    config, stream = layer.wisemem_config["default"], layer.edit_stream
    routing = ("pooling", "relative_scores", "score_activation", "mask_ratio", "seed", "save_dtype", "base_fingerprint")
    rest: dict[str, Any] = {name: getattr(config, name) for name in routing}
    rest["layer"] = next(iter(find_wise_layers(model)))
    if stream is not None:
        rest |= {"held": stream.held, "settings": stream.hparams.to_dict()}
        rest["generator"] = stream.snapshot().generator_state.tolist()
    return layer.memories("default"), rest


def looks(model: nn.Module) -> dict[str, Any]:
    """What a refused load must not change."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "attributes": sorted(vars(model)),
        "hooks": [len(model._forward_hooks), len(model._forward_pre_hooks)],
    }


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """A hang is an error, too."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a file could make Python run is an error."""

    def refused(*args: Any, **_: Any) -> Any:
        raise SystemExit(f"a file made Python run something: {args}")

    for owner, name in ((os, "system"), (subprocess, "Popen"), (pickle, "load"), (pickle, "loads"), (builtins, "eval")):
        monkeypatch.setattr(owner, name, refused)


def reseal(folder: Path) -> None:
    """The digests of the damaged files, as somebody writes them who wants them to be read."""
    path = folder / EDITS
    try:
        record = sealed(json.loads(path.read_text(encoding="utf-8")), folder)
        path.write_text(json.dumps(record), encoding="utf-8")
    except (ValueError, TypeError, AttributeError, RecursionError, OSError):
        return  # not readable, and so without digests to make


def fuzz(source: Path, work: Path, count: int, seed: int, *, resealed: bool, exact: bool) -> Counter[str]:
    """Damage a folder ``count`` times and load it each time; counts what became of it.

    Args:
        source: an undamaged folder.
        work: where to damage copies of it.
        count: how often.
        seed: of the damage.
        resealed: the digests fit the damaged files.
        exact: what loads must be what was saved. Without digests that cannot be asked for: it has to work.
    """
    model = build_model("llama")
    load_edits(model, source)
    states, rest = contents(model)
    states = [state.with_(delta_weight=state.delta_weight.clone()) for state in states]
    detach(model)
    untouched, before = logits(model, INPUTS), looks(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outcomes: Counter[str] = Counter()
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        folder = fresh_copy(source, work / "damaged")
        what = f"mutation {seed}/{number}, {mutate(folder, rng)}"
        if resealed:
            reseal(folder)
        try:
            with no_longer_than(10), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_edits(model, folder)
        except AdapterFileError as error:
            message = str(error)
            assert str(folder) in message, what
            assert len(message) < 3000, what
            assert looks(model) == before, what
            outcomes["refused"] += 1
            continue
        except BaseException as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:300]}") from error
        loaded, loaded_rest = contents(model)
        same = same_memories(loaded, states) and loaded_rest == rest
        if exact:
            assert same, what
        logits(model, INPUTS)
        outcomes["the same edits" if same else "other edits"] += 1
        detach(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, INPUTS), untouched)
    return outcomes


KINDS: dict[str, tuple[str, bool, bool]] = {
    "saved, with digests": ("saved", False, True),
    "saved, with digests made to fit": ("saved", True, False),
    "saved by PEFT, without digests": ("of_peft", False, False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("nothing_runs")
def test_damaged_folders_load_as_saved_or_are_refused(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source, resealed, exact = KINDS[kind]
    outcomes = fuzz(request.getfixturevalue(source), tmp_path, 50, 1, resealed=resealed, exact=exact)
    assert outcomes["refused"] > 20
    assert outcomes.total() - outcomes["refused"] > 1  # the model card, say, is nobody's business


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("nothing_runs")
def test_damaged_folders_at_length(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    source, resealed, exact = KINDS[kind]
    count = int(os.environ.get("SOAK_MUTATIONS", "2000"))
    outcomes = fuzz(request.getfixturevalue(source), tmp_path, count, 2, resealed=resealed, exact=exact)
    for outcome, number in outcomes.items():
        record_property(outcome, number)
    assert outcomes.total() == count
