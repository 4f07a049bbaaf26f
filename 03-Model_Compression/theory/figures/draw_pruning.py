"""Draws the figures of theory/3.2-Pruning.md from committed records and small computations; run as a script."""

import math
import tomllib
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from common.course.settings import ROOT
from common.measure.plots import BLUE, GREEN, GREY, METHODS, ORANGE
from common.methods.importance import keep_highest
from tools import tables

HERE = Path(__file__).parent
PROFILES = ROOT / "common" / "course" / "profiles.toml"
NAMES = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}


def device_of(notebook: str, key: str) -> str:
    """The device whose committed figures are drawn: a GPU where there is one, for its longer evaluation; the latest."""
    found = [r for r in tables.committed() if (r["lab"], r["notebook"], r["key"]) == ("pruning", notebook, key)]
    if not found:
        raise LookupError(f"No committed record of {key} from pruning notebook {notebook}: make record LAB=3.2.")
    return max(found, key=lambda r: ("NVIDIA" in r["device"], r["date"]))["device"]


def records(notebook: str, key: str) -> tuple[str, dict[str, dict]]:
    """That device, and its records of one key by artifact."""
    device = device_of(notebook, key)
    wanted = ("pruning", notebook, key, device)
    found = [r for r in tables.committed() if (r["lab"], r["notebook"], r["key"], r["device"]) == wanted]
    return device, {r["artifact"]: r for r in found}


def entropy(share: Tensor) -> Tensor:
    """Bits that say where the zeros are, at the least: the binary entropy of their share."""
    bits = torch.special.xlogy(share, share) + torch.special.xlogy(1 - share, 1 - share)
    return -bits / math.log(2)


def formats(bits: int) -> dict[str, tuple[Callable[[Tensor], Tensor], str, str]]:
    """Bits per weight of each storage format as a function of sparsity, with color and line style."""
    return {
        "dense": (lambda s: torch.full_like(s, bits), "black", "-"),
        "CSR, 32-bit columns": (lambda s: (1 - s) * (bits + 32), ORANGE, "-"),
        "CSR, 16-bit columns": (lambda s: (1 - s) * (bits + 16), ORANGE, "--"),
        "bitmask + values": (lambda s: (1 - s) * bits + 1, BLUE, "-"),
        "values + entropy of the mask (bound)": (lambda s: (1 - s) * bits + entropy(s), GREY, ":"),
    }


def storage() -> Figure:
    """Bits per weight against sparsity, for 16-bit and for 4-bit values."""
    s = torch.linspace(0, 1, 401)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for axis, bits in zip(axes, (16, 4), strict=True):
        for name, (size, color, style) in formats(bits).items():
            axis.plot(s, size(s), color=color, linestyle=style, label=name)
        axis.plot(
            0.5, bits / 2 + 1, "D", color=GREEN, markersize=7, label="2:4 (two 2-bit indices per group)", zorder=3
        )
        axis.plot(1 / bits, bits, "o", color=BLUE, zorder=3)
        for index in (32, 16):
            axis.plot(index / (bits + index), bits, "o", color=ORANGE, zorder=3)
        axis.set(xlabel="sparsity", ylabel="bits per weight", title=f"{bits}-bit values", xlim=(0, 1))
        axis.set_ylim(0, 2 * bits)
    axes[0].legend(frameon=False, fontsize=7, loc="lower left")
    figure.suptitle("Where zeros start to save space (dots: break-even with dense)", fontsize=11)
    return figure


def curve() -> Figure:
    """Left: perplexity against sparsity. Right: the same share of zeros in three patterns."""
    device, found = records("04-Benchmark_and_Analysis", "perplexity")
    dense = found["original"]["value"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), width_ratios=(3, 2))
    for method in NAMES:
        points = {
            int(name.removeprefix(f"{method}-")) / 100: r
            for name, r in found.items()
            if name.removeprefix(f"{method}-").isdigit()
        }
        at = sorted(points)
        values, spreads = ([points[s][field] or 0.0 for s in at] for field in ("value", "spread"))
        left.errorbar(
            [0, *at], [dense, *values], [0, *spreads], fmt="o-", color=METHODS[method], capsize=3, label=NAMES[method]
        )
    left.axhline(dense, color=GREY, linestyle="--", label="dense")
    left.set(xlabel="sparsity", ylabel="perplexity", yscale="log", title="Perplexity against sparsity")
    left.legend(frameon=False)
    patterns = {"free": "50", "4:8": "4-8", "2:4": "2-4"}
    for number, method in enumerate(("wanda", "sparsegpt")):
        chosen = [found[f"{method}-{suffix}"] for suffix in patterns.values()]
        places = [place + 0.2 * (number - 0.5) for place in range(len(patterns))]
        right.errorbar(
            places,
            [r["value"] for r in chosen],
            [r["spread"] or 0.0 for r in chosen],
            fmt="o",
            color=METHODS[method],
            capsize=3,
            label=NAMES[method],
        )
    right.axhline(dense, color=GREY, linestyle="--")
    right.set_xticks(range(len(patterns)), patterns)
    right.set(ylabel="perplexity", title="50 % zeros, three patterns")
    right.legend(frameon=False)
    figure.suptitle(f"Embedded model, {found['original']['protocol']['windows']} test windows, {device}", fontsize=9)
    return figure


