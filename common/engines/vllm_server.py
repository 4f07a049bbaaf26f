"""vLLM's own server, from its own environment (`make serve-env`), on the loopback interface."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import torch

from common.course import artifacts
from common.course.memory import card_memory
from common.course.settings import ROOT
from common.engines.processes import EngineDied, free_port, serve_command
from common.formats.awq import repack_as_awq
from common.formats.gptq import save_dense

ENVIRONMENT = ROOT / ".venv-serve"
MODEL_NAME = "course"  # what clients ask for
ANSWER_SECONDS = 300  # for one answer, then the server counts as hanging
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_INT4_W4A8": "0",  # else vLLM also rounds activations, to 8 bits, on CPUs with AMX
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it compiles at first use, and greedy answers have no use for it
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class VLLM:
    """A running server."""

    url: str  # of its OpenAI-compatible API
    log: Path

    @property
    def kernel(self) -> str:
        """The code it chose for quantized layers, from its log; "" where the model has none."""
        found = re.search(r"Using (\w*Kernel) for", self.log.read_text(encoding="utf-8", errors="replace"))
        return found[1] if found else ""

    def client(self) -> openai.OpenAI:
        """A client that asks once, waits `ANSWER_SECONDS` at most and goes past any proxy to the loopback."""
        direct = openai.DefaultHttpxClient(trust_env=False)
        return openai.OpenAI(
            base_url=self.url, api_key="unused", max_retries=0, timeout=ANSWER_SECONDS, http_client=direct
        )


def missing() -> str:
    """What to do where vLLM is not installed; "" where it is."""
    if (ENVIRONMENT / ".ready").exists():
        return ""
    return "vLLM is not installed. Run `make serve-env` (a few minutes; about 3.5 GB), then run the cell again."


def has_four_bit_kernel() -> bool:
    """vLLM computes with packed 4-bit weights on GPUs and on CPUs with AVX-512; others lack the kernel."""
    return torch.cuda.is_available() or torch.cpu.get_capabilities().get("avx512_f", False)


def sixteen_bits() -> torch.dtype:
    """bfloat16, which vLLM refuses on GPUs before Ampere (compute capability 8.0, such as a T4): float16 there."""
    old = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
    return torch.float16 if old else torch.bfloat16


def servable(checkpoint: artifacts.Artifact, target: Path, dtype: torch.dtype) -> artifacts.Artifact:
    """A GPTQ checkpoint as vLLM can serve it on this machine: the same numbers, saved in `target`.

    In AWQ's format where vLLM has a 4-bit kernel (it refuses asymmetric files in GPTQ's), else unpacked to `dtype`.
    """
    if has_four_bit_kernel():
        return repack_as_awq(checkpoint, target, sixteen_bits())
    return save_dense(checkpoint, target, dtype)


@contextlib.contextmanager
def serve_vllm(
    folder: Path | str,
    log: Path,
    *,
    tokenizer: Path | str,
    dtype: str,
    context: int,
    sequences: int,
    memory: float | None = None,
    options: tuple[str, ...] = (),
) -> Iterator[VLLM]:
    """Serve the model in `folder` (what `servable` saved, or an original) while the block lasts.

    tokenizer: the folder of the tokenizer, which must have a chat template; dtype: of what is not quantized, such as
    "bfloat16"; context: tokens per request, prompt and answer together; sequences: requests computed together;
    memory: the share of the card, as COURSE_GPU_MEMORY caps it, that it may fill (default: half of the whole card);
    options: more of vLLM's own, such as "--tensor-parallel-size=2".
    Prompts are computed anew each time, so that the first token's delay is real.
    Raises FileNotFoundError where vLLM is not installed; EngineDied when it cannot start (a model or a GPU that it does
    not know, memory), dies or does not answer while the block lasts.
    """
    if missing():
        raise FileNotFoundError(missing())
    port = free_port()
    root = f"http://127.0.0.1:{port}"
    # `vllm serve` asks for the version of the package `vllm`, which `vllm-cpu` does not have; its module does not.
    command = [ENVIRONMENT / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--tokenizer", tokenizer]
    command += ["--host", "127.0.0.1", "--port", port, "--served-model-name", MODEL_NAME]
    command += ["--dtype", dtype, "--max-model-len", context, "--max-num-seqs", sequences, "--no-enable-prefix-caching"]
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        share = 0.5 if memory is None else memory * card_memory() / total
        command += ["--gpu-memory-utilization", f"{share:.3f}"]
        # CUDA graphs without torch.compile, which would take longer than a notebook uses the server.
        command += ["--compilation-config", json.dumps({"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"})]
    else:
        command += ["--enforce-eager", "--max-num-batched-tokens", context]  # compiling takes minutes on a CPU
    command += options
    environment = SETTINGS | {"PATH": f"{ENVIRONMENT / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    with serve_command(command, health=f"{root}/health", log=log, name="vLLM", timeout=600, environment=environment):
        try:
            yield VLLM(url=f"{root}/v1", log=log)
        except openai.APITimeoutError as error:
            raise EngineDied(
                f"vLLM did not answer within {ANSWER_SECONDS} s and was stopped. Its log: {log}"
            ) from error
