"""The one walker over decoder blocks, on which every post-training method of this course stands.

A network of 7B parameters does not fit on a small card together with its calibration data, but one block does.
So the walker visits the blocks in order. Inside a block it stops wherever linear layers share an input
(q/k/v · o · gate/up · down), gathers a statistic of that input over all calibration data, lets the caller
change those layers, and only then lets the data flow on, through the layers as changed.
Every layer is thus calibrated on what it will really receive in the compressed network. (Wanda's authors look at the
whole block before they change it: `at_once`.)
"""

import copy
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
    """The decoder blocks of a Hugging Face causal LM (Llama, Mistral, Qwen, Gemma, OPT, ...), in order."""
    layers = model.config.get_text_config().num_hidden_layers
    candidates = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no list of {layers} decoder blocks that could be walked.")
    return candidates[0]


def first_blocks(model: nn.Module, count: int) -> nn.Module:
    """A copy of `model` that ends after its first `count` blocks: small enough to study closely."""
    blocks = decoder_blocks(model)
    owner = model.get_submodule(next(name for name, m in model.named_modules() if m is blocks).rpartition(".")[0])
    attribute = next(name for name, m in owner.named_children() if m is blocks)
    setattr(owner, attribute, blocks[:count])  # so that only these are copied
    try:
        shallow = copy.deepcopy(model)
    finally:
        setattr(owner, attribute, blocks)
    config = shallow.config.get_text_config()
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):  # one per block, else transformers refuses to load what it saved
        config.layer_types = config.layer_types[:count]
    return shallow


