"""Draws the figures of theory/3.3-Knowledge_Distillation.md and of Lab 3.3; run as a script.

From small computations, and from committed records where a figure shows measurements.
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from common.measure.plots import BLUE, GREEN, GREY, ORANGE
from common.methods.distillation import kd_loss, top_k_kd_loss
from common.methods.soft_labels import top_k_and_tail
from tools import tables

HERE = Path(__file__).parent
VOCABULARY = 49_152  # the embedded model's
TEACHER = torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64)  # the worked example of the document
STUDENT = torch.tensor([2.0, 3.0, 0.0, 1.0], dtype=torch.float64)
# Of students: the benchmark's name, the notebook's, and the color
OBJECTIVES = (("CE + KD", "CE + KD", BLUE), ("KD", "KD only", GREEN), ("CE", "CE only", ORANGE))


def zipf_logits(vocabulary: int = VOCABULARY, exponent: float = 1.5) -> Tensor:
    """Logits whose softmax falls like rank^-exponent: a heavy-tailed distribution over a whole vocabulary."""
    return -exponent * torch.arange(1, vocabulary + 1, dtype=torch.float64).log()


def temperature() -> Figure:
    """Left: one distribution at three temperatures. Right: what falls outside the k likeliest tokens."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.1))
    tokens = torch.arange(4)
    for number, (T, color) in enumerate(zip((1, 2, 4), (BLUE, ORANGE, GREEN), strict=True)):
        left.bar(tokens + 0.27 * (number - 1), (TEACHER / T).softmax(-1), 0.25, color=color, label=f"T = {T}")
    left.set_xticks(tokens, [f"token {i}\nlogit {logit:g}" for i, logit in enumerate(TEACHER.tolist())])
    left.set(ylabel="probability", title="Same logits, three temperatures")
    left.legend(frameon=False)
    logits, temperatures = zipf_logits(), torch.linspace(1, 4, 31).tolist()
    for k, color in ((16, GREY), (64, BLUE), (1024, GREEN)):
        outside = [1 - (logits / T).softmax(-1)[:k].sum().item() for T in temperatures]
        right.plot(temperatures, outside, color=color, label=f"k = {k:,}")
    right.set(xlabel="temperature", ylabel="probability outside the top k", ylim=(0, 1))
    right.set_title(f"Tail of a rank$^{{-1.5}}$ law, V = {VOCABULARY:,}")
    right.legend(frameon=False)
    return figure


def gradient_size() -> Figure:
    """Size of the gradient of KL in the worked example, with and without T², and the limit."""
    sizes, temperatures = [], [2.0**power for power in range(-1, 9)]
    for T in temperatures:
        z = STUDENT[None].clone().requires_grad_()
        kd_loss(z, TEACHER[None], T).backward()
        sizes.append(z.grad.norm().item())
    difference = STUDENT - TEACHER
    limit = ((difference - difference.mean()) / len(difference)).norm().item()
    figure, axis = plt.subplots(figsize=(5.6, 3.1))
    axis.axhline(limit, color=GREY, linestyle="--", label="limit (logit matching)")
    axis.plot(temperatures, sizes, "o-", color=BLUE, label="with T²")
    without = [size / T**2 for size, T in zip(sizes, temperatures, strict=True)]
    axis.plot(temperatures, without, "o-", color=ORANGE, label="without T²")
    axis.set_xscale("log", base=2)
    axis.set_xticks([2**power for power in range(-1, 9)], [f"{2.0**power:g}" for power in range(-1, 9)])
    axis.set(yscale="log", xlabel="temperature", ylabel="norm of the gradient", title="What T² is for")
    axis.legend(frameon=False)
    return figure


def gaussian(x: Tensor, mean: float, width: float) -> Tensor:
    density = torch.exp(-((x - mean) ** 2) / (2 * width**2))
    return density / density.sum()


def two_peaks(x: Tensor) -> Tensor:
    """The teacher of the forward / reverse example."""
    return 0.6 * gaussian(x, -2, 0.7) + 0.4 * gaussian(x, 2.5, 0.7)


def best_gaussian(x: Tensor, divergence) -> tuple[float, float]:
    """Mean and width of the Gaussian with the smallest divergence, by grid search in steps of 0.05."""
    means, widths = torch.arange(-80, 81) / 20, torch.arange(6, 81) / 20
    return min(
        ((m, w) for m in means.tolist() for w in widths.tolist()), key=lambda c: divergence(gaussian(x, *c)).item()
    )


