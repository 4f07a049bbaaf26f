"""The GPTQ v1 checkpoint format: what AutoGPTQ wrote and what GPTQModel, transformers and (if symmetric) vLLM load.

Per linear layer [out, in]:
    qweight int32 [in · bits / 32, out]   codes, packed along the inputs, lowest bits first
    qzeros  int32 [groups, out · bits / 32]   zero points minus 1, packed along the outputs
    scales  float16 [groups, out]
    g_idx   int32 [in]   group of each input
"""

import json
import statistics
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

from common.course import artifacts, checkpoint
from common.formats import awq
from common.formats.packing import WORD, pack_rows, unpack_rows
from common.methods.blocks import iter_linears
from common.methods.experts import Matrix
from common.methods.quantization import QuantizeConfig, QuantizedWeight
from common.methods.requirements import require_needs

BITS = (2, 3, 4, 8)  # that readers of the format know
KEYS = ("qweight", "qzeros", "scales", "g_idx")
OFFSET = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format → what a stored zero point lacks


def check_packable(model: nn.Module, layers: Iterable[str] | None = None) -> None:
    """Raise ValueError that names the layers which the format cannot hold: fused experts, and sizes that do not pack.

    layers: names of decoder layers, by default all. Call it before the work; `save_gptq` would refuse after it.
    """
    linears = dict(iter_linears(model))
    linears = linears if layers is None else {name: linears[name] for name in layers}
    if any(isinstance(linear, Matrix) for linear in linears.values()):
        require_needs(model, "layer files")
    odd = [
        f"{name} [{linear.out_features}, {linear.in_features}]"
        for name, linear in linears.items()
        if linear.out_features % WORD or linear.in_features % WORD
    ]
    if odd:
        raise ValueError(
            f"The GPTQ format packs layers whose inputs and outputs are multiples of {WORD}; this model has "
            f"{checkpoint.some(odd)}. Quantize it without saving in this format, or leave these layers out."
        )


def pack_linear(weight: QuantizedWeight) -> dict[str, Tensor]:
    """One layer's four tensors. Raises ValueError for bits that readers of the format do not know."""
    bits, (in_features, groups) = weight.config.bits, (weight.codes.shape[1], weight.scale.shape[1])
    if bits not in BITS:
        raise ValueError(f"The GPTQ format holds 2, 3, 4 or 8 bits, got {bits}. Quantize to one of these to save it.")
    return {
        "qweight": pack_rows(weight.codes.T, bits),
        "qzeros": pack_rows(weight.zero.int() - 1, bits).T.contiguous(),
        "scales": weight.scale.T.contiguous(),
        "g_idx": torch.arange(in_features, dtype=torch.int32) // (in_features // groups),
    }


