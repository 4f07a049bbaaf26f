"""Quantization-aware distillation (QAD): a quantized model learns on, from the distributions of the original.

GPTQ minimizes the error of one matrix at a time. Here all of them are trained together against KL(original ‖ model),
and what is trained stays on the grid. Every linear layer keeps a shadow W of its matrix in float32 and computes with

    Ŵ = scale · (clamp(round(W / scale) + zero, 0, max) - zero)

Rounding has slope 0 almost everywhere. The straight-through estimator takes it for 1 inside the grid's range and for 0
outside (Bengio et al., 2013, arXiv:1308.3432); the scales then get LSQ's gradient, round(W / scale) - W / scale inside
the range (Esser et al., 2020, arXiv:1902.08153). Zero points stay. The loss is any of `common.methods.training`.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from common.methods.blocks import iter_linears
from common.methods.quantization import QuantizedWeight
from common.methods.requirements import require_needs

# How much faster the logarithm of a scale moves than a weight: it is of order 1, a weight about a tenth of that.
GAIN_SPEED = 10


def round_through(x: Tensor) -> Tensor:
    """round(x) with slope 1: the straight-through estimator."""
    return x + (x.round() - x).detach()


class FakeQuantize(nn.Module):
    """Turns a shadow matrix [out, in] into the nearest one on a trained grid; a parametrization of `linear.weight`.

    log_gain [out, groups]: by how much each scale has changed, as a logarithm divided by GAIN_SPEED. One learning rate
    then fits weights and scales of every size, and none becomes negative.
    """

    def __init__(self, quantized: QuantizedWeight):
        super().__init__()
        self.config = quantized.config
        self.register_buffer("scale", quantized.scale.float())
        self.register_buffer("zero", quantized.zero.float())
        self.log_gain = nn.Parameter(torch.zeros_like(self.scale))

    def current_scale(self) -> Tensor:
        return self.scale * (GAIN_SPEED * self.log_gain).exp()

    def forward(self, weight: Tensor) -> Tensor:
        scale = self.current_scale()[..., None]
        codes = self._codes(weight, scale)
        return ((codes - self.zero[..., None]) * scale).view_as(weight)

    def _codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        """[out, groups, width], whole numbers that let gradients through."""
        grouped = weight.view(*self.zero.shape, -1)
        return (round_through(grouped / scale) + self.zero[..., None]).clamp(0, 2**self.config.bits - 1)

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> QuantizedWeight:
        """Codes and float16 scales of the shadow matrix, for `common.formats.gptq`."""
        scale = self.current_scale()
        codes = self._codes(weight, scale[..., None]).view_as(weight).to(torch.uint8)
        return QuantizedWeight(codes, scale.half(), self.zero.to(torch.uint8), self.config)


def put_on_grid(linear: nn.Module, weight: QuantizedWeight) -> list[nn.Parameter]:
    """Let a linear layer compute with the grid point nearest to a shadow matrix; returns what is to be trained."""
    fake = FakeQuantize(weight)
    linear.weight = nn.Parameter(weight.dequantize())
    parametrize.register_parametrization(linear, "weight", fake)
    return [linear.parametrizations.weight.original, fake.log_gain]


@torch.no_grad()
def settle_on_grid(linear: nn.Module) -> QuantizedWeight:
    """Make of it a plain linear layer again, whose frozen float32 weight is what the returned codes stand for."""
    quantized = linear.parametrizations.weight[0].quantized(linear.parametrizations.weight.original)
    parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
    linear.weight = nn.Parameter(quantized.dequantize(), requires_grad=False)
    return quantized


def prepare_qad(model: nn.Module, quantized: dict[str, QuantizedWeight]) -> nn.Module:
    """Make the linear layers named in `quantized` (of `gptq_model` or `rtn_model`) trainable on their grid, in place.

    The model computes in float32 what it did with those codes. All other parameters are frozen: what a GPTQ file
    stores in 16 bits stays the original's. Raises ValueError where a name or a shape is not the model's, and for fused
    experts.
    """
    require_needs(model, "training on the grid")
    linears = dict(iter_linears(model))
    for name, weight in quantized.items():
        if name not in linears or linears[name].weight.shape != weight.codes.shape:
            raise ValueError(f"{name} {tuple(weight.codes.shape)} is not a linear layer of this model's blocks.")
    model.float().requires_grad_(False)
    for name, weight in quantized.items():
        put_on_grid(linears[name], weight.to(linears[name].weight.device))
    return model


@torch.no_grad()
def finish_qad(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, QuantizedWeight]:
    """End the training, in place: plain linear layers that hold what their codes stand for; returns those by name.

    Scales are rounded to the float16 of a GPTQ file first, so that the model measured is the one that is saved.
    """
    trained = [(n, linear) for n, linear in iter_linears(model) if parametrize.is_parametrized(linear, "weight")]
    quantized = {name: settle_on_grid(linear) for name, linear in trained}
    for parameter in model.parameters():  # not `model.to`: it would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    model.requires_grad_(False)
    return quantized


def on_grid(model: nn.Module, quantized: dict[str, QuantizedWeight]) -> bool:
    """Whether every matrix named in `quantized` holds exactly what its codes stand for, in the model's type."""
    linears = dict(iter_linears(model))
    return all(torch.equal(linears[n].weight, q.dequantize().to(linears[n].weight)) for n, q in quantized.items())
