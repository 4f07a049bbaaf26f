"""A linear layer whose product a GPU computes in FP8 E4M3: one scale for each token, and one for each output.

Such tensor cores exist since Ada and Hopper (compute capability 8.9). On a CPU PyTorch computes the same, slowly.
What `number_formats.FP8` simulates is this product, up to the order of its sums.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.methods.number_formats import FP8

CAPABILITY = 8, 9  # the first with FP8 tensor cores


def fp8_cores(device: torch.device) -> bool:
    """Whether this device multiplies FP8 numbers itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY


def to_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn [n, in] and scales float32 [n, 1] of the rows of `values` [n, in]."""
    scale = FP8.scale(values)
    return (values.float() / scale).clamp(-FP8.largest, FP8.largest).to(torch.float8_e4m3fn), scale


def fp8_product(inputs: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """x Wᵀ [tokens, out] in `dtype`, of both as `to_fp8` gives them. Both dimensions of W must be multiples of 16."""
    (x, x_scale), (w, w_scale) = inputs, weight
    row = F.ScalingType.RowWise
    return F.scaled_mm(x, w.T, x_scale, row, w_scale.T, row, output_dtype=dtype)


class Fp8Linear(nn.Module):
    """x Wᵀ of a weight [out, in] in FP8: the inputs [tokens, in] are rounded whenever it is called."""

    def __init__(self, weight: Tensor):
        super().__init__()
        codes, scale = to_fp8(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return fp8_product(to_fp8(x), (self.codes, self.scale), x.dtype)
