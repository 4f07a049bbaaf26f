"""AWQ: protect the weights that meet large activations by scaling them up before rounding (Lin et al., 2023,
arXiv:2306.00978).

Input channel j of a layer is multiplied by s_j in the weights and divided by s_j in the activations, which changes
nothing, except that rounding now errs less on the channels with a large s_j. s_j = (mean |x_j|)^α, with α searched
for each group of layers that share an input.

The authors' code measures α's error at the output of the whole module on stored inputs; here it is measured at the
output of the linear layers, through the Hessian that GPTQ uses too: ‖ΔW·X‖² = ½ n tr(ΔW·H·ΔWᵀ), so no input has to be
stored.
"""

import torch
from torch import Tensor, nn

from common.methods.blocks import walk
from common.methods.compensation import Hessian, naming, squared_error
from common.methods.folding import find_folds
from common.methods.quantization import QuantizeConfig, check_widths, find_grid
from common.methods.stages import Stage

ALPHAS = torch.linspace(0.0, 0.9, 10).tolist()  # 0 is plain rounding


def channel_scale(mean_absolute: Tensor, alpha: float) -> Tensor:
    """s [in_features] from mean |x| per channel, normalized so that its largest and smallest value multiply to 1."""
    scale = mean_absolute.clamp(min=1e-4).pow(alpha)
    return scale / (scale.max() * scale.min()).sqrt()


def round_scaled(weight: Tensor, scale: Tensor, config: QuantizeConfig, importance: Tensor | None = None) -> Tensor:
    """Round `weight`·scale [out, in] to its grid and divide the scale out again: the weight that inference sees."""
    scaled = weight.float() * scale
    grid = find_grid(scaled, config, importance)
    group = torch.arange(weight.shape[1], device=weight.device) // config.width(weight.shape[1])
    return grid.decode(grid.encode(scaled, group), group) / scale


def search_scale(weight: Tensor, statistic: Hessian, config: QuantizeConfig) -> tuple[Tensor, float]:
    """The channel scale [in] with the lowest output error for `weight` [out, in], and its α."""
    hessian = statistic.matrix
    candidates = {alpha: channel_scale(statistic.mean_absolute, alpha) for alpha in ALPHAS}
    errors = {
        alpha: squared_error(round_scaled(weight, scale, config) - weight, hessian).item()
        for alpha, scale in candidates.items()
    }
    best = min(errors, key=errors.get)
    return candidates[best], best


def awq_model(model: nn.Module, windows: Tensor, config: QuantizeConfig, **walk_options) -> dict[str, float]:
    """AWQ for every linear layer of the decoder blocks, in place; returns the α of each group that can be scaled.

    An engine folds 1/s into the operation before (a norm, or `up_proj` for `down_proj`). Layers without one
    (`folding.find_folds`) are only rounded: `o_proj` with grouped-query attention, as in the authors' code, or fused
    experts.
    Raises ValueError, before the first change, where that is so everywhere.
    """
    check_widths(model, config)
    folds = find_folds(model, windows)
    if not any(folds):
        raise ValueError(f"AWQ has nothing to scale in {type(model).__name__}: no operation before a layer undoes it.")
    unclipped = QuantizeConfig(config.bits, config.group_size, config.sym, mse=False)
    alphas = {}

    def change(stage: Stage, statistic: Hessian) -> None:
        with naming(stage.named):
            round_stage(stage, statistic)

    def round_stage(stage: Stage, statistic: Hessian) -> None:
        weight = torch.cat([linear.weight for linear in stage.linears.values()]).float()
        scale = torch.ones_like(statistic.mean_absolute)
        if any(set(fold.readers) == set(stage.linears) for fold in folds[stage.block_index]):
            scale, alpha = search_scale(weight, statistic, unclipped)
            alphas[f"{stage.block_index}." + "+".join(stage.linears)] = alpha
        importance = statistic.matrix.diagonal() / scale.square()
        rounded = round_scaled(weight, scale, config, importance)
        start = 0
        for linear in stage.linears.values():
            linear.weight.copy_(rounded[start : start + linear.out_features])
            start += linear.out_features

    walk(model, windows, Hessian, change, description=config.label("awq"), **walk_options)
    return alphas
