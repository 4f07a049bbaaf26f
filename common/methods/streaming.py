"""A model that is larger than the card: one decoder block at a time is there, and nothing is copied back."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from common.measure.evaluation import windows_together
from common.methods.capture import Block, BlockInputs, blocks_replaced, capture, decoder_blocks, hooks, stand_ins, trace


@contextmanager
def lent(module: nn.Module, device: torch.device | str):
    """`module` on `device`, for a while; then its own tensors again, the very same: what was changed there is lost."""
    own = [(parameter, parameter.data) for parameter in module.parameters()]
    buffers = [(part, dict(part.named_buffers(recurse=False))) for part in module.modules()]
    module.to(device)
    try:
        yield module
    finally:
        for parameter, data in own:
            parameter.data = data
        for part, tensors in buffers:
            for name, tensor in tensors.items():
                setattr(part, name, tensor)


@contextmanager
def offloaded(model: nn.Module, device: torch.device | str):
    """The model's own forward pass on `device`, where one block at a time is; every pass reads all weights anew."""
    with surroundings_lent(model, device), ExitStack() as stack:
        for block in decoder_blocks(model):
            there = stack.enter_context(ExitStack())  # closed at the end where a pass ends half-way, too
            before = block.register_forward_pre_hook(partial(_bring, there, device))
            stack.enter_context(hooks(before, block.register_forward_hook(partial(_leave, there))))
        yield model


def _bring(there: ExitStack, device, block: nn.Module, _) -> None:
    there.enter_context(lent(block, device))


def _leave(there: ExitStack, *_) -> None:
    there.close()


@contextmanager
def surroundings_lent(model: nn.Module, device: torch.device | str):
    """Everything but the blocks on `device`, for a while."""
    with ExitStack() as stack:
        with blocks_replaced(model, nn.ModuleList()):
            stack.enter_context(lent(model, device))
        yield


@dataclass
class Streamed:
    """A model of which one decoder block at a time is on `device`, and otherwise only what is around the blocks."""

    model: nn.Module
    device: str | torch.device
    extras: list[tuple | None] | None = field(default=None, repr=False)  # what `trace` found; proven once

    @torch.no_grad()
    def enter(self, windows: Tensor) -> list[BlockInputs]:
        """What reaches the first block of windows [n, seqlen], some at a time; it waits where the model lives.

        Raises ValueError where the model's blocks cannot be called one by one (`capture.trace`).
        """
        self.model.eval()
        home = self.model.get_input_embeddings().weight.device
        if self.extras is None:
            self.extras = trace(self.model, windows, self.blocks()).extras
        return capture(self.model, windows, self._together(windows), torch.device(self.device), home, self.extras)

    def blocks(self) -> list[Block]:
        return [Block(index, "", module, {}) for index, module in enumerate(decoder_blocks(self.model))]

    def _together(self, windows: Tensor) -> int:
        return windows_together(windows, torch.device(self.device))

    @torch.no_grad()
    def stream(self, windows: Tensor) -> Iterator[Tensor]:
        """The logits [seqlen, vocabulary] of each of `windows` [n, seqlen], on `device`.

        What follows the blocks (norm, head, a logit scale or soft cap) is the model's own code. Between blocks the
        hidden states of all windows wait where the model lives. Raises what `enter` raises.
        """
        batches = self.enter(windows)
        for block in tqdm(self.blocks(), desc="stream", unit="block", leave=False):
            with lent(block.module, self.device):
                for batch in batches:
                    batch.hidden = block(batch, torch.device(self.device))
        yield from self.leave(windows, batches)

    @torch.no_grad()
    def leave(self, windows: Tensor, batches: list[BlockInputs]) -> Iterator[Tensor]:
        """The logits of windows that have been through all blocks, as `stream` gives them."""
        with surroundings_lent(self.model, self.device):
            for ids, batch in zip(windows.split(self._together(windows)), batches, strict=True):
                yield from self._logits(ids.to(self.device), batch)

    def _logits(self, ids: Tensor, batch: BlockInputs) -> Tensor:
        """One pass of the model in which the blocks do nothing but hand on what they have computed before."""

        def forward(index, hidden, args, kwargs):
            hidden, extras = batch.hidden.to(ids.device), self.extras[index]
            return hidden if extras is None else (hidden, *extras)

        with stand_ins(decoder_blocks(self.model), forward):
            return self.model(input_ids=ids, use_cache=False).logits
