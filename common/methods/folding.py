"""Where a factor per channel can be folded into the operation before a linear layer, proven by trying.

AWQ and SmoothQuant multiply the input channels of linear layers by s and divide the activations by it. To divide them
costs nothing where the operation before can do it: a normalization that only these layers read, or a linear layer
whose rows reach them channel by channel (`up_proj` before `down_proj`). Families differ: a norm may multiply by
(1 + w), have a bias, be read by a router or by attention and FFN at once. So nothing is taken from a family's name:
each candidate is tried on a copy of its block, on a few tokens, and counts if the block computes what it did before.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.methods.capture import Block, BlockInputs, hooks, to_device, trace, walkable_blocks

SAME = 1e-4  # of what a block adds to its input, in float32; a wrong fold changes it by more than a tenth


@dataclass(frozen=True)
class Fold:
    """`source` can take 1/s so that `readers` may take s; names inside a block."""

    source: str
    readers: tuple[str, ...]
    first_row: int = 0  # of the channels, in the source's weight
    is_norm: bool = True
    offset: bool = False  # the norm multiplies by (1 + weight)

    @torch.no_grad()
    def apply(self, block: nn.Module, scale: Tensor) -> None:
        """Multiply the readers' input channels by `scale` [channels] and divide what the source hands them."""
        for name in self.readers:
            block.get_submodule(name).weight.mul_(scale)
        source, rows = block.get_submodule(self.source), slice(self.first_row, self.first_row + len(scale))
        weight = source.weight[rows]
        if self.offset:
            weight.copy_((1 + weight.float()) / scale - 1)
        else:
            weight.div_(scale if self.is_norm else scale[:, None])
        if getattr(source, "bias", None) is not None:
            source.bias[rows].div_(scale)


@torch.no_grad()
def find_folds(model: nn.Module, windows: Tensor) -> list[list[Fold]]:
    """Of every block, in order, the folds that leave what it computes as it is; for each layer at most one."""
    traced = trace(model, windows)
    found = []
    for block, entered, kept in zip(walkable_blocks(model), traced.entered, traced.calls, strict=True):
        trial = Block(0, block.path, copy.deepcopy(block.module).float(), {})
        batch = BlockInputs(entered.float(), [to_device(kept, torch.float32, {})])
        found.append(_proven(trial, batch, block))
    return found


def _proven(trial: Block, batch: BlockInputs, block: Block) -> list[Fold]:
    device = batch.hidden.device
    before, folds = trial(batch, device), []
    for fold in _candidates(trial, batch, block):
        if any(set(fold.readers) & set(other.readers) for other in folds):
            continue  # has one already
        channels = trial.module.get_submodule(fold.readers[0]).in_features
        powers = torch.randint(-2, 3, (channels,), generator=torch.Generator().manual_seed(0)).float()
        scale = powers.exp2().to(device)  # powers of two: exact, and exactly undone
        fold.apply(trial.module, scale)
        after = trial(batch, device)
        fold.apply(trial.module, 1 / scale)
        if (after - before).norm() <= SAME * (before - batch.hidden).norm():
            folds.append(fold)
    return folds


def _candidates(trial: Block, batch: BlockInputs, block: Block) -> Iterator[Fold]:
    """What might be folded, likeliest first: each norm whose very output is read, each earlier layer of that width."""
    outputs: dict[str, Tensor] = {}  # of norms
    inputs: dict[str, Tensor] = {}  # of linear layers, in order of execution; kept, so that no memory is used twice

    def norm(name):
        return lambda _, __, out: outputs.setdefault(name, out) if isinstance(out, Tensor) else None

    def linear(name):
        return lambda _, args: inputs.setdefault(name, args[0])

    modules = dict(trial.module.named_modules())
    linears = [name for name in block.linears if isinstance(modules.get(name), nn.Linear)]
    norms = [name for name, m in modules.items() if getattr(m, "weight", None) is not None and m.weight.dim() == 1]

    def keep(hook):  # a hook that returns something would replace the value
        return lambda *args: (hook(*args), None)[1]

    handles = [modules[name].register_forward_hook(keep(norm(name))) for name in norms]
    handles += [modules[name].register_forward_pre_hook(keep(linear(name))) for name in linears]
    with hooks(*handles):
        trial(batch, batch.hidden.device)

    readers: dict[int, list[str]] = {}
    for name, x in inputs.items():
        readers.setdefault(x.data_ptr(), []).append(name)
    for name, out in outputs.items():
        same_input = readers.get(out.data_ptr())
        if same_input and len(modules[name].weight) == modules[same_input[0]].in_features:
            for offset in (False, True):
                yield Fold(name, tuple(same_input), offset=offset)
    order = list(inputs)
    for same_input in readers.values():
        channels = modules[same_input[0]].in_features
        for name in reversed(order[: order.index(same_input[0])]):
            wide = modules[name].out_features
            if wide in (channels, 2 * channels):  # twice as many: gate and up in one matrix, up below
                yield Fold(name, tuple(same_input), first_row=wide - channels, is_norm=False)
