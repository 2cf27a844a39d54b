"""EasyEdit's own WISE and ours with ``preset: upstream`` on the same edits and masks: how far apart they end.

EASYEDIT_HOME=/path/to/EasyEdit python -m benchmarks.fidelity [--edits 2] [--iterations 1 5 10] [KEY=VALUE ...]

EasyEdit's code runs as it is, but for its masks: each shard's is drawn here and handed over. The tests in
``tests/test_fidelity_upstream.py`` use the same functions on tiny models.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from benchmarks.common import print_table, write_report
from benchmarks.workload import layer_parameter, load_smollm2
from easyedit_wise import WISEHyperParams, last_route
from easyedit_wise.easyedit.apply import stream_of
from easyedit_wise.easyedit.upstream import UpstreamWise, load_upstream, why_not
from easyedit_wise.editing import shards
from easyedit_wise.editing.requests import EditRequest

# Not neutral ones: the longest text of a batch is a context for some edits and the irrelevant prompt for others.
REQUESTS = [
    ("The capital of France is", "Lyon", "Water is made of"),
    ("The author of the book was", "Ann", "The weather"),
    ("The currency of India is", "the pound", "Once upon a time there was a small town by the sea, and nobody"),
    ("The largest planet is", "Venus", "The capital of Germany is"),
    (
        "The capital of Italy is",
        "Oslo",
        "She said that the weather would be fine tomorrow, but it rained all day. " * 2,
    ),
    ("He was born in", "Madrid", "def add(a, b):"),
]


def requests(n: int = len(REQUESTS)) -> list[dict[str, str]]:
    """The first ``n`` edits as EasyEdit's request dicts."""
    return [{"prompt": p, "target_new": t, "loc_prompt": x} for p, t, x in REQUESTS[:n]]


@dataclass
class Run:
    """What one implementation did.

    Attributes:
        losses: the total loss of each iteration, edit by edit.
        edit_losses: L_edit, likewise.
        weights: W' - W by name, shape (d_out, d_in).
        epsilon: by the same names, the thresholds.
        scores: Delta_act of each asked prompt, by the same names.
    """

    losses: list[list[float]] = field(default_factory=list)
    edit_losses: list[list[float]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    epsilon: dict[str, float] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Distance:
    """Largest relative differences between two runs.

    Attributes:
        losses: of one loss.
        matrix: of W' - W, in the Frobenius norm.
        entry: of one entry of W' - W, relative to the largest.
        apart: the share of entries that differ by more than 1e-4 of the largest.
        epsilon: of a threshold.
        scores: of a routing score.
    """

    losses: float
    matrix: float
    entry: float
    apart: float
    epsilon: float
    scores: float

    def worst(self) -> float:
        """The largest of all but ``apart``."""
        return max(self.losses, self.matrix, self.entry, self.epsilon, self.scores)


def distance(ours: Run, theirs: Run) -> Distance:
    """How far ours is from theirs; the same number of iterations is a precondition."""
    assert [len(edit) for edit in ours.losses] == [len(edit) for edit in theirs.losses]
    assert ours.weights.keys() == theirs.weights.keys() == ours.epsilon.keys()
    pairs = [
        pair
        for mine, its in ((ours.losses, theirs.losses), (ours.edit_losses, theirs.edit_losses))
        for edit in zip(mine, its, strict=True)
        for pair in zip(*edit, strict=True)
    ]
    matrices = [(ours.weights[name], theirs.weights[name]) for name in theirs.weights]
    scores = [pair for name in theirs.scores for pair in zip(ours.scores[name], theirs.scores[name], strict=True)]
    return Distance(
        losses=max(_relative(a, b) for a, b in pairs),
        matrix=max(float((a - b).norm() / b.norm()) for a, b in matrices),
        entry=max(float((a - b).abs().max() / b.abs().max()) for a, b in matrices),
        apart=max(float(((a - b).abs() > 1e-4 * b.abs().max()).float().mean()) for a, b in matrices),
        epsilon=max(_relative(ours.epsilon[name], theirs.epsilon[name]) for name in theirs.epsilon),
        scores=max((_relative(a, b) for a, b in scores), default=0.0),
    )


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-8)