def unpack_codes(tensors: dict[str, Tensor], bits: int, group_size: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's codes [in, out], zero points as they are stored [groups, out] and the group of each input [in].

    group_size is asked where the layer has no g_idx; -1 is one group a row. Raises ValueError for a g_idx that names
    groups which are not there.
    """
    codes = unpack_rows(tensors["qweight"], bits)
    zeros = unpack_rows(tensors["qzeros"].T.contiguous(), bits).T
    groups = len(tensors["scales"])
    if "g_idx" in tensors:
        group = tensors["g_idx"].long()
    else:
        group = torch.arange(len(codes), device=codes.device) // (group_size if group_size > 0 else len(codes))
    if group.min() < 0 or group.max() >= groups:
        raise ValueError(
            f"g_idx names the groups {group.min()} to {group.max()}, and there are scales for {groups}: the file is "
            "damaged, or its group_size is another than its config says."
        )
    return codes, zeros, group


def unpack_linear(tensors: dict[str, Tensor], bits: int, offset: int = 1, group_size: int = 0) -> Tensor:
    """The float32 matrix [out, in] that a layer's four tensors stand for; offset: see `OFFSET`."""
    codes, zeros, group = unpack_codes(tensors, bits, group_size)
    zeros, scales = zeros.float() + offset, tensors["scales"].float()
    return ((codes.float() - zeros[group]) * scales[group]).T


def stored_bits(tensors: dict[str, Tensor], bits: int) -> int:
    """Bits of a layer by its shapes, since files can mix them; `bits` where there is no g_idx to tell."""
    return WORD * len(tensors["qweight"]) // len(tensors["g_idx"]) if "g_idx" in tensors else bits


def zero_offset(layers: Iterable[dict[str, Tensor]], bits: int, group_size: int = 0) -> float | None:
    """How far the codes' mean lies above the stored zero points: about 1 in v1, 0 in v2. The median over `layers`.

    A trained matrix has a mean of nearly zero: that is what tells where its zero point is. None where its codes are
    too many (8 bits) or its weights too few to tell a difference of one.
    """
    offsets, variance, count = [], 0.0, 0
    for tensors in layers:
        width = stored_bits(tensors, bits)
        if width > 4:
            continue
        codes, zeros, group = unpack_codes(tensors, width, group_size)
        difference = codes.float() - zeros.float()[group]
        offsets.append(difference.mean().item())
        variance, count = max(variance, difference.var().item()), count + difference.numel()
    if not offsets or (variance / count) ** 0.5 > 0.1:
        return None
    return statistics.median(offsets)


def save_gptq(
    folder: Path,
    model: nn.Module,
    tokenizer,
    quantized: dict[str, QuantizedWeight],
    *,
    method: str,
    parent: str,
    device: torch.device | str | None = None,
) -> artifacts.Artifact:
    """Save `model` with the layers named in `quantized` packed, everything else in 16 bits.

    device: where a layer is packed (default: where its codes are).
    An embedding may be among them, after the layers: `load_dequantized` reads it, engines want it in 16 bits. A
    model that computes in float32, since the CPU cannot do otherwise, still came from 16-bit weights.
    Raises what `check_packable` raises.
    """
    embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    check_packable(model, [name for name in quantized if name not in embeddings])
    config = next(iter(quantized.values())).config
    tensors = {}
    for name, value in checkpoint.tensors_once(model).items():
        layer = name.removesuffix(".weight")
        if layer in quantized:
            codes = quantized[layer].to(device or quantized[layer].codes.device)
            tensors |= {f"{layer}.{key}": tensor.cpu() for key, tensor in pack_linear(codes).items()}
        else:
            tensors[name] = value.to(torch.bfloat16 if value.dtype == torch.float32 else value.dtype).contiguous().cpu()

    def write(path: Path) -> None:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        checkpoint.save_settings(path, model)
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


def load_dequantized(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """A checkpoint in GPTQ's (v1, v2) or AWQ's format, or a dense one, as an ordinary model in `dtype`, on the CPU.

    device: where a layer is unpacked.
    For measuring quality: it computes with the stored numbers, rounded once to `dtype`, on any device, at the
    original's speed. Raises ValueError for other formats, and where files or tensors are missing or damaged.
    """
    folder = Path(folder)
    config = AutoConfig.from_pretrained(folder)
    settings = quantization_settings(folder)
    method = settings.get("quant_method")
    if method not in (None, "gptq", "awq"):
        raise ValueError(
            f"{folder} holds weights in the format {method!r}; load_dequantized reads gptq, awq and dense folders. "
            "Load it with AutoModelForCausalLM.from_pretrained, which runs that format's own kernels."
        )
    packed, state = packed_layers(folder)
    if packed and method is None:
        raise ValueError(
            f"{folder} holds packed layers and its config.json has no quantization_config to read them by."
        )
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    unpack = _gptq_reader(folder, packed, settings) if method == "gptq" else awq.unpack_linear
    for layer, tensors in packed.items():
        try:
            there = {key: tensor.to(device) for key, tensor in tensors.items()}
            state[f"{layer}.weight"] = unpack(there).to(dtype).cpu()
        except (KeyError, RuntimeError, ValueError, IndexError) as error:
            raise ValueError(f"{folder}: layer {layer} cannot be unpacked: {error}") from error
    config.__dict__.pop("quantization_config", None)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    options = {"config": config, "state_dict": state, "dtype": dtype, "output_loading_info": True}
    model, info = model_class.from_pretrained(None, **options)
    unexpected = checkpoint.whole(model, info, str(folder))
    if unexpected:
        warnings.warn(f"{folder} holds tensors that are ignored: {checkpoint.some(unexpected)}.", stacklevel=2)
    checkpoint.generate_as_stored(model, folder)
    return checkpoint.tie_as_stored(model).eval()


def quantization_settings(folder: Path) -> dict:
    """What a folder says of its quantization, in config.json or where AutoGPTQ and AutoAWQ once put it; {} if dense."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = content.get("quantization_config")
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if settings is None and (folder / name).exists():
            settings = {"quant_method": method} | json.loads((folder / name).read_text(encoding="utf-8"))
    return settings or {}


def packed_layers(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """A folder's tensors: those of packed layers by layer and key, all others by name."""
    packed, others = {}, {}
    found = checkpoint.stored(folder)
    for name in found:
        layer, _, key = name.rpartition(".")
        target, label = (packed.setdefault(layer, {}), key) if key in KEYS else (others, name)
        target[label] = checkpoint.read_tensor(found, name)
    return packed, others


def _gptq_reader(folder: Path, packed: dict[str, dict[str, Tensor]], settings: dict) -> Callable[[dict], Tensor]:
    """`unpack_linear` with the folder's bits, groups and convention for zero points.

    The convention is what `checkpoint_format` says; where nothing is said, what the zero points themselves say, else
    v1, transformers' default.
    """
    bits, group_size = settings["bits"], settings["group_size"]
    label = settings.get("checkpoint_format") or settings.get("format")
    if label not in (None, *OFFSET):
        raise ValueError(f"{folder} is in the layout {label!r} of GPTQ; load_dequantized reads {' and '.join(OFFSET)}.")
    found = zero_offset(list(packed.values())[:8], bits, group_size)
    if label is None:
        offset = 0 if found is not None and found < 0.5 else 1
    else:
        offset = OFFSET[label]
        if found is not None and abs(found - offset) > 0.5:
            warnings.warn(
                f"{folder} says checkpoint_format {label!r}, but its zero points lie {found - offset:+.1f} steps from "
                "where its weights would be centred: is it mislabelled? `python -m tools.doctor` says more.",
                stacklevel=3,
            )
    return lambda tensors: unpack_linear(tensors, stored_bits(tensors, bits), offset, group_size)


def save_dense(source: artifacts.Artifact, target: Path, dtype: torch.dtype) -> artifacts.Artifact:
    """Save a checkpoint in GPTQ v1 format unpacked to `dtype`, for engines that have no 4-bit kernel here."""

    def write(path: Path) -> None:
        checkpoint.save_model(path, load_dequantized(source.folder, dtype))
        AutoTokenizer.from_pretrained(source.folder).save_pretrained(path)

    settings = source.settings | {"dtype": str(dtype).removeprefix("torch.")}
    return artifacts.save(target, write, method="dense", settings=settings, parent=source.name)
