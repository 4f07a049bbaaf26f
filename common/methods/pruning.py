"""Post-training pruning of linear layers: magnitude, Wanda and SparseGPT.

A mask is a boolean matrix [out_features, in_features], True where a weight stays. The three methods differ in the
score by which weights are compared, in the weights that are compared with one another, and in what happens to those
that stay:

    method      score                  compared within                  weights that stay
    magnitude   |W|                    the matrix                       unchanged
    Wanda       |W| · ‖X‖₂             a row (one output)               unchanged
    SparseGPT   W² / diag(H⁻¹)         a block of 128 columns           make up for those removed

Under an N:M pattern all three compare within groups of M consecutive inputs and keep N of them.
(Wanda: Sun et al., arXiv:2306.11695; SparseGPT: Frantar & Alistarh, arXiv:2301.00774.)
"""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from common.methods.blocks import by_statistic, iter_linears, walk
from common.methods.compensation import BLOCK_COLUMNS, Hessian, compensate, inverse_cholesky, naming
from common.methods.importance import InputNorms, keep_highest, wanda_scores
from common.methods.requirements import require_needs
from common.methods.stages import Linear, Stage, Statistic

METHODS = ("magnitude", "wanda", "sparsegpt")


@dataclass(frozen=True)
class PruneConfig:
    """What to remove, and how."""

    method: str = "wanda"
    sparsity: float = 0.5  # share of a layer's weights that is removed
    pattern: str = "unstructured"  # or "N:M": at most N of M consecutive inputs stay, such as "2:4"
    damp_percent: float = 0.01  # SparseGPT: added to the Hessian's diagonal, as a share of its mean

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"Unknown method {self.method!r}; choose {', '.join(METHODS)}.")
        check_sparsity(self.sparsity)
        if self.pattern == "unstructured":
            return
        n, _, m = self.pattern.partition(":")
        if not (n.isdigit() and m.isdigit() and 0 < int(n) < int(m)):
            raise ValueError(f"pattern must be 'unstructured' or 'N:M' with 0 < N < M, got {self.pattern!r}.")
        if BLOCK_COLUMNS % int(m):
            raise ValueError(f"M must be a power of two up to {BLOCK_COLUMNS}, got pattern {self.pattern!r}.")
        if self.sparsity != 1 - int(n) / int(m):
            raise ValueError(f"Pattern {self.pattern} means a sparsity of {1 - int(n) / int(m)}, not {self.sparsity}.")

    @property
    def group(self) -> int:
        """M of an N:M pattern; 0 without one."""
        return 0 if self.pattern == "unstructured" else int(self.pattern.split(":")[1])

    def as_dict(self) -> dict:
        return asdict(self)

    @property
    def label(self) -> str:
        """A short name for tables and folders, such as `wanda-50` or `sparsegpt-2-4`."""
        amount = f"{self.sparsity * 100:g}" if not self.group else self.pattern.replace(":", "-")
        return f"{self.method}-{amount}"


def check_sparsity(sparsity: float) -> None:
    """Raise ValueError unless 0 ≤ sparsity < 1."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the share of weights removed, 0 ≤ sparsity < 1; got {sparsity}.")


Choose = Callable[[Tensor, slice], Tensor]
STATISTIC = {"wanda": InputNorms, "sparsegpt": Hessian}  # what each method wants to know of a layer's input


def _keep(scores: Tensor, config: PruneConfig, sparsity: float) -> Tensor:
    """Mask of a matrix of scores [out, in]; `sparsity` may differ from the config's in an unstructured pattern."""
    if config.group:
        return keep_highest(scores.unflatten(-1, (-1, config.group)), config.sparsity).flatten(-2)
    if config.method == "wanda":
        return keep_highest(scores, sparsity)
    return keep_highest(scores.flatten(), sparsity).view_as(scores)


