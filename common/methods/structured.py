"""Structured pruning: whole blocks or whole hidden units go, so what is left is a smaller dense model.

No sparse kernel is needed and every engine runs it faster; the price is quality, which training then wins back
(Lab 3.3).
"""

import copy
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional as F

from common.methods.blocks import decoder_blocks, iter_linears, walk
from common.methods.capture import Block, blocks_replaced, walkable_blocks
from common.methods.compensation import Hessian
from common.methods.importance import InputNorms
from common.methods.layer_lists import keep_layers
from common.methods.proofs import require_same_from_configuration
from common.methods.stages import Statistic
from common.methods.streaming import lent

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
    with blocks_replaced(model, nn.ModuleList(blocks[index] for index in kept)):  # so that only these are copied
        smaller = copy.deepcopy(model)
    for index, block in enumerate(decoder_blocks(smaller, len(kept))):
        for module in block.modules():
            for name in LAYER_NUMBER & vars(module).keys():
                if getattr(module, name) is not None:
                    setattr(module, name, index)  # where this block's keys and values lie in the cache
    keep_layers(smaller.config.get_text_config(), kept)
    require_same_from_configuration(smaller)
    return smaller


@contextmanager
def only_blocks(model: nn.Module, kept: list[int]):
    """The model itself with only the blocks `kept`, in order, for a while: to measure it; nothing is copied."""
    blocks, config = decoder_blocks(model), model.config.get_text_config()
    before = copy.deepcopy(vars(config))
    with blocks_replaced(model, nn.ModuleList(blocks[index] for index in kept)):
        keep_layers(config, kept)
        try:
            yield model
        finally:
            vars(config).clear()
            vars(config).update(before)


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
    windows: Tensor,
    *,
    importance: Importance = contribution,
    compensate: bool = False,
    **walk_options,
) -> nn.Module:
    """A copy of `model` whose feed-forward layers keep the `width` hidden units that matter most.

    torch-pruning finds what has to go with a unit: its rows of gate_proj and up_proj, its column of down_proj.
    windows: calibration tokens [nsamples, seqlen], which every block receives as in the model itself.
    compensate: let the columns of down_proj that stay make up for the others (`reconstruct`).
    One block of the model is copied at a time, and cut, before the next: in full there is only `model`.
    `walk_options` go to `common.methods.blocks.walk`. Raises ValueError for families that have other feed-forward
    layers.
    """
    downs, hidden = _feed_forward(model), model.config.get_text_config().intermediate_size
    if not 0 < width <= hidden:
        raise ValueError(f"width must lie between 1 and the present {hidden} hidden units, got {width}.")
    home, statistics, narrow = next(model.parameters()).device, {}, []
    with blocks_replaced(model, nn.ModuleList()):
        smaller = copy.deepcopy(model)

    def note(stage, statistic) -> None:
        statistics.update({name: statistic for name in stage.named if name in downs})

    def cut(block: Block, *_) -> None:
        name, statistic = statistics.popitem()
        module = copy.deepcopy(block.module)
        path = name.removeprefix(f"{block.path}.")
        _narrow(smaller, module, path, width, statistic, importance, compensate)
        narrow.append(module.to(home))

    options = {"observe": Hessian if compensate else InputNorms, "description": "narrow", "at_once": True}
    walk(model, windows, change=note, refine=cut, **options | walk_options)
    decoder_blocks(smaller, 0).extend(narrow)
    smaller.config.get_text_config().intermediate_size = width
    require_same_from_configuration(smaller)
    return smaller


def _narrow(model, block: nn.Module, path: str, width: int, statistic, importance: Importance, compensate: bool):
    """Cut the feed-forward layer of a block, in place; model: what is around the blocks. path: of down_proj in it."""
    down, owner = block.get_submodule(path), block.get_submodule(path.rpartition(".")[0])
    order = importance(down.weight, statistic).argsort()
    dropped, kept = order[: down.in_features - width].tolist(), order[down.in_features - width :].sort().values
    moved = reconstruct(down.weight, statistic.matrix, kept) if compensate else down.weight[:, kept].clone()
    if dropped:
        with lent(model, down.weight.device):
            graph = _dependencies(model, block)
        entrance = getattr(owner, "gate_proj", None) or owner.up_proj
        graph.get_pruning_group(entrance, torch_pruning.prune_linear_out_channels, dropped).prune()
    down.weight.copy_(moved)
    vars(owner).update(intermediate_size=width)


def width_as_small_as(model: nn.Module, dropped: int, multiple: int = 8) -> int:
    """The FFN width at which a model has as many parameters as without `dropped` of its blocks (rounded)."""
    blocks, config = decoder_blocks(model), model.config.get_text_config()
    saved = dropped * sum(p.numel() for p in blocks[0].parameters())
    unit = 3 * config.hidden_size * len(blocks)  # what a hidden unit less in every block saves
    return max(multiple, round((config.intermediate_size - saved / unit) / multiple) * multiple)


def _dependencies(model: nn.Module, block: nn.Module) -> torch_pruning.DependencyGraph:
    """Which layers of a model with this one block lose rows or columns together.

    ValueError for families that torch-pruning cannot trace.
    """
    config = model.config.get_text_config()
    layers, config.num_hidden_layers = config.num_hidden_layers, 1
    try:
        decoder_blocks(model, 0).append(block)
        example = {"input_ids": torch.zeros(1, 4, dtype=torch.long, device=model.device), "use_cache": False}
        # Norms are not of nn's own; a single number, as Apertus' activation has, loses nothing.
        others = (module for module in model.modules() if not isinstance(module, nn.Linear))
        norms = [p for module in others for p in module.parameters(recurse=False) if p.dim() == 1 < p.numel()]
        with torch.enable_grad():
            return torch_pruning.DependencyGraph().build_dependency(
                model,
                example,
                output_transform=lambda output: output.logits,
                unwrapped_parameters=[(p, 0) for p in norms],
            )
    except Exception as error:
        raise ValueError(f"torch-pruning cannot trace {type(model).__name__}, so it cannot be narrowed.") from error
    finally:
        config.num_hidden_layers = layers
        del decoder_blocks(model, 1)[:]


def _feed_forward(model: nn.Module) -> set[str]:
    """Names of every block's down_proj. ValueError unless each has just one, with what feeds it."""
    linears, width = dict(iter_linears(model)), getattr(model.config.get_text_config(), "intermediate_size", None)
    downs = set()
    for name, down in linears.items():
        feeding = [linears.get(name.removesuffix("down_proj") + part) for part in ("gate_proj", "up_proj")]
        if name.endswith("down_proj") and any(feeding) and down.in_features == width:
            downs.add(name)
    if len(downs) != len(decoder_blocks(model)):
        raise ValueError(
            f"The feed-forward layers of {type(model).__name__} cannot be narrowed: that takes one down_proj in each "
            "block with an up_proj before it, all as wide as the configuration says (no experts, no fused layers)."
        )
    return downs
