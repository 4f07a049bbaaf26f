"""A stand-in: a folder with a published shape, random weights and the embedded tokenizer, for speed and memory only.

    python -m tools.stand_in llama-2-7b FOLDER [--bits 4] [--small]

Weights of 7B models cannot be shipped with a course; their shapes can, and memory and time depend on shapes. Its text
means nothing, and no claim of quality applies to it (`common.course.claims`). The vocabulary is the tokenizer's, so
the embedding is larger than the published one. All blocks hold the same numbers: drawing 7 billion takes minutes.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.course import artifacts
from common.course.assets import SHAPES, load_tokenizer

GROUP_SIZE = 128  # of the 4-bit kind
STEP = 0.0043  # a uniform code in 0…15 times this spreads like Llama's initial weights


def shrunk(config):
    """Much the same ratios, a sixteenth of the width and a quarter of the depth: to try on a CPU what a 7B will do."""
    config = copy.deepcopy(config)
    width, shared = config.hidden_size // 16, config.num_attention_heads // config.num_key_value_heads
    heads = config.num_attention_heads // 8
    config.update(
        {
            "hidden_size": width,
            "intermediate_size": -(-config.intermediate_size // (16 * 64)) * 64,
            "num_hidden_layers": -(-config.num_hidden_layers // 4),
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // shared),
            "head_dim": width // heads,
        }
    )
    return config


def make_stand_in(
    shape: str, folder: Path, bits: int = 16, device: str = "cpu", small: bool = False
) -> artifacts.Artifact:
    """Save the stand-in of `shape` (of `assets.SHAPES`), drawn on `device`: bfloat16, or 4 bits in AWQ's format.

    small: of its `shrunk` shape.
    """
    if shape not in SHAPES or bits not in (4, 16):
        raise ValueError(f"A stand-in has 4 or 16 bits and one of the shapes {', '.join(SHAPES)}.")
    tokenizer, published = load_tokenizer("embedded"), shrunk(SHAPES[shape]) if small else SHAPES[shape]
    config = copy.deepcopy(published)
    config.update({"vocab_size": len(tokenizer), "dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]})
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    if bits == 4:
        method = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True}
        config.quantization_config = method
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(published).named_parameters()}

    def write(path: Path) -> None:
        config.save_pretrained(path)
        tokenizer.save_pretrained(path)
        _write_weights(path, shapes, config, bits, device)

    size = sum(shape.numel() for shape in shapes.values()) * bits // 8
    settings = {"shape": shape, "bits": bits}
    return artifacts.save(folder, write, method="stand-in", settings=settings, parent="", expected_bytes=size)


def _write_weights(path: Path, shapes: dict, config, bits: int, device: str) -> None:
    """One file per block and one for the rest, with the index that `from_pretrained` reads."""
    generator = torch.Generator(device).manual_seed(0)
    block, rest, files = {}, {}, {}
    for name, shape in shapes.items():
        if ".layers." not in name:
            vocabulary = "embed_tokens" in name or "lm_head" in name
            rest[name] = _dense((config.vocab_size, shape[1]) if vocabulary else shape, config, generator)
        elif ".layers.0." in name:
            linear = bits == 4 and len(shape) == 2
            block |= _packed(name, shape, generator) if linear else {name: _dense(shape, config, generator)}
    for index in range(config.num_hidden_layers):
        tensors = {name.replace(".layers.0.", f".layers.{index}."): tensor for name, tensor in block.items()}
        files |= _save(path / f"model-{index:03}.safetensors", tensors)
    files |= _save(path / "model-rest.safetensors", rest)
    index = {"metadata": {}, "weight_map": files}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _save(file: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    save_file(tensors, file, metadata={"format": "pt"})
    return dict.fromkeys(tensors, file.name)


def _dense(shape, config, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:  # a norm
        return torch.ones(shape, dtype=torch.bfloat16)
    drawn = torch.randn(shape, generator=generator, device=generator.device) * config.initializer_range
    return drawn.to("cpu", torch.bfloat16)


def _packed(name: str, shape, generator: torch.Generator) -> dict[str, Tensor]:
    """Random codes of a linear layer [out, in] in AWQ's packing (`common.formats.awq`), zero point 8."""
    (outputs, inputs), layer = shape, name.removesuffix(".weight")
    limits = torch.iinfo(torch.int32)
    words = torch.randint(
        limits.min, limits.max, (inputs, outputs // 8), generator=generator, device=generator.device, dtype=torch.int64
    )
    eights = torch.full((inputs // GROUP_SIZE, outputs // 8), 0x88888888 - 2**32, dtype=torch.int32)
    scales = torch.full((inputs // GROUP_SIZE, outputs), STEP, dtype=torch.float16)
    return {f"{layer}.qweight": words.to("cpu", torch.int32), f"{layer}.qzeros": eights, f"{layer}.scales": scales}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make a folder with a published shape and random weights.")
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, default=16, choices=[4, 16])
    parser.add_argument("--small", action="store_true", help="a sixteenth of the width, a quarter of the depth")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = make_stand_in(options.shape, options.folder, options.bits, device, options.small)
    print(f"{options.folder}: {made.weight_bytes / 1e9:.2f} GB of random weights in the shape of {options.shape}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