def sparsegpt(
    weight: Tensor, hessian: Tensor, choose: Choose, span: int = BLOCK_COLUMNS, damp_percent: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Remove weights column by column; the columns to the right make up for it. Returns (weight, mask), both [out, in].

    hessian: [in, in], of the layer's inputs (`Hessian.matrix`).
    choose(scores, columns): at the head of every `span` columns, which of them stay, bool [out, span]; the scores are
    w_j² / [H⁻¹]_jj, H⁻¹ being that of the columns not yet passed, w as updated so far.
    """
    factor = inverse_cholesky(hessian, damp_percent)
    columns = weight.float().T.contiguous()
    keep = torch.empty(columns.shape, dtype=torch.bool, device=weight.device)

    def begin(block: slice) -> None:
        scores = (columns[block] / factor.diagonal()[block, None]).square()
        keep[block] = choose(scores.T, block).T

    compensate(columns, factor, torch.mul, keep, begin=begin, block_columns=span)
    return columns.T.contiguous(), keep.T.contiguous()


def _check_width(config: PruneConfig, in_features: int, name: str) -> None:
    if config.group and in_features % config.group:
        raise ValueError(
            f"Pattern {config.pattern} needs inputs in groups of {config.group}; {name} has {in_features} inputs."
        )


def prune(weight: Tensor, statistic: Statistic | None, config: PruneConfig) -> tuple[Tensor, Tensor]:
    """Prune one matrix: returns (weight, mask), both [out, in].

    statistic: of the layer's inputs. Magnitude needs none, Wanda anything with `.norms`, SparseGPT a `Hessian`.
    Raises ValueError where the M of a pattern does not divide the inputs.
    """
    _check_width(config, weight.shape[1], "a layer")
    return prune_together([weight], statistic, config, [config.sparsity])[0]


def prune_together(
    weights: list[Tensor], statistic: Statistic | None, config: PruneConfig, sparsities: list[float]
) -> list[tuple[Tensor, Tensor]]:
    """Prune matrices that read the same input, each to its own sparsity and with its own mask.

    SparseGPT's column loop takes them stacked: rows do not influence each other, and one loop is faster than three.
    """
    rows = [len(weight) for weight in weights]

    def choose(scores: Tensor, columns: slice) -> Tensor:
        parts = zip(scores.split(rows), sparsities, strict=True)
        return torch.cat([_keep(part, config, sparsity) for part, sparsity in parts])

    stacked = torch.cat([weight.float() for weight in weights])
    if config.method == "sparsegpt":
        span = config.group or BLOCK_COLUMNS
        pruned, keep = sparsegpt(stacked, statistic.matrix, choose, span, config.damp_percent)
    else:
        scores = stacked.abs() if config.method == "magnitude" else wanda_scores(stacked, statistic.norms)
        keep = choose(scores, slice(None))
        pruned = stacked * keep
    return list(zip(pruned.split(rows), keep.split(rows), strict=True))


@torch.no_grad()
def prune_model(
    model: nn.Module,
    windows: Tensor | None,
    config: PruneConfig,
    allocation: dict[str, float] | None = None,
    **walk_options,
) -> dict[str, Tensor]:
    """Prune every linear layer of the decoder blocks, in place; returns the masks by layer name.

    windows: calibration tokens [nsamples, seqlen] (magnitude takes None). Each block is pruned on what the blocks
    before it, as pruned, hand it. Inside a block SparseGPT goes on stage by stage, since its compensation can answer
    what it sees; Wanda's norms are all taken before any layer of the block is pruned, as in its authors' code.
    allocation: layer name → sparsity, where layers differ (`common.methods.allocation`). `walk_options` go to
    `common.methods.blocks.walk`. A model that has zeros already is pruned further, with a warning.
    """
    _prepare(model, config, allocation)
    home = model.device  # masks stay where the weights live, not where a block is worked on
    masks = {}

    def change(stage: Stage, statistic: Statistic) -> None:
        results = prune_linears(stage.named, statistic, config, allocation)
        masks.update({name: keep.to(home) for name, keep in results.items()})

    if config.method == "magnitude":
        for name, linear in iter_linears(model):
            keep = prune_linears({name: linear}, None, config, allocation, walk_options.get("device"))[name]
            masks[name] = keep.to(home)
    else:
        walk_options = {"at_once": config.method == "wanda", "description": config.label} | walk_options
        walk(model, windows, STATISTIC[config.method], change, **walk_options)
    return masks


@torch.no_grad()
def prune_once(
    model: nn.Module, statistics: dict[str, Statistic], config: PruneConfig, allocation: dict[str, float] | None = None
) -> dict[str, Tensor]:
    """Like `prune_model`, but with statistics collected beforehand from the dense model (`blocks.collect`).

    No calibration pass, so a sweep over many sparsities costs only the pruning itself; but later layers do not see
    what pruning did to earlier ones.
    """
    _prepare(model, config, allocation)
    masks = {}
    for linears in by_statistic(model, statistics):
        masks |= prune_linears(linears, statistics[next(iter(linears))], config, allocation)
    return masks


@torch.no_grad()
def prune_linears(
    linears: dict[str, Linear],
    statistic: Statistic | None,
    config: PruneConfig,
    allocation: dict[str, float] | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Prune layers that read the same input, in place; returns their masks, by the names that were given.

    device: where that is worked out (default: where the weights are; to sort a 7B's takes minutes on a CPU).
    """
    sparsities = [allocation[name] if allocation else config.sparsity for name in linears]
    weights = [linear.weight for linear in linears.values()]
    with naming(linears):
        results = prune_together([w.to(device or w.device) for w in weights], statistic, config, sparsities)
    for weight, (pruned, _) in zip(weights, results, strict=True):
        weight.copy_(pruned)
    return {name: keep for name, (_, keep) in zip(linears, results, strict=True)}


def _prepare(model: nn.Module, config: PruneConfig, allocation: dict[str, float] | None) -> None:
    """Find what is wrong before minutes of work, not after."""
    require_needs(model, "weights")
    for name, linear in iter_linears(model):
        _check_width(config, linear.in_features, name)
    for sparsity in (allocation or {}).values():
        check_sparsity(sparsity)
    if allocation is not None and set(allocation) != {name for name, _ in iter_linears(model)}:
        raise ValueError("The allocation must give a sparsity for every linear layer of the model, and no other.")
    if allocation is not None and config.group:
        raise ValueError(f"Pattern {config.pattern} fixes every layer's sparsity; give no allocation.")
    found = model_sparsity(model)
    if found > 0.01:
        warnings.warn(f"This model is pruned already: {found:.1%} of its linear weights are zero.", stacklevel=4)


def model_sparsity(model: nn.Module) -> float:
    """Share of zeros among the weights of the decoder blocks' linear layers."""
    zeros = total = 0
    for _, linear in iter_linears(model):
        zeros += (linear.weight == 0).sum().item()
        total += linear.weight.numel()
    return zeros / total
