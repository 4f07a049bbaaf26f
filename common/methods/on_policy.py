"""On-policy distillation: the student writes, the teacher corrects (GKD, Agarwal et al., 2024, arXiv:2306.13649).

The loss is that of any distillation (`common.methods.training.Objective`); only who wrote the text is new. Sampling
is not differentiated through.
"""

import copy
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from common.measure.benchmarking import release_memory, synchronize
from common.measure.cuda_graph import graphed
from common.methods.speculative import draw
from common.methods.static_cache import Reader, require_static_cache
from common.methods.training import DistillationTrainer


class Writer:
    """What a model writes itself, token by token from its own distribution; on a GPU one step is a CUDA graph.

    Unlike `common.methods.writing.continuations` nothing is forbidden: after an end of text it goes on. Raises
    ValueError as `require_static_cache`.
    """

    def __init__(self, model: nn.Module, batch: int, length: int):
        require_static_cache(model)
        self.model, self.length, self.device = model, length, model.device
        self.reader = Reader(model, batch, length + 4)  # a graph is run three times before it is recorded
        self.windows = torch.zeros(batch, length + 4, dtype=torch.long, device=self.device)
        self.position = torch.zeros((), dtype=torch.long, device=self.device)  # of the last token that is known
        self.step = None

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        """Write as `student` does now: its weights, rounded to this model's type."""
        for mine, theirs in zip(self.model.parameters(), student.parameters(), strict=True):
            mine.copy_(theirs)

    def _step(self) -> Tensor:
        at = self.position[None]
        logits = self.reader(self.windows.index_select(1, at), self.position)[:, -1]
        self.position += 1
        self.windows.index_copy_(1, self.position[None], draw(logits.float().softmax(-1))[:, None])
        return self.windows

    def _begin(self, prompts: Tensor) -> None:
        n = prompts.shape[1]
        self.windows[: len(prompts), :n] = prompts.to(self.device)
        if n > 1:
            self.reader(self.windows[:, : n - 1], torch.zeros_like(self.position), keep=1)
        self.position.fill_(n - 1)

    @torch.no_grad()
    def __call__(self, prompts: Tensor) -> Tensor:
        """Windows [n, length] on the CPU that begin with prompts [n, prompt tokens], n at most the batch."""
        self._begin(prompts)
        if self.step is None:
            self.step = graphed(self._step, self.device)
            self._begin(prompts)  # recording has written something
        for _ in range(self.length - prompts.shape[1]):
            self.step()
        return self.windows[: len(prompts), : self.length].cpu().clone()


def write_on(model: nn.Module, prompts: Tensor, length: int, batch_size: int) -> Tensor:
    """What `model` writes after each prompt [n, prompt tokens]: windows [n, length] on the CPU."""
    writer = Writer(model.eval(), min(batch_size, len(prompts)), length)
    return torch.cat([writer(batch) for batch in prompts.split(batch_size)])


@dataclass
class Lesson:
    """What came of `learn`: losses in nats per token, one per step; which steps read the student's own text."""

    losses: list[float] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    seconds: float = 0.0  # until the last step was done
    writing_seconds: float = 0.0


def learn(
    trainer: DistillationTrainer,
    writer: Writer,
    windows: Tensor,
    own_share: float,
    *,
    seconds: float,
    prompt_tokens: int,
    seed: int,
) -> Lesson:
    """Train `trainer`'s student for so many seconds, writing included; λ = own_share of the steps read its own text.

    windows: real text [n, seqlen]; the student goes on from their first `prompt_tokens`, as many windows at a time as
    `writer` holds, so that its text is a few steps older than its weights. The learning rate warms up over a tenth of
    the time and falls as a cosine. Loss, peak rate and batch size are the trainer's.
    """
    student, arguments, device = trainer.model.train(), trainer.args, trainer.args.device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        student.parameters(), betas=(0.9, arguments.adam_beta2), weight_decay=arguments.weight_decay, fused=True
    )
    batch_size, waiting, order, lesson = arguments.per_device_train_batch_size, [], [], Lesson()
    trainer.compute_loss(student, {"input_ids": windows[:batch_size].to(device)}).backward()  # records its graphs
    if own_share:
        writer(windows[: writer.reader.batch, :prompt_tokens])  # and this the writer's: before the clock starts
    optimizer.zero_grad()
    synchronize(device)
    start, spent = time.perf_counter(), 0.0
    bar = tqdm(total=round(seconds), desc="learn", unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total} s")
    while spent < seconds:
        if len(order) < batch_size:
            order = torch.randperm(len(windows), generator=generator).tolist()
        batch, order = windows[order[:batch_size]], order[batch_size:]
        own = torch.rand((), generator=generator).item() < own_share
        if own:
            if not waiting:
                writer.follow(student)
                writing = time.perf_counter()
                prompts = torch.randint(len(windows), (writer.reader.batch,), generator=generator)
                waiting = list(writer(windows[prompts, :prompt_tokens]).split(batch_size))
                lesson.writing_seconds += time.perf_counter() - writing
            batch = waiting.pop()
        share = spent / seconds
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * _schedule(share)
        loss = trainer.compute_loss(student, {"input_ids": batch.to(device)})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        lesson.losses.append(loss.item())  # waits for the device, so that the clock tells the truth
        lesson.own.append(own)
        bar.update(min(time.perf_counter() - start, seconds) - spent)
        spent = time.perf_counter() - start
    bar.close()
    lesson.seconds = spent
    trainer.bodies.clear()
    release_memory()
    return lesson


def _schedule(share: float) -> float:
    """Learning rate as a share of its peak after this share of the time: warm-up over a tenth, then a cosine."""
    return min(10 * share + 0.01, 1.0) * (1 + torch.tensor(torch.pi * share).cos().item()) / 2


def copy_for_writing(student: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a student for `Writer.follow`, in the type that it will be used in."""
    return copy.deepcopy(student).to(dtype).eval().requires_grad_(False)
