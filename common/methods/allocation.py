"""How much to prune where: a sparsity for every layer, the same in total.

An allocation maps layer names to sparsities, for `common.methods.pruning.prune_model`.
"""

import torch
from torch import Tensor, nn

from common.methods.blocks import decoder_blocks, iter_linears
from common.methods.importance import wanda_scores
from common.methods.pruning import check_sparsity
from common.methods.stages import Statistic


def by_importance(model: nn.Module, importance: list[float], sparsity: float, span: float) -> dict[str, float]:
    """One sparsity per block: the more important a block, the less of it goes.

    The densities lie linearly in importance over an interval of width 2 · `span` around a mean of 1 - `sparsity`
    (OWL, Yin et al., arXiv:2310.05175, as in its authors' code). Blocks must be equally large.
    """
    check_sparsity(sparsity)
    if not 0 <= span <= min(sparsity, 1 - sparsity):
        raise ValueError(f"span must lie between 0 and {min(sparsity, 1 - sparsity):.2g}, got {span}.")
    scores = torch.tensor(importance, dtype=torch.float64)
    if len(scores) != len(decoder_blocks(model)):
        raise ValueError(f"{len(scores)} importances for {len(decoder_blocks(model))} blocks.")
    spread = (scores.max() - scores.min()).clamp(min=1e-12)
    density = (scores - scores.min()) / spread * 2 * span
    per_block = (sparsity + density.mean() - density).clamp(0, 0.999).tolist()
    return {name: per_block[block_of(name)] for name, _ in iter_linears(model)}


def block_of(name: str) -> int:
    """The block index in a layer's full name, such as 7 in `model.layers.7.mlp.up_proj`."""
    return int(next(part for part in name.split(".") if part.isdigit()))


@torch.no_grad()
def outlier_ratios(model: nn.Module, statistics: dict[str, Statistic], multiple: float = 5.0) -> list[float]:
    """Of each block, the share of weights whose Wanda score exceeds `multiple` times the block's mean (OWL)."""
    scores: list[list[Tensor]] = [[] for _ in decoder_blocks(model)]
    for name, linear in iter_linears(model):
        scores[block_of(name)].append(wanda_scores(linear.weight, statistics[name].norms).flatten())
    flat = [torch.cat(block) for block in scores]
    return [(block > multiple * block.mean()).float().mean().item() for block in flat]


def owl(model: nn.Module, statistics: dict[str, Statistic], sparsity: float, span: float = 0.08) -> dict[str, float]:
    """Outlier-weighted layer-wise sparsity: blocks with more outliers keep more weights (OWL's λ is `span`).

    statistics: of the dense model's inputs, with `.norms` (`common.methods.blocks.collect`).
    """
    return by_importance(model, outlier_ratios(model, statistics), sparsity, span)


@torch.no_grad()
def one_threshold(
    model: nn.Module, sparsity: float, statistics: dict[str, Statistic] | None = None
) -> dict[str, float]:
    """Each layer's share of scores below one global threshold: |W|, or Wanda's scores where statistics are given.

    Needs all scores at once: 4 bytes per weight.
    """
    check_sparsity(sparsity)
    scores = {
        name: wanda_scores(linear.weight, statistics[name].norms) if statistics else linear.weight.float().abs()
        for name, linear in iter_linears(model)
    }
    everything = torch.cat([score.flatten() for score in scores.values()])
    threshold = everything.kthvalue(max(1, round(sparsity * len(everything)))).values
    return {name: min((score <= threshold).float().mean().item(), 0.999) for name, score in scores.items()}


@torch.no_grad()
def total_sparsity(model: nn.Module, allocation: dict[str, float]) -> float:
    """The share of all weights that an allocation removes."""
    sizes = {name: linear.weight.numel() for name, linear in iter_linears(model)}
    return sum(allocation[name] * size for name, size in sizes.items()) / sum(sizes.values())
