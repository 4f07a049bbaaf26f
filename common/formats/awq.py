"""The AWQ checkpoint format, as another way to pack the same numbers.

vLLM reads GPTQ files only when they are symmetric, but AWQ files also when they are not. Both formats store codes,
scales and zero points; repacking from one to the other changes no number, whatever method had found them.

Per linear layer [out, in], 4 bits:
    qweight int32 [in, out / 8]   codes, packed along the outputs in the order 0 2 4 6 1 3 5 7, lowest bits first
    qzeros  int32 [groups, out / 8]   zero points, packed likewise
    scales  float16 [groups, out]
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.course import artifacts, checkpoint
from common.formats.packing import pack_outputs, unpack_outputs, unpack_rows


def repack_linear(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One layer's GPTQ v1 tensors as AWQ tensors.

    Raises ValueError where its groups do not cover consecutive inputs (`desc_act` written the old way).
    """
    groups = len(tensors["scales"])
    group = tensors["g_idx"]
    if not torch.equal(group, torch.arange(len(group), dtype=group.dtype) // (len(group) // groups)):
        raise ValueError("AWQ's format has no g_idx: its groups are consecutive inputs. Quantize with static groups.")
    zeros = unpack_rows(tensors["qzeros"].T.contiguous(), bits=4).T + 1  # GPTQ v1 stores them minus 1
    return {
        "qweight": pack_outputs(unpack_rows(tensors["qweight"], bits=4)),
        "qzeros": pack_outputs(zeros.contiguous()),
        "scales": tensors["scales"],
    }


def unpack_linear(tensors: dict[str, Tensor]) -> Tensor:
    """The float32 matrix [out, in] that a layer's three tensors in AWQ's format stand for."""
    codes, zeros = unpack_outputs(tensors["qweight"]), unpack_outputs(tensors["qzeros"])
    group = torch.arange(len(codes), device=codes.device) // (len(codes) // len(zeros))
    return ((codes.float() - zeros.float()[group]) * tensors["scales"].float()[group]).T


def repack_as_awq(source: artifacts.Artifact, target: Path, dtype: torch.dtype = torch.bfloat16) -> artifacts.Artifact:
    """Save the GPTQ v1 checkpoint `source` in AWQ's format, what is not quantized in `dtype` (16 bits).

    Raises ValueError unless it has 4 bits.
    """
    if source.settings["bits"] != 4:
        raise ValueError(f"AWQ's format holds 4 bits, {source.name} has {source.settings['bits']}.")
    packed, tensors = {}, {}
    found = checkpoint.stored(source.folder)
    for name in found:
        layer, _, key = name.rpartition(".")
        if key in ("qweight", "qzeros", "scales", "g_idx"):
            packed.setdefault(layer, {})[key] = checkpoint.read_tensor(found, name)
        else:
            tensors[name] = checkpoint.read_tensor(found, name).to(dtype)
    for layer, parts in packed.items():
        tensors |= {f"{layer}.{key}": value for key, value in repack_linear(parts).items()}

    def write(path: Path) -> None:
        skipped = shutil.ignore_patterns("*.safetensors", artifacts.DESCRIPTION)
        shutil.copytree(source.folder, path, ignore=skipped, dirs_exist_ok=True)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": source.settings["group_size"],
            "zero_point": True,
        }
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    size = sum(tensor.nbytes for tensor in tensors.values())
    return artifacts.save(
        target,
        write,
        method="awq-format",
        settings=source.settings | {"dtype": str(dtype).removeprefix("torch.")},  # of everything that is not quantized
        parent=source.name,
        expected_bytes=size,
    )
