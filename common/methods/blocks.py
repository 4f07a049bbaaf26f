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

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from common.methods.beside import Beside
from common.methods.capture import capture, decoder_blocks, first_blocks, trace, walkable_blocks
from common.methods.experts import block_linears, one_by_one
from common.methods.requirements import require_needs
from common.methods.resume import Resume
from common.methods.stages import Linear, Stage, Statistic
from common.methods.visits import Change, Observe, Refine, Visits

__all__ = [
    "block_linears",
    "by_statistic",
    "collect",
    "decoder_blocks",
    "first_blocks",
    "iter_linears",
    "walk",
]


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
    refine: Refine | None = None,
    resume: Resume | None = None,
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
    refine(block, batches, beside): called once all layers of a block have been changed, with what the block is given
    here and (beside.batches) in the original network; it may change the block again, before the data flows on.
    resume: where finished blocks are kept; those of an interrupted run are put in place, not visited again.
    Returns how many tokens reached each layer that was visited. Warns of experts that were sent too few: a Hessian of
    fewer than two tokens per input does more harm than good (GPTQ then errs up to twice as much as rounding to
    nearest), so only the size of each input counts; of fewer than FEW_TOKENS not even that: GPTQ rounds to nearest,
    Wanda compares |W|.
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
    work = Visits(observe, change, device, windows.numel(), reduce, refine)
    with one_by_one(model):
        batches = capture(model, windows, batch_size or len(windows), device, store, traced.extras)
        shown = capture(model, windows[:1, : traced.tokens], 1, device, store, traced.extras)[0]
        work.beside = Beside.of(batches if beside else [])
        for block in tqdm(blocks, desc=description, unit="block"):
            block.module.to(device)
            shown.hidden = traced.entered[block.index]
            with work.beside.along(block, device):
                if resume is not None and resume.restore(block):
                    for batch in batches:
                        batch.hidden = block(batch, device)
                else:
                    work.through(block, shown, batches, at_once)
                    if resume is not None:
                        resume.keep(block)
            block.module.to(home)
    _warn(work)
    return work.tokens


def _warn(work: Visits) -> None:
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
