"""What depends on a model's shape alone, measured on random weights of a 7B model: speed, memory, time to compress.

    python -m benchmarks.shape_7b [--shape llama-2-7b] [--only decode prefill ...] [--gpu-memory 15] [--record]

Each step writes its figures as soon as it has them, under the notebook name `shape-7b-STEP` of lab `shape`; what
cannot run here is listed with its reason, and the other steps go on.

    decode      a decoding step per kernel and batch, as ratio to 16 bits and as share of the memory-bandwidth floor
    profile     where a decoding step of 16 and of 4 bits spends its time, kernel by kernel
    prefill     a prompt through 16-bit weights, dense, and 2:4 on every rung of the ladder
    sparse      the 2:4 products of the shape's matrices, as they come and at their best
    gptq        GPTQ, few windows; blocks streamed from host memory through --gpu-memory gibibytes
    gptqmodel   the same windows through GPTQModel
    gptq-long   GPTQ, many windows
    wanda       Wanda, many windows
    decode-jit  the kernels that GPTQModel compiles first (in the background, once GPTQ has been timed)
    decode-int8 bitsandbytes' INT8, last: a kernel that breaks a CUDA graph's capture may leave the process unusable

On an H100 these are two commands of at most ten minutes: `--only gptq gptqmodel gptq-long`, and the others.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial

# Layers of many sizes come and go: fixed segments would fill the cap with holes. Read when torch is imported.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedTokenizerFast

from benchmarks.decode_kernels import CONFIG, KERNELS, Kernel, bytes_of_weights, bytes_per_step, use_kernel
from common.course import assets
from common.course.assets import load_model, model_config
from common.course.environment import prepare
from common.course.memory import GIB
from common.course.settings import PROFILES, Settings, load_settings
from common.measure.benchmarking import (
    Decoder,
    graphed,
    measure_latency,
    peak_memory,
    release_memory,
    sparse_kernels,
    synchronize,
)
from common.measure.cuda_graph import using_attention
from common.measure.results import Recorder, read
from common.measure.roofline import measure_bandwidth
from common.methods.blocks import iter_linears
from common.methods.pruning import PruneConfig, prune_model
from common.methods.quantization import QuantizeConfig, gptq_model
from common.methods.semi_structured import LADDER, climb, keep_first_two, make_sparse, product_times
from tools import tables

assets.SHAPES["tiny"] = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=256,
    max_position_embeddings=512,
)
BUILD_SECONDS = 300  # how long to wait for a kernel that GPTQModel compiles


class NotHere(Exception):
    """This machine cannot run it."""


class Build:
    """A kernel of GPTQModel that compiles in a process of its own, at low priority, while other steps run."""

    def __init__(self, extension: str):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the build
        code = f"from gptqmodel import extension; extension.load({extension!r})"
        self.process = subprocess.Popen(
            ["nice", "-n", "19", sys.executable, "-c", code],
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            start_new_session=True,  # so that its compilers can be ended with it
        )

    def wait(self, seconds: float) -> None:
        """Return once it is compiled; raises where that fails, or takes longer than `seconds`."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.stop()
            raise NotHere(f"it is not compiled after waiting {seconds:.0f} s") from None
        if code:
            self.errors.seek(0)
            lines = [line.strip() for line in self.errors if line.strip()]
            heads = [number for number, line in enumerate(lines) if "Extension load failed" in line]
            raise RuntimeError(f"it does not compile: {' '.join(lines[heads[-1] + 1 :][:1] if heads else lines[-1:])}")

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait()


def start_builds(run: "Run", remaining: list[str]) -> None:
    """Start compiling what step decode-jit needs, as soon as no step is left whose time the CPU decides."""
    wanted = "decode-jit" in remaining and not any(step.startswith("gptq") for step in remaining)
    if wanted and not run.builds and run.device.type == "cuda" and importlib.util.find_spec("gptqmodel"):
        run.builds = {name: Build(name) for name in (kernel.extension for kernel in KERNELS.values()) if name}


