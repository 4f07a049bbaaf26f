"""Figures of the advanced notebooks."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from common.measure.plots import GREY, SLATE, colors


def front(points: dict[str, tuple[float, float, float]]) -> list[str]:
    """The points that no other beats in both size and divergence, by size: (bits, KL, seconds) each."""
    kept, best = [], float("inf")
    for name, (_, divergence, _) in sorted(points.items(), key=lambda item: item[1][:2]):
        if divergence < best:
            kept, best = [*kept, name], divergence
    return kept


def pareto(points: dict[str, tuple[float, float, float]], title: str) -> Figure:
    """True bits of the whole file against KL from the original, both logarithmic; the area of a dot is seconds.

    points: name → (bits per weight, KL in nats per token, seconds of work). A line joins those that nothing beats.
    """
    figure, axis = plt.subplots(figsize=(8, 4.8))
    largest = max(seconds for *_, seconds in points.values())
    for (name, (bits, divergence, seconds)), color in zip(points.items(), colors(points, (SLATE,)), strict=True):
        axis.scatter(bits, divergence, s=20 + 400 * seconds / largest, color=color, alpha=0.55)
        axis.annotate(name, (bits, divergence), (6, 4), textcoords="offset points", fontsize=8)
    best = front(points)
    axis.plot(*zip(*(points[name][:2] for name in best), strict=True), color=GREY, linestyle="--", zorder=0)
    axis.set(xscale="log", yscale="log", title=title)
    axis.set_xlabel("bits per weight of the whole file (logarithmic)")
    axis.set_ylabel("KL from the original, nats per token (logarithmic)")
    ticks = [bits for bits in (2, 3, 4, 6, 8, 12, 16) if axis.get_xlim()[0] <= bits <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, [str(bits) for bits in ticks])
    axis.minorticks_off()
    axis.margins(x=0.15)
    figure.text(0.99, 0.01, f"largest dot: {largest:.0f} s", ha="right", fontsize=8)
    return figure
