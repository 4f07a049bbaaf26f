"""Evaluation of a model that is larger than the card: all windows flow through one block after another."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from common.methods.capture import Block, BlockInputs, blocks_replaced, capture, decoder_blocks, stand_ins, trace


@dataclass(frozen=True)
class Streamed:
    """A model of which one decoder block at a time is on `device`, and otherwise only what is around the blocks."""

    model: nn.Module
    device: str | torch.device

    @torch.no_grad()
    def stream(self, windows: Tensor) -> Iterator[Tensor]:
        """The logits [seqlen, vocabulary] of each of `windows` [n, seqlen], on `device`.

        What follows the blocks (norm, head, a logit scale or soft cap) is the model's own code. Between blocks the
        hidden states of all windows wait where the model lives. Raises ValueError where its blocks cannot be called
        one by one (`capture.trace`).
        """
        self.model.eval()
        device, home = torch.device(self.device), self.model.get_input_embeddings().weight.device
        blocks = [Block(index, "", module, {}) for index, module in enumerate(decoder_blocks(self.model))]
        extras = trace(self.model, windows, blocks).extras
        batches = capture(self.model, windows, 1, device, home, extras)
        for block in tqdm(blocks, desc="stream", unit="block", leave=False):
            block.module.to(device)
            for batch in batches:
                batch.hidden = block(batch, device)
            block.module.to(home)
        with _surroundings_on(self.model, device, home):
            for ids, batch in zip(windows, batches, strict=True):
                yield self._logits(ids.to(device), batch, extras)

    def _logits(self, ids: Tensor, batch: BlockInputs, extras: list[tuple | None]) -> Tensor:
        """One pass of the model in which the blocks do nothing but hand on what they have computed before."""

        def forward(index, hidden, args, kwargs):
            hidden = batch.hidden.to(ids.device)
            return hidden if extras[index] is None else (hidden, *extras[index])

        with stand_ins(decoder_blocks(self.model), forward):
            return self.model(input_ids=ids[None], use_cache=False).logits[0]


@contextmanager
def _surroundings_on(model: nn.Module, device: torch.device, home: torch.device):
    """Everything but the blocks on `device`, for a while."""
    with blocks_replaced(model, nn.ModuleList()):
        model.to(device)
    try:
        yield
    finally:
        with blocks_replaced(model, nn.ModuleList()):
            model.to(home)
