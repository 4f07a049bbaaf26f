"""The linear layers of a block in the order in which they run, those that read the same input together."""

import re
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from common.methods.capture import Block, BlockInputs, hooks
from common.methods.experts import Matrix


class Statistic(Protocol):
    """What is gathered of a linear layer's input. `add` receives [tokens, in_features] activations."""

    def add(self, inputs: Tensor) -> None: ...


Linear = nn.Linear | Matrix


@dataclass(frozen=True)
class Stage:
    """Linear layers of one block that read the same input, by their name inside the block."""

    block_index: int
    linears: dict[str, Linear]
    path: str  # of the block in the model: `model.layers.7`

    @property
    def head(self) -> Linear:
        """The layer that the input reaches first."""
        return next(iter(self.linears.values()))

    @property
    def in_features(self) -> int:
        return self.head.in_features

    @property
    def named(self) -> dict[str, Linear]:
        """The layers by their full names."""
        return {f"{self.path}.{name}": linear for name, linear in self.linears.items()}

    @property
    def kind(self) -> str:
        """The same for the same matrix of all experts, `mlp.experts.*.down_proj`; otherwise the first layer's name."""
        name = next(iter(self.linears))
        return re.sub(r"\.\d+(?=\.|$)", ".*", name) if "expert" in name or isinstance(self.head, Matrix) else name


def find_stages(block: Block, batches: list[BlockInputs], device) -> tuple[list[Stage], bool]:
    """Group a block's layers by the input they share, in order of execution; and does one of them run twice?

    The first batch shows it, unless none of its tokens is routed to some expert: then the next one is looked at.
    """
    stages, missing, repeated = [], dict(block.linears), False

    def watch(name, linear):
        def hook(_, args):
            nonlocal repeated
            repeated |= name in arrived
            arrived.add(name)
            if missing.pop(name, None) is not None:
                groups.setdefault(id(args[0]), (args[0], {}))[1][name] = linear  # the tensor keeps its id taken

        return linear.register_forward_pre_hook(hook)

    for batch in batches:
        groups: dict[int, tuple[Tensor, dict[str, Linear]]] = {}
        arrived: set[str] = set()
        with hooks(*(watch(name, linear) for name, linear in block.linears.items())):
            block(batch, device)
        stages += [Stage(block.index, linears, block.path) for _, linears in groups.values()]
        if not missing:
            break
    return stages + [Stage(block.index, {name: linear}, block.path) for name, linear in missing.items()], repeated


def levels_of(stages: list[Stage]) -> list[list[Stage]]:
    """Stages to be observed in the same pass: the same matrix of every expert. Any other is alone."""
    levels: dict[str, list[Stage]] = {}
    for stage in stages:
        levels.setdefault(stage.kind, []).append(stage)
    return list(levels.values())
