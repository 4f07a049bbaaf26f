"""Tiny random models with the embedded model's tokenizer and chat template, where students' models lie.

By hand: `python tests/model_tools.py qwen3 folder`, or `... qwen3 cache tiny/qwen3-like` for a Hub id.
"""

import hashlib
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.course.assets import load_tokenizer

SIZES = {
    "hidden_size": 128,  # every size a multiple of 64: the group size of Lab 3.1, and of what llama.cpp packs
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,  # five times the usual: attention and logits then have something to say
}
FAMILIES = {
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 32},  # norms of (1 + w), soft caps, sliding windows
    "gemma3_text": {"sliding_window": 64, "query_pre_attn_scalar": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},  # fused experts
}
REVISION = "0123456789abcdef0123456789abcdef01234567"


def write_tiny(kind: str, folder: Path, spec: str = "embedded-short") -> Path:
    """Save a random model of the family `kind` (a key of FAMILIES) in bfloat16 and the tokenizer of `spec`."""
    tokenizer = load_tokenizer(spec)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **SIZES | special | FAMILIES[kind])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_cached(kind: str, repo: str, cache: Path, spec: str = "embedded-short") -> Path:
    """The same as the Hub id `repo` in a cache folder (HF_HUB_CACHE), as a download would leave it; its snapshot."""
    home = cache / f"models--{repo.replace('/', '--')}"
    for name in ("refs", "blobs"):
        (home / name).mkdir(parents=True)
    (home / "refs" / "main").write_text(REVISION)
    snapshot = write_tiny(kind, home / "snapshots" / REVISION, spec)
    for file in list(snapshot.iterdir()):  # a snapshot holds links only
        blob = home / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        file.symlink_to(Path("../../blobs") / blob.name)
    return snapshot


if __name__ == "__main__":
    kind, where, *repo = sys.argv[1:]
    write_cached(kind, repo[0], Path(where)) if repo else write_tiny(kind, Path(where))
