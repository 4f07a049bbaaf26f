"""llama.cpp behind a socket: `python -m common.engines.llamacpp_worker FD`, started by `common.engines.llamacpp`.

A request is a tuple, the operation's name first. The answer is ("done", value), or ("failed", exception); after "read"
the logits follow, float32, one message per token. Messages are multiprocessing's (length first), and come from the
notebook that started this process only. It ends when the socket closes.
"""

import logging
import sys
import time
from multiprocessing.connection import Connection

import llama_cpp
import numpy as np

WARM_UP = 3  # steps before the timed ones


class Worker:
    """One operation per method; a model is loaded once."""

    def __init__(self, connection: Connection):
        self.connection = connection
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # what the engine says of its work

    def quantize(self, source: str, target: str, ftype: int, threads: int) -> int:
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread = ftype, threads
        return llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters)

    def load(self, file: str, context: int, threads: int) -> int:
        """Load a model; the size of its vocabulary."""
        self.llm = llama_cpp.Llama(
            file, n_ctx=context, n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False
        )
        return self.llm.n_vocab()

    def read(self, ids: list[int]) -> None:
        self.llm.reset()
        self.llm.eval(ids)

    def tokenize(self, text: str) -> list[int]:
        return self.llm.tokenize(text.encode(), add_bos=True, special=True)

    def generate(self, prompt: str, max_new_tokens: int) -> str:
        self.llm.reset()
        messages = [{"role": "user", "content": prompt}]
        answer = self.llm.create_chat_completion(messages, temperature=0.0, max_tokens=max_new_tokens)
        return answer["choices"][0]["message"]["content"].strip()

    def latency(self, prompt: list[int], runs: int) -> list[float]:
        """Seconds of `runs` decoding steps after `prompt`, always at the same position."""
        self.read(prompt)
        seconds = []
        for _ in range(WARM_UP + runs):
            self.llm.n_tokens = len(prompt)  # `eval` drops what the cache holds beyond it
            start = time.perf_counter()
            self.llm.eval(prompt[-1:])
            seconds.append(time.perf_counter() - start)
        return seconds[WARM_UP:]

    def serve(self) -> None:
        while True:
            try:
                operation, *arguments = self.connection.recv()
            except EOFError:
                return
            try:
                value = getattr(self, operation)(*arguments)
            except MemoryError:  # NumPy's own kind too
                self.connection.send(("failed", MemoryError()))
                continue
            except Exception as error:
                # Exceptions of other packages may not survive the way.
                known = type(error).__module__ == "builtins"
                self.connection.send(("failed", error if known else RuntimeError(f"{type(error).__name__}: {error}")))
                continue
            self.connection.send(("done", value))
            if operation == "read":
                for logits in np.asarray(self.llm.scores[: len(arguments[0])], dtype=np.float32):
                    self.connection.send_bytes(logits)


if __name__ == "__main__":
    Worker(Connection(int(sys.argv[1]))).serve()
