"""Draws the figures of theory/3.1-Quantization.md from small computations and committed records; run as a script."""

from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from common.measure.evaluation import Estimate
from common.measure.plots import BLUE, GREEN, GREY, ORANGE
from common.measure.quantization_plots import bits_against_distortion
from common.methods.compensation import Hessian, inverse_cholesky
from common.methods.quantization import QuantizeConfig, gptq, rtn
from tools.tables import committed

HERE = Path(__file__).parent
PEAK, BANDWIDTH = 989e12, 3.35e12  # H100 SXM by NVIDIA's data sheet: dense BF16 FLOP/s, HBM3 bytes/s
BITS = 4 + (16 + 4) / 64  # 4 bits in groups of 64, with a scale and a zero point each


def round_to(w: Tensor, bits: int, limit: float) -> Tensor:
    """The nearest of 2^bits evenly spaced values from -limit to limit."""
    step = 2 * limit / (2**bits - 1)
    return ((w.clamp(-limit, limit) + limit) / step).round() * step - limit


def rounding() -> Figure:
    """Left: error against bits, measured and by formula. Right: error against the clipping limit."""
    w = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 3.3))
    bits = list(range(1, 9))
    measured = [(w - round_to(w, b, 5.0)).square().mean().sqrt() for b in bits]
    left.plot(bits, [10 / (2**b - 1) / 12**0.5 for b in bits], color=GREY, label="Δ / √12")
    left.plot(bits, measured, "o", color=BLUE, label="measured")
    left.set(yscale="log", xlabel="bits", ylabel="root mean squared error", title="Range fixed at ±5 std")
    left.legend(frameon=False)
    limits = torch.linspace(0.6, 5, 90).tolist()
    for b, color in ((2, ORANGE), (3, GREEN), (4, BLUE)):
        errors = [(w - round_to(w, b, c)).square().mean().item() for c in limits]
        best = min(range(len(limits)), key=errors.__getitem__)
        right.plot(limits, errors, color=color, label=f"{b} bits: best at {limits[best]:.1f}")
        right.plot(limits[best], errors[best], "o", color=color)
    right.set(yscale="log", xlabel="clipping limit c, in std", ylabel="mean squared error")
    right.set_title("Clip more (left) or round coarser (right)")
    right.legend(frameon=False)
    return figure


