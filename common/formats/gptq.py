"""The GPTQ v1 checkpoint format: what AutoGPTQ wrote and what GPTQModel, transformers and (if symmetric) vLLM load.

Per linear layer [out, in]:
    qweight int32 [in · bits / 32, out]   codes, packed along the inputs, lowest bits first
    qzeros  int32 [groups, out · bits / 32]   zero points minus 1, packed along the outputs
    scales  float16 [groups, out]
    g_idx   int32 [in]   group of each input
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

from common.course import artifacts
from common.methods.quantization import QuantizeConfig, QuantizedWeight

WORD = 32


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack integers [n, columns] in [0, 2**bits) along dim 0 into int32 [n · bits / 32, columns].

    The codes form one stream of bits, lowest first, cut into 32-bit words; n must be a multiple of 32.
    """
    n, columns = codes.shape
    if n % WORD:
        raise ValueError(f"The GPTQ format packs layer sizes that are multiples of {WORD}, got {n}.")
    codes = codes.to(torch.int64).reshape(n // WORD, WORD, columns)  # 32 codes fill exactly `bits` words
    words = codes.new_zeros(n // WORD, bits, columns)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        words[:, word] |= codes[:, i] << shift
        if shift + bits > WORD:  # only 3-bit codes straddle two words
            words[:, word + 1] |= codes[:, i] >> (WORD - shift)
    return words.view(-1, columns).to(torch.int32)  # keeps the low 32 bits; bit 31 becomes the sign


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_rows`: uint8 [n, columns]."""
    words = packed.to(torch.int64) & 0xFFFFFFFF
    words = words.reshape(-1, bits, packed.shape[1])
    codes = []
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        code = words[:, word] >> shift
        if shift + bits > WORD:
            code = code | words[:, word + 1] << (WORD - shift)
        codes.append((code & (2**bits - 1)).to(torch.uint8))
    return torch.stack(codes, dim=1).view(-1, packed.shape[1])


def pack_linear(weight: QuantizedWeight) -> dict[str, Tensor]:
    """One layer's four tensors."""
    bits, in_features = weight.config.bits, weight.codes.shape[1]
    return {
        "qweight": pack_rows(weight.codes.T, bits),
        "qzeros": pack_rows(weight.zero.int() - 1, bits).T.contiguous(),
        "scales": weight.scale.T.contiguous(),
        "g_idx": torch.arange(in_features, dtype=torch.int32) // weight.config.group_size,
    }


def unpack_linear(tensors: dict[str, Tensor], bits: int) -> Tensor:
    """The float32 matrix [out, in] that a layer's four tensors stand for."""
    codes = unpack_rows(tensors["qweight"], bits).float()  # [in, out]
    zeros = unpack_rows(tensors["qzeros"].T.contiguous(), bits).T.float() + 1  # [groups, out]
    scales, group = tensors["scales"].float(), tensors["g_idx"].long()
    return ((codes - zeros[group]) * scales[group]).T


def save_gptq(
    folder: Path, model: nn.Module, tokenizer, quantized: dict[str, QuantizedWeight], *, method: str, parent: str
) -> artifacts.Artifact:
    """Save `model` with the layers named in `quantized` packed, everything else in 16 bits.

    A model that computes in float32, since the CPU cannot do otherwise, still came from 16-bit weights.
    """
    config = next(iter(quantized.values())).config
    tied = set(model._tied_weights_keys or []) if model.config.tie_word_embeddings else set()
    tensors = {}
    for name, value in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in quantized:
            tensors |= {f"{layer}.{key}": tensor.cpu() for key, tensor in pack_linear(quantized[layer]).items()}
        elif name not in tied:  # a tied output head is the embedding: written once
            tensors[name] = value.to(torch.bfloat16 if value.dtype == torch.float32 else value.dtype).contiguous().cpu()

    def write(path: Path) -> None:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(path)
        model.generation_config.save_pretrained(path)
        tokenizer.save_pretrained(path)
        _add_quantization_config(path / "config.json", config, method)

    size = sum(tensor.nbytes for tensor in tensors.values())
    settings = config.as_dict()
    return artifacts.save(folder, write, method=method, settings=settings, parent=parent, expected_bytes=size)


def _add_quantization_config(file: Path, config: QuantizeConfig, method: str) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    content["quantization_config"] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "sym": config.sym,
        # Act-order decided the order of work only: every group still covers consecutive inputs, which is what
        # readers of this flag want to know (their kernels need no reordering).
        "desc_act": False,
        "damp_percent": config.damp_percent,
        "lm_head": False,
        # GPTQModel reads an asymmetric v1 file only when its writer is known to keep zero points above 0, as
        # GPTQModel has done since 0.9.0 and `find_grid` does too. Naming that version is how a file says so.
        "meta": {"quantizer": [f"03-model-compression-{method}:0.1.0", "gptqmodel:0.9.0"]},
    }
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    # auto-gptq looks for the same under this name.
    own = json.dumps(content["quantization_config"], indent=2) + "\n"
    file.with_name("quantize_config.json").write_text(own, encoding="utf-8")


def load_dequantized(folder: Path, dtype: torch.dtype) -> nn.Module:
    """A checkpoint in GPTQ v1 format as an ordinary dense model, its packed layers unpacked to `dtype`.

    For measuring quality: it computes with the stored numbers, rounded once to `dtype`, on any device, at the
    original's speed.
    """
    config = AutoConfig.from_pretrained(folder)
    bits = config.quantization_config["bits"]
    del config.quantization_config
    state, packed = {}, {}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open has no iterator
            layer, key = name.rsplit(".", 1)
            if key in ("qweight", "qzeros", "scales", "g_idx"):
                packed.setdefault(layer, {})[key] = file.get_tensor(name)
            else:
                state[name] = file.get_tensor(name).to(dtype)
    for layer, tensors in packed.items():
        state[f"{layer}.weight"] = unpack_linear(tensors, bits).to(dtype)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()


def save_dense(source: artifacts.Artifact, target: Path, dtype: torch.dtype) -> artifacts.Artifact:
    """Save a checkpoint in GPTQ v1 format unpacked to `dtype`, for engines that have no 4-bit kernel here."""

    def write(path: Path) -> None:
        load_dequantized(source.folder, dtype).save_pretrained(path)
        AutoTokenizer.from_pretrained(source.folder).save_pretrained(path)

    settings = source.settings | {"dtype": str(dtype).removeprefix("torch.")}
    return artifacts.save(target, write, method="dense", settings=settings, parent=source.name)
