"""One walk through the decoder blocks: what has arrived where, and when the caller may change it."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.methods.beside import Beside
from common.methods.capture import Block, BlockInputs, Halt, hooks
from common.methods.compensation import naming
from common.methods.experts import Matrix
from common.methods.stages import Stage, Statistic, find_stages, levels_of

FEW_TOKENS = 16  # of an expert that was sent fewer, not even the sizes of its inputs are known

Observe = Callable[[int, Tensor], Statistic]
Change = Callable[[Stage, Statistic], None]
Refine = Callable[[Block, list[BlockInputs], Beside], None]


@dataclass
class Seen:
    """What has arrived at a stage so far."""

    stage: Stage
    statistic: Statistic | None = None
    tokens: int = 0
    original: tuple[Tensor, ...] = ()  # what the original network's layers are given of this batch, if asked for


@dataclass
class Visits:
    """One walk: what the caller wants, where it computes, and how many tokens each layer was shown."""

    observe: Observe
    change: Change
    device: torch.device
    total: int  # calibration tokens
    reduce: Callable[[Statistic], None] | None = None
    refine: Refine | None = None
    beside: Beside = field(default_factory=lambda: Beside([]))
    tokens: dict[str, int] = field(default_factory=dict)
    few: dict[str, int] = field(default_factory=dict)

    def arrive(self, seen: Seen, inputs: Tensor) -> None:
        rows = inputs.flatten(end_dim=-2)
        if isinstance(seen.stage.head, Matrix):
            rows = rows[rows.any(-1)]  # Llama 4 sends every token to every expert, as zeros where it was not chosen
        if seen.statistic is None:
            seen.statistic = self.observe(seen.stage.in_features, inputs)
        if len(rows):
            seen.statistic.add(rows, *seen.original)
            seen.tokens += len(rows)

    def finish(self, seen: Seen) -> None:
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

    def watching(self, stages: list[Stage], then: Callable[[Seen], None]):
        """What the stages have seen, and hooks that add to it what arrives and call `then`."""

        def watch(seen):
            def hook(_, args):
                self.arrive(seen, args[0])
                then(seen)

            return seen.stage.head.register_forward_pre_hook(hook)

        everything = [Seen(stage) for stage in stages]
        return everything, hooks(*(watch(seen) for seen in everything))

    def fetch(self, number: int, everything: list[Seen], first: bool) -> None:
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
        if len(batches) == 1 and not (at_once or repeated or self.refine):
            batches[0].hidden = self.on_arrival(block, stages, batches[0])
            return
        self.level_by_level(block, [stages] if at_once else levels_of(stages), batches, leave=not repeated)
        if self.refine is not None:
            self.refine(block, batches, self.beside)
        for batch in batches:
            batch.hidden = block(batch, self.device)
