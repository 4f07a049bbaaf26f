"""`make interop`: auto-gptq 0.7.1 reads the checkpoint of notebook 02; its perplexity must be ours within 1 %.

    python benchmarks/interop.py [--windows 2] [--profile cpu]

auto-gptq is archived and wants old versions, so it runs in its own environment, `.venv-interop` (Python 3.11 only).
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from benchmarks.compatibility import for_transformers_4
from common.course import artifacts
from common.course.assets import load_tokenizer
from common.course.settings import ROOT, load_settings
from common.course.text import evaluation_windows, load_corpus
from common.formats.gptq import load_dequantized
from common.measure.evaluation import evaluate

PYTHON = ROOT / ".venv-interop" / "bin" / "python"


def compare(checkpoint: Path, windows: torch.Tensor) -> tuple[float, dict]:
    """(our perplexity, what auto-gptq reports) of a GPTQ v1 checkpoint, both in float32."""
    ours = evaluate(load_dequantized(checkpoint, torch.float32), windows).perplexity
    with tempfile.TemporaryDirectory() as folder:
        file, copy = Path(folder) / "windows.pt", Path(folder) / "checkpoint"
        torch.save(windows, file)
        shutil.copytree(checkpoint, copy)
        for_transformers_4(copy)
        command = [PYTHON, Path(__file__).with_name("auto_gptq_reader.py"), copy, file]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"auto-gptq failed:\n{done.stderr[-2000:]}")
    return ours, json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="auto-gptq 0.7.1 reads our checkpoint.")
    parser.add_argument("--windows", type=int, default=2, help="test windows of 512 tokens")
    parser.add_argument("--profile", default="auto", help="whose artifact `gptq`")
    options = parser.parse_args()
    settings = load_settings("quantization", options.profile)
    checkpoint = artifacts.load(settings.artifacts / "gptq", made_by="Lab-3.1-Quantization/02-Quantize")
    windows = evaluation_windows(load_tokenizer(settings.model), load_corpus(settings.corpus), 512, options.windows)
    ours, theirs = compare(checkpoint.folder, windows)
    difference = abs(theirs["perplexity"] / ours - 1)
    print(f"ours {ours:.4f} · auto-gptq {theirs['perplexity']:.4f} ({theirs['kernel']}) · difference {difference:.3%}")
    print(f"sum of |embedding| before it was copied in: {theirs['embedding before it was copied in']:.0f}")
    if difference > 0.01:
        raise SystemExit("auto-gptq reads something else than we wrote.")
    print("✅ the checkpoint means the same to auto-gptq 0.7.1 and to us")


if __name__ == "__main__":
    main()
