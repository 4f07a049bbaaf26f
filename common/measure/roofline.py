"""How fast a matrix product could be on this device, and how fast it is when its weights are not in the cache.

The roofline (Williams, Waterman and Patterson, 2009): work takes at least as long as reading its bytes, and at least as
long as its operations. Both rates are measured, since no program reaches a data sheet's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from common.measure.benchmarking import measure_latency, release_memory
from common.measure.cuda_graph import graphed

PASSES = 50  # in a CUDA graph: enough that starting it (10 µs) does not count


@dataclass(frozen=True)
class Roofline:
    """bandwidth: bytes per second; rate: floating-point operations per second; cache: bytes of the last-level cache."""

    bandwidth: float
    rate: float
    cache: int

    def seconds(self, size: float, operations: float) -> float:
        """The least time in which `size` bytes are read and as many operations done."""
        return max(size / self.bandwidth, operations / self.rate)

    def copies(self, size: int) -> int:
        """How many copies of something push each other out of the cache when they take turns."""
        return max(1, -(-4 * self.cache // size))


def measure_bandwidth(device: torch.device) -> float:
    """Bytes per second at which a device reads memory: the better of summing up and of copying 2 GiB (CPU: 64 MiB)."""
    size = 2**31 if device.type == "cuda" else 2**26
    data = torch.ones(size // 4, device=device)
    target = torch.empty_like(data)
    total = measure_latency(data.sum, 20, device).percentile(50)
    copy = measure_latency(partial(target.copy_, data), 20, device).percentile(50)
    del data, target
    release_memory()
    return max(size / total, 2 * size / copy)


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measured limits of a device; operations as in a large square product of `dtype`. A CPU's cache is ignored."""
    cuda = device.type == "cuda"
    side = 8192 if cuda else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    rate = 2 * side**3 / measure_latency(lambda: a @ a, 5, device).percentile(50)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if cuda else 0
    return Roofline(measure_bandwidth(device), rate, cache)


def cold_seconds(runs: list[Callable[[], Tensor]], device: torch.device) -> float:
    """Median seconds of one of `runs`: the same work on copies of its data (`Roofline.copies`), taking turns.

    What was read a moment ago lies in the cache, out of which a model's other layers would have driven it. On a GPU the
    runs follow each other in one CUDA graph.
    """
    cuda = device.type == "cuda"
    turns = [run for _ in range(-(-PASSES // len(runs))) for run in runs] if cuda else runs

    def everything() -> Tensor:
        for run in turns:
            found = run()
        return found

    latency = measure_latency(graphed(everything, device), 10 if cuda else 3, device, warmup=1)
    return latency.percentile(50) / len(turns)
