"""What exercises give to students ready-made, and show no code of, since it is the answer to another exercise."""

from torch import Tensor


def quantized(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """`weight` [out, in] rounded to the grid of each of its groups."""
    w = weight.reshape(len(weight), -1, group_size)
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-7)
    zero = (-low / scale).round()
    return (((w / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale).reshape(weight.shape)


def pruned(weight: Tensor, sparsity: float) -> Tensor:
    """A copy of `weight` with its smallest weights zero."""
    flat = weight.flatten().clone()
    flat[weight.abs().flatten().argsort()[: round(sparsity * len(flat))]] = 0
    return flat.view_as(weight)
