"""Structured pruning: whole blocks or whole hidden units go, so what is left is a smaller dense model.

No sparse kernel is needed and every engine runs it faster; the price is quality, which training then wins back
(Lab 3.3).
"""

import copy

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn import functional as F

from common.methods.blocks import Statistic, decoder_blocks


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
    """A copy of `model` without the blocks numbered in `dropped`; ValueError when it has no such block, or no other."""
    blocks = decoder_blocks(model)
    unknown = set(dropped) - set(range(len(blocks)))
    if unknown or len(set(dropped)) == len(blocks):
        raise ValueError(f"Cannot drop blocks {sorted(dropped)} of a model with blocks 0 to {len(blocks) - 1}.")
    kept = [index for index in range(len(blocks)) if index not in dropped]
    smaller = copy.deepcopy(model)
    remaining = decoder_blocks(smaller)
    parts = [remaining[index] for index in kept]
    for index, block in enumerate(parts):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # where this block's keys and values lie in the cache
    del remaining[:]
    remaining.extend(parts)
    config = smaller.config.get_text_config()
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
    return smaller


@torch.no_grad()
def narrow_ffn(model: nn.Module, width: int, statistics: dict[str, Statistic]) -> nn.Module:
    """A copy of `model` whose feed-forward layers keep the `width` hidden units that matter most to the output.

    A unit's score is ‖column of down_proj‖₂ · ‖its activations‖₂, the norm of its outgoing weights' Wanda scores.
    torch-pruning finds what has to go with a unit: its rows of gate_proj and up_proj, its column of down_proj.
    statistics: of the inputs of every `down_proj`, with `.norms` (`common.methods.blocks.collect`).
    """
    smaller = copy.deepcopy(model)
    hidden = smaller.config.get_text_config().intermediate_size
    if not 0 < width <= hidden:
        raise ValueError(f"width must lie between 1 and the present {hidden} hidden units, got {width}.")
    example = {"input_ids": torch.zeros(1, 4, dtype=torch.long, device=smaller.device), "use_cache": False}
    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph().build_dependency(
            smaller,
            example,
            output_transform=lambda output: output.logits,
            unwrapped_parameters=[(p, 0) for p in smaller.parameters() if p.dim() == 1],  # norms: not of nn's own
        )
    modules = dict(smaller.named_modules())
    for name, statistic in statistics.items():
        if not name.endswith("down_proj"):
            continue
        down, gate = modules[name], modules[name.replace("down_proj", "gate_proj")]
        score = down.weight.float().norm(dim=0) * statistic.norms
        dropped = score.argsort()[: hidden - width].tolist()
        if dropped:
            graph.get_pruning_group(gate, torch_pruning.prune_linear_out_channels, dropped).prune()
    smaller.config.get_text_config().intermediate_size = width
    return smaller
