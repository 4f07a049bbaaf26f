"""Perplexity of a GPTQ v1 checkpoint as auto-gptq 0.7.1 reads it. Runs in `.venv-interop`: nothing of `common` here.

    .venv-interop/bin/python benchmarks/auto_gptq_reader.py CHECKPOINT WINDOWS.pt

Prints one line of JSON. The two checks in it are what a student trips over; see 版本相容性.md.
"""

import json
import sys

import torch
from auto_gptq import AutoGPTQForCausalLM
from safetensors.torch import load_file
from torch.nn import functional as F


def load(folder: str) -> torch.nn.Module:
    model = AutoGPTQForCausalLM.from_quantized(folder, device="cpu", use_safetensors=True, torch_dtype=torch.float32)
    model = model.model
    # transformers loads nothing here (auto-gptq fills the model itself), and auto-gptq ties the output head to the
    # embedding only after it has loaded: both stay at zero, and every token is as likely as any other.
    embedding = load_file(f"{folder}/model.safetensors")["model.embed_tokens.weight"].float()
    before = float(model.get_input_embeddings().weight.abs().sum())
    model.get_input_embeddings().weight.data = embedding
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    model.untouched = before
    return model.float().eval()


@torch.no_grad()
def main() -> None:
    folder, windows = sys.argv[1], torch.load(sys.argv[2], weights_only=True)
    model = load(folder)
    losses = [F.cross_entropy(model(ids[None]).logits[0, :-1].float(), ids[1:]) for ids in windows]
    kernel = type(model.model.layers[0].self_attn.q_proj)
    result = {
        "perplexity": torch.stack(losses).double().mean().exp().item(),
        "kernel": kernel.__module__,
        "embedding before it was copied in": model.untouched,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
