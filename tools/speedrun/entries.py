"""The course's own entries, to begin with.

python -m tools.speedrun.entries NAME FOLDER        then: make submit FILE=FOLDER
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from common.course.assets import load_model, load_tokenizer
from common.course.text import calibration_windows, load_corpus
from common.formats.gptq import save_gptq
from common.methods.gptaq import gptaq_model
from common.methods.quantization import QuantizeConfig, gptq_model, rtn_model
from tools.speedrun.rules import MODEL, STATEMENT

PLAIN = QuantizeConfig(bits=4, group_size=64, sym=True, mse=False, desc_act=False)


@dataclass(frozen=True)
class Entry:
    """How an entry is made; windows: of `seqlen` calibration tokens each, 0 for rounding alone, else for `quantize`."""

    name: str
    method: str
    config: QuantizeConfig
    windows: int = 0
    seqlen: int = 512
    quantize: Callable = gptq_model


ENTRIES = {
    "rtn": Entry("RTN 4-bit g64", "四捨五入，對稱", PLAIN),
    "rtn-asym": Entry("RTN 4-bit g64 asym", "四捨五入，非對稱", QuantizeConfig(mse=False, desc_act=False)),
    "gptq-short": Entry("GPTQ 4-bit g64, 2k", "GPTQ、act-order、非對稱", QuantizeConfig(mse=False), 16, 128),
    "gptq": Entry("GPTQ 4-bit g64, 32k", "GPTQ、act-order、MSE 截斷、非對稱（3.1-02 的設定）", QuantizeConfig(), 64),
    "gptaq": Entry("GPTAQ 4-bit g64, 32k", "GPTAQ，其餘同 GPTQ 32k", QuantizeConfig(), 64, quantize=gptaq_model),
}


def make(entry: Entry, folder: Path, spec: str = MODEL) -> None:
    """Make an entry of a model and save it with its statement."""
    model, tokenizer, tokens = load_model(spec, torch.bfloat16), load_tokenizer(spec), 0
    if entry.windows:
        windows = calibration_windows(tokenizer, load_corpus("wiki-leads"), entry.windows, entry.seqlen, 0)
        quantized, tokens = entry.quantize(model, windows, entry.config), windows.numel()
    else:
        quantized = rtn_model(model, entry.config)
    method = "gptq" if entry.windows else "rtn"
    save_gptq(folder, model, tokenizer, quantized, method=method, parent="original")
    said = {"name": entry.name, "author": "課程", "method": entry.method, "calibration_tokens": tokens}
    (folder / STATEMENT).write_text(json.dumps(said, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make one of the course's own entries.")
    parser.add_argument("name", choices=ENTRIES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    make(ENTRIES[arguments.name], arguments.folder)
