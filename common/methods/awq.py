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

from common.methods.blocks import Stage, walk
from common.methods.compensation import Hessian, squared_error
from common.methods.quantization import QuantizeConfig, find_grid

ALPHAS = torch.linspace(0.0, 0.9, 10).tolist()  # 0 is plain rounding


def channel_scale(mean_absolute: Tensor, alpha: float) -> Tensor:
    """s [in_features] from mean |x| per channel, normalized so that its largest and smallest value multiply to 1."""
    scale = mean_absolute.clamp(min=1e-4).pow(alpha)
    return scale / (scale.max() * scale.min()).sqrt()


def round_scaled(weight: Tensor, scale: Tensor, config: QuantizeConfig, importance: Tensor | None = None) -> Tensor:
    """Round `weight`·scale [out, in] to its grid and divide the scale out again: the weight that inference sees."""
    scaled = weight.float() * scale
    grid = find_grid(scaled, config, importance)
    group = torch.arange(weight.shape[1], device=weight.device) // config.group_size
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
    """AWQ for every linear layer of the decoder blocks, in place; returns the α chosen for each group of layers.

    An engine folds 1/s into the operation before (a norm, or `up_proj` for `down_proj`). With grouped-query attention
    `o_proj` has no such operation: its α stays 0, as in the authors' code.
    """
    attention = model.config.get_text_config()
    grouped = attention.num_key_value_heads != attention.num_attention_heads
    unclipped = QuantizeConfig(config.bits, config.group_size, config.sym, mse=False)
    alphas = {}

    def change(stage: Stage, statistic: Hessian) -> None:
        weight = torch.cat([linear.weight for linear in stage.linears.values()]).float()
        scale, alpha = torch.ones_like(statistic.mean_absolute), 0.0
        if not (grouped and any(name.endswith("o_proj") for name in stage.linears)):
            scale, alpha = search_scale(weight, statistic, unclipped)
        importance = statistic.matrix.diagonal() / scale.square()
        rounded = round_scaled(weight, scale, config, importance)
        start = 0
        for linear in stage.linears.values():
            linear.weight.copy_(rounded[start : start + linear.out_features])
            start += linear.out_features
        alphas[f"{stage.block_index}." + "+".join(stage.linears)] = alpha

    walk(model, windows, Hessian, change, description=config.label("awq"), **walk_options)
    return alphas
