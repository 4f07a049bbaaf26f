"""The figures of notebooks and documents, one function each. Every function returns its matplotlib Figure."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

BLUE, ORANGE, GREY, GREEN = "#2563eb", "#ea580c", "#9ca3af", "#16a34a"
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
    for (name, values), color in zip(errors.items(), (ORANGE, BLUE, GREEN), strict=False):
        axis.plot(values.cumsum(0).numpy(), label=name, color=color)
    axis.set(xlabel="columns quantized", ylabel="error so far", title=title)
    axis.legend(frameon=False)
    return figure


def matrices(images: dict[str, Tensor], title: str) -> Figure:
    """Matrices side by side on one color scale."""
    limit = max(image.abs().max().item() for image in images.values())
    figure, axes = plt.subplots(1, len(images), figsize=(3.4 * len(images), 3), squeeze=False)
    for axis, (name, image) in zip(axes[0], images.items(), strict=True):
        shown = axis.imshow(image.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        axis.set_title(name)
        axis.grid(False)
    axes[0, 0].set(xlabel="input", ylabel="output")
    figure.colorbar(shown, ax=axes[0].tolist(), shrink=0.8)
    figure.suptitle(title)
    return figure


def curve(
    points: dict[str, dict[float, float]], xlabel: str, ylabel: str, title: str, floors: dict[str, float]
) -> Figure:
    """Lines over a logarithmic x axis, with horizontal lines to compare against."""
    figure, axis = plt.subplots(figsize=(7, 3.4))
    for (name, series), color in zip(points.items(), (BLUE, ORANGE, GREEN, "#9333ea"), strict=False):
        axis.plot(list(series), list(series.values()), "o-", color=color, label=name)
    for name, value in floors.items():
        axis.axhline(value, color=GREY, linestyle="--")
        axis.annotate(name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="#6b7280")
    axis.set_xscale("log", base=2)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axis.legend(frameon=False)
    return figure


def bars(
    values: dict[str, float], xlabel: str, title: str, highlight: str = "", reference: float | None = None
) -> Figure:
    """Horizontal bars with their values; one may be highlighted, and a reference drawn as a line."""
    figure, axis = plt.subplots(figsize=(7, 0.34 * len(values) + 1.1))
    names = list(values)
    axis.barh(names, list(values.values()), color=[ORANGE if name == highlight else BLUE for name in names])
    for position, value in enumerate(values.values()):
        axis.text(value, position, f" {value:,.2f}", va="center", fontsize=9)
    if reference is not None:
        axis.axvline(reference, color=GREY, linestyle="--")
    axis.invert_yaxis()
    axis.margins(x=0.12)
    if max(values.values()) > 100 * min(values.values()):
        axis.set_xscale("log")  # one method has failed: keep the others readable
    axis.grid(axis="y", visible=False)
    axis.set(xlabel=xlabel, title=title)
    return figure


def stacked_bytes(parts: dict[str, dict[str, float]], title: str) -> Figure:
    """What a checkpoint's bytes are made of: one stacked bar per checkpoint, in megabytes."""
    figure, axis = plt.subplots(figsize=(7, 0.5 * len(parts) + 1.4))
    kinds = list(dict.fromkeys(kind for checkpoint in parts.values() for kind in checkpoint))
    left = np.zeros(len(parts))
    for kind, color in zip(kinds, (GREY, BLUE, ORANGE, GREEN, "#9333ea"), strict=False):
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
    for (name, values), color in zip(seconds.items(), (GREY, BLUE, ORANGE), strict=False):
        milliseconds = np.array(values) * 1e3
        axis.hist(milliseconds, bins=30, alpha=0.6, color=color, label=name)
        axis.axvline(np.median(milliseconds), color=color)
        axis.axvline(np.percentile(milliseconds, 99), color=color, linestyle=":")
    axis.set(xlabel="ms per token (line: median, dots: P99)", ylabel="runs", title=title)
    axis.legend(frameon=False)
    return figure


def lines(points: dict[str, dict[float, float]], xlabel: str, ylabel: str, title: str) -> Figure:
    """Lines with markers over a linear axis that starts at zero."""
    figure, axis = plt.subplots(figsize=(7, 3))
    for (name, series), color in zip(points.items(), (GREY, BLUE, ORANGE), strict=False):
        axis.plot(list(series), list(series.values()), "o-", color=color, label=name)
    axis.set_ylim(bottom=0)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axis.legend(frameon=False)
    return figure
