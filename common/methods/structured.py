"""Structured pruning: whole blocks or whole hidden units go, so what is left is a smaller dense model.

No sparse kernel is needed and every engine runs it faster; the price is quality, which training then wins back
(Lab 3.3).
"""

import copy
from collections.abc import Callable

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional as F

from common.methods.blocks import decoder_blocks, iter_linears
from common.methods.capture import walkable_blocks
from common.methods.layer_lists import keep_layers
from common.methods.proofs import require_same_from_configuration
from common.methods.stages import Statistic

LAYER_NUMBER = {"layer_idx", "layer_id", "layer_number"}  # of a module; families name it differently


@torch.no_grad()
def block_influence(model: nn.Module, windows: Tensor) -> list[float]:
    """1 - cos(x, block(x)), averaged over the tokens of windows [nsamples, seqlen]: how much each block changes.

    (ShortGPT, Men et al., arXiv:2403.03853.)
    """
    blocks = decoder_blocks(model)
    changes = torch.zeros(len(blocks), dtype=torch.float64)

    def measure(index):
        def hook(_, args, output):
            before, after = args[0].float(), (output[0] if isinstance(output, tuple) else output).float()
            changes[index] += (1 - F.cosine_similarity(before, after, dim=-1)).mean().item()

        return hook

    handles = [block.register_forward_hook(measure(index)) for index, block in enumerate(blocks)]
    try:
        for ids in windows:
            model(input_ids=ids[None].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return (changes / len(windows)).tolist()


def drop_blocks(model: nn.Module, dropped: list[int]) -> nn.Module:
    """A copy of `model` without the blocks numbered in `dropped`, its configuration cut likewise.

    Raises ValueError when it has no such block, or no other, and for families whose configuration cannot say it.
    """
    blocks = decoder_blocks(model)
    walkable_blocks(model)  # refuses weights that are quantized already
    unknown = set(dropped) - set(range(len(blocks)))
    if unknown or len(set(dropped)) == len(blocks):
        raise ValueError(f"Cannot drop blocks {sorted(dropped)} of a model with blocks 0 to {len(blocks) - 1}.")
    kept = [index for index in range(len(blocks)) if index not in dropped]
    smaller = copy.deepcopy(model)
    remaining = decoder_blocks(smaller)
    parts = [remaining[index] for index in kept]
    for index, block in enumerate(parts):
        for module in block.modules():
            for name in LAYER_NUMBER & vars(module).keys():
                if getattr(module, name) is not None:
                    setattr(module, name, index)  # where this block's keys and values lie in the cache
    del remaining[:]
    remaining.extend(parts)
    keep_layers(smaller.config.get_text_config(), kept)
    require_same_from_configuration(smaller)
    return smaller


def contribution(down: Tensor, statistic: Statistic) -> Tensor:
    """‖column of down_proj‖₂ · ‖activations‖₂ of every hidden unit: what removing it alone does to the output."""
    return down.float().norm(dim=0) * statistic.norms


def activation(down: Tensor, statistic: Statistic) -> Tensor:
    """‖activations‖₂ of every hidden unit, whatever is made of them (Minitron, arXiv:2407.14679)."""
    return statistic.norms


Importance = Callable[[Tensor, Statistic], Tensor]


def reconstruct(weight: Tensor, hessian: Tensor, kept: Tensor, damp_percent: float = 0.01) -> Tensor:
    """Structured OBS: the columns `kept` of a matrix [out, in], moved so that they make up for all the others.

    All rows lose the same inputs, so one system serves them all: least squares, Ŵ = W · H[:, kept] · H[kept, kept]⁻¹.
    hessian: [in, in] of the inputs. (Optimal Brain Surgeon, with groups of weights instead of single ones.)
    """
    damped = hessian + damp_percent * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)
    factor = torch.linalg.cholesky(damped[kept][:, kept])
    return torch.cholesky_solve(damped[kept] @ weight.to(damped.dtype).T, factor).T


