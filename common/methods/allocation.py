"""How much to prune where: a sparsity for every layer, the same in total.

An allocation maps layer names to sparsities, for `common.methods.pruning.prune_model`.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from common.methods.blocks import decoder_blocks, iter_linears
from common.methods.capture import walkable_blocks
from common.methods.importance import wanda_scores
from common.methods.pruning import check_sparsity
from common.methods.stages import Linear, Statistic


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
    """Of each block, the share of weights whose Wanda score exceeds `multiple` times the block's mean (OWL).

    Computed where the statistics are, a block at a time.
    """
    ratios = []
    for block in walkable_blocks(model):
        parts = [
            _scores(f"{block.path}.{name}", linear, statistics).flatten() for name, linear in block.linears.items()
        ]
        scores = torch.cat(parts)
        ratios.append((scores > multiple * scores.mean()).float().mean().item())
    return ratios


def _scores(name: str, linear: Linear, statistics: dict[str, Statistic] | None) -> Tensor:
    """Of every weight: Wanda's, where the statistics are; |W| where there are none."""
    if not statistics:
        return linear.weight.float().abs()
    norms = statistics[name].norms
    return wanda_scores(linear.weight.to(norms.device), norms)


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

    Layers are read one at a time, three times over.
    """
    check_sparsity(sparsity)
    linears = dict(iter_linears(model))
    total = sum(linear.weight.numel() for linear in linears.values())

    def scores() -> Iterator[Tensor]:
        return (_scores(name, linear, statistics) for name, linear in linears.items())

    threshold = kth_smallest(scores, max(1, round(sparsity * total)))
    return {
        n: min((score <= threshold).float().mean().item(), 0.999) for n, score in zip(linears, scores(), strict=True)
    }


def kth_smallest(parts: Callable[[], Iterable[Tensor]], k: int) -> float:
    """The k-th smallest (from 1) of all numbers in float32 tensors that need not be in memory together; none negative.

    Such floats are ordered as their bits are: the upper 16 are counted first, then the lower ones of those that share
    the upper ones of the k-th.
    """
    upper = sum(torch.bincount(_bits(part) >> 16, minlength=1 << 15).cpu() for part in parts()).cumsum(0)
    high = torch.searchsorted(upper, k).item()
    k -= upper[high - 1].item() if high else 0
    lower = 0
    for part in parts():
        bits = _bits(part)
        lower = lower + torch.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16).cpu()
    low = torch.searchsorted(lower.cumsum(0), k).item()
    return torch.tensor(high << 16 | low, dtype=torch.int32).view(torch.float32).item()


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32).flatten()


@torch.no_grad()
def total_sparsity(model: nn.Module, allocation: dict[str, float]) -> float:
    """The share of all weights that an allocation removes."""
    sizes = {name: linear.weight.numel() for name, linear in iter_linears(model)}
    return sum(allocation[name] * size for name, size in sizes.items()) / sum(sizes.values())
