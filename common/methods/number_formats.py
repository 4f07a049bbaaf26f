"""Number formats of 4 and 8 bits: their grids, their scales for blocks, RTN and GPTQ on them.

A minifloat of e exponent and m mantissa bits has 2^m values between two powers of two: fine near zero, coarse far from
it. FP8 E4M3 (arXiv:2209.05433) reaches 448. E2M1 has 0, ±0.5, 1, 1.5, 2, 3, 4, 6 only and lives on the scales of small
blocks: MXFP4's are powers of two (arXiv:2310.10537), NVFP4's are E4M3 numbers times one float32 number a tensor.
With one exponent bit every step is alike: that is a symmetric integer, so INT8 and INT4 are E1M6 and E1M2.
Rounding is simulated: what is computed is what such a kernel would compute, up to the order of its sums.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from common.methods.blocks import iter_linears, walk
from common.methods.compensation import Hessian, compensate, inverse_cholesky, naming
from common.methods.requirements import require_needs
from common.methods.stages import Stage

TINY = 2.0**-100  # in place of a scale of zero


@dataclass(frozen=True)
class Format:
    """A minifloat (exponent bits, mantissa bits, largest value), with one scale for `block` numbers in a row."""

    name: str
    exponent: int
    mantissa: int
    largest: float
    block: int  # -1: a scale for all numbers of a row
    scales: str  # "float32", "float16", "power of two", or "e4m3" times a float32 number for the tensor

    def nearest(self, values: Tensor) -> Tensor:
        """The nearest values of the unscaled format, halves to the even one; larger ones become the largest. float32"""
        power = (values.view(torch.int32) & 0x7F800000).view(torch.float32)  # of two below each number: its exponent
        step = power.clamp(min=2.0 ** (2 - 2 ** (self.exponent - 1))) * 2.0**-self.mantissa  # below it spacing stays
        return ((values / step).round() * step).clamp(-self.largest, self.largest)

    def width(self, n: int) -> int:
        """How many of n numbers in a row share a scale; ValueError where blocks do not divide them."""
        if self.block == -1:
            return n
        if n % self.block:
            raise ValueError(f"{self.name} has blocks of {self.block}; they do not divide {n} inputs.")
        return self.block

    def scale(self, values: Tensor) -> Tensor:
        """The scale of every block of `values` [..., n], float32 [..., n / block]. ValueError where it does not fit."""
        width = self.width(values.shape[-1])
        peak = values.float().unflatten(-1, (-1, width)).abs().amax(-1)
        if self.scales == "power of two":  # as the OCP's standard says: what lies above the largest value is clipped
            top = torch.frexp(torch.tensor(self.largest)).exponent
            return torch.ldexp(torch.ones_like(peak), torch.frexp(peak).exponent - top.item()).clamp(min=TINY)
        if self.scales == "e4m3":
            whole = (peak.amax() / (self.largest * FP8.largest)).clamp(min=TINY)
            return (FP8.nearest(peak / self.largest / whole) * whole).clamp(min=TINY)
        scale = peak / self.largest
        return (scale.half().float() if self.scales == "float16" else scale).clamp(min=TINY)

    def round(self, values: Tensor) -> Tensor:
        """`values` [..., n] on the scaled grid, in their own dtype: round to nearest."""
        scale = self.scale(values)[..., None]
        blocks = values.float().unflatten(-1, (scale.shape[-2], -1))
        return (self.nearest(blocks / scale) * scale).flatten(-2).to(values.dtype)

    @property
    def bits(self) -> float:
        """Bits per number; one scale a row or tensor is not counted."""
        scale = {"float32": 32, "float16": 16, "power of two": 8, "e4m3": 8}[self.scales]
        return 1 + self.exponent + self.mantissa + (scale / self.block if self.block > 0 else 0)

    def grid(self) -> Tensor:
        """All values without a scale, in order."""
        steps = torch.arange(2**self.mantissa) / 2**self.mantissa
        least = 2 - 2 ** (self.exponent - 1)
        values = [steps * 2.0**least]
        values += [(1 + steps) * 2.0 ** (least + power) for power in range(2**self.exponent - 1)]
        positive = torch.cat(values)
        positive = positive[positive <= self.largest]
        return torch.cat((-positive.flip(0)[:-1], positive))


INT8 = Format("INT8", 1, 6, 127 / 32, -1, "float32")  # -127 to 127, in steps of 1/32
INT4 = Format("INT4", 1, 2, 3.5, 32, "float16")  # -7 to 7, in steps of 1/2
FP8 = Format("FP8 E4M3", 4, 3, 448.0, -1, "float32")
MXFP4 = Format("MXFP4", 2, 1, 6.0, 32, "power of two")
NVFP4 = Format("NVFP4", 2, 1, 6.0, 16, "e4m3")
FORMATS = (INT8, FP8, INT4, MXFP4, NVFP4)


@cache  # one function per format: a recording on the GPU belongs to a function
def _rounding(form: Format) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda column, scale: form.nearest(column / scale) * scale


def gptq_on(weight: Tensor, hessian: Tensor, form: Format, damp_percent: float = 0.01) -> Tensor:
    """GPTQ's column loop on another grid, by descending activations: the rounded float32 matrix [out, in].

    The scales are those of `form.round`, of the original weights.
    """
    order = torch.argsort(hessian.diagonal(), descending=True)
    scale = form.scale(weight)
    along = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1).T[order].contiguous()
    factor = inverse_cholesky(hessian[order][:, order], damp_percent)
    columns = compensate(weight.float().T[order], factor, _rounding(form), along)
    return columns.T[:, torch.argsort(order)].contiguous()


@torch.no_grad()
def rtn_on_model(model: nn.Module, form: Format, device: str | torch.device | None = None) -> None:
    """Round every linear layer of the decoder blocks to `form`, in place, one at a time on `device` (default: its own).

    Raises ValueError, before the first change, where the format's blocks do not divide a layer's inputs.
    """
    require_needs(model, "weights")
    for _, linear in iter_linears(model):
        form.width(linear.in_features)
    for _, linear in iter_linears(model):
        linear.weight.copy_(form.round(linear.weight.to(device)))


def gptq_on_model(model: nn.Module, windows: Tensor, form: Format, **walk_options) -> None:
    """`gptq_on` for every linear layer of the decoder blocks, in place; options go to `common.methods.blocks.walk`."""

    def change(stage: Stage, statistic: Hessian) -> None:
        for name, linear in stage.named.items():  # one by one: NVFP4 has a scale per matrix
            with naming([name]):
                linear.weight.copy_(gptq_on(linear.weight, statistic.matrix, form))

    walk(model, windows, Hessian, change, **{"description": f"gptq {form.name}"} | walk_options)


def round_inputs(model: nn.Module, form: Format) -> None:
    """From now on every linear layer of the decoder blocks rounds its inputs to `form`: W4A16 becomes W4A4."""
    require_needs(model, "rounded activations")
    for _, linear in iter_linears(model):
        linear.register_forward_pre_hook(lambda _, args: (form.round(args[0]), *args[1:]))
