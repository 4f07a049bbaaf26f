"""The figures of Lab 3.3, one function each. Every function returns its matplotlib Figure."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from common.measure.plots import BLUE, GREY, ORANGE, colors


def distributions(rows: dict[str, dict[str, float]], title: str) -> Figure:
    """Probabilities of the same tokens, one panel per row (such as a temperature)."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(7, 1.6 * len(rows)), sharex=True, squeeze=False)
    for axis, (name, values) in zip(axes[:, 0], rows.items(), strict=True):
        axis.bar(list(values), list(values.values()), color=BLUE)
        axis.set_title(name)
        axis.set_ylabel("probability")
    axes[-1, 0].tick_params(axis="x", rotation=45)
    figure.suptitle(title)
    return figure


def influences(values: list[float], kept: list[int], title: str) -> Figure:
    """Influence of each block on a logarithmic axis, those that are kept in blue."""
    figure, axis = plt.subplots(figsize=(7, 2.8))
    axis.scatter(range(len(values)), values, color=[BLUE if i in kept else GREY for i in range(len(values))])
    axis.set_yscale("log")
    axis.grid(axis="x", visible=False)
    axis.set(xlabel="block", ylabel="influence (log)", title=title)
    return figure


def plainly_logarithmic(axis: Axes) -> None:
    """A logarithmic y axis labelled 15, 20, 30 instead of 2×10¹."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def learning_curves(panels: dict[str, dict[str, dict[float, float]]], title: str) -> Figure:
    """Panels side by side (label of the y axis → run → step → value), logarithmic: one bad run must not hide others."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), squeeze=False)
    for axis, (ylabel, runs) in zip(axes[0], panels.items(), strict=True):
        for (name, series), color in zip(runs.items(), colors(runs), strict=True):
            axis.plot(list(series), list(series.values()), "o-", markersize=3, color=color, label=name)
        axis.set(xlabel="step", ylabel=f"{ylabel} (log)")
        plainly_logarithmic(axis)
    axes[0, -1].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    return figure


def tradeoff(points: dict[str, tuple[float, float]], front: list[str], title: str) -> Figure:
    """Quality and size: name → (megabytes, perplexity). The line is the front, its points are filled."""
    figure, axis = plt.subplots(figsize=(8, 4.6))
    line = sorted(points[name] for name in front)
    axis.plot(*zip(*line, strict=True), "--", color=ORANGE, label="Pareto front (size, perplexity)")
    for number, (name, (x, y)) in enumerate(points.items()):  # above and below in turn: labels stay apart
        axis.scatter(x, y, s=70, color=BLUE if name in front else GREY, zorder=3)
        axis.annotate(name, (x, y), xytext=(7, -10 if number % 2 else 5), textcoords="offset points", fontsize=8)
    plainly_logarithmic(axis)
    axis.margins(x=0.15, y=0.15)
    axis.set(xlabel="MB on disk", ylabel="perplexity (log)", title=title)
    axis.legend(frameon=False)
    return figure
