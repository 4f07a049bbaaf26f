"""How far a submission is from the original, measured in a process of its own.

KL(original ‖ submission) on windows of the test split that are the same for all, and on others that the submission's
own bytes draw: nobody can know those before the file is finished. A model that does far better on the first than on the
second knows the first.
"""

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from common.course.assets import load_model, load_tokenizer
from common.course.text import evaluation_windows, load_corpus
from common.formats.gptq import load_dequantized
from common.measure.evaluation import Baseline, evaluate
from tools.speedrun.rules import MODEL, Refused, fingerprint

SEQLEN, WINDOWS = 256, 8  # of the ranking, and as many drawn ones
POOL = 64  # windows of the test split from which these are drawn
KNOWN = 0.7  # least KL on the known windows, as a share of that on the drawn ones; our own entries have 0.90 to 0.93
SECONDS = 900


def measured(folder: Path, model: str = MODEL) -> dict:
    """KL in nats per token ("kl"), its standard error, and that on drawn windows ("drawn"). Raises Refused."""
    command = [sys.executable, "-m", "tools.speedrun.measure", str(folder.resolve()), model]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=Path(__file__).parents[2])
    except subprocess.TimeoutExpired as error:
        raise Refused(f"Measuring took longer than {SECONDS} s.") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise Refused(f"The model cannot be measured: {said.removeprefix('ValueError: ')}")
    return honest(json.loads(lines[-1]))


def honest(found: dict) -> dict:
    """What was measured, if the known windows are about as hard for the model as others. Raises Refused."""
    if not math.isfinite(found["kl"] + found["drawn"]):
        raise Refused("Its distance from the original is not finite.")
    if found["kl"] < KNOWN * found["drawn"]:
        raise Refused(
            f"It knows the test windows: KL {found['kl']:.4f} there, {found['drawn']:.4f} on windows that its own "
            "bytes drew."
        )
    return found


def windows_for(folder: Path, model: str) -> Tensor:
    """The ranking's windows, then the drawn ones [2 · WINDOWS, SEQLEN]."""
    pool = evaluation_windows(load_tokenizer(model), load_corpus("wiki-leads"), SEQLEN, POOL)
    generator = torch.Generator().manual_seed(int(fingerprint(folder)[:15], 16))
    drawn = WINDOWS + torch.randperm(len(pool) - WINDOWS, generator=generator)[:WINDOWS]
    return torch.cat((pool[:WINDOWS], pool[drawn]))


def distances(folder: Path, model: str) -> dict:
    """What `measured` says, computed here, in float32, which every processor can. ValueError for what is no model."""
    windows, baseline = windows_for(folder, model), Baseline(2 * WINDOWS)
    original = load_model(model, torch.float32)
    vocabulary = original.config.vocab_size
    if AutoConfig.from_pretrained(folder).vocab_size != vocabulary:
        raise ValueError(f"Its vocabulary has not the original's {vocabulary} tokens.")
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "error", message=".*tensors that are ignored"
        )  # what is no weight has no business there
        submitted = load_dequantized(folder, torch.float32)
    evaluate(original, windows, keep=baseline)
    divergences = evaluate(submitted, windows, against=baseline).divergences
    kl, drawn = divergences[:WINDOWS], divergences[WINDOWS:].mean().item()
    error = kl.std(correction=1).item() / math.sqrt(WINDOWS)
    return {"kl": kl.mean().item(), "standard_error": error, "drawn": drawn}


if __name__ == "__main__":
    print(json.dumps(distances(Path(sys.argv[1]), sys.argv[2])))