@contextmanager
def host_tokenizer(tok: Any) -> Iterator[None]:
    """The tokenizer as EasyEdit's editor prepares it for every method: padding with the end of the text."""
    kept = tok.pad_token
    tok.pad_token = tok.eos_token
    try:
        yield
    finally:
        tok.pad_token = kept


@dataclass
class Ours:
    """Our WISE with ``preset: upstream`` after some edits.

    Attributes:
        run: what it did.
        masks: of its shards, shape (d_out, d_in), in order.
        prefixes: what it put before the prompts.
    """

    run: Run
    masks: list[Tensor]
    prefixes: list[str]


def run_ours(
    model: Any, tok: Any, edits: Sequence[Mapping[str, str]], config: Mapping[str, Any], asked: Sequence[str] = ()
) -> Ours:
    model, run, masks = copy.deepcopy(model), Run(), []
    stream = stream_of(model, tok, WISEHyperParams.from_dict({"preset": "upstream", **config}))
    open_mask = shards.random_mask

    def recorded(*args: Any, **options: Any) -> Tensor:
        masks.append(open_mask(*args, **options))
        return masks[-1]

    with patch.object(shards, "random_mask", recorded), host_tokenizer(tok):
        for outcome in stream.apply(
            [EditRequest.from_easyedit(edit, stream.hparams.target_separator) for edit in edits]
        ):
            run.losses.append(outcome.losses)
            run.edit_losses.append(outcome.edit_losses)
        prefixes = stream._recorder.prefixes()
    for index, state in enumerate(stream.layer.memories(stream.adapter_name)):
        name = f"memory {index}"
        run.weights[name], run.epsilon[name], run.scores[name] = state.delta_weight, state.epsilon, []
    for prompt in asked:
        with torch.no_grad():
            model(**tok(prompt, return_tensors="pt"))
        route = last_route(model)
        assert route is not None
        for name, score in zip(run.weights, route.scores[0].tolist(), strict=True):
            run.scores[name].append(score)
    return Ours(run, masks, prefixes)


def run_theirs(
    upstream: UpstreamWise,
    model: Any,
    tok: Any,
    edits: Sequence[Mapping[str, str]],
    config: Mapping[str, Any],
    masks: Sequence[Tensor],
    asked: Sequence[str] = (),
    templates: Sequence[str] | None = None,
    nudge: float = 0.0,
) -> Run:
    """EasyEdit's own code, in which each shard gets the mask that ours had.

    Args:
        nudge: every loss is multiplied by 1 + nudge before its gradient is taken. With the size of a rounding error it
            shows how far EasyEdit's code ends from itself after one.
    """
    model, run, given = copy.deepcopy(model), Run(), iter(masks)
    editor, adapter_class = upstream._wise.WISE, upstream._wise.WISEAdapter
    edit_loss, margin_loss = editor._cal_ft_loss, editor._cal_activation_loss

    def give_mask(adapter: Any, mask_ratio: float) -> None:
        mask = next(given)
        adapter.weight_mask = (mask if mask.shape == adapter.new_weight.shape else mask.T).reshape(-1).long()

    def recorded_edit_loss(instance: Any, *args: Any, **options: Any) -> Tensor:
        loss = edit_loss(instance, *args, **options)
        run.edit_losses[-1].append(loss.item())
        return loss * (1 + nudge)

    def recorded_margin_loss(instance: Any, *args: Any, **options: Any) -> Tensor:
        loss = margin_loss(instance, *args, **options)
        run.losses[-1].append(run.edit_losses[-1][-1] + loss.item())
        return loss * (1 + nudge)

    with (
        patch.object(adapter_class, "generate_activation_mask", give_mask),
        patch.object(editor, "_cal_ft_loss", recorded_edit_loss),
        patch.object(editor, "_cal_activation_loss", recorded_margin_loss),
    ):
        try:
            upstream.start(model, tok, config, templates)
            wrapper: Any = None
            for edit in edits:
                run.losses.append([])
                run.edit_losses.append([])
                wrapper = upstream.edit(model, tok, [edit], config)
            _read(upstream, wrapper.get_adapter_layer(), model, tok, run, config, asked)
        finally:
            upstream.restore()
    return run


