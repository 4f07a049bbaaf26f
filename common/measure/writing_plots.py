"""Figures of the notebook on writing students and drafts (A3)."""

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from common.measure.evaluation import Estimate
from common.measure.plots import BLUE, GREEN, GREY, ORANGE, PALETTE, SLATE, colors, plain_numbers


def between(curves: dict[str, dict[float, float]], ends: dict[str, float], title: str) -> Figure:
    """A family of divergences over its β, scaled: a line each, and what it tends to in that line's color, dashed."""
    figure, axis = plt.subplots(figsize=(7, 3.2))
    for (name, series), (end, value), color in zip(curves.items(), ends.items(), (BLUE, ORANGE), strict=True):
        axis.plot(list(series), list(series.values()), color=color, label=name)
        axis.axhline(value, color=color, linestyle="--", linewidth=0.9)
        axis.annotate(end, (0.5, value), va="bottom", ha="center", fontsize=8, color=color)
    axis.set(xlabel="β", ylabel="nats per token", title=title, xlim=(0, 1))
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    return figure


def differences(panels: dict[str, dict[str, Estimate]], title: str) -> Figure:
    """A panel per text: paired differences of each way to learn from one of them, dots with 95 % intervals.

    All panels share both axes; zero, where the difference vanishes, is drawn as a line.
    """
    names = list(next(iter(panels.values())))
    size = (3.4 * len(panels), 0.38 * len(names) + 1.5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis, (text, found) in zip(axes[0], panels.items(), strict=True):
        for position, (name, color) in enumerate(zip(names, colors(names, PALETTE), strict=True)):
            mean = found[name]
            reach = [[mean.value - mean.low], [mean.high - mean.value]]
            axis.errorbar(mean.value, position, xerr=reach, fmt="o", color=color, capsize=3)
        axis.axvline(0, color=GREY, linestyle="--")
        axis.set_title(text)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    figure.supxlabel("KL from the teacher, difference in nats per token (95 % interval)", fontsize=10)
    figure.suptitle(title)
    return figure


def overlap(p: Tensor, q: Tensor, names: list[str], title: str) -> Figure:
    """Two distributions over some tokens: what both have, and what only one has, stacked."""
    figure, axis = plt.subplots(figsize=(7, 3.2))
    both, places = torch.minimum(p, q), range(len(names))
    axis.bar(places, both, color=GREEN, label="min(p, q): kept")
    axis.bar(places, (p - q).clamp_min(0), bottom=both, color=BLUE, label="p - q: drawn after a rejection")
    axis.bar(places, (q - p).clamp_min(0), bottom=both, color=ORANGE, alpha=0.5, label="q - p: rejected")
    axis.set_xticks(places, names, rotation=40, ha="right", fontsize=8)
    axis.set(ylabel="probability", title=title)
    axis.grid(axis="x", visible=False)
    axis.legend(frameon=False)
    return figure


def speedups(
    curves: dict[str, dict[float, float]], measured: dict[str, tuple[float, float]], xlabel: str, title: str
) -> Figure:
    """Expected speed-up over acceptance, a line per number of drafted tokens, and what was measured as dots.

    measured: name → (acceptance, speed-up). One, where a draft is worth nothing, is drawn as a line.
    """
    figure, axis = plt.subplots(figsize=(8, 4))
    for (name, series), color in zip(curves.items(), PALETTE, strict=False):
        axis.plot(list(series), list(series.values()), color=color, label=name)
    axis.axhline(1, color=GREY, linestyle="--")
    for (name, point), marker in zip(measured.items(), "os^Dv<>P*Xph" * 3, strict=False):
        axis.scatter(*point, color="black", s=26, marker=marker, label=name, zorder=3)
    axis.set(xlabel=xlabel, ylabel="speed, multiple of plain decoding", title=title, xlim=(0, 1))
    axis.set_ylim(bottom=0)
    figure.legend(frameon=False, fontsize=8, loc="outside right center")
    return figure


def classes(points: dict[str, tuple[float, float, float]], limits: list[float], title: str) -> Figure:
    """Size on disk against KL, a dot for each model with an area for its speed, and the limits of the size classes.

    points: name → (MB, KL in nats per token, tokens per second).
    """
    figure, axis = plt.subplots(figsize=(8, 4.8))
    fastest = max(speed for *_, speed in points.values())
    for (name, (size, divergence, speed)), color in zip(points.items(), colors(points, (SLATE,)), strict=True):
        axis.scatter(size, divergence, s=260 * (speed / fastest) ** 2, color=color, alpha=0.6)
        axis.annotate(name, (size, divergence), (7, 4), textcoords="offset points", fontsize=8)
    for limit in limits:
        axis.axvline(limit, color=GREY, linestyle="--", linewidth=0.9)
        axis.annotate(
            f"{limit:.0f} MB", (limit, 1), xycoords=("data", "axes fraction"), va="bottom", ha="center", fontsize=8
        )
    axis.set(xscale="log", yscale="log")
    axis.set_title(title, pad=18)
    axis.set_xlabel("MB on disk (logarithmic)")
    axis.set_ylabel("KL from the teacher, nats per token (logarithmic)")
    axis.set_xticks(limits, [f"{limit:.0f}" for limit in limits])
    axis.xaxis.set_minor_formatter(NullFormatter())
    plain_numbers(axis.yaxis)
    axis.margins(x=0.2, y=0.1)
    figure.text(0.99, 0.01, f"area: speed squared, largest {fastest:.0f} tokens/s", ha="right", fontsize=8)
    return figure