class Run:
    """One run: where figures go, and what later steps want to know of earlier ones."""

    def __init__(self, settings: Settings, gpu_memory: float = 0.0):
        self.settings, self.device, self.gpu_memory = settings, settings.device, gpu_memory
        self.lines: list[str] = []  # the summary
        self.builds: dict[str, Build] = {}  # GPTQModel's extensions that are being compiled
        self.original: dict[int, float] = {}  # seconds of a 16-bit decoding step, by batch
        self._bandwidth = 0.0

    def begin(self, step: str) -> None:
        self.step = step
        self.recorder = Recorder(self.settings.replace(notebook=f"shape-7b-{step}"))

    def record(self, key: str, value: float, unit: str, artifact: str, protocol: dict, n: int = 1) -> None:
        if artifact != "original" or not self.step.startswith("decode-"):  # there it is only the others' reference
            self.recorder.record(key, value, unit, artifact=artifact, protocol=protocol, n=n)
        self.say(f"{artifact:18} {key:18} {value:>12,.3f} {unit}")

    def say(self, text: str) -> None:
        line = f"{self.step:12} {text}"
        self.lines.append(line)
        print(line, flush=True)

    def attempt(self, name: str, part: Callable[["Run"], None]) -> None:
        """Run a part; if it fails, note the first line of its error and go on."""
        reason = ""
        try:
            part(self)
        except NotHere as error:
            self.say(f"{name:18} skipped: {error}")
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if reason:
            self.recorder.record("failed", 1, "failure", artifact=name, protocol={"error": reason})
            self.say(f"{name:18} failed: {reason}")
        release_memory()  # here, where the error no longer holds the model

    def bandwidth(self) -> float:
        """Bytes per second at which this device reads memory."""
        if not self._bandwidth:
            self._bandwidth = measure_bandwidth(self.device)
            protocol = {"how": "the better of sum and copy"}
            self.record("bandwidth", self._bandwidth / 1e9, "GB/s", "memory", protocol, n=20)
        return self._bandwidth


def floor_seconds(model: nn.Module, batch: int, context: int, bandwidth: float) -> float:
    """Seconds that reading everything a decoding step needs takes at `bandwidth` bytes per second."""
    return bytes_per_step(model, batch, context) / bandwidth


# --- speed -----------------------------------------------------------------------------------------------------------


def decode(run: Run, names: list[str]) -> None:
    """A decoding step with each of the kernels; 16 bits first, if this run has not measured them yet."""
    run.bandwidth()
    for name in names if run.original else ["original", *names]:
        run.attempt(name, partial(decode_with, name=name, kernel=KERNELS[name]))


def decode_with(run: Run, name: str, kernel: Kernel) -> None:
    """Latency, throughput, memory and share of the floor of one kernel, for each batch size."""
    settings, device = run.settings, run.device
    on_gpu = device.type == "cuda"
    if kernel.gpu_only and not on_gpu:
        raise NotHere("its kernel needs a GPU")
    if kernel.extension in run.builds:
        run.builds[kernel.extension].wait(BUILD_SECONDS)
    model = load_model(settings.model, kernel.dtype if on_gpu else settings.dtype, device)
    error = use_kernel(model, kernel)
    if not error < 0.2:
        raise AssertionError(f"the kernel's output is off by {error:.2f}: it computes something else")
    release_memory()
    run.record("output-error", error, "relative", name, {"layer": "down_proj of the first block"})
    run.record("weights-memory", bytes_of_weights(model) / 1e6, "MB", name, {})
    context = settings.context_tokens
    for batch in (batch for batch in settings.batch_sizes if batch <= kernel.most):
        with peak_memory(device) as peak:
            step = Decoder(model, batch, context)
            latency = measure_latency(step, settings.latency_runs, device)
        seconds, n = latency.percentile(50), settings.latency_runs
        del step
        if name == "original":
            run.original[batch] = seconds
        record = partial(run.record, artifact=name, protocol={"context": context, "batch": batch, "cuda graph": on_gpu})
        record(f"tpot-b{batch}", seconds * 1e3, "ms", n=n)
        record(f"throughput-b{batch}", batch / seconds, "tokens/s", n=n)
        if batch in run.original:
            record(f"speedup-b{batch}", run.original[batch] / seconds, "× 16 bits", n=n)
        share = floor_seconds(model, batch, context + 1, run.bandwidth()) / seconds
        record(f"floor-share-b{batch}", share, "share", n=n)
        record(f"peak-memory-b{batch}", peak.bytes / 1e6, "MB")


GROUPS = {  # kernels by what they are for; the first pattern found in a name decides
    "attention": r"flash|fmha|attention|softmax",
    "products": r"gemm|gemv|nvjet|cutlass|int4|splitk",
}


def group_of(kernel: str) -> str:
    """What a kernel is for, by its name: "products", "attention" or "rest"."""
    return next((name for name, pattern in GROUPS.items() if re.search(pattern, kernel.lower())), "rest")


def profile(run: Run) -> None:
    """Milliseconds of a decoding step by group of kernels, batch 1; the gaps are what the GPU waits in between."""
    if run.device.type != "cuda":
        raise NotHere("it counts the time of GPU kernels")
    for name in ("original", "torch-int4", "triton-int4"):
        run.attempt(name, partial(profile_with, name=name, kernel=KERNELS[name]))


