"""A checkpoint's files as they are, damaged ones too: headers of safetensors, tensors of GGUF; no weights yet."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import torch
from safetensors import safe_open

from common.course.checkpoint import INDEX, some, weight_files
from common.formats.gptq import quantization_settings
from common.formats.sparse import WEIGHTS
from tools.doctor.findings import Finding

# Tensors that stand for one weight together: GPTQ and AWQ · compressed-tensors and fp8 · bitsandbytes · torchao · ours.
PARTS = re.compile(
    r"\.(?:(?P<packed>qweight|qzeros|scales|g_idx|SCB)"
    r"|weight_(?:packed|scale|zero_point|shape|g_idx|global_scale|scale_inv)"
    r"|_weight_\w+|weight\..+)$"
)
SCALES = re.compile(r"(?:\.scales|_scale|_scale_inv|\.absmax|\.SCB)$")
AGAIN = "Copy or download it again, or make it again."


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    name: str
    weight: str  # the weight that it is, or is a part of
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: Path

    @property
    def count(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass
class Checkpoint:
    """What lies in a folder, or in a GGUF file."""

    path: Path
    kind: str  # dense, gptq, awq, sparse, gguf, or a quant_method of others
    config: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)  # of its quantization
    tensors: dict[str, Stored] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)  # of reading
    files: list[Path] = field(default_factory=list)

    def read(self, name: str) -> torch.Tensor:
        """A tensor's numbers; those of a GGUF file de-quantized."""
        stored = self.tensors[name]
        if self.kind == "gguf":
            tensor = next(t for t in self.reader.tensors if t.name == name)
            return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        with safe_open(stored.file, framework="pt") as file:
            return file.get_tensor(name)

    def layers(self) -> dict[str, dict[str, str]]:
        """Layers in GPTQ's or AWQ's format: name → key → name of the tensor."""
        found = {}
        for name in self.tensors:
            layer, _, key = name.rpartition(".")
            if key in ("qweight", "qzeros", "scales", "g_idx"):
                found.setdefault(layer, {})[key] = name
        return found


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the folder or GGUF file `path`; FileNotFoundError where there is none."""
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if files and not (path / "config.json").exists():
            path = files[0]
    if path.suffix == ".gguf":
        return _open_gguf(path)
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} is no model: there is no config.json in it, and no .gguf file.")
    return _open_folder(path)


def _open_folder(folder: Path) -> Checkpoint:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = Checkpoint(folder, "dense", config, quantization_settings(folder))
    found.kind = found.settings.get("quant_method", "dense")
    if (folder / WEIGHTS).exists():
        found.kind, files = "sparse", [folder / WEIGHTS]
    else:
        files = _shards(found)
    for file in files:
        _read_header(found, file)
    if found.kind == "dense" and found.layers():
        found.kind = "gptq"
        found.findings.append(
            Finding(
                "no quantization_config",
                "layers are packed (qweight), and neither config.json nor quantize_config.json says how",
                "Take quantization_config from the original repository into config.json.",
            )
        )
    found.files = files
    return found


def _shards(found: Checkpoint) -> list[Path]:
    folder = found.path
    try:
        return weight_files(folder)
    except ValueError as error:
        if not (folder / INDEX).exists():
            found.findings.append(Finding("no weights", str(error), "Save or download the model's .safetensors files."))
            return []
    named = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    missing = sorted(name for name in named if not (folder / name).exists())
    found.findings.append(
        Finding("missing shard", f"{some(missing)} of the {len(named)} files that {INDEX} names", AGAIN)
    )
    return sorted(folder / name for name in named - set(missing))


def _read_header(found: Checkpoint, file: Path) -> None:
    """Take up a safetensors file's tensors as far as they are there."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if 8 + length <= size else None
    except (ValueError, UnicodeDecodeError):
        header = None
    if header is None:
        found.findings.append(Finding("truncated file", f"{file.name} ends within its header, or has none", AGAIN))
        return
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        seen = f"{file.name} has {size:,} bytes, its header describes {end:,}"
        found.findings.append(Finding("truncated file", seen, AGAIN))
        return
    for name, entry in header.items():
        begin, stop = entry["data_offsets"]
        weight = PARTS.sub(".weight", name)
        found.tensors[name] = Stored(name, weight, entry["dtype"], tuple(entry["shape"]), stop - begin, file)


def _open_gguf(file: Path) -> Checkpoint:
    found = Checkpoint(file, "gguf", files=[file])
    try:
        found.reader = gguf.GGUFReader(file)
    except Exception as error:  # the reader has no error of its own: what fails depends on where the file ends
        found.findings.append(Finding("truncated file", f"{file.name} cannot be read to its end ({error})", AGAIN))
        return found
    found.config = {name: value.contents() for name, value in found.reader.fields.items()}
    for tensor in found.reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        stored = Stored(tensor.name, tensor.name, tensor.tensor_type.name, shape, int(tensor.n_bytes), file)
        found.tensors[tensor.name] = stored
    return found
