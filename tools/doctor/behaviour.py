"""What the model says, and how well it predicts text beside its parent."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.course import artifacts
from common.course.assets import load_model, locate
from common.course.text import evaluation_windows, load_corpus
from common.formats.gptq import load_dequantized
from common.formats.sparse import load_sparse
from common.measure.evaluation import Baseline, evaluate, generate
from tools.doctor.reading import Checkpoint

PROMPT = "The capital of France is"
WINDOWS, SEQLEN = 8, 256


def load(found: Checkpoint) -> nn.Module:
    """The checkpoint's model in float32, packed weights unpacked where the course can."""
    if found.kind == "sparse":
        return load_sparse(found.path, torch.float32)
    if found.kind in ("dense", "gptq", "awq"):
        return load_dequantized(found.path, torch.float32)
    if found.kind == "gguf":
        options = {"gguf_file": found.path.name, "dtype": torch.float32}
        return AutoModelForCausalLM.from_pretrained(found.path.parent, **options).eval()
    return AutoModelForCausalLM.from_pretrained(found.path).eval()


def parent_of(found: Checkpoint) -> str:
    """The spec of the model that the checkpoint was made from, where artifact.json names one that is here; else ""."""
    folder = found.path if found.path.is_dir() else found.path.parent
    if not (folder / artifacts.DESCRIPTION).exists():
        return ""
    name = artifacts.load(folder).parent
    beside = folder.with_name(name) if name else folder
    if beside != folder and (beside / "config.json").exists():
        return str(beside)
    try:
        return locate(name)
    except (OSError, ValueError):  # "original": its spec is not written down
        return ""


@torch.no_grad()
def behaviour(found: Checkpoint, parent: str) -> dict[str, str]:
    """Answer to a prompt, perplexity on the course's held-out text, and both of the parent's."""
    folder = found.path if found.path.is_dir() else found.path.parent
    options = {"gguf_file": found.path.name} if found.kind == "gguf" else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    windows = evaluation_windows(tokenizer, load_corpus(), SEQLEN, WINDOWS)
    facts, baseline = {}, None
    if parent:
        original, baseline = load_model(parent, torch.float32), Baseline(WINDOWS)
        facts["parent"] = f"{Path(parent).name}, perplexity {evaluate(original, windows, keep=baseline).perplexity:.2f}"
        del original
    model = load(found)
    quality = evaluate(model, windows, against=baseline)
    facts["perplexity"] = f"{quality.perplexity:.2f} ({WINDOWS} windows of {SEQLEN} tokens of wiki-leads, test split)"
    if quality.kl is not None:
        facts["against parent"] = f"KL {quality.kl:.4f} nats per token, same top-1 {quality.top1:.1%}"
    facts["answer"] = f"{PROMPT!r} → {generate(model, tokenizer, PROMPT, 24)!r}"
    return facts
