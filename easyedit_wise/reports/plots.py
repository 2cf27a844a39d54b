"""The picture of routing: which prompts reach a side memory, and by what margin."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, which stays apart under every common colour blindness; each group has a
# marker of its own as well. Black and grey are left to the threshold and the text.
_COLOURS = ("#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#D55E00")
_MARKERS = ("o", "s", "^", "D", "v", "P")
# A log axis pays once the scores span more than this factor.
_LOG_SPAN = 20.0
_GOLDEN = 0.6180339887498949


def plot_routing(
    groups: Mapping[str, Sequence[float]],
    epsilon: Sequence[float] | float | None,
    path: str | Path,
    *,
    normalised: bool = False,
    title: str | None = None,
) -> Path:
    """Draw each group's routing scores as a strip of points, with the threshold, into a PNG file.

    Args:
        groups: routing scores (Eq. 3) of the prompts by group, drawn from the top in this order,
            such as edit prompts, rephrasings, nearby and unrelated prompts.
        epsilon: the threshold, or one for each memory. Not used (it may be None) when normalised.
        path: the PNG file; missing folders are made.
        normalised: ``groups`` holds scores divided by their memory's epsilon. The threshold is
            then 1, which makes scores of several memories comparable.
        title: shown above the plot instead of the usual one.

    Returns:
        The path of the file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no group, an empty one, a score that is negative or not finite, or no epsilon.
    """
    scores = {name: _checked(name, values) for name, values in groups.items()}
    if not scores:
        raise ValueError("There are no groups of routing scores to plot.")
    thresholds = [1.0] if normalised else _thresholds(epsilon)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError(
            "Plots need matplotlib, which is not installed: pip install 'easyedit_wise[plots]'"
        ) from missing

    figure = Figure(figsize=(8.0, 1.6 + 0.75 * len(scores)), layout="constrained")
    axes = figure.add_subplot()
    _scale(axes, [score for values in scores.values() for score in values] + thresholds)
    for row, values in enumerate(scores.values()):
        axes.scatter(
            values,
            [row + offset for offset in _spread(len(values))],
            s=34,
            color=_COLOURS[row % len(_COLOURS)],
            marker=_MARKERS[row % len(_MARKERS)],
            alpha=0.8,
            edgecolors="white",
            linewidths=0.6,
            zorder=3,
        )
        if row:
            axes.axhline(row - 0.5, color="0.9", linewidth=0.8, zorder=1)
    _draw_thresholds(axes, thresholds, normalised)
    figure.legend(loc="outside lower right", ncols=min(len(thresholds), 3), frameon=False, fontsize="small")
    if len(thresholds) == 1:
        _label_sides(axes, thresholds[0])
        _count_routed(axes, scores, thresholds[0])

    axes.set_yticks(range(len(scores)), [f"{name}\n(n = {len(values)})" for name, values in scores.items()])
    # Below the last strip there is room for the names of the two sides.
    axes.set_ylim(len(scores) - 0.3, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("routing score / threshold ε of its memory" if normalised else "routing score (Eq. 3)")
    axes.set_title(title or "Which prompts reach the side memory", loc="left", fontweight="bold")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A canvas of its own instead of pyplot, which would keep the figure in a global list.
    FigureCanvasAgg(figure).print_png(target)
    return target


def _checked(name: str, values: Sequence[float]) -> list[float]:
    scores = [float(value) for value in values]
    if not scores:
        raise ValueError(f"The group {name!r} has no routing score.")
    for score in scores:
        if not math.isfinite(score) or score < 0:
            raise ValueError(f"The group {name!r} has the routing score {score}; a score is finite and not negative.")
    return scores


def _thresholds(epsilon: Sequence[float] | float | None) -> list[float]:
    if epsilon is None:
        raise ValueError("Without normalised=True, plot_routing needs the threshold epsilon.")
    values = [float(epsilon)] if isinstance(epsilon, (int, float)) else [float(value) for value in epsilon]
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"epsilon must be one finite number or several, got {epsilon!r}.")
    return values


def _spread(count: int) -> list[float]:
    """Heights in (-0.3, 0.3) that keep neighbouring points apart, the same ones in every run."""
    if count == 1:
        return [0.0]
    return [0.6 * ((i * _GOLDEN + 0.5) % 1.0 - 0.5) for i in range(count)]


def _scale(axes: Any, values: Sequence[float]) -> None:
    """A log axis when the values span orders of magnitude; a score of 0 has its place left of them."""
    axes.margins(x=0.06)
    positive = [value for value in values if value > 0]
    if not positive or max(positive) <= _LOG_SPAN * min(positive):
        # From 0, which makes lengths comparable, unless that would squeeze all points to one side.
        if min(values) < 0.5 * max(values):
            axes.set_xlim(-0.03 * max(values), 1.06 * max(values))
        return
    if len(positive) == len(values):
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=min(positive), linscale=0.4)
    # Plain numbers at 1, 2 and 5 instead of bare powers of ten, of which there may be one only.
    ticks = [m * 10.0**e for e in range(-12, 13) for m in (1, 2, 5)]
    ticks = [tick for tick in ticks if min(positive) * 0.9 <= tick <= max(positive) * 1.1]
    if len(ticks) > 9:
        ticks = [tick for tick in ticks if f"{tick:e}".startswith("1")]
    if len(positive) < len(values):
        ticks.insert(0, 0.0)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _draw_thresholds(axes: Any, thresholds: Sequence[float], normalised: bool) -> None:
    for i, threshold in enumerate(thresholds):
        if len(thresholds) > 1:
            label = f"threshold ε of memory {i + 1}: {threshold:.3g}"
        else:
            label = "threshold (score = ε)" if normalised else f"threshold ε = {threshold:.3g}"
        style = ("-", "--", "-.", ":")[i % 4]
        axes.axvline(threshold, color="black", linewidth=1.4, linestyle=style, label=label, zorder=2)


def _label_sides(axes: Any, threshold: float) -> None:
    """Say on both sides of the one threshold which memory answers there."""
    left, right = axes.get_xlim()
    axes.axvspan(threshold, right, color="0.5", alpha=0.08, linewidth=0, zorder=0)
    axes.set_xlim(left, right)
    for text, shift, alignment in (("main memory  ", -1, "right"), ("  side memory", 1, "left")):
        axes.annotate(
            text,
            xy=(threshold, 0.0),
            xycoords=("data", "axes fraction"),
            xytext=(2 * shift, 4),
            textcoords="offset points",
            horizontalalignment=alignment,
            fontsize="small",
            fontstyle="italic",
            color="0.3",
        )


def _count_routed(axes: Any, scores: Mapping[str, Sequence[float]], threshold: float) -> None:
    for row, values in enumerate(scores.values()):
        routed = sum(value > threshold for value in values)
        axes.annotate(
            f"{routed}/{len(values)} above",
            xy=(1.01, row),
            xycoords=("axes fraction", "data"),
            verticalalignment="center",
            fontsize="small",
            color="0.3",
        )
