"""The figures of notebooks and documents, one function each. Every function returns its matplotlib Figure."""

from collections.abc import Iterable
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from common.measure.evaluation import Estimate

BLUE, ORANGE, GREY, GREEN, PURPLE = "#2563eb", "#ea580c", "#9ca3af", "#16a34a", "#9333ea"
# One color for a method in the whole chapter. A label has the color of the method that it names first.
METHODS = {
    "original": GREY,
    "dense": GREY,
    "teacher": GREY,
    "rtn": ORANGE,
    "gptq": BLUE,
    "awq": GREEN,
    "nf4": PURPLE,
    "int8": "#a16207",
    "magnitude": "#dc2626",
    "wanda": "#0d9488",
    "sparsegpt": "#4338ca",
    "owl": "#65a30d",
    "uniform": "#64748b",
    "one threshold": "#c2410c",
    "sensitivity": "#a21caf",
    "ce only": "#b45309",
    "kd only": "#0369a1",
    "ce + kd": "#be185d",
    "ce + kd + minilm": "#7c3aed",
    "ce + kd + written text": "#15803d",
    "ce + shuffled kd": "#6b7280",
}
plt.rcParams.update(
    {
        "figure.dpi": 110,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.titlesize": 11,
        "figure.constrained_layout.use": True,
    }
)


SLATE = "#475569"  # what names no method, where the row says what it is
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, "#0891b2", "#ca8a04")


def colors(labels: Iterable[str], others: tuple[str, ...] = PALETTE) -> list[str]:
    """A color for each label: its method's (`METHODS`), or the next of `others` that no method here has."""
    methods = []
    for label in map(str.lower, labels):
        named = [method for method in METHODS if method in label]
        # of names that begin together, such as CE + KD and CE + KD + MiniLM, the longest
        method = min(named, key=lambda name: (label.index(name), -len(name)), default=None)
        methods.append(METHODS.get(method))
    free = cycle([color for color in others if color not in methods] or others)
    return [color or next(free) for color in methods]


def _from_zero(axis: Axes) -> None:
    """Begin the y axis at zero, with a share of the whole above: dots that hardly differ would lie on the edge."""
    axis.set_ylim(0, 1.08 * axis.dataLim.ymax)


def plain_numbers(axis: Axis) -> None:
    """Numbers at 1, 2 and 5 of every decade, for an x or y axis that is logarithmic already."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def three_digits(value: float) -> str:
    """A number with three significant digits, large ones in full: 1.90, 0.00351, 252,000."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:#.3g}"


def weight_grid(weights: Tensor, levels: dict[str, Tensor]) -> Figure:
    """Histogram of one group's weights with the values that each grid can represent drawn below it."""
    figure, axes = plt.subplots(len(levels), 1, figsize=(7, 1.7 * len(levels)), sharex=True, squeeze=False)
    for axis, (name, values) in zip(axes[:, 0], levels.items(), strict=True):
        axis.hist(weights.numpy(), bins=40, color=GREY)
        for value in values.tolist():
            axis.axvline(value, color=BLUE, linewidth=0.9)
        axis.set_title(f"{name}: {len(values)} levels")
        axis.set_yticks([])
    axes[-1, 0].set_xlabel("weight")
    return figure


def errors_by_column(errors: dict[str, Tensor], title: str) -> Figure:
    """Running sum over columns of each method's output error, in the order in which columns were quantized."""
    figure, axis = plt.subplots(figsize=(7, 3))
    for (name, values), color in zip(errors.items(), colors(errors), strict=True):
        axis.plot(values.cumsum(0).numpy(), label=name, color=color)
    axis.set(xlabel="columns quantized", ylabel="error so far", title=title)
    axis.legend(frameon=False)
    return figure


