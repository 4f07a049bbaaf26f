"""The original network beside the one that is being compressed: the same tokens, through the blocks as they were."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from common.methods.capture import Block, BlockInputs, Halt, hooks
from common.methods.experts import Matrix, block_linears
from common.methods.stages import Stage


@dataclass
class Beside:
    """What flows through the original blocks, a `BlockInputs` for each batch of the walk; none where nobody asks."""

    batches: list[BlockInputs]
    block: Block | None = None  # the current one, as it was

    @classmethod
    def of(cls, batches: list[BlockInputs]) -> "Beside":
        """Before the first block both networks are given the same."""
        return cls([BlockInputs(batch.hidden, batch.calls) for batch in batches])

    @contextmanager
    def along(self, block: Block, device: torch.device) -> Iterator[None]:
        """Keep `block` as it is now, while it is being changed; then let every batch flow on through the original."""
        if self.batches:
            module = copy.deepcopy(block.module)
            self.block = Block(block.index, block.path, module, block_linears(module))
        yield
        for batch in self.batches:
            batch.hidden = self.block(batch, device)
        self.block = None

    def inputs(self, number: int, stages: list[Stage], device: torch.device, first: bool) -> list[tuple[Tensor, ...]]:
        """What the original's layers of each stage are given of a batch: [tokens, in_features], or nothing.

        first: the pass ends when it has reached the first stage. Raises ValueError where experts are sent tokens of
        their own: the two networks do not send the same ones.
        """
        if not self.batches:
            return [() for _ in stages]
        if any(isinstance(stage.head, Matrix) or "expert" in stage.kind for stage in stages):
            raise ValueError(
                f"{stages[0].path} has experts: the original sends them other tokens than the network that is being "
                "quantized, and asymmetric calibration compares token by token. Quantize this model with GPTQ."
            )
        found: dict[str, Tensor] = {}

        def watch(name):
            def hook(_, args):
                found[name] = args[0].flatten(end_dim=-2)
                if first:
                    raise Halt

            return self.block.linears[name].register_forward_pre_hook(hook)

        heads = [next(iter(stage.linears)) for stage in stages]
        with hooks(*map(watch, heads)), suppress(Halt):
            self.block(self.batches[number], device)
        return [(found[head],) for head in heads]