def block_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a block by name; ValueError when it has none."""
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    if not linears:
        raise ValueError(f"{type(block).__name__} has no torch.nn.Linear layer: is the model already quantized?")
    return linears


@dataclass
class _Batch:
    """What blocks are called with: hidden states [batch, seqlen, hidden], and keyword arguments for each block.

    The latter differ where attention does: some models (Qwen2, Gemma) have a sliding window in some blocks only.
    """

    hidden: Tensor
    kwargs: list[dict]

    def through(self, index: int, block: nn.Module, device: torch.device) -> Tensor:
        out = block(self.hidden.to(device), **self.kwargs[index])
        return out[0] if isinstance(out, tuple) else out


@contextmanager
def _hooks(*handles):
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _to(value, device, moved: dict):
    """Move the tensors inside a keyword argument (a tensor, or a tuple of them) to `device`, each only once."""
    if isinstance(value, Tensor):
        if id(value) not in moved:
            moved[id(value)] = value, value.to(device)  # the first keeps the id taken
        return moved[id(value)][1]
    if isinstance(value, tuple):
        return tuple(_to(item, device, moved) for item in value)
    return value


def _capture(model, blocks, windows: Tensor, batch_size: int, device, store) -> list[_Batch]:
    """Run the part around the blocks (embedding, positions, masks) and keep what reaches them; they compute nothing."""
    captured: list[_Batch] = []

    def stand_in(index):
        def forward(*args, **kwargs):
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if index == 0:
                moved.clear()
                captured.append(_Batch(hidden.to(store), []))
            captured[-1].kwargs.append({name: _to(value, device, moved) for name, value in kwargs.items()})
            if index == len(blocks) - 1:
                raise _Halt
            return hidden

        return forward

    moved: dict = {}
    home = model.get_input_embeddings().weight.device
    try:
        for index, block in enumerate(blocks):
            block.forward = stand_in(index)
        for ids in windows.split(batch_size):
            try:
                model(input_ids=ids.to(home), use_cache=False)
            except _Halt:
                continue
    finally:
        for block in blocks:
            del block.forward
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
        batch.through(index, block, device)
    return [Stage(index, linears) for _, linears in groups]


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
                    outputs.append(batch.through(stages[0].block_index, block, device).to(batch.hidden.device))
                except _Halt:
                    continue
            if len(outputs) == len(batches):
                return outputs


def _flow_at_once(block, stages: list[Stage], batches: list[_Batch], observe: Observe, change: Change, device):
    """Observe all stages in one pass of the block as it was, change them all, then move the batches through."""
    index, statistics = stages[0].block_index, [None] * len(stages)

    def arrive(number):
        def hook(_, args):
            if statistics[number] is None:
                statistics[number] = observe(stages[number].in_features, args[0])
            statistics[number].add(args[0].flatten(end_dim=-2))

        return hook

    heads = [next(iter(stage.linears.values())) for stage in stages]
    with _hooks(*(linear.register_forward_pre_hook(arrive(i)) for i, linear in enumerate(heads))):
        for batch in batches:
            batch.through(index, block, device)
    for stage, statistic in zip(stages, statistics, strict=True):
        change(stage, statistic)
    return [batch.through(index, block, device).to(batch.hidden.device) for batch in batches]


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
    at_once: bool = False,
    reduce: Callable[[Statistic], None] | None = None,
    description: str = "blocks",
) -> None:
    """Visit every linear layer of every decoder block with the inputs it receives from the blocks before it.

    windows: calibration tokens [nsamples, seqlen].
    observe(in_features, inputs) makes an empty statistic; change(stage, statistic) may modify stage.linears.
    device: where a block computes; blocks are brought there one at a time and put back (default: where they are).
    batch_size: sequences per forward pass (default: all at once, which costs one pass instead of five).
    store: where activations wait between blocks (default: `device`; "cpu" saves GPU memory).
    at_once: observe the whole block before any of its layers is changed: two passes, however many batches.
    reduce: called with each statistic once it has seen all windows, before `change`: several processes add up theirs.
    """
    if windows.dim() != 2 or len(windows) == 0:
        raise ValueError(f"Calibration windows must be [nsamples ≥ 1, seqlen], got shape {tuple(windows.shape)}.")
    model.eval()
    blocks, flow = decoder_blocks(model), _flow_at_once if at_once else _flow
    if reduce is not None:
        alone = change

        def change(stage: Stage, statistic: Statistic) -> None:
            reduce(statistic)
            alone(stage, statistic)

    home = next(blocks[0].parameters()).device
    device = torch.device(device or home)
    store = torch.device(store or device)
    batches = _capture(model, blocks, windows, batch_size or len(windows), device, store)
    one = _capture(model, blocks, windows[:1], 1, device, store)[0]
    for index, block in enumerate(tqdm(blocks, desc=description, unit="block")):
        block.to(device)
        stages = _stages(index, block, one, device)
        for batch, hidden in zip(batches, flow(block, stages, batches, observe, change, device), strict=True):
            batch.hidden = hidden
        block.to(home)


def collect(model: nn.Module, windows: Tensor, observe: Observe, **options) -> dict[str, Statistic]:
    """Statistics of every linear layer's input in the model as it is: layer name → statistic (shared within a stage).

    `options` go to `walk`. Memory: one statistic per stage, four per block; Hessians of a 7B model do not fit.
    """
    names = {linear: name for name, linear in iter_linears(model)}
    found = {}

    def note(stage: Stage, statistic: Statistic) -> None:
        found.update({names[linear]: statistic for linear in stage.linears.values()})

    walk(model, windows, observe, note, **{"description": "collect"} | options)
    return found


def by_statistic(model: nn.Module, statistics: dict[str, Statistic]) -> Iterator[dict[str, nn.Linear]]:
    """Linear layers by name, those that share a statistic of `collect` together, in order of the first of them."""
    stages: dict[int, dict[str, nn.Linear]] = {}
    for name, linear in iter_linears(model):
        stages.setdefault(id(statistics[name]), {})[name] = linear
    yield from tqdm(stages.values(), desc="layers", unit="stage", leave=False)


def iter_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear layer of the decoder blocks as (full name, layer): what compression changes."""
    blocks = decoder_blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    for index, block in enumerate(blocks):
        for name, linear in block_linears(block).items():
            yield f"{prefix}.{index}.{name}", linear
