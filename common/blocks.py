"""The one walker over decoder blocks, on which every post-training method of this course stands.

A network of 7B parameters does not fit on a small card together with its calibration data, but one block does.
So the walker visits the blocks in order. Inside a block it stops wherever linear layers share an input
(q/k/v · o · gate/up · down), gathers a statistic of that input over all calibration data, lets the caller
change those layers, and only then lets the data flow on, through the layers as changed.
Every layer is thus calibrated on what it will really receive in the compressed network.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm


class Statistic(Protocol):
    """What is gathered of a linear layer's input. `add` receives [tokens, in_features] activations."""

    def add(self, inputs: Tensor) -> None: ...


Observe = Callable[[int, Tensor], Statistic]
Change = Callable[["Stage", Statistic], None]


@dataclass(frozen=True)
class Stage:
    """Linear layers of one block that read the same input, by their name inside the block."""

    block_index: int
    linears: dict[str, nn.Linear]

    @property
    def in_features(self) -> int:
        return next(iter(self.linears.values())).in_features


class _Halt(Exception):
    """Raised inside a forward pass to leave it once what was wanted has been seen."""


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a Hugging Face causal LM (Llama, Mistral, Qwen, OPT, GPT-2, ...), in order."""
    layers = model.config.get_text_config().num_hidden_layers
    candidates = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no list of {layers} decoder blocks that could be walked.")
    return candidates[0]


def block_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a block by name; ValueError when it has none."""
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    if not linears:
        raise ValueError(f"{type(block).__name__} has no torch.nn.Linear layer: is the model already quantized?")
    return linears


@dataclass
class _Batch:
    """What a block is called with: hidden states [batch, seqlen, hidden] and the block's keyword arguments."""

    hidden: Tensor
    kwargs: dict

    def through(self, block: nn.Module, device: torch.device) -> Tensor:
        out = block(self.hidden.to(device), **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


@contextmanager
def _hooks(*handles):
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _to(value, device):
    """Move the tensors inside a keyword argument (a tensor, or a tuple of them) to `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    return value


def _capture(model, blocks, windows: Tensor, batch_size: int, device, store) -> list[_Batch]:
    """Run the part before the first block (embedding, positions, mask) and keep what reaches that block."""
    captured: list[_Batch] = []

    def keep(_, args, kwargs):
        hidden = args[0] if args else kwargs.pop("hidden_states")
        captured.append(_Batch(hidden.to(store), {name: _to(value, device) for name, value in kwargs.items()}))
        raise _Halt

    home = model.get_input_embeddings().weight.device
    with _hooks(blocks[0].register_forward_pre_hook(keep, with_kwargs=True)):
        for ids in windows.split(batch_size):
            try:
                model(input_ids=ids.to(home), use_cache=False)
            except _Halt:
                continue
    return captured


def _stages(index: int, block: nn.Module, batch: _Batch, device) -> list[Stage]:
    """Group a block's linear layers by the input they share, in order of execution, by watching one sequence."""
    groups: list[tuple[Tensor, dict[str, nn.Linear]]] = []

    def watch(name, linear):
        def hook(_, args):
            if not groups or groups[-1][0] is not args[0]:
                groups.append((args[0], {}))
            groups[-1][1][name] = linear

        return linear.register_forward_pre_hook(hook)

    with _hooks(*(watch(name, linear) for name, linear in block_linears(block).items())):
        one = {name: _first_row(value, len(batch.hidden)) for name, value in batch.kwargs.items()}
        _Batch(batch.hidden[:1], one).through(block, device)
    return [Stage(index, linears) for _, linears in groups]


def _first_row(value, batch_size: int):
    if isinstance(value, tuple):
        return tuple(_first_row(item, batch_size) for item in value)
    if isinstance(value, Tensor) and value.dim() > 1 and len(value) == batch_size:
        return value[:1]
    return value


def _flow(block: nn.Module, stages: list[Stage], batches: list[_Batch], observe: Observe, change: Change, device):
    """Move all batches through the block, changing each stage's layers once every batch has reached them.

    A batch that arrives at a stage waits (its pass is left, and begun anew later) until the last one arrives.
    With a single batch nothing ever waits, so the whole block costs one pass.
    """
    position, statistic, last = 0, None, False

    def arrive(stage_index):
        def hook(_, args):
            nonlocal position, statistic
            if stage_index != position:
                return  # an earlier stage, changed already
            stage = stages[position]
            if statistic is None:
                statistic = observe(stage.in_features, args[0])
            statistic.add(args[0].flatten(end_dim=-2))
            if last:
                change(stage, statistic)
                position, statistic = position + 1, None
            if len(batches) > 1:
                raise _Halt

        return hook

    heads = [next(iter(stage.linears.values())) for stage in stages]
    with _hooks(*(linear.register_forward_pre_hook(arrive(i)) for i, linear in enumerate(heads))):
        while True:
            outputs = []
            for number, batch in enumerate(batches, start=1):
                last = number == len(batches)
                try:
                    outputs.append(batch.through(block, device).to(batch.hidden.device))
                except _Halt:
                    continue
            if len(outputs) == len(batches):
                return outputs


@torch.no_grad()
def walk(
    model: nn.Module,
    windows: Tensor,
    observe: Observe,
    change: Change,
    *,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    store: str | torch.device | None = None,
    description: str = "blocks",
) -> None:
    """Visit every linear layer of every decoder block with the inputs it receives from the blocks before it.

    windows: calibration tokens [nsamples, seqlen].
    observe(in_features, inputs) makes an empty statistic; change(stage, statistic) may modify stage.linears.
    device: where a block computes; blocks are brought there one at a time and put back (default: where they are).
    batch_size: sequences per forward pass (default: all at once, which costs one pass instead of five).
    store: where activations wait between blocks (default: `device`; "cpu" saves GPU memory).
    """
    if windows.dim() != 2 or len(windows) == 0:
        raise ValueError(f"Calibration windows must be [nsamples ≥ 1, seqlen], got shape {tuple(windows.shape)}.")
    blocks = decoder_blocks(model)
    home = next(blocks[0].parameters()).device
    device = torch.device(device or home)
    store = torch.device(store or device)
    batches = _capture(model, blocks, windows, batch_size or len(windows), device, store)
    for index, block in enumerate(tqdm(blocks, desc=description, unit="block")):
        block.to(device)
        stages = _stages(index, block, batches[0], device)
        for batch, hidden in zip(batches, _flow(block, stages, batches, observe, change, device), strict=True):
            batch.hidden = hidden
        block.to(home)


def iter_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear layer of the decoder blocks as (full name, layer): what compression changes."""
    blocks = decoder_blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    for index, block in enumerate(blocks):
        for name, linear in block_linears(block).items():
            yield f"{prefix}.{index}.{name}", linear