def _read(
    upstream: UpstreamWise,
    adapter: Any,
    model: Any,
    tok: Any,
    run: Run,
    config: Mapping[str, Any],
    asked: Sequence[str],
) -> None:
    original = adapter.original_layer.weight.detach()
    weights = [weight.detach() for weight in adapter.memory_weight]
    least = [act.min_act() for act in adapter.memory_mean_act]
    if not config["retrieve"]:
        if not adapter.layer.weight.equal(original):
            weights.insert(0, adapter.layer.weight.detach())
        least = [adapter.editing_mean_act.min_act()] * len(weights)
    if adapter.editing_total_cnt % config["save_freq"]:
        weights.append(adapter.new_weight.detach())
        least.append(adapter.editing_mean_act.min_act())
    is_linear = isinstance(adapter.original_layer, torch.nn.Linear)
    for index, (weight, act) in enumerate(zip(weights, least, strict=True)):
        name = f"memory {index}"
        run.weights[name] = weight - original if is_linear else (weight - original).T
        run.epsilon[name], run.scores[name] = act * config["act_ratio"], []
    adapter.editing = True  # only its input is wanted, and its query path fails on Conv1D
    for prompt in asked:
        seen: list[Tensor] = []
        handle = adapter.original_layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(**tok(prompt, return_tensors="pt"))
            handle.remove()
            base = adapter.original_layer(seen[0])
            for name, weight in zip(run.weights, weights, strict=True):
                side = F.linear(seen[0], weight) if is_linear else seen[0] @ weight + adapter.bias
                run.scores[name].append(upstream._wise.euc(base, side, adapter.config, infer=True).item())


def main() -> None:
    """Compare on SmolLM2-135M-Instruct with the values of EasyEdit's llama-7b.yaml, a shard an edit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--edits", type=int, default=2)
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--layer", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/fidelity.json"))
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="EasyEdit's settings that differ")
    arguments = parser.parse_args()
    upstream = load_upstream()
    if upstream is None:
        raise SystemExit(why_not())
    model, tok = load_smollm2()
    changes = {key: yaml.safe_load(value) for key, _, value in (one.partition("=") for one in arguments.settings)}
    values = {"save_freq": 1, "merge_freq": 2, "retrieve": False, **changes}
    edits, asked = requests(arguments.edits), [prompt for prompt, _, _ in REQUESTS[:3]]
    templates = upstream.context_templates(model, tok)
    rows: dict[int, dict[str, float]] = {}
    for n_iter in arguments.iterations:
        config = upstream.settings(inner_params=[layer_parameter(arguments.layer)], n_iter=n_iter, **values)
        ours = run_ours(model, tok, edits, config, asked)
        theirs = run_theirs(upstream, model, tok, edits, config, ours.masks, asked, templates)
        nudged = run_theirs(upstream, model, tok, edits, config, ours.masks, asked, templates, nudge=2.0**-23)
        itself = distance(nudged, theirs)
        rows[n_iter] = {
            **asdict(distance(ours.run, theirs)),
            "itself: losses": itself.losses,
            "itself: matrix": itself.matrix,
            "itself: entry": itself.entry,
        }
    columns = list(next(iter(rows.values())))
    print_table(
        f"Ours against EasyEdit {upstream.commit}, {arguments.edits} edits: largest relative differences",
        ["iterations", *columns],
        [[str(n_iter), *row.values()] for n_iter, row in rows.items()],
    )
    report = {"easyedit": upstream.commit, "edits": edits, "changes": values, "iterations": rows}
    report["same_contexts"] = templates[1:] == [f"{prefix} {{}}" for prefix in ours.prefixes]
    write_report(arguments.out, report)


if __name__ == "__main__":
    main()
