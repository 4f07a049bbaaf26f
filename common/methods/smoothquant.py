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

from common.methods.blocks import collect, iter_linears
from common.methods.capture import PROOF_TOKENS, same, walkable_blocks
from common.methods.compensation import finite, naming
from common.methods.folding import find_folds
from common.methods.requirements import require_needs


class ChannelMaxima:
    """max |x_j| of every input channel j over all tokens."""

    def __init__(self, in_features: int, like: Tensor):
        self.largest = torch.zeros(in_features, device=like.device)

    def add(self, inputs: Tensor) -> None:
        self.largest = torch.maximum(self.largest, inputs.abs().amax(0).float())

    @property
    def maxima(self) -> Tensor:
        """[in_features]"""
        return finite(self.largest)


def smoothing_scale(activation_maxima: Tensor, weight_maxima: Tensor, alpha: float) -> Tensor:
    """s [in_features] from max |x_j| and max |w_j|, both [in_features] (SmoothQuant, equation 4)."""
    return activation_maxima.clamp(min=1e-5).pow(alpha) / weight_maxima.clamp(min=1e-5).pow(1 - alpha)


def round_int8(values: Tensor) -> Tensor:
    """Symmetric 8-bit rounding with one scale per row: of a weight matrix, an output; of activations, a token."""
    scale = (values.float().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-8)
    return ((values / scale).round().clamp(-127, 127) * scale).to(values.dtype)


@torch.no_grad()
def smooth_model(model: nn.Module, windows: Tensor, alpha: float = 0.5, **walk_options) -> list[str]:
    """Move the size of activations into the weights of the layers that follow a normalization, in place.

    The model computes what it did before, which is proven on a few tokens. As in the authors' code, o_proj and
    down_proj stay as they are; so does what reads a norm that something else reads too (a router).
    windows: calibration tokens [nsamples, seqlen]. `walk_options` go to `common.methods.blocks.walk`.
    Returns the names of the layers that were smoothed. Raises ValueError, before the first change, if there are none.
    """
    name = type(model).__name__
    folds = [[fold for fold in block if fold.is_norm] for block in find_folds(model, windows)]
    if not any(folds):
        raise ValueError(f"SmoothQuant cannot smooth {name}: none of its norms is read by linear layers alone.")
    statistics = collect(model, windows, ChannelMaxima, **walk_options)
    few = windows[:1, :PROOF_TOKENS].to(model.get_input_embeddings().weight.device)
    before, smoothed = model(input_ids=few, use_cache=False).logits, []
    for block, folds_of_block in zip(walkable_blocks(model), folds, strict=True):
        for fold in folds_of_block:
            names = [f"{block.path}.{reader}" for reader in fold.readers]
            largest = torch.stack([block.linears[reader].weight.abs().amax(0) for reader in fold.readers])
            with naming(names):
                maxima = torch.stack([statistics[each].maxima for each in names]).amax(0)
            scale = smoothing_scale(maxima.to(largest.device), largest.amax(0).float(), alpha)
            fold.apply(block.module, scale)
            smoothed += names
    if not same(model(input_ids=few, use_cache=False).logits, before):
        raise ValueError(f"Smoothing has changed what {name} computes: load the model again, and do without.")
    return smoothed


@torch.no_grad()
def smoothquant_model(model: nn.Module, windows: Tensor, alpha: float = 0.5, **walk_options) -> None:
    """SmoothQuant W8A8 for every linear layer of the decoder blocks, in place: smooth, then round weights per output
    and, whenever the model runs, activations per token."""
    require_needs(model, "rounded activations")
    smooth_model(model, windows, alpha, **walk_options)
    round_model(model)


@torch.no_grad()
def round_model(model: nn.Module) -> None:
    """Plain W8A8 for every linear layer of the decoder blocks, in place.

    Raises ValueError where experts are fused: there is no layer whose input could be rounded.
    """
    require_needs(model, "rounded activations")
    for _, linear in iter_linears(model):
        linear.weight.copy_(round_int8(linear.weight))
        linear.register_forward_pre_hook(lambda _, args: (round_int8(args[0]), *args[1:]))