def profile_with(run: Run, name: str, kernel: Kernel) -> None:
    model = load_model(run.settings.model, kernel.dtype, run.device)
    use_kernel(model, kernel)
    step, repeats = Decoder(model, 1, run.settings.context_tokens), 20
    whole = measure_latency(step, repeats, run.device).percentile(50) * 1e3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        for _ in range(repeats):
            step()
        synchronize(run.device)
    kernels = {event.key: event.self_device_time_total / 1e3 / repeats for event in profiled.key_averages()}
    if not any(kernels.values()):
        raise NotHere("the profiler sees no kernels on this machine")
    spent = dict.fromkeys((*GROUPS, "rest"), 0.0)
    for kernel_name, milliseconds in kernels.items():
        spent[group_of(kernel_name)] += milliseconds
    spent["gaps"] = max(0.0, whole - sum(spent.values()))
    for group, milliseconds in spent.items():
        run.record(f"profile-{group}", milliseconds, "ms", name, {"batch": 1, "context": run.settings.context_tokens})
    for kernel_name in sorted(kernels, key=kernels.get, reverse=True)[:12]:
        run.say(f"{name:18} {kernels[kernel_name]:8.3f} ms  {group_of(kernel_name):10} {kernel_name[:80]}")


def prefill(run: Run) -> None:
    """A prompt through the model: dense, then with all layers 2:4, once for each rung of the ladder.

    The random weights become 2:4 in place, so that one copy of them is enough; both use the same fast attention.
    """
    settings, device, tokens = run.settings, run.device, run.settings.window_tokens
    model = load_model(settings.model, settings.dtype, device)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)
    runs = max(20, settings.latency_runs // 5)
    times: dict[str, float] = {}

    @torch.inference_mode()
    def logits() -> Tensor:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    def measure(name: str) -> Tensor:
        with using_attention(model, "causal"):
            step = graphed(logits, device)
            times[name] = measure_latency(step, runs, device, warmup=runs).percentile(50)  # seconds: clocks settle
            found = step().float().clone()
        record = partial(run.record, artifact=name, n=runs)
        protocol = {"tokens": tokens, "batch": 1, "cuda graph": device.type == "cuda", "attention": "causal"}
        record("prefill", times[name] * 1e3, "ms", protocol=protocol)
        record("prefill-speed", times["dense"] / times[name], "× dense", protocol=protocol)
        return found

    measure("dense")
    for _, linear in iter_linears(model):
        keep_first_two(linear.weight.detach())
    with using_attention(model, "causal"):
        expected = logits().float()
    if not sparse_kernels(device):
        raise NotHere("2:4 kernels need a GPU (Ampere or later)")
    make_sparse(model)
    release_memory()
    for name, rung in LADDER.items():
        climb(model, rung)
        error = ((measure(name) - expected).norm() / expected.norm()).item()
        run.record("prefill-error", error, "relative", name, {"tokens": tokens, "against": "the same zeros, dense"})
        release_memory()


def sparse(run: Run) -> None:
    """2:4 against dense products, by the number of tokens: as it comes, and the best of the ladder.

    Without Python between the kernels, and on copies of the matrix that the GPU's cache cannot hold.
    """
    if not sparse_kernels(run.device):
        raise NotHere("2:4 kernels need a GPU (Ampere or later)")
    config = model_config(run.settings.model)
    width, hidden = config.hidden_size, config.intermediate_size
    for name, shape in {"q_proj": (width, width), "up_proj": (hidden, width), "down_proj": (width, hidden)}.items():
        weight = torch.randn(shape, device=run.device, dtype=torch.bfloat16)
        keep_first_two(weight)
        for tokens in run.settings.token_counts:
            dense, default, best = product_times(weight, tokens).values()
            record = partial(run.record, artifact=name, protocol={"tokens": tokens, "cache": "cold"})
            for key, value in {"dense": dense, "sparse-default": default, "sparse": best}.items():
                record(f"{key}-{tokens}", value * 1e6, "µs")
            record(f"sparse-speed-default-{tokens}", dense / default, "× dense")
            record(f"sparse-speed-{tokens}", dense / best, "× dense")


# --- compression -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def memory_cap(run: Run) -> Iterator[None]:
    """Give PyTorch's allocator no more than `run.gpu_memory` gibibytes of the GPU (0: all of it)."""
    if not run.gpu_memory or run.device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(run.device).total_memory / GIB
    release_memory()
    torch.cuda.set_per_process_memory_fraction(min(1.0, run.gpu_memory / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def host_model(run: Run) -> nn.Module:
    """The shape's model in host memory; made on the device, which is faster."""
    model = load_model(run.settings.model, run.settings.dtype, run.device).cpu()
    release_memory()
    return model


def random_windows(run: Run, count: int) -> Tensor:
    """[count, window_tokens] random tokens: what they say has no influence on the time."""
    generator = torch.Generator().manual_seed(run.settings.seed)
    size = (count, run.settings.window_tokens)
    return torch.randint(0, model_config(run.settings.model).vocab_size, size, generator=generator)


def timed(run: Run, key: str, artifact: str, protocol: dict, work: Callable[[], object]) -> None:
    """Record how long `work` takes under the cap, and its peak of device memory."""
    protocol = protocol | {"cap GiB": run.gpu_memory if run.device.type == "cuda" else 0.0}
    with memory_cap(run), peak_memory(run.device) as peak:
        start = time.perf_counter()
        work()
        synchronize(run.device)
        seconds = time.perf_counter() - start
    run.record(f"{key}-seconds", seconds, "s", artifact, protocol)
    run.record(f"{key}-peak", peak.bytes / GIB, "GiB", artifact, protocol)


def compress(run: Run, key: str, method: Callable, config: QuantizeConfig | PruneConfig, count: int) -> None:
    """Compress the shape with one of the course's methods: blocks come from host memory, activations stay."""
    model, windows = host_model(run), random_windows(run, count)
    work = partial(method, model, windows, config, device=run.device, batch_size=run.settings.batch_size)
    timed(run, f"{key}-{count}", "common", {"windows": count, "seqlen": run.settings.window_tokens}, work)


# Act-order, clipping and zero points are on: more work than GPTQModel is asked for below.
GPTQ = QuantizeConfig(group_size=CONFIG.group_size)


def gptqmodel(run: Run) -> None:
    """The windows of step `gptq` through GPTQModel: symmetric, no search for clipping, otherwise its defaults.

    Loading and saving are not timed.
    """
    from gptqmodel import GPTQModel
    from gptqmodel import QuantizeConfig as LibraryConfig

    count = run.settings.nsamples
    windows = random_windows(run, count)
    examples = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in windows]
    config = LibraryConfig(bits=GPTQ.bits, group_size=GPTQ.group_size, sym=True, desc_act=False)
    with tempfile.TemporaryDirectory() as folder:
        host_model(run).save_pretrained(folder)
        some_tokenizer().save_pretrained(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            library = GPTQModel.load(folder, config)

        def work() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                library.quantize(examples, batch_size=1)

        protocol = {"windows": count, "seqlen": run.settings.window_tokens}
        timed(run, f"gptq-{count}", "GPTQModel", protocol, work)


def some_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one word, for a library that will not load a model without any."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")),
        unk_token="?",
        pad_token="?",
        eos_token="?",
    )


