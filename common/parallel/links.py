"""How long an all-reduce takes: what tensor parallelism waits for twice a block, and DDP once a step.

torchrun --nproc-per-node 2 -m common.parallel.links FOLDER        (`launch` does it)
"""

import torch
import torch.distributed as dist

from common.parallel.collective import clock, folder_given, together, write_result

RUNS = 50


def all_reduce_seconds(count: int, device: torch.device) -> float:
    """Median seconds of an all-reduce of `count` bytes in bfloat16, one after the other."""
    message = torch.ones(count // 2, dtype=torch.bfloat16, device=device)
    seconds = []
    for _ in range(RUNS + 5):  # the first ones set up the links
        begin = clock(device)
        dist.all_reduce(message)
        seconds.append(clock(device) - begin)
        message.fill_(1)
    return torch.tensor(seconds[5:]).median().item()


def main() -> None:
    folder = folder_given()
    with together(folder) as (job, device):
        write_result(folder, seconds=[all_reduce_seconds(count, device) for count in job["bytes"]])


if __name__ == "__main__":
    main()
