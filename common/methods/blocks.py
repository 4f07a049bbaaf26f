"""The one walker over decoder blocks, on which every post-training method of this course stands.

A network of 7B parameters does not fit on a small card together with its calibration data, but one block does.
So the walker visits the blocks in order. Inside a block it stops wherever linear layers share an input
(q/k/v · o · gate/up · down), gathers a statistic of that input over all calibration data, lets the caller
change those layers, and only then lets the data flow on, through the layers as changed.
Every layer is thus calibrated on what it will really receive in the compressed network. (Wanda's authors look at the
whole block before they change it: `at_once`.)

In a mixture of experts each expert receives other tokens; the matrices of all experts are visited together, each with
a statistic of its own.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from common.methods.beside import Beside
from common.methods.capture import (
    Block,
    BlockInputs,
    Halt,
    capture,
    decoder_blocks,
    first_blocks,
    hooks,
    trace,
    walkable_blocks,
)
from common.methods.compensation import naming
from common.methods.experts import Matrix, block_linears, one_by_one
from common.methods.requirements import require_needs
from common.methods.stages import Linear, Stage, Statistic, find_stages, levels_of

__all__ = [
    "block_linears",
    "by_statistic",
    "collect",
    "decoder_blocks",
    "first_blocks",
    "iter_linears",
    "walk",
]

FEW_TOKENS = 16  # of an expert that was sent fewer, not even the sizes of its inputs are known


Observe = Callable[[int, Tensor], Statistic]
Change = Callable[["Stage", Statistic], None]


@dataclass
class _Seen:
    """What has arrived at a stage so far."""

    stage: Stage
    statistic: Statistic | None = None
    tokens: int = 0
    original: tuple[Tensor, ...] = ()  # what the original network's layers are given of this batch, if asked for


@dataclass
class _Walk:
    """One walk: what the caller wants, where it computes, and how many tokens each layer was shown."""

    observe: Observe
    change: Change
    device: torch.device
    total: int  # calibration tokens
    reduce: Callable[[Statistic], None] | None = None
    beside: Beside = field(default_factory=lambda: Beside([]))
    tokens: dict[str, int] = field(default_factory=dict)
    few: dict[str, int] = field(default_factory=dict)

    def arrive(self, seen: _Seen, inputs: Tensor) -> None:
        rows = inputs.flatten(end_dim=-2)
        if isinstance(seen.stage.head, Matrix):
            rows = rows[rows.any(-1)]  # Llama 4 sends every token to every expert, as zeros where it was not chosen
        if seen.statistic is None:
            seen.statistic = self.observe(seen.stage.in_features, inputs)
        if len(rows):
            seen.statistic.add(rows, *seen.original)
            seen.tokens += len(rows)

    def finish(self, seen: _Seen) -> None:
        """Let the caller change a stage. An expert with too few tokens is taken to have independent inputs."""
        stage = seen.stage
        if self.reduce is not None:
            self.reduce(seen.statistic)
        self.tokens |= dict.fromkeys(stage.named, seen.tokens)
        with naming(stage.named):  # `hasattr` reads it
            enough = 2 * stage.in_features if hasattr(seen.statistic, "matrix") else FEW_TOKENS
        if seen.tokens < min(enough, self.total):
            sizes = torch.ones(stage.in_features, device=self.device)
            if seen.tokens >= FEW_TOKENS:
                sizes = getattr(seen.statistic, "norms", sizes)
            seen.statistic = self.observe(stage.in_features, sizes)
            seen.statistic.add(sizes.diag())
            self.few[stage.path + "." + next(iter(stage.linears))] = seen.tokens
        self.change(stage, seen.statistic)

    def watching(self, stages: list[Stage], then: Callable[[_Seen], None]):
        """What the stages have seen, and hooks that add to it what arrives and call `then`."""

        def watch(seen):
            def hook(_, args):
                self.arrive(seen, args[0])
                then(seen)

            return seen.stage.head.register_forward_pre_hook(hook)

        everything = [_Seen(stage) for stage in stages]
        return everything, hooks(*(watch(seen) for seen in everything))

    def fetch(self, number: int, everything: list[_Seen], first: bool) -> None:
        """What the original network's layers are given of a batch, where it flows beside."""
        found = self.beside.inputs(number, [seen.stage for seen in everything], self.device, first)
        for seen, original in zip(everything, found, strict=True):
            seen.original = original

    def level_by_level(self, block: Block, levels: list[list[Stage]], batches: list[BlockInputs], leave: bool) -> None:
        """Gather what all batches bring to a level, change it, and go on to the next.

        leave: a pass ends when it has reached the level; what follows must wait for the change anyway.
        """

        def then(_):
            if leave:
                raise Halt

        for stages in levels:
            leave = leave and len(stages) == 1
            everything, watched = self.watching(stages, then)
            with watched:
                for number, batch in enumerate(batches):
                    self.fetch(number, everything, first=leave)
                    with suppress(Halt):
                        block(batch, self.device)
            for seen in everything:
                self.finish(seen)

    def on_arrival(self, block: Block, stages: list[Stage], batch: BlockInputs) -> Tensor:
        """Change each stage when its input arrives, in a single pass: with one batch nothing has to wait."""
        everything, watched = self.watching(stages, self.finish)
        self.fetch(0, everything, first=False)
        with watched:
            hidden = block(batch, self.device)
        for seen in everything:
            if seen.statistic is None:
                self.finish(seen)  # an expert without a token
        return hidden

    def through(self, block: Block, shown: BlockInputs, batches: list[BlockInputs], at_once: bool) -> None:
        """Visit one block with all batches, and let them flow on through it as changed."""
        stages, repeated = find_stages(block, [shown, *batches], self.device)
        if len(batches) == 1 and not (at_once or repeated):
            batches[0].hidden = self.on_arrival(block, stages, batches[0])
            return
        self.level_by_level(block, [stages] if at_once else levels_of(stages), batches, leave=not repeated)
        for batch in batches:
            batch.hidden = block(batch, self.device)


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
    beside: bool = False,
    description: str = "blocks",
) -> dict[str, int]:
    """Visit every linear layer of every decoder block with the inputs it receives from the blocks before it.

    windows: calibration tokens [nsamples, seqlen].
    observe(in_features, inputs) makes an empty statistic; change(stage, statistic) may modify stage.linears.
    device: where a block computes; blocks are brought there one at a time and put back (default: where they are).
    batch_size: sequences per forward pass (default: all at once, which costs one pass instead of five).
    store: where activations wait between blocks (default: `device`; "cpu" saves GPU memory).
    at_once: observe the whole block before any of its layers is changed: two passes, however many batches.
    reduce: called with each statistic once it has seen all windows, before `change`: several processes add up theirs.
    beside: let the original network flow along; a statistic is given its inputs too, `add(inputs, original)`. Memory:
    one block and all hidden states a second time.
    Returns how many tokens reached each layer. Warns of experts that were sent too few: a Hessian of fewer than two
    tokens per input does more harm than good (GPTQ then errs up to twice as much as rounding to nearest), so only the
    size of each input counts; of fewer than FEW_TOKENS not even that: GPTQ rounds to nearest, Wanda compares |W|.
    Raises ValueError, before the first change, where the model cannot be walked (`requirements`, `capture.trace`).
    """
    if windows.dim() != 2 or len(windows) == 0:
        raise ValueError(f"Calibration windows must be [nsamples ≥ 1, seqlen], got shape {tuple(windows.shape)}.")
    model.eval()
    require_needs(model, "calibration" if reduce is None else "calibration by several processes")
    traced, blocks = trace(model, windows), walkable_blocks(model)
    home = next(blocks[0].module.parameters()).device
    device = torch.device(device or home)
    store = torch.device(store or device)
    work = _Walk(observe, change, device, windows.numel(), reduce)
    with one_by_one(model):
        batches = capture(model, windows, batch_size or len(windows), device, store, traced.extras)
        shown = capture(model, windows[:1, : traced.tokens], 1, device, store, traced.extras)[0]
        work.beside = Beside.of(batches if beside else [])
        for block in tqdm(blocks, desc=description, unit="block"):
            block.module.to(device)
            shown.hidden = traced.entered[block.index]
            with work.beside.along(block, device):
                work.through(block, shown, batches, at_once)
            block.module.to(home)
    _warn(work)
    return work.tokens