def matrices(images: dict[str, Tensor], title: str) -> Figure:
    """Matrices side by side on one color scale, which ends where one entry in 200 is beyond: else outliers set it."""
    sizes = np.concatenate([image.abs().flatten().numpy() for image in images.values()])
    limit = np.percentile(sizes, 99.5) or sizes.max()
    figure, axes = plt.subplots(1, len(images), figsize=(3.4 * len(images), 3), squeeze=False)
    for axis, (name, image) in zip(axes[0], images.items(), strict=True):
        shown = axis.imshow(image.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        axis.set_title(name)
        axis.grid(False)
    axes[0, 0].set(xlabel="input", ylabel="output")
    figure.colorbar(shown, ax=axes[0].tolist(), shrink=0.8, extend="both" if sizes.max() > limit else "neither")
    figure.suptitle(title)
    return figure


def curve(
    points: dict[str, dict[float, float]], xlabel: str, ylabel: str, title: str, floors: dict[str, float]
) -> Figure:
    """Lines over a logarithmic x axis, with horizontal lines to compare against."""
    figure, axis = plt.subplots(figsize=(7, 3.4))
    for (name, series), color in zip(points.items(), colors(points), strict=True):
        axis.plot(list(series), list(series.values()), "o-", color=color, label=name)
    for name, value in floors.items():
        axis.axhline(value, color=GREY, linestyle="--")
        axis.annotate(name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="#6b7280")
    axis.set_xscale("log", base=2)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axis.legend(frameon=False)
    return figure


def bars(values: dict[str, float], xlabel: str, title: str, reference: float | None = None) -> Figure:
    """Horizontal bars from zero with their values, and a reference as a line; dots where the axis is logarithmic."""
    figure, axis = plt.subplots(figsize=(7, 0.34 * len(values) + 1.1))
    found = list(values.values())
    logarithmic = max(found) > 100 * min(found) > 0  # one method has failed: keep the others readable
    if logarithmic:
        axis.scatter(found, list(values), color=colors(values, (SLATE,)))
        axis.set_xscale("log")
    else:
        axis.barh(list(values), found, color=colors(values, (SLATE,)))
    for position, value in enumerate(found):
        axis.annotate(
            three_digits(value), (value, position), (8, 0), textcoords="offset points", va="center", fontsize=9
        )
    if reference is not None:
        axis.axvline(reference, color=GREY, linestyle="--")
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.grid(axis="y", visible=False)
    axis.set(xlabel=f"{xlabel} (logarithmic)" if logarithmic else xlabel, title=title)
    return figure


def dots(
    values: dict[str, dict[str, float]], xlabel: str, title: str, limits: dict[str, float] | None = None
) -> Figure:
    """Values on a logarithmic axis: a row for each of `values`, a color for each series, `limits` as lines."""
    figure, axis = plt.subplots(figsize=(7, 0.34 * len(values) + 1.4))
    names = list(dict.fromkeys(name for row in values.values() for name in row))
    for name, color in zip(names, colors(names), strict=True):
        rows = {position: row[name] for position, row in enumerate(values.values()) if name in row}
        axis.plot(list(rows.values()), list(rows), "o", color=color, label=name)
    for name, limit in (limits or {}).items():
        axis.axvline(limit, color=GREY, linestyle="--")
        axis.annotate(name, (limit, 1), xycoords=("data", "axes fraction"), va="bottom", ha="center", fontsize=8)
    axis.set_xscale("log")
    plain_numbers(axis.xaxis)
    axis.set_yticks(range(len(values)), list(values))
    axis.invert_yaxis()
    axis.set_xlabel(xlabel)
    axis.set_title(title, pad=18 if limits else None)
    if len(names) > 1:
        figure.legend(frameon=False, ncols=len(names), loc="outside lower center", fontsize=8)
    return figure


def ratios(found: dict[str, Estimate], title: str, of: str = "the original's") -> Figure:
    """Perplexity as a multiple of another (`of`): dots with 95 % intervals, 1 drawn as a line.

    found: model → `Comparison.ratio`. Dots, since the length of a bar on such an axis would mean nothing.
    """
    figure, axis = plt.subplots(figsize=(7, 0.34 * len(found) + 1.1))
    for position, (ratio, color) in enumerate(zip(found.values(), colors(found, (SLATE,)), strict=True)):
        reach = [[ratio.value - ratio.low], [ratio.high - ratio.value]]
        axis.errorbar(ratio.value, position, xerr=reach, fmt="o", color=color, capsize=3)
    axis.axvline(1, color=GREY, linestyle="--")
    axis.set_yticks(range(len(found)), list(found))
    axis.invert_yaxis()
    if max(ratio.high for ratio in found.values()) > 4:
        axis.set_xscale("log")
        plain_numbers(axis.xaxis)
    axis.set(xlabel=f"perplexity, multiple of {of} (95 % interval)", title=title)
    return figure


def stacked_bytes(parts: dict[str, dict[str, float]], title: str) -> Figure:
    """What a checkpoint's bytes are made of: one stacked bar per checkpoint, in megabytes."""
    figure, axis = plt.subplots(figsize=(7, 0.5 * len(parts) + 1.4))
    kinds = list(dict.fromkeys(kind for checkpoint in parts.values() for kind in checkpoint))
    left = np.zeros(len(parts))
    for kind, color in zip(kinds, (GREY, BLUE, ORANGE, GREEN, PURPLE), strict=False):
        width = np.array([checkpoint.get(kind, 0) / 1e6 for checkpoint in parts.values()])
        axis.barh(list(parts), width, left=left, color=color, label=kind)
        left += width
    for position, total in enumerate(left):
        axis.text(total, position, f" {total:.1f} MB", va="center", fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.14)
    axis.set(xlabel="MB on disk", title=title)
    axis.legend(frameon=False, ncols=len(kinds), loc="upper center", bbox_to_anchor=(0.5, -0.32), fontsize=8)
    return figure


def latency_histogram(seconds: dict[str, list[float]], title: str) -> Figure:
    """Distribution of run times in milliseconds, with median and 99th percentile marked."""
    figure, axis = plt.subplots(figsize=(7, 3))
    for (name, values), color in zip(seconds.items(), colors(seconds), strict=True):
        milliseconds = np.array(values) * 1e3
        axis.hist(milliseconds, bins=30, alpha=0.6, color=color, label=name)
        axis.axvline(np.median(milliseconds), color=color)
        axis.axvline(np.percentile(milliseconds, 99), color=color, linestyle=":")
    axis.set(xlabel="ms per token (line: median, dots: P99)", ylabel="runs", title=title)
    axis.legend(frameon=False)
    return figure


def turns(panels: dict[str, dict[str, list[float]]], title: str) -> Figure:
    """Milliseconds of what was measured in turns, a dot per round, a panel per quantity; every axis starts at zero."""
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3), squeeze=False)
    for axis, (quantity, seconds) in zip(axes[0], panels.items(), strict=True):
        for (name, values), color in zip(seconds.items(), colors(seconds), strict=True):
            axis.plot(range(1, len(values) + 1), 1e3 * np.array(values), "o", color=color, label=name, alpha=0.8)
        axis.set(title=quantity, xlabel="round", ylabel="ms")
        _from_zero(axis)
    axes[0, 0].legend(frameon=False)
    figure.suptitle(title)
    return figure


