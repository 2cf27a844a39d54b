"""Tables and the picture of a lifelong run: scores at each checkpoint, routing, retention by age."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

# (heading, score). A column without any value is not shown. tf: teacher-forced; gr: greedy generation.
_MAIN = (
    ("Rel\ntf", "reliability"),
    ("Gen\ntf", "generalisation"),
    ("Loc\ntf", "locality"),
    ("Loc\nnear tf", "nearby_kept"),
    ("Port\ntf", "portability"),
    ("exact\nedit gr", "edit_exact"),
    ("exact\nreph gr", "rephrasing_exact"),
    ("PPL\n≤100", "perplexity_clipped"),
    ("δ-ACC\ntf", "target_known"),
    ("OOD\nitems", "ood_items"),
    ("OOD\ntokens", "ood_tokens"),
)
_MORE = (
    ("contains\nedit", "edit_contains"),
    ("contains\nreph", "rephrasing_contains"),
    ("F1\nedit", "edit_f1"),
    ("F1\nreph", "rephrasing_f1"),
    ("contains\nport", "portability_contains"),
    ("same\nunrelated", "unrelated_same"),
    ("same\nnear", "nearby_same"),
    ("PPL\nmean", "perplexity"),
    ("PPL\nmedian", "perplexity_median"),
)
_ROUTING = (
    ("fire\nedits", "edits_fire"),
    ("fire\nreph", "rephrasings_fire"),
    ("fire\nunrel", "unrelated_fire"),
    ("fire\nnear", "nearby_fire"),
    ("memory\nedits", "edits_right_memory"),
    ("memory\nreph", "rephrasings_right_memory"),
    ("AUROC\nedit/unr", "auroc_edits_unrelated"),
    ("AUROC\nedit/near", "auroc_edits_nearby"),
    ("AUROC\nreph/unr", "auroc_rephrasings_unrelated"),
    ("AUROC\nreph/near", "auroc_rephrasings_nearby"),
    ("n", "n_memories"),
)
_COLOURS = ("#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#D55E00")


def lifelong_tables(results: Sequence[Mapping[str, Any]]) -> list[Table]:
    """What runs of the lifelong protocol score: teacher-forced, greedy, and routing where a run has any.

    Args:
        results: what :func:`easyedit_wise.evaluate.evaluate` returns, one a run.

    Raises:
        ValueError: no results.
    """
    if not results:
        raise ValueError("There are no results to show.")
    rows, routed = [], []
    for result in results:
        name = result["settings"]["alg"]
        stream = result["stream"]
        for source, scores in result["before"].items():
            rows.append(((name, _place(stream, source), "0"), scores, ""))
        for checkpoint in result["checkpoints"]:
            edits, seconds = str(checkpoint["edits"]), f"{checkpoint['seconds_per_edit']:.1f}"
            for source, scores in checkpoint["scores"].items():
                rows.append(((name, _place(stream, source), edits), scores, seconds))
            for source, routing in checkpoint["routing"].items():
                routed.append(((name, _place(stream, source), edits), routing, ""))
    tables = [
        _table("The model after T edits on all of them (tf: teacher-forced, gr: greedy generation)", _MAIN, rows),
        _table("The same, more of greedy generation and of the targets' perplexity", _MORE, rows),
        _table("Routing of the prompts alone: which fire, whose memory answers, AUROC of the scores", _ROUTING, routed),
    ]
    return [table for table in tables if table is not None]


def plot_retention(series: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path, score: str) -> Path:
    """Draw a score against the age of the edits, one line a run, into a PNG file.

    Args:
        series: bins as :class:`easyedit_wise.evaluation.lifelong.AgeBin` has them, by the run's name.
        path: the PNG file; missing folders are made.
        score: which of the bins' scores.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no run has that score.
    """
    lines = {
        name: [((one["youngest"] + one["oldest"]) / 2, one[score]) for one in bins if one.get(score) is not None]
        for name, bins in series.items()
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        raise ValueError(f"No run has the score {score!r} by age.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError(
            "Plots need matplotlib, which is not installed: pip install 'easyedit_wise[plots]'"
        ) from missing
    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(lines.items()):
        ages, values = zip(*points, strict=True)
        axes.plot(ages, values, marker="os^Dv"[i % 5], color=_COLOURS[i % len(_COLOURS)], label=name)
    axes.set_xlabel("age: edits made afterwards")
    axes.set_ylabel(score.replace("_", " "))
    axes.set_ylim(-0.03, 1.03)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_title("What the final model kept of each edit", loc="left", fontweight="bold")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower right", ncols=min(len(lines), 3), frameon=False, fontsize="small")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(target)
    return target


def _place(stream: str, source: str) -> str:
    return source if stream == source else f"{source} in {stream}"


def _table(
    title: str,
    columns: Sequence[tuple[str, str]],
    rows: Sequence[tuple[tuple[str, str, str], Mapping[str, Any], str]],
) -> Table | None:
    shown = [(heading, name) for heading, name in columns if any(one.get(name) is not None for _, one, _ in rows)]
    if not shown:
        return None
    table = Table(title=title, title_justify="left", header_style="bold")
    for heading in ("algorithm", "data"):
        table.add_column(heading)
    for heading in ("T", *(heading for heading, _ in shown), "s an\nedit"):
        table.add_column(heading, justify="right", no_wrap=True)
    for names, scores, seconds in rows:
        if any(scores.get(name) is not None for _, name in shown):
            table.add_row(*map(Text, names), *(_cell(scores.get(name)) for _, name in shown), seconds)
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.3f}".removeprefix("0") if 0 <= value < 10 else f"{value:.4g}"
