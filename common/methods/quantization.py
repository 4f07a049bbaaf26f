"""Weight-only quantization: round-to-nearest (RTN) and GPTQ on one shared integer grid.

A weight matrix [out_features, in_features] is cut into groups of `group_size` consecutive inputs; each group of
each row has its own scale and zero point, and a weight is stored as an integer code in [0, 2**bits - 1]:

    weight ≈ scale · (code - zero)

Without `mse` RTN and GPTQ use the same grid and differ in one thing only: GPTQ lets the columns that are still to be
quantized absorb the error of those that have been. (Frantar et al., 2023, arXiv:2210.17323.) With it, GPTQ also weighs
the search for each range by the Hessian's diagonal.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from common.methods.blocks import by_statistic, iter_linears, walk
from common.methods.capture import Block
from common.methods.compensation import Hessian, compensate, inverse_cholesky, naming
from common.methods.grid import Grid, clipped_scale, nearest_codes
from common.methods.requirements import require_needs
from common.methods.resume import Resume
from common.methods.stages import Linear, Stage

PARTS = ("codes", "scale", "zero")  # of a QuantizedWeight


@dataclass(frozen=True)
class QuantizeConfig:
    """How to quantize; names as in GPTQModel and transformers.GPTQConfig."""

    bits: int = 4
    group_size: int = 64  # inputs that share a scale and a zero point; -1: all inputs of a row
    sym: bool = False  # symmetric: the zero point is fixed in the middle of the grid
    desc_act: bool = True  # act-order: columns with the largest activations first (groups stay where they are)
    mse: bool = True  # search each group's clipping range; False keeps the extreme values
    damp_percent: float = 0.01  # added to the Hessian's diagonal, as a share of its mean

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {self.bits}.")
        if self.group_size < 1 and self.group_size != -1:
            raise ValueError(f"group_size must be a positive number of inputs, or -1 for a row, got {self.group_size}.")
        if not 0 < self.damp_percent < 1:
            raise ValueError(f"damp_percent must lie between 0 and 1, got {self.damp_percent}.")

    def as_dict(self) -> dict:
        return asdict(self)

    def width(self, in_features: int) -> int:
        """Inputs per group of a layer. Raises ValueError where group_size does not divide its inputs."""
        if self.group_size == -1:
            return in_features
        if in_features % self.group_size:
            divisor = next(g for g in (128, 64, 32, 16, 8, 4, 2, 1) if in_features % g == 0)
            raise ValueError(
                f"group_size {self.group_size} does not divide the {in_features} inputs of a layer; "
                f"choose a divisor such as {divisor}."
            )
        return self.group_size

    def label(self, method: str) -> str:
        """A short name for tables and folders, such as `gptq-w4-g64-asym-mse-act`."""
        groups = "row" if self.group_size == -1 else f"g{self.group_size}"
        parts = [method, f"w{self.bits}", groups, "sym" if self.sym else "asym"]
        parts += ["mse"] * self.mse + ["act"] * (self.desc_act and method == "gptq")
        return "-".join(parts)


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix: codes uint8 [out, in], scale float16 [out, groups], zero uint8 [out, groups]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    config: QuantizeConfig

    @property
    def size_bits(self) -> int:
        """What it takes to store: codes, and a scale of 16 bits and a zero point for every group."""
        return self.codes.numel() * self.config.bits + self.scale.numel() * (16 + self.config.bits)

    def to(self, device: torch.device) -> "QuantizedWeight":
        """The same on another device."""
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device), zero=self.zero.to(device))

    def dequantize(self) -> Tensor:
        """The float32 matrix [out, in] that the codes stand for."""
        per_column = (self.scale.float(), self.zero.float())
        scale, zero = (t.repeat_interleave(self.config.width(self.codes.shape[1]), dim=1) for t in per_column)
        return (self.codes.float() - zero) * scale


def find_grid(weight: Tensor, config: QuantizeConfig, importance: Tensor | None = None) -> Grid:
    """The integer grid of every group of `weight` [out, in].

    With `config.mse` the range of each group is shrunk as long as that lowers its squared error, each input
    weighted by `importance` [in] if given (the Hessian's diagonal: what the error costs at the output).
    """
    out_features, in_features = weight.shape
    width = config.width(in_features)
    groups = in_features // width
    w = weight.float().reshape(out_features, groups, width)
    max_code = 2**config.bits - 1
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    if config.sym:
        scale = 2 * torch.maximum(-low, high) / max_code
        zero = torch.full_like(scale, (max_code + 1) // 2)
    else:
        # The GPTQ v1 format stores zero - 1, so a zero point of 0 cannot be written: leave room for one code below.
        low = torch.minimum(low, -high / (max_code - 1))
        scale = (high - low) / max_code
        zero = (-low / scale.clamp(min=1e-12)).round().clamp(1, max_code)
    scale = scale.clamp(min=1e-7)  # a group of zeros; 1e-7 is a float16 number
    if config.mse:
        cost = torch.ones_like(w[:1]) if importance is None else importance.float().view(1, groups, -1)
        scale = clipped_scale(w, scale, zero, max_code, cost)
    return Grid(scale.squeeze(-1).half().float(), zero.squeeze(-1), max_code)


def _pack(codes: Tensor, grid: Grid, config: QuantizeConfig) -> QuantizedWeight:
    return QuantizedWeight(codes.to(torch.uint8).contiguous(), grid.scale.half(), grid.zero.to(torch.uint8), config)


def rtn(weight: Tensor, config: QuantizeConfig) -> QuantizedWeight:
    """Round every weight [out, in] to the nearest point of its group's grid. Needs no data."""
    grid = find_grid(weight, config)
    group = torch.arange(weight.shape[1], device=weight.device) // config.width(weight.shape[1])
    return _pack(grid.encode(weight.float(), group), grid, config)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    config: QuantizeConfig,
    keep: Tensor | None = None,
    asymmetry: Tensor | None = None,
) -> QuantizedWeight:
    """Quantize `weight` [out, in] column by column, each column's error compensated by the columns after it.

    hessian: [in, in], of the layer's inputs (`Hessian.matrix`). Rows do not influence each other, so layers that
    read the same input may be stacked into one call.
    keep: bool [out, in]; weights where it is False become exactly zero (a pruned model stays pruned).
    asymmetry: [in, in], how the original network's inputs differ from these (`common.methods.gptaq`).
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True) if config.desc_act else torch.arange(len(diagonal))
    order = order.to(weight.device)
    grid = find_grid(weight, config, importance=diagonal)
    factor = inverse_cholesky(hessian[order][:, order], config.damp_percent)
    group = order // config.width(len(order))  # of each column, in that order
    along = [grid.scale[:, group].T.contiguous(), grid.zero[:, group].T.contiguous()]
    along += [] if keep is None else [keep[:, order].T.contiguous()]
    drift = None if asymmetry is None else (asymmetry[order][:, order] @ factor.T).triu(1) @ factor

    columns = compensate(weight.float().T[order], factor, _rounding(grid.max_code), *along, drift=drift)
    codes = grid.encode(columns.T, group)[:, torch.argsort(order)]
    return _pack(codes, grid, config)


@cache  # one function per grid size: a recording on the GPU belongs to a function
def _rounding(max_code: int) -> Callable[..., Tensor]:
    """What GPTQ replaces a column by [out]: the nearest points of its grid, and zero where `keep` is False."""

    def nearest(column: Tensor, scale: Tensor, zero: Tensor, keep: Tensor | None = None) -> Tensor:
        rounded = (nearest_codes(column, scale, zero, max_code) - zero) * scale
        return rounded if keep is None else rounded * keep  # zero is a point of every grid: its code is the zero point

    return nearest


def check_widths(model: nn.Module, config: QuantizeConfig) -> None:
    """Raise ValueError where group_size does not divide a layer's inputs: before minutes of work, not after."""
    for _, linear in iter_linears(model):
        config.width(linear.in_features)


