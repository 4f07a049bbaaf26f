"""Many versions of one model measured in one walk: of none of them more than a block exists at a time.

A sweep over sparsities, patterns or ways to share out zeros changes the same dense model again and again. Kept whole,
each version is a copy of the weights, and the Hessians of all layers have to be kept for the next. Here they go
through the model side by side: at each block, what calibration gathers of its inputs is used for every version,
then forgotten; what each version's test windows have become moves on to the next block.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.measure.evaluation import Baseline, Quality, evaluate
from common.methods.beside import Beside
from common.methods.blocks import walk
from common.methods.capture import Block, BlockInputs
from common.methods.compensation import Hessian
from common.methods.stages import Linear, Statistic
from common.methods.streaming import Streamed
from common.methods.visits import Observe

Edit = Callable[[dict[str, Linear], Statistic], object]  # changes layers that read the same input, by full name


@torch.no_grad()
def evaluate_edited(
    model: nn.Module,
    calibration: Tensor,
    tests: Tensor,
    edits: dict[str, Edit],
    *,
    observe: Observe = Hessian,
    device: torch.device | str,
    batch_size: int | None = None,
    against: Baseline | None = None,
) -> dict[str, Quality]:
    """Quality on `tests` of the model under each of `edits`; the model itself stays as it is.

    Statistics are of the original's inputs (`blocks.collect`): later layers do not see what an edit did to earlier
    ones. Memory: a block and its statistics on `device`; the hidden states of all tests for every edit in main memory.
    """
    subject, device = Streamed(model, device), torch.device(device)
    entered = subject.enter(tests)
    flows = {label: [BlockInputs(batch.hidden, batch.calls) for batch in entered] for label in edits}
    stages: list[tuple[dict[str, Linear], Statistic]] = []

    def note(stage, statistic) -> None:
        stages.append((stage.named, statistic))

    def visit(block: Block, _: list[BlockInputs], __: Beside) -> None:
        before = {name: linear.weight.clone() for named, _ in stages for name, linear in named.items()}
        for label, edit in edits.items():
            for named, statistic in stages:
                edit(named, statistic)
            for batch in flows[label]:
                batch.hidden = block(batch, device)
            for named, _ in stages:
                for name, linear in named.items():
                    linear.weight.copy_(before[name])
        stages.clear()

    options = {"device": device, "store": "cpu", "batch_size": batch_size, "description": f"{len(edits)} versions"}
    walk(model, calibration, observe, note, at_once=True, refine=visit, **options)
    return {label: evaluate(_Arrived(subject, flows.pop(label)), tests, against=against) for label in edits}


class _Arrived:
    """Windows that have been through all blocks, as `evaluate` takes a model."""

    def __init__(self, subject: Streamed, batches: list[BlockInputs]):
        self.subject, self.batches = subject, batches

    def stream(self, windows: Tensor):
        return self.subject.leave(windows, self.batches)
