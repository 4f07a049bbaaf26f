"""Figures of the notebook on number formats."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from common.measure.evaluation import Estimate
from common.measure.plots import BLUE, colors, plain_numbers


def grids(values: dict[str, Tensor], title: str) -> Figure:
    """Every value of each number format as a stroke, the largest at 1: one row a format."""
    figure, axis = plt.subplots(figsize=(8, 0.5 * len(values) + 1.1))
    for row, grid in enumerate(values.values()):
        axis.vlines((grid / grid.max()).numpy(), row - 0.35, row + 0.35, color=BLUE, linewidth=0.8)
    axis.set_yticks(range(len(values)), [f"{name}: {len(grid)} values" for name, grid in values.items()])
    axis.invert_yaxis()
    axis.grid(False)
    axis.set(xlabel="value, as a share of the largest one", title=title)
    return figure


def estimates(found: dict[str, dict[str, Estimate]], xlabel: str, title: str) -> Figure:
    """Dots with 95 % intervals on a logarithmic axis: a row for each of `found`, a color for each series."""
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    figure, axis = plt.subplots(figsize=(7, 0.38 * len(found) + 1.5))
    for place, (name, color) in enumerate(zip(names, colors(names), strict=True)):
        rows = [(row, each[name]) for row, each in enumerate(found.values()) if name in each]
        values = np.array([one.value for _, one in rows])
        low = np.clip([one.low for _, one in rows], values / 10, None)  # such an axis has no zero
        reach = np.abs([values - low, np.array([one.high for _, one in rows]) - values])
        height = [row + 0.16 * (place - (len(names) - 1) / 2) for row, _ in rows]  # intervals do not hide each other
        axis.errorbar(values, height, xerr=reach, fmt="o", color=color, capsize=2, label=name)
    axis.set_xscale("log")
    plain_numbers(axis.xaxis)
    axis.set_yticks(range(len(found)), list(found))
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set(xlabel=f"{xlabel} (logarithmic)", title=title)
    if len(names) > 1:
        figure.legend(frameon=False, ncols=len(names), loc="outside lower center", fontsize=8)
    return figure