def forward_and_reverse() -> Figure:
    """A teacher with two peaks, and the single Gaussian that each KL divergence prefers."""
    x = torch.linspace(-8, 8, 321, dtype=torch.float64)
    p = two_peaks(x) + 1e-300
    fits = {
        "student by forward KL(p‖q)": (best_gaussian(x, lambda q: (p * (p / (q + 1e-300)).log()).sum()), BLUE),
        "student by reverse KL(q‖p)": (best_gaussian(x, lambda q: torch.special.xlogy(q, q / p).sum()), ORANGE),
    }
    step = (x[1] - x[0]).item()
    figure, axis = plt.subplots(figsize=(6.4, 3.1))
    axis.fill_between(x, two_peaks(x) / step, color=GREY, alpha=0.5, label="teacher p: two peaks")
    for name, ((mean, width), color) in fits.items():
        label = f"{name}: mean {mean:.2f}, width {width:.2f}"
        axis.plot(x, gaussian(x, mean, width) / step, color=color, label=label)
    axis.set(xlabel="outcome", ylabel="density", title="One Gaussian cannot be both peaks", ylim=(0, 0.72))
    axis.legend(frameon=False, fontsize=8)
    return figure


def top_k() -> Figure:
    """KL of a noisy student: what k tokens with and without the tail say it is."""
    p = zipf_logits()[None]
    generator = torch.Generator().manual_seed(0)
    q = p + torch.randn(p.shape, generator=generator, dtype=p.dtype)
    with_tail, without = {}, {}
    for k in (2**power for power in range(13)):
        ids, log_probs = top_k_and_tail(p.double(), k, 1.0)
        with_tail[k] = top_k_kd_loss(q, ids, log_probs.double(), 1.0).item()
        log_p = log_probs[:, :-1].double().log_softmax(-1)
        without[k] = (log_p.exp() * (log_p - F.log_softmax(q, -1).gather(-1, ids))).sum().item()
    figure, axis = plt.subplots(figsize=(5.6, 3.1))
    axis.axhline(kd_loss(q, p, 1.0).item(), color=GREY, linestyle="--", label="whole vocabulary")
    axis.plot(without.keys(), without.values(), "o-", color=ORANGE, label="top k renormalized, no tail")
    axis.plot(with_tail.keys(), with_tail.values(), "o-", color=BLUE, label="top k + tail")
    axis.set_xscale("log", base=2)
    axis.set_xticks([4**power for power in range(7)], [f"{4**power:,}" for power in range(7)])
    axis.set(xlabel="k (tokens stored per position)", ylabel="KL (nats)", title="A lower bound, and a biased target")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    return figure


def what_it_bought() -> Figure:
    """Committed figures of students from one start, of the device and model of `benchmarks/students.py`.

    Filled: each objective at its best rate, with the spread over data orders. Hollow: notebook 03's long runs, each at
    its best checkpoint. Left: perplexity on test text; right: distance from the teacher. No axis starts at zero.
    """
    committed = tables.committed()
    short = [r for r in committed if r["lab"] == "students" and r["key"] in ("best-perplexity", "best-kl")]
    if not short:
        raise LookupError("No committed record of students at their best rate: python -m benchmarks.students --record.")
    device = short[0]["device"]
    best = [r for r in committed if r["protocol"].get("checkpoint") == "best in validation" and r["device"] == device]
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 2.2), sharey=True)
    for axis, key, label in zip(axes, ("perplexity", "kl"), ("perplexity", "KL, nats/token"), strict=True):
        mean = {r["artifact"]: r for r in short if r["key"] == f"best-{key}"}
        long = {r["artifact"]: r["value"] for r in best if r["key"] == f"long-{key}"}
        for y, (name, shown, color) in enumerate(OBJECTIVES):
            style = {"fmt": "o", "color": color, "capsize": 3}
            axis.errorbar(mean[name]["value"], y, xerr=mean[name]["spread"], **style)
            axis.plot(long[shown], y, "o", color=color, markerfacecolor="none")
        axis.set_yticks(range(len(OBJECTIVES)), [shown for _, shown, _ in OBJECTIVES])
        axis.set(xlabel=f"{label} (axis does not start at 0)", ylim=(-0.6, 2.6))
    steps = short[0]["protocol"]["steps"], best[0]["protocol"]["steps"]
    title = "Half the blocks, one start; filled: {} steps, hollow: best checkpoint of {}; left is better ({})"
    figure.suptitle(title.format(*steps, device), fontsize=10)
    return figure


FIGURES = {
    "distillation-temperature": temperature,
    "distillation-gradient": gradient_size,
    "distillation-forward-reverse": forward_and_reverse,
    "distillation-top-k": top_k,
    "distillation-bought": what_it_bought,
}


def main(folder: Path = HERE) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "distillation"
    for name, draw in FIGURES.items():
        draw().savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close()


if __name__ == "__main__":
    main()