@torch.no_grad()
def narrow_ffn(
    model: nn.Module,
    width: int,
    statistics: dict[str, Statistic],
    *,
    importance: Importance = contribution,
    compensate: bool = False,
) -> nn.Module:
    """A copy of `model` whose feed-forward layers keep the `width` hidden units that matter most.

    torch-pruning finds what has to go with a unit: its rows of gate_proj and up_proj, its column of down_proj.
    statistics: of the inputs of every `down_proj`, with `.norms` (`common.methods.blocks.collect`).
    compensate: let the columns of down_proj that stay make up for the others (`reconstruct`; statistics of `Hessian`).
    Raises ValueError for families that have other feed-forward layers.
    """
    smaller = copy.deepcopy(model)
    layers, hidden = _feed_forward(smaller, statistics), smaller.config.get_text_config().intermediate_size
    if not 0 < width <= hidden:
        raise ValueError(f"width must lie between 1 and the present {hidden} hidden units, got {width}.")
    graph = _dependencies(smaller)
    for name, down, entrance in layers:
        vars(smaller.get_submodule(name.rpartition(".")[0])).update(intermediate_size=width)
        order = importance(down.weight, statistics[name]).argsort()
        dropped, kept = order[: hidden - width].tolist(), order[hidden - width :].sort().values
        moved = reconstruct(down.weight, statistics[name].matrix, kept) if compensate else down.weight[:, kept]
        if dropped:
            graph.get_pruning_group(entrance, torch_pruning.prune_linear_out_channels, dropped).prune()
        down.weight.copy_(moved)
    smaller.config.get_text_config().intermediate_size = width
    require_same_from_configuration(smaller)
    return smaller


def width_as_small_as(model: nn.Module, dropped: int, multiple: int = 8) -> int:
    """The FFN width at which a model has as many parameters as without `dropped` of its blocks (rounded)."""
    blocks, config = decoder_blocks(model), model.config.get_text_config()
    saved = dropped * sum(p.numel() for p in blocks[0].parameters())
    unit = 3 * config.hidden_size * len(blocks)  # what a hidden unit less in every block saves
    return max(multiple, round((config.intermediate_size - saved / unit) / multiple) * multiple)


def _dependencies(model: nn.Module) -> torch_pruning.DependencyGraph:
    """Which layers lose rows or columns together. ValueError for families that torch-pruning cannot trace."""
    example = {"input_ids": torch.zeros(1, 4, dtype=torch.long, device=model.device), "use_cache": False}
    # Norms are not of nn's own; a single number, as Apertus' activation has, loses nothing.
    others = (module for module in model.modules() if not isinstance(module, nn.Linear))
    norms = [p for module in others for p in module.parameters(recurse=False) if p.dim() == 1 < p.numel()]
    try:
        with torch.enable_grad():
            return torch_pruning.DependencyGraph().build_dependency(
                model,
                example,
                output_transform=lambda output: output.logits,
                unwrapped_parameters=[(p, 0) for p in norms],
            )
    except Exception as error:
        raise ValueError(f"torch-pruning cannot trace {type(model).__name__}, so it cannot be narrowed.") from error


def _feed_forward(model: nn.Module, statistics: dict[str, Statistic]) -> list[tuple[str, nn.Linear, nn.Linear]]:
    """Of every block: name of its down_proj, that layer, and one that feeds it. ValueError unless each has just one."""
    linears, width = dict(iter_linears(model)), getattr(model.config.get_text_config(), "intermediate_size", None)
    layers = []
    for name, down in linears.items():
        feeding = [linears.get(name.removesuffix("down_proj") + part) for part in ("gate_proj", "up_proj")]
        entrance = next((linear for linear in feeding if linear is not None), None)
        if name.endswith("down_proj") and name in statistics and entrance is not None and down.in_features == width:
            layers.append((name, down, entrance))
    if len(layers) != len(decoder_blocks(model)):
        raise ValueError(
            f"The feed-forward layers of {type(model).__name__} cannot be narrowed: that takes one down_proj in each "
            "block with an up_proj before it, all as wide as the configuration says (no experts, no fused layers)."
        )
    return layers