def sensitivity() -> Figure:
    """What pruning a single block costs, and the sparsities that an allocation by log sensitivity makes of it."""
    device, found = records("04-Benchmark_and_Analysis", "sensitivity")
    cost = {int(name.removeprefix("block ")): r["value"] for name, r in found.items() if name.startswith("block ")}
    blocks = sorted(cost)
    values = torch.tensor([cost[block] for block in blocks])
    profile = tomllib.loads(PROFILES.read_text(encoding="utf-8"))["pruning"]
    total, span = (profile[name]["all"] for name in ("high_sparsity", "owl_span"))
    scores = values.log()  # as common.methods.allocation.by_importance does
    density = (scores - scores.min()) / (scores.max() - scores.min()) * 2 * span
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.1))
    left.bar(blocks, values, color=BLUE)
    left.set(xlabel="block pruned alone (Wanda, 50 %)", ylabel="KL, nats/token", title="What pruning one block costs")
    right.plot(blocks, total + density.mean() - density, "o-", color=GREEN)
    right.axhline(total, color=GREY, linestyle="--", label=f"mean {total:g}")
    right.set(xlabel="block", ylabel="sparsity", title="Sparsity linear in log KL, same total")
    right.legend(frameon=False)
    figure.suptitle(f"Embedded model, {device}", fontsize=9)
    return figure


def speed() -> Figure:
    """2:4 against dense by number of tokens: what the bytes and the arithmetic allow, and what was measured."""
    keys = {
        r["key"]
        for r in tables.committed()
        if r["key"].startswith("sparse-speed-") and r["protocol"].get("kernel") == "2:4"
    }
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    axis.axhspan(16 / 9, 2, color=GREY, alpha=0.35, label="ideal: 16/9 (bytes) to 2 (arithmetic)")
    axis.axhline(1, color="black", linewidth=0.8)
    measured: dict[str, dict[int, float]] = {}
    for key in keys:
        device, found = records("03-Inference", key)
        for artifact, r in found.items():
            measured.setdefault(artifact, {})[r["protocol"]["tokens"]] = r["value"]
    for (artifact, points), color in zip(sorted(measured.items()), (BLUE, ORANGE), strict=False):
        at = sorted(points)
        axis.plot(at, [points[tokens] for tokens in at], "o-", color=color, label=artifact)
    axis.set(xscale="log", xlabel="tokens multiplied at once", ylabel="speed relative to dense", ylim=(0, 2.2))
    axis.set_title(f"2:4 kernel, {device}")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(0, 0.66))
    return figure


def patterns() -> Figure:
    """The same scores, half of the weights kept, in four patterns: dark stays."""
    scores = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.4, 1, 16)
    chosen = {
        "unstructured": keep_highest(scores.flatten(), 0.5).view_as(scores),
        "4:8": keep_highest(scores.unflatten(1, (-1, 8)), 0.5).flatten(1),
        "2:4": keep_highest(scores.unflatten(1, (-1, 4)), 0.5).flatten(1),
        "structured (inputs)": keep_highest(scores.norm(dim=0), 0.5).expand_as(scores),
    }
    figure, axes = plt.subplots(1, len(chosen), figsize=(9, 2.7))
    for axis, (name, keep) in zip(axes, chosen.items(), strict=True):
        axis.pcolormesh(keep, cmap="Blues", vmin=0, vmax=1.2, edgecolors="white", linewidth=0.5)
        every = {"4:8": 8, "2:4": 4}.get(name, 16)
        for place in range(every, 16, every):
            axis.axvline(place, color=ORANGE, linewidth=1.5)
        axis.set(title=name, xticks=[], yticks=[], aspect="equal")
        axis.invert_yaxis()
    axes[0].set(xlabel="inputs", ylabel="outputs")
    return figure


