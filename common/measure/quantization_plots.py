"""The figures of Lab 3.1 alone, one function each. Every function returns its matplotlib Figure."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from common.measure.evaluation import Estimate, pareto_front
from common.measure.plots import BLUE, GREY, SLATE, colors


def intervals(found: dict[str, Estimate], xlabel: str, title: str) -> Figure:
    """Dots with their 95 % intervals; the axis starts at zero."""
    figure, axis = plt.subplots(figsize=(7, 0.34 * len(found) + 1.1))
    for position, (value, color) in enumerate(zip(found.values(), colors(found, (SLATE,)), strict=True)):
        reach = [[value.value - value.low], [value.high - value.value]]
        axis.errorbar(value.value, position, xerr=reach, fmt="o", color=color, capsize=3)
    axis.set_yticks(range(len(found)), list(found))
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set(xlabel=xlabel, title=title)
    return figure


def bits_against_distortion(points: dict[str, list[tuple[float, Estimate]]], title: str) -> Figure:
    """Every method's distortion over its true bits per weight, with 95 % intervals, and the Pareto front of all."""
    figure, axis = plt.subplots(figsize=(7.5, 4.4))
    for (method, measured), color in zip(points.items(), colors(points), strict=True):
        bits, found = zip(*measured, strict=True)
        values = np.array([each.value for each in found])
        low = np.clip([each.low for each in found], values / 10, None)  # an axis of logarithms has no zero
        reach = np.abs([values - low, np.array([each.high for each in found]) - values])
        axis.errorbar(bits, values, yerr=reach, fmt="o", color=color, capsize=2, alpha=0.8, label=method)
    front = pareto_front((b, each.value, method) for method, measured in points.items() for b, each in measured)
    axis.step([b for b, _, _ in front], [value for _, value, _ in front], where="post", color=GREY, label="front")
    axis.set_yscale("log")
    axis.set(xlabel="bits per weight, scales and zeros counted", ylabel="KL, nats per token", title=title)
    axis.legend(frameon=False, fontsize=8)
    return figure


def shares_of_limit(shares: dict[str, dict[int, float]], title: str) -> Figure:
    """Share of the roofline's limit that each kernel reaches, over the tokens that meet the weights at once."""
    figure, axis = plt.subplots(figsize=(7, 3))
    for (name, series), color in zip(shares.items(), colors(shares), strict=True):
        axis.plot(list(series), list(series.values()), "o-", color=color, label=name)
    axis.axhline(1, color=GREY, linestyle="--")
    limit = "limit of memory or arithmetic, its own for each"
    axis.annotate(limit, (0.01, 1.02), xycoords=("axes fraction", "data"), fontsize=8)
    tokens = sorted({count for series in shares.values() for count in series})
    axis.set_xscale("log", base=2)
    axis.set_xticks(tokens, [str(count) for count in tokens])
    axis.set(xlabel="tokens at once", ylabel="share of the limit", title=title, ylim=(0, 1.15))
    axis.legend(frameon=False, fontsize=8)
    return figure


def rounded_row(weights: Tensor, rounded: Tensor, title: str) -> Figure:
    """A row of weights as dots, and the values that they are rounded to."""
    figure, axis = plt.subplots(figsize=(7.5, 2.5))
    axis.plot(weights.numpy(), ".", color=GREY, markersize=4, label="weight")
    axis.plot(rounded.numpy(), "_", color=BLUE, markersize=5, label="rounded")
    axis.set(xlabel="input", ylabel="weight", title=title)
    axis.legend(frameon=False, ncols=2, fontsize=8, loc="upper right")
    return figure


def hessian(matrix: Tensor, columns: int, title: str) -> Figure:
    """The corner of H around its largest diagonal entry on a logarithmic scale, and the whole sorted diagonal."""
    worst = matrix.diagonal().argmax().item()
    start = max(0, min(worst - columns // 2, len(matrix) - columns))
    part = matrix[start : start + columns, start : start + columns].abs()
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.3))
    edges = (start, start + columns, start + columns, start)
    shown = left.imshow(part.clamp(min=part.max() * 1e-6).log10().numpy(), cmap="viridis", extent=edges)
    left.grid(False)
    left.set(xlabel="input", ylabel="input", title="log₁₀ |H|")
    figure.colorbar(shown, ax=left, shrink=0.85)
    right.semilogy(matrix.diagonal().sort(descending=True).values.numpy(), color=SLATE)
    right.set(xlabel="inputs, the largest first", ylabel="diagonal of H", title="How large each input is")
    figure.suptitle(title)
    return figure


def frames(images: dict[str, Tensor], title: str, xlabel: str = "input", ylabel: str = "output") -> Figure:
    """Matrices of sizes (not signs), one below the other, on one color scale that ends at the 99th percentile."""
    top = np.quantile(np.concatenate([image.flatten().numpy() for image in images.values()]), 0.99)
    figure, axes = plt.subplots(len(images), 1, figsize=(8, 1.4 * len(images) + 0.8), sharex=True, squeeze=False)
    for axis, (name, image) in zip(axes[:, 0], images.items(), strict=True):
        shown = axis.imshow(image.numpy(), cmap="magma", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        axis.set(title=name, ylabel=ylabel)
        axis.grid(False)
    axes[-1, 0].set_xlabel(xlabel)
    figure.colorbar(shown, ax=axes[:, 0].tolist(), shrink=0.85, extend="max")
    figure.suptitle(title)
    return figure