def lines(
    points: dict[str, dict[float, float]], xlabel: str, ylabel: str, title: str, *, xscale="linear", yscale="linear"
) -> Figure:
    """Lines with markers; a linear y axis starts at zero."""
    figure, axis = plt.subplots(figsize=(7, 3))
    for (name, series), color in zip(points.items(), colors(points), strict=True):
        axis.plot(list(series), list(series.values()), "o-", color=color, label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title, xscale=xscale, yscale=yscale)
    if yscale == "linear":
        _from_zero(axis)
    axis.legend(frameon=False)
    return figure


def load_curve(levels: pd.DataFrame, knee: int, limits: dict[str, float], breaks: int | None = None) -> Figure:
    """A `loadtest.LoadTest`'s levels over the number of users; `limits`: milliseconds of the SLO by quantity.

    breaks: the number of users with whom the objective is missed, drawn through all panels.
    """
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), sharex=True)
    axes[0].plot(levels.index, levels["tokens/s"], "o-", color=BLUE)
    axes[0].axvline(knee, color=GREY, linestyle=":")
    axes[0].annotate(f"knee: {knee}", (knee, 0.04), xycoords=("data", "axes fraction"), ha="left", fontsize=9)
    for axis in axes if breaks else ():
        axis.axvline(breaks, color=ORANGE, linestyle="--", linewidth=0.9)
    if breaks:
        axes[0].annotate(f"SLO breaks: {breaks}", (breaks, 0.14), xycoords=("data", "axes fraction"), fontsize=9)
    share = axes[0].twinx()
    share.plot(levels.index, 100 * levels["in SLO"], "s--", color=ORANGE)
    share.set(ylim=(0, 105))
    share.set_ylabel("% of requests within SLO", color=ORANGE)
    share.grid(False)
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("tokens per second", color=BLUE)
    axes[0].set_title("Throughput")
    for axis, (quantity, limit) in zip(axes[1:], limits.items(), strict=True):
        for q, color in ((50, BLUE), (95, ORANGE), (99, GREEN)):
            values = levels[f"{quantity} P{q} ms"]
            if values.notna().any():  # else there were too few requests for this percentile
                axis.plot(levels.index, values, "o-", color=color, label=f"P{q}")
        axis.axhline(limit, color=GREY, linestyle="--", label="SLO")
        axis.set_ylim(bottom=0)
        axis.set(title=quantity, ylabel="ms")
        axis.legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(levels.index, [str(users) for users in levels.index])
        axis.set_xlabel("concurrent users")
    return figure


