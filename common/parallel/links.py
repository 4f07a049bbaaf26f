"""How long an all-reduce takes: what tensor parallelism waits for twice a block, and DDP once a step.

torchrun --nproc-per-node 2 -m common.parallel.links FOLDER        (`launch` does it)
"""

import time

import torch
import torch.distributed as dist

from common.parallel.collective import folder_given, together, write_result

RUNS = 50


def all_reduce_seconds(count: int, device: torch.device) -> float:
    """Median seconds of an all-reduce of `count` bytes in bfloat16, one after the other."""
    message = torch.ones(count // 2, dtype=torch.bfloat16, device=device)
    seconds = []
    for _ in range(RUNS + 5):  # the first ones set up the links
        _wait(device)
        begin = time.perf_counter()
        dist.all_reduce(message)
        _wait(device)
        seconds.append(time.perf_counter() - begin)
        message.fill_(1)
    return torch.tensor(seconds[5:]).median().item()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    folder = folder_given()
    with together(folder) as (job, device):
        write_result(folder, seconds=[all_reduce_seconds(count, device) for count in job["bytes"]])


if __name__ == "__main__":
    main()
