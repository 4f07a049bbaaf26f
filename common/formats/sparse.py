"""A checkpoint that is smaller for its zeros: one bit per weight says where, then the values that are left.

A weight matrix of n numbers of b bits, d of them dense, takes d·b + n bits, against n·b dense; at 16 bits and 50 %
that is 9/16. Compressed sparse rows (CSR) spend a column index per value instead: 32 bits for each value of 16.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from common.course import artifacts, checkpoint
from common.course.artifacts import Artifact
from common.methods.blocks import iter_linears
from common.methods.experts import Matrix

WEIGHTS = "sparse.safetensors"  # not model.safetensors: others would load it without its linear layers


def pack(weight: Tensor) -> dict[str, Tensor]:
    """bitmask uint8 [⌈n/8⌉] (bit i of byte j: weight 8j+i is not zero), values [nonzeros], shape int64 [dimensions].

    Worked out where the weight is; what is returned is on the CPU.
    """
    flat = weight.detach().flatten()
    kept = flat != 0
    places = F.pad(kept, (0, -len(kept) % 8)).view(-1, 8).byte() << torch.arange(8, device=flat.device).byte()
    bitmask = places.sum(1, dtype=torch.uint8)
    return {"bitmask": bitmask.cpu(), "values": flat[kept].cpu(), "shape": torch.tensor(weight.shape)}


def unpack(packed: dict[str, Tensor], device: torch.device | str = "cpu") -> Tensor:
    """The dense weight that `pack` was given. ValueError when bitmask and values do not belong together."""
    size = packed["shape"].prod().item()
    bitmask, values = packed["bitmask"].to(device), packed["values"].to(device)
    bits = bitmask[:, None] >> torch.arange(8, device=device).byte() & 1
    kept = bits.flatten()[:size].bool()
    if kept.sum() != len(values):
        raise ValueError(f"Damaged sparse weight: {kept.sum()} bits set, {len(values)} values.")
    return (
        torch.zeros(size, dtype=values.dtype, device=device)
        .masked_scatter_(kept, values)
        .view(*packed["shape"].tolist())
    )


def packed_bytes(weight: Tensor) -> int:
    """Size of `pack(weight)` in a file, in bytes."""
    return -(-weight.numel() // 8) + (weight != 0).sum().item() * weight.element_size() + 8 * weight.dim()


def csr_bytes(weight: Tensor) -> int:
    """Size of the same weight as CSR with 32-bit indices, in bytes."""
    values = (weight != 0).sum().item()
    return values * (weight.element_size() + 4) + 4 * (len(weight) + 1)


def _stored(linear: nn.Linear | Matrix) -> Tensor:
    """The parameter that holds a matrix: one of its own, or that of all experts."""
    return getattr(linear.owner, linear.parameter) if isinstance(linear, Matrix) else linear.weight


def save_sparse(
    folder: Path,
    model: nn.Module,
    tokenizer,
    *,
    method: str,
    settings: dict,
    parent: str,
    device: torch.device | str | None = None,
) -> Artifact:
    """Save a pruned model: the matrices of the decoder blocks packed, fused experts too, everything else as it is.

    device: where a matrix is packed (default: where it is).
    """
    # `iter_linears` refuses quantized weights: their zeros are codes.
    matrices = {_stored(linear).data_ptr() for _, linear in iter_linears(model)}
    tensors = {}
    for name, tensor in checkpoint.tensors_once(model).items():
        if tensor.data_ptr() in matrices and tensor.dim() > 1:
            tensors |= {f"{name}.{part}": value for part, value in pack(tensor.to(device or tensor.device)).items()}
        else:
            tensors[name] = tensor.cpu().contiguous()

    def write(path: Path) -> None:
        save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
        checkpoint.save_settings(path, model)
        tokenizer.save_pretrained(path)

    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return artifacts.save(folder, write, method=method, settings=settings, parent=parent, expected_bytes=size)


def load_sparse(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """The model that `save_sparse` saved, on the CPU, in evaluation mode. Dense in memory, where zeros take space.

    device: where a matrix is unpacked.
    """
    if not (folder / WEIGHTS).exists():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}: load_sparse reads what save_sparse wrote.")
    config = AutoConfig.from_pretrained(folder)
    state: dict[str, Tensor] = {}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open has no iterator
            weight, _, part = name.rpartition(".")
            if part == "bitmask":
                packed = {key: file.get_tensor(f"{weight}.{key}") for key in ("bitmask", "values", "shape")}
                state[weight] = unpack(packed, device).to(dtype).cpu()
            elif part not in ("values", "shape"):
                state[name] = file.get_tensor(name).to(dtype)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    options = {"config": config, "state_dict": state, "dtype": dtype, "output_loading_info": True}
    model, info = model_class.from_pretrained(None, **options)
    checkpoint.whole(model, info, str(folder))
    checkpoint.generate_as_stored(model, folder)
    return checkpoint.tie_as_stored(model).eval()