def compensation() -> Figure:
    """Cost of each column with and without compensation, and the output errors that they predict."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 16, generator=generator) @ torch.randn(16, 4096, generator=generator)
    size = torch.logspace(-0.7, 0.7, 64)[torch.randperm(64, generator=generator)]
    inputs = (mixing / 4 + torch.randn(64, 4096, generator=generator) / 2) * size[:, None]  # correlated, of many sizes
    weight = torch.randn(64, 64, generator=generator)
    statistic = Hessian(64, inputs)
    statistic.add(inputs.T.contiguous())
    H = statistic.matrix
    order = H.diagonal().argsort(descending=True)
    costs = {
        "RTN": H.diagonal(),
        "GPTQ": inverse_cholesky(H, 0.01).diagonal() ** -2,
        "GPTQ, act-order": inverse_cholesky(H[order][:, order], 0.01).diagonal() ** -2,
    }
    plain, act = (QuantizeConfig(4, 64, sym=False, desc_act=desc_act, mse=False) for desc_act in (False, True))
    results = (rtn(weight, plain), gptq(weight, H, plain), gptq(weight, H, act))
    changes = [weight - result.dequantize() for result in results]
    measured = [(change @ H * change).sum().item() for change in changes]
    predicted = [cost.sum().item() for cost in costs.values()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 3.3))
    for (name, cost), color in zip(costs.items(), (ORANGE, BLUE, GREEN), strict=True):
        left.plot(range(1, 65), cost.sort(descending=True).values, color=color, label=name)
    left.set(yscale="log", xlabel="columns, most expensive first", ylabel="cost of rounding it", title="Per column")
    left.legend(frameon=False)
    places = torch.arange(3)
    right.bar(places - 0.2, [p / predicted[0] for p in predicted], 0.38, color=GREY, label="predicted")
    right.bar(places + 0.2, [m / measured[0] for m in measured], 0.38, color=BLUE, label="measured")
    right.set_xticks(places, list(costs))
    right.set(ylabel="output error, RTN = 1", title="All columns, 4 bits")
    right.legend(frameon=False)
    return figure


def sweep() -> Figure:
    """KL of the whole model against the true bits per weight, by method, on the device with the longest sweep."""
    records = [r for r in committed() if (r["lab"], r["notebook"]) == ("quantization", "02-Quantize")]
    kls = [r for r in records if r["key"] == "blocks-kl"]
    device = max(sorted({r["device"] for r in kls}), key=lambda name: sum(r["device"] == name for r in kls))
    kls = [r for r in kls if r["device"] == device]
    bits = {r["artifact"]: r["value"] for r in records if (r["device"], r["key"]) == (device, "bits-per-weight")}
    found: dict[str, list[tuple[float, Estimate]]] = {}
    for r in kls:
        artifact = r["artifact"].removeprefix("gguf-")  # GGUF's bits are recorded by the type's name
        if artifact in bits:  # the rows of the options have the bits of rows that are there already
            kl = Estimate(r["value"], r["spread"], *r["interval"])
            method = "GGUF" if artifact != r["artifact"] else artifact.split("-")[0].upper()
            found.setdefault(method, []).append((bits[artifact], kl))
    protocol = kls[0]["protocol"]
    stated = f"{protocol['windows']} windows of {protocol['seqlen']} tokens"
    return bits_against_distortion(found, f"First {protocol['blocks']} blocks quantized: KL on {stated} ({device})")


def seconds(batch: float, bits: float) -> float:
    """Time for one weight by the roofline: reading it, or multiplying with it, whichever takes longer."""
    return max(bits / 8 / BANDWIDTH, 2 * batch / PEAK)


def measured_speedups() -> dict[str, dict[int, float]]:
    """Decoding speed with 4 bits over that with 16 by batch, on GPUs: the embedded model, the 7B shape, products."""
    kernels = {
        "triton-int4": "7B shape, our kernel",
        "torch-int4": "7B shape, PyTorch's int4",
        "gptq-marlin": "7B shape, Marlin",
    }
    rates: dict[tuple[str, str, int], float] = {}  # of the embedded model, by device, artifact and batch
    times: dict[tuple[str, str, int], float] = {}  # of a block's products, by device, artifact and tokens
    found: dict[str, dict[int, float]] = {}
    for r in committed():
        key, _, batch = r["key"].rpartition("-b")
        if not r["device"].startswith("NVIDIA"):
            continue  # the roofline is a GPU's
        if (r["lab"], r["notebook"], key) == ("quantization", "03-Inference", "throughput"):
            rates[r["device"], r["artifact"], int(batch)] = r["value"]
        elif r["key"].startswith("block-time-t"):
            times[r["device"], r["artifact"], int(r["key"].removeprefix("block-time-t"))] = r["value"]
        elif (r["lab"], key) == ("shape", "speedup") and r["artifact"] in kernels:
            name = f"{kernels[r['artifact']]} ({' '.join(r['device'].split()[:2])})"
            found.setdefault(name, {})[int(batch)] = r["value"]
    for (device, artifact, batch), rate in rates.items():
        if artifact == "gptq":
            found.setdefault(f"135M, {device}", {})[batch] = rate / rates[device, "original", batch]
    for (device, artifact, tokens), time in times.items():
        if artifact == "4 bits, our kernel":
            found.setdefault(f"7B products, our kernel ({device})", {})[tokens] = (
                times[device, "16 bits", tokens] / time
            )
    return found


def roofline() -> Figure:
    """Left: the roofline and where decoding and prefill lie. Right: what it lets 4 bits gain, and what we measured."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.6))
    intensity = torch.logspace(-0.3, 4, 100)
    left.plot(intensity, (intensity * BANDWIDTH).clamp(max=PEAK) / 1e12, color=GREY, linewidth=2)
    loads = {"decode, batch 1": (1, "o"), "decode, batch 32": (32, "s"), "prefill, 2048 tokens": (2048, "^")}
    for name, (batch, marker) in loads.items():
        for bits, color in ((16, ORANGE), (BITS, BLUE)):
            x = 16 * batch / bits
            left.plot(x, min(x * BANDWIDTH, PEAK) / 1e12, marker, color=color)
        left.plot([], [], marker, color="black", linestyle="", label=name)
    for bits, color in (("16 bits", ORANGE), (f"{BITS} bits", BLUE)):
        left.plot([], [], color=color, linewidth=6, label=bits)
    left.set(xscale="log", yscale="log", xlabel="FLOP per byte of weights", ylabel="TFLOP/s at most")
    left.set_title("Roofline of an H100 SXM (data sheet)")
    left.legend(frameon=False, fontsize=8)
    batches = torch.logspace(0, 3.2, 200).tolist()
    right.plot(batches, [seconds(b, 16) / seconds(b, BITS) for b in batches], color=GREY, label="roofline, H100 SXM")
    colors = cycle((ORANGE, BLUE, GREEN, "black", "purple", "deeppink"))
    for (name, gains), color in zip(sorted(measured_speedups().items()), colors, strict=False):
        right.plot(sorted(gains), [gains[b] for b in sorted(gains)], "o-", color=color, label=name)
    right.axhline(1, color="black", linestyle="--", linewidth=0.8)
    right.set(xscale="log", xlabel="sequences decoded together", ylabel="speed, 16 bits = 1", ylim=(0, 8))
    right.set_title("What 4 bits gain: bound, and measured")
    right.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


FIGURES = {
    "quantization-rounding": rounding,
    "quantization-compensation": compensation,
    "quantization-sweep": sweep,
    "quantization-roofline": roofline,
}


def main(folder: Path = HERE) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "quantization"
    for name, draw in FIGURES.items():
        draw().savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close()


if __name__ == "__main__":
    main()
