"""Small inputs of the widgets, from the embedded model: one row of weights, and a small layer with its Hessian.

python -m tools.book.samples            writes book/static/data/samples.js, which is committed
"""

import json
from pathlib import Path

import torch

from common.course.assets import load_model, load_tokenizer
from common.course.settings import ROOT
from common.course.text import calibration_windows, load_corpus
from common.methods.blocks import iter_linears
from common.methods.compensation import Hessian

FILE = ROOT / "book" / "static" / "data" / "samples.js"
LAYER, ROW, WIDTH = "layers.10.self_attn.o_proj", 0, 128
ROWS, COLUMNS = 6, 10  # of the small layer
WINDOWS, SEQLEN = 8, 128


def _linked(hessian: torch.Tensor, count: int) -> list[int]:
    """The inputs that go together most: from the closest pair on, always the one closest to those chosen."""
    scale = hessian.diagonal().rsqrt()
    close = (hessian * scale[:, None] * scale).abs().fill_diagonal_(0)
    chosen = list(divmod(close.argmax().item(), len(close)))
    while len(chosen) < count:
        gain = close[:, chosen].sum(1)
        gain[chosen] = -1
        chosen.append(gain.argmax().item())
    return sorted(chosen)


@torch.no_grad()
def samples() -> dict:
    """{"row": 128 weights, "weight": [6][10], "hessian": [10][10], "layer": name, "inputs": which}."""
    model = load_model("embedded", torch.float32)
    name, layer = next(item for item in iter_linears(model) if item[0].endswith(LAYER))
    windows = calibration_windows(load_tokenizer("embedded"), load_corpus(), WINDOWS, SEQLEN)
    statistic = Hessian(layer.in_features, layer.weight)
    hook = layer.register_forward_pre_hook(lambda _, inputs: statistic.add(inputs[0].flatten(0, -2)))
    for window in windows:
        model(window[None])
    hook.remove()
    inputs = _linked(statistic.matrix, COLUMNS)
    return {
        "layer": name,
        "row": layer.weight[ROW, :WIDTH].tolist(),
        "inputs": inputs,
        "weight": layer.weight[:ROWS, inputs].tolist(),
        "hessian": [[float(f"{value:.6g}") for value in row] for row in statistic.matrix[inputs][:, inputs].tolist()],
    }


def read(file: Path = FILE) -> dict:
    return json.loads(file.read_text(encoding="utf-8").removeprefix("window.bookSamples = ").rstrip(";\n"))


if __name__ == "__main__":
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(f"window.bookSamples = {json.dumps(samples())};\n", encoding="utf-8")
