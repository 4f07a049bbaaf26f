"""What processes do together: begin, add up statistics, share out the rows of a matrix, end with one message.

Everything here works with NCCL on GPUs and with gloo on CPUs, and with a single process, where it does nothing.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from common.methods.quantization import QuantizeConfig, QuantizedWeight
from common.parallel.launch import JOB, RESULT


@contextmanager
def together(folder: Path):
    """Join the other processes; yields (the job, this process's device). `launch` tells the first error of any."""
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    try:
        yield json.loads((folder / JOB).read_text(encoding="utf-8")), device
    except Exception as error:
        (folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        os._exit(1)  # at once: the others wait for this process, and torchrun ends them when it is gone
    dist.destroy_process_group()


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def mine(items: Tensor) -> Tensor:
    """This process's share of `items`, as even as they divide."""
    return items.tensor_split(dist.get_world_size())[dist.get_rank()]


def add_up(statistic) -> None:
    """Replace each sum over this process's tokens by the sum over everybody's: tensors and counts, in place.

    The Hessian and the norms are sums over tokens, so what comes out is what one process would have gathered.
    """
    for name, value in vars(statistic).items():
        if isinstance(value, Tensor):
            dist.all_reduce(value)
        elif isinstance(value, int):
            total = torch.tensor(value, device=_where(statistic))
            dist.all_reduce(total)
            setattr(statistic, name, int(total))


def _where(statistic) -> torch.device:
    return next(value.device for value in vars(statistic).values() if isinstance(value, Tensor))


def by_rows(quantize: Callable[..., QuantizedWeight]) -> Callable[..., QuantizedWeight]:
    """`quantize(weight, hessian, config, keep)` with the rows of `weight` [out, in] shared out among the processes.

    Rows do not influence each other, so each process works on its own, and hands its codes to the others.
    """

    def shared(weight: Tensor, hessian: Tensor, config: QuantizeConfig, keep: Tensor | None = None) -> QuantizedWeight:
        own = quantize(mine(weight), hessian, config, None if keep is None else mine(keep))
        return QuantizedWeight(*(_gather(part, len(weight)) for part in (own.codes, own.scale, own.zero)), config)

    return shared


def _gather(own: Tensor, rows: int) -> Tensor:
    """Everybody's rows, in order of the processes: [rows, ...] of the `own` ones here."""
    whole = own.new_empty(rows, *own.shape[1:])
    for rank, part in enumerate(whole.tensor_split(dist.get_world_size())):
        if rank == dist.get_rank():
            part.copy_(own)
        dist.broadcast(part, src=rank)
    return whole


def peaks() -> list[int]:
    """Bytes of GPU memory that each process had in use at most; zeros on CPUs."""
    own = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def write_result(folder: Path, **figures) -> None:
    """The first process leaves the figures for `launch`."""
    if dist.get_rank() == 0:
        (folder / RESULT).write_text(json.dumps(figures), encoding="utf-8")


def folder_given() -> Path:
    """The folder that `launch` names on the command line."""
    return Path(sys.argv[-1])