@torch.no_grad()
def rtn_model(
    model: nn.Module, config: QuantizeConfig, *, device: str | torch.device | None = None
) -> dict[str, QuantizedWeight]:
    """RTN for every linear layer of the decoder blocks, in place; returns the quantized weights by layer name.

    device: where a layer is worked on (default: where it is); results stay where the weights live.
    """
    require_needs(model, "weights")
    check_widths(model, config)
    quantized = {}
    for name, linear in iter_linears(model):
        result = rtn(linear.weight.to(device or linear.weight.device), config)
        linear.weight.copy_(result.dequantize().to(linear.weight.dtype))
        quantized[name] = result.to(linear.weight.device)
    return quantized


def gptq_model(
    model: nn.Module,
    windows: Tensor,
    config: QuantizeConfig,
    *,
    keep_zeros: bool = False,
    quantize: Callable[..., QuantizedWeight] = gptq,
    resume: Path | None = None,
    **walk_options,
) -> dict[str, QuantizedWeight]:
    """GPTQ for every linear layer of the decoder blocks, in place; returns the quantized weights by layer name.

    windows: calibration tokens [nsamples, seqlen]. keep_zeros: weights that are zero stay zero, as a pruned model
    wants; otherwise error compensation refills some of them. quantize: `gptq`, or the same shared out among processes
    (`common.parallel`). resume: folder in which finished blocks wait until all are done, so that an interrupted run can
    be taken up where it was (`common.methods.resume`). `walk_options` go to `common.methods.blocks.walk`.
    """
    check_widths(model, config)
    home = model.device  # results stay where the weights live, not where a block is worked on
    quantized = {}

    def change(stage: Stage, statistic: Hessian) -> None:
        results = gptq_linears(stage.named, statistic, config, keep_zeros, quantize)
        quantized.update({name: result.to(home) for name, result in results.items()})

    def put(block: Block, tensors: dict[str, Tensor]) -> None:
        for name, linear in block.linears.items():
            parts = (tensors[f"{name}.{part}"] for part in PARTS)
            done = QuantizedWeight(*parts, config).to(linear.weight.device)
            linear.weight.copy_(done.dequantize())
            quantized[f"{block.path}.{name}"] = done.to(home)

    def take(block: Block) -> dict[str, Tensor]:
        done = {name: quantized[f"{block.path}.{name}"] for name in block.linears}
        return {f"{name}.{part}": getattr(weight, part) for name, weight in done.items() for part in PARTS}

    if resume is None:
        kept = None
    else:
        given = config, keep_zeros, walk_options.get("batch_size")
        kept = Resume(resume, model, windows, given, put, take, walk_options.get("device"))
    walk(model, windows, Hessian, change, resume=kept, description=config.label("gptq"), **walk_options)
    if kept is not None:
        kept.finish()
    return quantized


@torch.no_grad()
def gptq_once(
    model: nn.Module, statistics: dict[str, Hessian], config: QuantizeConfig, *, keep_zeros: bool = False
) -> dict[str, QuantizedWeight]:
    """Like `gptq_model`, with Hessians collected beforehand (`blocks.collect`) and no calibration pass."""
    quantized = {}
    for linears in by_statistic(model, statistics):
        quantized |= gptq_linears(linears, statistics[next(iter(linears))], config, keep_zeros)
    return quantized


def gptq_linears(
    linears: dict[str, Linear], statistic: Hessian, config, keep_zeros, quantize=gptq
) -> dict[str, QuantizedWeight]:
    """GPTQ for layers that read the same input, in place and in one column loop; returns their quantized weights."""
    stacked = torch.cat([linear.weight for linear in linears.values()])
    with naming(linears):
        result = quantize(stacked, statistic.matrix, config, keep=stacked != 0 if keep_zeros else None)
    quantized, start = {}, 0
    for name, linear in linears.items():
        rows = slice(start, start := start + linear.out_features)
        quantized[name] = QuantizedWeight(result.codes[rows], result.scale[rows], result.zero[rows], config)
        linear.weight.copy_(quantized[name].dequantize())
    return quantized
