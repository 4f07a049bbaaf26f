"""llama.cpp: quantize a GGUF file, and measure it exactly as transformers models are measured.

llama.cpp is compiled for the processor that it finds, and may crash on it: it runs in a process of its own
(`llamacpp_worker`, under the guard of `processes`), whose death is one EngineDied here.

Needs the compiled package `llama-cpp-python` (`make engines`); everything else in `common` works without it.
"""

import importlib.util
import socket
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import gguf
import torch
from torch import Tensor

from common.course.files import whole_file
from common.engines.processes import EngineDied, cause_of_death, out_of_memory_kills, start_guarded, stop_guarded
from common.measure.benchmarking import Latency

TIME_LIMIT = 600.0  # seconds for one answer of the worker: a window, a quantization, all steps of a latency
LOG_END = 1000  # bytes of llama.cpp's own output that an error shows


def missing() -> str:
    """What to do where llama.cpp is not installed; "" where it is."""
    if importlib.util.find_spec("llama_cpp"):
        return ""
    return (
        "llama.cpp is not installed. Run `make engines` (it compiles for some minutes and needs a C++ compiler), "
        "then restart the kernel."
    )


class _Worker:
    """A process that runs llama.cpp for one file. Raises ModuleNotFoundError where llama.cpp is not installed."""

    def __init__(self, file: str, time_limit: float):
        if missing():
            raise ModuleNotFoundError(missing())
        self.file, self.time_limit = file, time_limit
        self._kills = out_of_memory_kills()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "common.engines.llamacpp_worker", theirs.fileno()]
            self._guard = start_guarded(command, self._log, pass_fds=(theirs.fileno(),))
        self._connection = Connection(ours.detach())

    def ask(self, operation: str, *arguments):
        """One answer. Raises what the operation raised there, or EngineDied when the process died or hangs."""
        try:
            self._connection.send((operation, *arguments))
            if not self._connection.poll(self.time_limit):
                self._died(f"did not answer within {self.time_limit:g} s and was stopped")
            outcome, value = self._connection.recv()
        except (EOFError, ConnectionError):
            self._died()
        if outcome == "failed" and isinstance(value, MemoryError):
            self._died("could not get the memory it asked for (close other programs, or choose a smaller model)")
        if outcome == "failed":
            raise value
        return value

    def receive(self, tensor: Tensor) -> Tensor:
        """Fill a float32 tensor [rows, columns] with the messages to come, one a row."""
        try:
            for row in tensor.numpy():
                self._connection.recv_bytes_into(row)
        except (EOFError, ConnectionError):
            self._died()
        return tensor

    def _died(self, cause: str = ""):
        status = self.close()
        cause = cause or cause_of_death(status, self._kills)
        self._log.seek(0)
        said = self._log.read()[-LOG_END:].decode(errors="replace").strip()
        raise EngineDied(
            f"llama.cpp {cause} while it worked on {self.file}. What was measured before still stands. To see whether "
            "this machine's build works at all, run: .venv/bin/python -m common.engines.selfcheck"
            + (f"\nIts last words:\n{said}" if said else "")
        ) from None

    def close(self) -> int:
        self._connection.close()
        return stop_guarded(self._guard)


def quantize_gguf(source: Path, target: Path, kind: str, time_limit: float = TIME_LIMIT) -> Path:
    """Let llama.cpp quantize the float16 file `source` to `kind`, such as "Q8_0", "Q4_K_M" or "Q2_K".

    Raises ValueError for a kind that llama.cpp does not have, RuntimeError when it fails, EngineDied when it crashes.
    """
    ftype = getattr(gguf.LlamaFileType, f"MOSTLY_{kind}", None)
    if ftype is None:
        raise ValueError(f"llama.cpp has no quantization {kind!r}; try Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q3_K_M or Q2_K.")
    worker = _Worker(source.name, time_limit)
    try:
        with whole_file(target) as new:
            if worker.ask("quantize", str(source), str(new), int(ftype), torch.get_num_threads()):
                raise RuntimeError(f"llama.cpp could not quantize {source.name} to {kind}: is it a float16 GGUF file?")
    finally:
        worker.close()
    return target


class LlamaCpp:
    """A GGUF file loaded by llama.cpp, callable like a transformers model: `evaluation.evaluate` takes both alike.

    context: tokens it can hold; time_limit: seconds for one answer. It computes on the CPU with as many threads as
    PyTorch uses. Every method raises EngineDied when its process dies or hangs, or cannot load the file.
    """

    device = torch.device("cpu")

    def __init__(self, file: Path, context: int, time_limit: float = TIME_LIMIT):
        self._worker = _Worker(Path(file).name, time_limit)
        try:
            self._vocabulary = self._worker.ask("load", str(file), context, torch.get_num_threads())
        except ValueError as error:
            self.close()
            raise EngineDied(
                f"llama.cpp could not load {Path(file).name}: {error}. Is the file whole, and is enough memory free?"
            ) from None

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def eval(self) -> "LlamaCpp":
        return self

    def close(self) -> None:
        """End the process, and with it free the model's memory."""
        self._worker.close()

    def __call__(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits [batch, tokens, vocabulary] of sequences `input_ids` [batch, tokens], each read from its beginning."""
        return SimpleNamespace(logits=torch.stack([self._read(ids) for ids in input_ids.tolist()]))

    def _read(self, ids: list[int]) -> Tensor:
        self._worker.ask("read", ids)
        return self._worker.receive(torch.empty(len(ids), self._vocabulary))

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text` by the tokenizer in the file, special tokens in it recognised."""
        return self._worker.ask("tokenize", text)

    def generate(self, prompt: str, max_new_tokens: int) -> str:
        """Greedy answer to `prompt`, which goes through the chat template in the file."""
        return self._worker.ask("generate", prompt, max_new_tokens)

    def latency(self, context: int, runs: int) -> Latency:
        """Time `runs` decoding steps after `context` tokens, all at the same position, on the worker's own clock."""
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(self._vocabulary, (context,), generator=generator).tolist()
        return Latency(self._worker.ask("latency", prompt, runs))
