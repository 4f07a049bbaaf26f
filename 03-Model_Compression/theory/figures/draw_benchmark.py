"""Draws the figure of the comparison with other libraries from committed records; run as a script."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from common.measure.plots import BLUE, GREEN, GREY, ORANGE
from tools import tables

HERE = Path(__file__).parent
COLORS = {"ours": BLUE, "RTN": GREY, "GPTQModel": ORANGE, "llm-compressor": GREEN, "optimum": "#9333ea"}
PANELS = {
    "GPTQ, 4 bits, symmetric": ["gptq-w4-g64-sym"],
    "GPTQ, 4 bits, asymmetric": ["gptq-w4-g64-asym"],
    "GPTQ, 3 bits, asymmetric": ["gptq-w3-g64-asym"],
    "50 %: ○ Wanda, □ SparseGPT": ["wanda-50", "sparsegpt-50"],
    "2:4: ○ Wanda, □ SparseGPT": ["wanda-2-4", "sparsegpt-2-4"],
}


def figures(device: str) -> dict[str, dict[str, dict]]:
    """setting/library → key → record."""
    found: dict[str, dict[str, dict]] = {}
    for r in tables.committed():
        if (r["lab"], r["device"]) == ("benchmark", device):
            found.setdefault(r["artifact"], {})[r["key"]] = r
    return found


def quality_against_time(device: str) -> Figure:
    """A panel per setting: seconds (logarithmic) and perplexity of each implementation, with its spread."""
    found = figures(device)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 3.2))
    for axis, (title, settings) in zip(axes, PANELS.items(), strict=True):
        for setting, marker in zip(settings, "os", strict=False):
            for library, color in COLORS.items():
                keys = found.get(f"{setting}/{library}", {})
                if "perplexity" in keys:
                    quality = keys["perplexity"]
                    axis.errorbar(
                        keys["seconds"]["value"],
                        quality["value"],
                        yerr=quality["spread"] or 0.0,
                        fmt=marker,
                        color=color,
                        label=library if marker == "o" else None,
                        capsize=3,
                    )
        axis.set(xscale="log", xlim=(0.15, 900))
        axis.set_xticks([1, 10, 100], ["1", "10", "100"], minor=False)
        axis.minorticks_off()
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("seconds")
    axes[0].set_ylabel("perplexity")
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=c, label=name) for name, c in COLORS.items()]
    figure.legend(handles=handles, frameon=False, ncols=len(COLORS), loc="outside lower center", fontsize=8)
    figure.suptitle(f"Lower left is better · {device}", fontsize=10)
    return figure


def main(folder: Path = HERE) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "benchmark"
    devices = sorted({r["device"] for r in tables.committed() if r["lab"] == "benchmark"})
    for device in devices:
        kind = "gpu" if "NVIDIA" in device else "cpu"
        quality_against_time(device).savefig(folder / f"benchmark-{kind}.svg", metadata={"Date": None})
        plt.close()


if __name__ == "__main__":
    main()