STEPS: dict[str, Callable[[Run], None]] = {
    "decode": partial(decode, names=["triton-int4", "torch-int4", "bnb-nf4", "gptq-triton"]),
    "profile": profile,
    "prefill": prefill,
    "sparse": sparse,
    "gptq": lambda run: compress(run, "gptq", gptq_model, GPTQ, run.settings.nsamples),
    "gptqmodel": gptqmodel,
    "gptq-long": lambda run: compress(run, "gptq", gptq_model, GPTQ, run.settings.nsamples_long),
    "wanda": lambda run: compress(run, "wanda", prune_model, PruneConfig(), run.settings.nsamples_long),
    "decode-jit": partial(decode, names=["gptq-exllama_v2", "gptq-marlin"]),
    "decode-int8": partial(decode, names=["bnb-int8"]),
}


def main(arguments: list[str] | None = None) -> Run:
    parser = argparse.ArgumentParser(description="Speed, memory and time to compress a 7B shape with random weights.")
    parser.add_argument("--shape", help=f"one of {', '.join(assets.SHAPES)} (default: the profile's)")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--gpu-memory", type=float, default=15, help="GiB for compressing (0: all of the GPU)")
    parser.add_argument("--profile", default="auto", choices=["auto", *PROFILES])
    parser.add_argument("--record", action="store_true", help="make the figures the committed ones, step by step")
    options = parser.parse_args(arguments)
    shape = options.shape or load_settings("shape", options.profile).shape
    run = Run(prepare("shape", "shape-7b", options.profile, f"shape:{shape}"), options.gpu_memory)
    steps = [step for step in STEPS if step in options.only]
    try:
        for number, step in enumerate(steps):
            start_builds(run, steps[number:])
            start = time.perf_counter()
            run.begin(step)
            run.attempt(step, STEPS[step])
            run.say(f"took {time.perf_counter() - start:.0f} s")
            if options.record and any(r["notebook"] == run.recorder.notebook for r in read(run.recorder.file)):
                tables.promote(run.recorder.notebook, run.recorder.file, run.settings.model)
    finally:
        for build in run.builds.values():
            build.stop()
        print("\n" + "\n".join(run.lines))
    return run


if __name__ == "__main__":
    main()
