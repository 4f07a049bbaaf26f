"""llama.cpp: quantize a GGUF file, and measure it exactly as transformers models are measured.

Needs the compiled package `llama-cpp-python` (`make engines`); everything else in `common` works without it.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor


def missing() -> str:
    """What to do where llama.cpp is not installed; "" where it is."""
    if importlib.util.find_spec("llama_cpp"):
        return ""
    return (
        "llama.cpp is not installed. Run `make engines` (it compiles for some minutes and needs a C++ compiler), "
        "then restart the kernel."
    )


def require():
    """The package `llama_cpp`, its log silenced. Raises ModuleNotFoundError that says how to install it."""
    if missing():
        raise ModuleNotFoundError(missing())
    import llama_cpp

    llama_cpp._logger.set_verbose(False)
    return llama_cpp


def quantize_gguf(source: Path, target: Path, kind: str) -> Path:
    """Let llama.cpp quantize the float16 file `source` to `kind`, such as "Q8_0", "Q4_K_M" or "Q2_K".

    Raises ValueError for a kind that llama.cpp does not have, RuntimeError when it fails.
    """
    llama_cpp = require()
    ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}", None)
    if ftype is None:
        raise ValueError(f"llama.cpp has no quantization {kind!r}; try Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q3_K_M or Q2_K.")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = ftype
    parameters.nthread = torch.get_num_threads()
    aside = target.with_suffix(".new")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(aside).encode(), parameters):
        raise RuntimeError(f"llama.cpp could not quantize {source.name} to {kind}: is it a float16 GGUF file?")
    return aside.replace(target)


class LlamaCpp:
    """A GGUF file loaded by llama.cpp, callable like a transformers model: `evaluation.evaluate` takes both alike.

    context: tokens it can hold. It computes on the CPU with as many threads as PyTorch uses.
    """

    device = torch.device("cpu")

    def __init__(self, file: Path, context: int):
        threads = torch.get_num_threads()
        self._llm = require().Llama(
            str(file),
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=True,
            verbose=False,
        )

    def eval(self) -> "LlamaCpp":
        return self

    def close(self) -> None:
        """Free the model's memory."""
        self._llm.close()

    def __call__(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits [1, tokens, vocabulary] of one sequence `input_ids` [1, tokens], computed from its beginning."""
        ids = input_ids[0].tolist()
        self._llm.reset()
        self._llm.eval(ids)
        return SimpleNamespace(logits=torch.from_numpy(np.array(self._llm.scores[: len(ids)]))[None])

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text` by the tokenizer in the file, special tokens in it recognised."""
        return self._llm.tokenize(text.encode(), add_bos=True, special=True)

    def generate(self, prompt: str, max_new_tokens: int) -> str:
        """Greedy answer to `prompt`, which goes through the chat template in the file."""
        self._llm.reset()
        messages = [{"role": "user", "content": prompt}]
        answer = self._llm.create_chat_completion(messages, temperature=0.0, max_tokens=max_new_tokens)
        return answer["choices"][0]["message"]["content"].strip()

    def decoder(self, context: int) -> Callable[[], None]:
        """One decoding step after `context` tokens, always at the same position: for `measure_latency`."""
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(self._llm.n_vocab(), (context,), generator=generator).tolist()
        self._llm.reset()
        self._llm.eval(prompt)

        def step():
            self._llm.n_tokens = context  # `eval` drops what the cache holds beyond it
            self._llm.eval(prompt[-1:])

        return step
