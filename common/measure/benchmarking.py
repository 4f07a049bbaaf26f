"""Speed and memory, measured so that the figures mean what they say.

The GPU works asynchronously: every timing here waits for it. The first runs load kernels and fill caches: they are
not counted. On a GPU, one decoded token of a small model takes less time than Python needs to launch its kernels,
so decoding is replayed from a CUDA graph; otherwise one would measure Python.
"""

import copy
import gc
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import StaticCache

from common.course.memory import hand_back_freed_memory, reset_gpu_peak
from common.measure.cuda_graph import graphed, using_attention


@dataclass(frozen=True)
class Latency:
    """Seconds per run."""

    seconds: list[float]

    @property
    def mean(self) -> float:
        return sum(self.seconds) / len(self.seconds)

    def percentile(self, q: float) -> float:
        """The q-th percentile (0-100), interpolated between runs."""
        return torch.tensor(self.seconds, dtype=torch.float64).quantile(q / 100).item()


def synchronize(device: torch.device) -> None:
    """Wait until the GPU has finished; the CPU computes synchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_latency(run: Callable[[], object], runs: int, device: torch.device, warmup: int = 3) -> Latency:
    """Time `run` `runs` times, each from a finished device to a finished device."""
    for _ in range(warmup):
        run()
    seconds = []
    for _ in tqdm(range(runs), desc="latency", leave=False):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return Latency(seconds)


def in_turns(
    put: Callable[[str], object],
    names: list[str],
    run: Callable[[], object],
    rounds: int,
    runs: int,
    device: torch.device,
) -> dict[str, list[float]]:
    """Median seconds of `run` in each round, for each of `names`: `put(name)` makes ready what is timed.

    A B, B A, A B, ...: what drifts meanwhile (clocks, other programs) falls on all alike, and cancels in the
    differences within a round.
    """
    medians: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            put(name)
            medians[name].append(measure_latency(run, runs, device).percentile(50))
    return medians


def copies_beyond_cache(matrix: torch.Tensor) -> list[torch.Tensor]:
    """A matrix and copies of it, so many that none is left in the GPU's cache when its turn comes again.

    A model reads every matrix once per pass; one that is timed alone, again and again, would be read from the cache.
    """
    if matrix.device.type != "cuda":
        return [matrix]
    cache = torch.cuda.get_device_properties(matrix.device).L2_cache_size
    return [matrix] + [matrix.clone() for _ in range(-(-2 * cache // matrix.nbytes))]


@torch.inference_mode()
def per_product(product: Callable[[torch.Tensor], torch.Tensor], matrix: torch.Tensor) -> float:
    """Median seconds of `product(matrix)`, of at least forty in a CUDA graph, on `copies_beyond_cache` in turn."""
    matrices, device = copies_beyond_cache(matrix), matrix.device
    rounds = -(-40 // len(matrices))
    step = graphed(lambda: [product(each) for _ in range(rounds) for each in matrices][-1], device)
    return measure_latency(step, 20, device).percentile(50) / (rounds * len(matrices))


def sparse_kernels(device: torch.device) -> bool:
    """Whether PyTorch multiplies 2:4 sparse matrices on this device: NVIDIA GPUs since Ampere (8.0), no CPU."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


class Decoder:
    """One decoding step of `model` for `batch` sequences that have `context` tokens in a static KV cache.

    Calling it computes the logits of the next token [batch, vocabulary], always at the same position, so that every
    run does the same work. On a GPU the step is captured once in a CUDA graph and replayed; RuntimeError when the
    graph does not hold all of the model's work, since timings of such a graph are too good to be true.
    """

    @torch.inference_mode()
    def __init__(self, model: nn.Module, batch: int, context: int):
        self.model, self.context = model, context
        self.cache = StaticCache(config=model.config, max_cache_len=context + 1)
        prompt = torch.randint(0, model.config.vocab_size, (batch, context), device=model.device)
        model(input_ids=prompt, past_key_values=self.cache, logits_to_keep=1)
        self.token = prompt[:, -1:].clone()
        self.position = torch.full((batch, 1), context, device=model.device)
        self.run = graphed(self._step, model.device)
        self._check_recording()

    def _step(self) -> torch.Tensor:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)  # back to the same position
            if layer.is_sliding:
                layer.cumulative_length_int = self.context  # the number by which a window knows that it is full
        out = self.model(input_ids=self.token, position_ids=self.position, past_key_values=self.cache, logits_to_keep=1)
        return out.logits[:, -1]

    def _check_recording(self) -> None:
        recorded, self.cache = self.cache, copy.deepcopy(self.cache)  # a full window moves on with every step
        expected, self.cache = self._step(), recorded
        check_replay(self.run(), expected)

    @torch.inference_mode()
    def __call__(self) -> torch.Tensor:
        return self.run()


def check_replay(replayed: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare what a CUDA graph computes with the model itself; RuntimeError where they differ.

    A kernel that is started on another stream than PyTorch's current one (ExLlamaV2's in GPTQModel 7.6.0 is) runs
    while the step is recorded, but is not recorded: replays silently leave it out, and look fast. Rounding alone
    makes a percent (a library may sum in another order while recording), a missing product far more than ten.
    """
    if not (replayed - expected).norm() <= 0.1 * expected.norm():  # NaN is no match either
        raise RuntimeError(
            "The recorded decoding step computes something else than the model: a kernel of its layers ignores the "
            "current CUDA stream, so the CUDA graph lacks it. Choose another kernel."
        )


@torch.inference_mode()
def prefill(model: nn.Module, batch: int, context: int) -> Callable[[], torch.Tensor]:
    """A function that reads a prompt of `context` tokens for `batch` sequences: what the first token waits for.

    On a GPU it replays a CUDA graph; RuntimeError as in `Decoder`.
    """
    prompt = torch.randint(0, model.config.vocab_size, (batch, context), device=model.device)

    @torch.inference_mode()
    def read():
        return model(input_ids=prompt, use_cache=True, logits_to_keep=1).logits

    if model.device.type != "cuda":
        return read
    with using_attention(model, "causal"):
        replay = graphed(read, model.device)
    check_replay(replay(), read())
    return replay


def release_memory() -> None:
    """Give memory of deleted models back to the system, so that the next model is measured from a clean start."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    else:
        hand_back_freed_memory()


@dataclass
class PeakMemory:
    """Bytes: on a GPU the peak of PyTorch's allocator, on a CPU the growth of the process's resident memory."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device):
    """Measure the peak memory of a block of code: `with peak_memory(device) as peak: ...; peak.bytes`."""
    peak = PeakMemory()
    if device.type == "cuda":
        reset_gpu_peak()
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    release_memory()
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch():
        while not done.wait(0.01):
            peak.bytes = max(peak.bytes, process.memory_info().rss - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