def ellipse() -> Figure:
    """Two weights of one output: where an error is equally large, and what OBD and OBS do on the line w₁ = 0."""
    w, H = torch.tensor([1.0, -1.0]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])  # exercise 1
    obd, obs = torch.tensor([0.0, -1.0]), torch.tensor([0.0, -0.5])
    x, y = torch.meshgrid(torch.linspace(-0.9, 2.4, 200), torch.linspace(-2.3, 0.6, 200), indexing="xy")
    delta = torch.stack([x - w[0], y - w[1]], dim=-1)
    error = ((delta @ H) * delta).sum(-1) / 2
    figure, axis = plt.subplots(figsize=(5.2, 4.2))
    lines = axis.contour(x, y, error, levels=[0.25, 0.75, 1.0, 2.0], colors=GREY, linewidths=1)
    axis.clabel(lines, fmt="%g", fontsize=8)
    axis.axvline(0, color="black", linewidth=1.2)
    axis.annotate("constraint: $w_1=0$", (0, 0.48), (6, 0), textcoords="offset points", fontsize=9)
    for point, label, color, place in (
        (w, "trained weights, error 0", "black", (8, 6)),
        (obd, "removed (OBD): error 1", METHODS["magnitude"], (8, -16)),
        (obs, "removed, the other moved (OBS): error 0.75", METHODS["sparsegpt"], (8, 10)),
    ):
        axis.plot(*point.tolist(), "o", color=color, markersize=8)
        axis.annotate(label, point.tolist(), place, textcoords="offset points", color=color, fontsize=8)
    for end, color in ((obd, METHODS["magnitude"]), (obs, METHODS["sparsegpt"])):
        axis.annotate("", end.tolist(), w.tolist(), arrowprops={"arrowstyle": "->", "color": color, "shrinkB": 5})
    axis.set(xlabel="$w_1$", ylabel="$w_2$", title="Equal output error around the trained weights", aspect="equal")
    axis.grid(visible=False)
    return figure


def multiplexer() -> Figure:
    """One group of 2:4: two values, two places of two bits, and the inputs that they choose."""
    figure, axis = plt.subplots(figsize=(7.4, 3.6))
    axis.set(xlim=(0, 11), ylim=(0.2, 5.4))
    axis.axis("off")

    def box(x, y, text, color, width=1.1, height=0.7):
        axis.add_patch(plt.Rectangle((x, y), width, height, facecolor=color, edgecolor="black", linewidth=0.8))
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)

    def arrow(start, end, color="black"):
        axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color, "linewidth": 1.1})

    weights, pale = ("0", "$w_1$", "0", "$w_3$"), "#dbeafe"
    for column, text in enumerate(weights):
        box(0.2 + 1.15 * column, 4.4, text, "white" if text == "0" else pale)
        box(0.2 + 1.15 * column, 0.4, f"$x_{column}$", "#fef3c7")
    axis.text(0.2, 5.2, "four weights of one output, two of them zero", fontsize=9)
    axis.text(0.2, 1.25, "their four inputs", fontsize=9)
    arrow((4.8, 4.75), (5.9, 4.75))
    for number, (value, place) in enumerate((("$w_1$", "01"), ("$w_3$", "11"))):
        box(6.0 + 2.3 * number, 4.4, value, pale)
        box(7.1 + 2.3 * number, 4.4, place, "#e5e7eb", 0.8)
    axis.text(6.0, 5.2, "kept: two values, and 2 bits of place each", fontsize=9)
    for number, (chosen, value) in enumerate(((1, "$w_1$"), (3, "$w_3$"))):
        left = 5.4 + 2.6 * number
        axis.add_patch(
            plt.Polygon(
                [(left, 1.9), (left + 1.9, 1.9), (left + 1.5, 2.6), (left + 0.4, 2.6)], fc="#e5e7eb", ec="black"
            )
        )
        axis.text(left + 0.95, 2.25, "4 → 1", ha="center", va="center", fontsize=9)
        for column in range(4):
            color = BLUE if column == chosen else GREY
            axis.plot(
                [0.75 + 1.15 * column, left + 0.35 + 0.4 * column],
                [1.1, 1.9],
                color=color,
                linewidth=1.6 if column == chosen else 0.6,
            )
        axis.plot([7.5 + 2.3 * number, left + 1.7], [4.4, 2.3], color=ORANGE, linewidth=1.1, linestyle="--")
        arrow((left + 0.95, 2.6), (left + 0.95, 3.2), BLUE)
        axis.text(left + 0.95, 3.4, f"{value} × $x_{chosen}$", ha="center", fontsize=10)
    told = "places (dashed) choose two of four inputs:\ntwo multiplications instead of four"
    axis.text(5.6, 1.0, told, fontsize=9, va="top")
    return figure


FIGURES = {
    "pruning-patterns": patterns,
    "pruning-ellipse": ellipse,
    "pruning-multiplexer": multiplexer,
    "pruning-storage": storage,
    "pruning-curve": curve,
    "pruning-sensitivity": sensitivity,
    "pruning-2-4-speed": speed,
}


def main(folder: Path = HERE) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "pruning"
    for name, draw in FIGURES.items():
        draw().savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close()


if __name__ == "__main__":
    main()
