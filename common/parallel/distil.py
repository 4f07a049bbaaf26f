"""Distillation on several processes: DDP or FSDP2, the teacher whole on every card or sharded, the same batch.

    accelerate launch --multi_gpu --num_processes 2 -m common.parallel.distil FOLDER        (`launch` does it)

Whatever the number of processes and of micro-batches, step s learns from the same windows, and the gradient is the
mean over them; so the loss curve is that of one card, up to rounding. Checkpoints fit any number of processes.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from common.course.assets import load_model
from common.methods.blocks import decoder_blocks
from common.methods.distillation import distillation_loss, kd_loss, student_from_teacher
from common.parallel.collective import clock, folder_given, mine, peaks, together, write_result

WARM_UP = 2  # steps that are not timed: they load kernels and make the optimizer's state


@dataclass(frozen=True)
class Plan:
    """What is trained, and how the processes share it."""

    teacher: str  # a spec of `common.course.assets`
    student: str = ""  # likewise; "" takes some of the teacher's blocks
    keep: tuple[int, ...] = ()  # which ones
    steps: int = 10
    batch_size: int = 8  # windows per step, of all processes together
    accumulate: int = 1  # micro-batches that a process reads one after the other in a step
    strategy: str = "ddp"  # or "fsdp2"
    shard_teacher: bool = False
    alpha: float = 0.5
    learning_rate: float = 1e-3
    seed: int = 0
    dtype: str = "float32"  # of the student's weights and the optimizer
    teacher_dtype: str = "float32"
    autocast: bool = False  # matrix products in bfloat16
    save_every: int = 0  # steps between two checkpoints; 0: none
    save_student: bool = False  # the trained weights, as student.safetensors


def objective(student: nn.Module, teacher: nn.Module, ids: Tensor, alpha: float) -> Tensor:
    """α · CE + (1 - α) · KL of windows `ids` [batch, seqlen], mean over the tokens that have a predecessor."""
    labels = ids[:, 1:].flatten()
    with torch.no_grad():
        taught = teacher(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    logits = student(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    hard = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")
    return distillation_loss(hard, kd_loss(logits, taught, 1.0), alpha) / len(labels)


def shard(model: nn.Module) -> nn.Module:
    """FSDP2: every process keeps a slice of each block's weights, and borrows the rest while the block computes."""
    for block in decoder_blocks(model):
        fully_shard(block)
    return fully_shard(model)


def spread(student: nn.Module, strategy: str, device: torch.device) -> nn.Module:
    """The student as the processes share it: "ddp" copies it whole, "fsdp2" cuts weights, gradients and optimizer."""
    if strategy == "fsdp2":
        return shard(student)
    return DistributedDataParallel(student, device_ids=[device.index] if device.type == "cuda" else None)


def batches(windows: Tensor, step: int, plan: Plan) -> Iterator[Tensor]:
    """This process's micro-batches of step `step`; all processes together read the step's windows, each once."""
    generator = torch.Generator().manual_seed(plan.seed)
    order = torch.randperm(len(windows), generator=generator)
    start = step * plan.batch_size % (len(windows) - plan.batch_size + 1)
    yield from mine(windows[order[start : start + plan.batch_size]]).tensor_split(plan.accumulate)


def one_step(model: nn.Module, teacher: nn.Module, windows: Tensor, step: int, plan: Plan, device) -> float:
    """Gradients of one step in `model`; returns the step's loss, the mean over all processes."""
    total = torch.zeros((), device=device)
    for number, ids in enumerate(batches(windows, step, plan), start=1):
        last = number == plan.accumulate
        wait = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
        if not isinstance(model, DistributedDataParallel):
            model.set_requires_gradient_sync(last)
        with wait, torch.autocast(device.type, torch.bfloat16, enabled=plan.autocast):
            loss = objective(model, teacher, ids.to(device), plan.alpha) / plan.accumulate
            loss.backward()
        total += loss.detach()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def train(plan: Plan, device: torch.device, folder: Path) -> None:
    """Train, saving now and then; goes on from the last checkpoint in `folder` if there is one."""
    windows = load_file(folder / "windows.safetensors")["windows"]
    if plan.batch_size % (dist.get_world_size() * plan.accumulate):
        raise ValueError(
            f"A batch of {plan.batch_size} windows cannot be shared out evenly among {dist.get_world_size()} "
            f"processes with {plan.accumulate} micro-batches each: choose a multiple."
        )
    dtype = getattr(torch, plan.dtype)
    teacher = load_model(plan.teacher, getattr(torch, plan.teacher_dtype), device).requires_grad_(False)
    student = load_model(plan.student, dtype, device) if plan.student else student_from_teacher(teacher, plan.keep)
    student = student.to(dtype).train().requires_grad_(True)
    if plan.shard_teacher:
        teacher = shard(teacher)
    model = spread(student, plan.strategy, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    start, losses = _resume(folder, model, optimizer)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # a teacher that is sharded was whole for a moment
    begin = clock(device)
    for step in range(start, plan.steps):
        if step == start + WARM_UP:
            begin = clock(device)
        losses.append(one_step(model, teacher, windows, step, plan, device))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if plan.save_every and (step + 1) % plan.save_every == 0:
            _save(folder, model, optimizer, step + 1, losses)
    timed = max(1, plan.steps - start - WARM_UP)
    tokens = timed * plan.batch_size * windows.shape[1] / (clock(device) - begin)
    write_result(folder, losses=losses, tokens_per_second=tokens, peak_bytes=peaks(), resumed_at=start)
    if plan.save_student:
        whole = states.get_model_state_dict(
            model, options=states.StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if dist.get_rank() == 0:
            save_file({name: tensor.clone() for name, tensor in whole.items()}, folder / "student.safetensors")


def _save(folder: Path, model: nn.Module, optimizer, step: int, losses: list[float]) -> None:
    """Every process writes its share; the step counts as saved once all have."""
    weights, moments = states.get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "losses": torch.tensor(losses)}
    dcp.save(state, checkpoint_id=folder / f"step-{step}")
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / f"step-{step}" / "complete").touch()


def _resume(folder: Path, model: nn.Module, optimizer) -> tuple[int, list[float]]:
    """Load the last complete checkpoint, if any; returns its step, and the losses up to it."""
    found = sorted(int(mark.parent.name.partition("-")[2]) for mark in folder.glob("step-*/complete"))
    if not found:
        return 0, []
    weights, moments = states.get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "losses": torch.zeros(found[-1])}
    dcp.load(state, checkpoint_id=folder / f"step-{found[-1]}")
    states.set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return found[-1], state["losses"].tolist()


def main() -> None:
    folder = folder_given()
    with together(folder) as (job, device):
        train(Plan(**job), device, folder)


if __name__ == "__main__":
    main()