def service_series(series: pd.DataFrame, steps: dict[str, float]) -> Figure:
    """The service's own metrics during a load test; `steps`: label → second at which each level began."""
    figure, axes = plt.subplots(3, 1, figsize=(9, 5.6), sharex=True)
    time = series["seconds"]
    axes[0].plot(time, series["llm_requests_running"], color=BLUE, label="running")
    axes[0].plot(time, series["llm_requests_waiting"], color=ORANGE, label="waiting")
    axes[0].plot(time, series["llm_queue_limit"], color=GREY, linestyle="--", label="queue limit")
    axes[0].legend(frameon=False, ncols=3, fontsize=8)
    axes[0].set_ylabel("requests")
    axes[0].set_title("What the service reported about itself", pad=18)
    seconds = np.gradient(time)
    for axis, name, label in (
        (axes[1], "llm_generated_tokens_total", "tokens per second"),
        (axes[2], "llm_errors_total", "errors per second"),
    ):
        rate = pd.Series(np.gradient(series[name]) / seconds).rolling(3, min_periods=1).mean()
        axis.plot(time, rate, color=BLUE)
        axis.set(ylabel=label, ylim=(0, None))
    for label, begin in steps.items():
        for axis in axes:
            axis.axvline(begin, color=GREY, linewidth=0.8, linestyle=":")
        axes[0].annotate(label, (begin, 1), xycoords=("data", "axes fraction"), va="bottom", fontsize=8)
    axes[-1].set_xlabel("seconds")
    return figure


def allocations(per_block: dict[str, list[float]], mean: float, title: str) -> Figure:
    """Sparsity of every block under several allocations of one mean, on shared axes that do not start at zero."""
    figure, axis = plt.subplots(figsize=(7, 3))
    axis.axhline(mean, color=GREY, linestyle="--", label="uniform")
    for (name, values), color in zip(per_block.items(), colors(per_block), strict=True):
        axis.plot(values, "o-", color=color, label=name, markersize=4)
    axis.set(xlabel="block", ylabel="sparsity (axis not from 0)", title=title)
    axis.legend(frameon=False)
    return figure


def histogram(values: Tensor, xlabel: str, title: str) -> Figure:
    """How often each size occurs; counts on a logarithmic axis, since the tail is what matters here."""
    figure, axis = plt.subplots(figsize=(7, 2.6))
    axis.hist(values.numpy(), bins=80, color=BLUE, log=True)
    axis.set(xlabel=xlabel, ylabel="count", title=title)
    return figure


def masks(keep: dict[str, Tensor], title: str) -> Figure:
    """Boolean masks side by side: dark where a weight stays."""
    figure, axes = plt.subplots(1, len(keep), figsize=(3.2 * len(keep), 3.3), squeeze=False)
    for axis, (name, mask) in zip(axes[0], keep.items(), strict=True):
        axis.imshow(mask.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axis.set_title(name)
        axis.grid(False)
    axes[0, 0].set(xlabel="input", ylabel="output")
    figure.suptitle(title)
    return figure


def scatter(points: dict[str, tuple[Tensor, Tensor]], xlabel: str, ylabel: str, title: str) -> Figure:
    """A panel of dots per series, on shared axes: a logarithmic x axis, and shares from 0 to 1."""
    figure, axes = plt.subplots(1, len(points), figsize=(3.2 * len(points), 3.2), sharex=True, sharey=True)
    for axis, (name, (x, y)), color in zip(axes, points.items(), colors(points), strict=True):
        axis.scatter(x.numpy(), y.numpy(), s=8, alpha=0.5, color=color)
        axis.set(title=name, xscale="log", ylim=(0, 1))
    axes[0].set_ylabel(ylabel)
    figure.supxlabel(xlabel, fontsize=10)
    figure.suptitle(title)
    return figure


def columns(values: dict, xlabel: str, ylabel: str, title: str) -> Figure:
    """Upright bars for a quantity along the depth of a network."""
    figure, axis = plt.subplots(figsize=(7, 2.8))
    axis.bar(list(values), list(values.values()), color=BLUE)
    axis.grid(axis="x", visible=False)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    return figure
