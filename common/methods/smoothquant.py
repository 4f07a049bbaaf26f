"""SmoothQuant: 8-bit weights and 8-bit activations, the difficulty shared between the two (Xiao et al., 2022,
arXiv:2211.10438).

A few input channels of a linear layer are a hundred times larger than the rest, so one scale per token leaves those
few codes. Channel j is divided by s_j in the activations, by folding 1/s_j into the normalization before the layer,
and multiplied by it in the weights: the product stays what it was, and both factors are easier to round.

    s_j = max|x_j|^α / max|w_j|^(1-α)

Rounding is simulated: what is computed are the products that an int8 kernel would compute, in floating point.
"""

import torch
from torch import Tensor, nn

from common.methods.blocks import by_statistic, collect, iter_linears

NORM_BEFORE = {"self_attn.q_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm"}


class ChannelMaxima:
    """max |x_j| of every input channel j over all tokens."""

    def __init__(self, in_features: int, like: Tensor):
        self.maxima = torch.zeros(in_features, device=like.device)

    def add(self, inputs: Tensor) -> None:
        self.maxima = torch.maximum(self.maxima, inputs.abs().amax(0).float())


def smoothing_scale(activation_maxima: Tensor, weight_maxima: Tensor, alpha: float) -> Tensor:
    """s [in_features] from max |x_j| and max |w_j|, both [in_features] (SmoothQuant, equation 4)."""
    return activation_maxima.clamp(min=1e-5).pow(alpha) / weight_maxima.clamp(min=1e-5).pow(1 - alpha)


def round_int8(values: Tensor) -> Tensor:
    """Symmetric 8-bit rounding with one scale per row: of a weight matrix, an output; of activations, a token."""
    scale = (values.float().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-8)
    return ((values / scale).round().clamp(-127, 127) * scale).to(values.dtype)


@torch.no_grad()
def smooth_model(model: nn.Module, windows: Tensor, alpha: float = 0.5, **walk_options) -> None:
    """Move the size of activations into the weights of the layers that follow a normalization, in place.

    The model computes what it did before. As in the authors' code, o_proj and down_proj stay as they are.
    windows: calibration tokens [nsamples, seqlen]. `walk_options` go to `common.methods.blocks.walk`.
    """
    statistics = collect(model, windows, ChannelMaxima, **walk_options)
    for linears in by_statistic(model, statistics):
        first = next(iter(linears))
        name = next((name for name in NORM_BEFORE if first.endswith(name)), None)
        if name is None:
            continue
        norm = model.get_submodule(first.removesuffix(name) + NORM_BEFORE[name])
        largest = torch.stack([linear.weight.abs().amax(0) for linear in linears.values()]).amax(0).float()
        scale = smoothing_scale(statistics[first].maxima, largest, alpha)
        norm.weight.div_(scale)
        for linear in linears.values():
            linear.weight.mul_(scale)


@torch.no_grad()
def smoothquant_model(model: nn.Module, windows: Tensor, alpha: float = 0.5, **walk_options) -> None:
    """SmoothQuant W8A8 for every linear layer of the decoder blocks, in place: smooth, then round weights per output
    and, whenever the model runs, activations per token."""
    smooth_model(model, windows, alpha, **walk_options)
    round_model(model)


@torch.no_grad()
def round_model(model: nn.Module) -> None:
    """Plain W8A8 for every linear layer of the decoder blocks, in place."""
    for _, linear in iter_linears(model):
        linear.weight.copy_(round_int8(linear.weight))
        linear.register_forward_pre_hook(lambda _, args: (round_int8(args[0]), *args[1:]))