def _warn(work: _Walk) -> None:
    if work.few:
        some = ", ".join(f"{name} ({tokens})" for name, tokens in list(work.few.items())[:3])
        warnings.warn(
            f"{len(work.few)} groups of matrices (mostly experts) were sent too few calibration tokens: {some}. Their "
            "inputs were taken to be independent, and alike where hardly any came; more text reaches more experts.",
            stacklevel=4,
        )


def collect(model: nn.Module, windows: Tensor, observe: Observe, **options) -> dict[str, Statistic]:
    """Statistics of every linear layer's input in the model as it is: layer name → statistic (shared within a stage).

    `options` go to `walk`. Memory: one statistic per stage, four per block; Hessians of a 7B model do not fit.
    """
    found = {}

    def note(stage: Stage, statistic: Statistic) -> None:
        found.update(dict.fromkeys(stage.named, statistic))

    walk(model, windows, observe, note, **{"description": "collect"} | options)
    return found


def by_statistic(model: nn.Module, statistics: dict[str, Statistic]) -> Iterator[dict[str, Linear]]:
    """Linear layers by name, those that share a statistic of `collect` together, in order of the first of them."""
    stages: dict[int, dict[str, Linear]] = {}
    for name, linear in iter_linears(model):
        stages.setdefault(id(statistics[name]), {})[name] = linear
    yield from tqdm(stages.values(), desc="layers", unit="stage", leave=False)


def iter_linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Every linear layer of the decoder blocks as (full name, layer): what compression changes."""
    for block in walkable_blocks(model):
        for name, linear in block.linears.items():
            yield f"{block.path}.{name}", linear
