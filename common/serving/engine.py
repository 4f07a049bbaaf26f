"""The in-process engine: a transformers model, decoded in one thread by continuous batching."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch import nn

from common.serving.batching import Batch, Sampling, Sequence, require_batchable
from common.serving.detokenize import Detokenizer
from common.serving.prompts import Prompts
from common.serving.schemas import ApiError, Piece, Request

log = logging.getLogger(__name__)
FAILURES = 3  # in a row: then the engine is not ready until a probe succeeds
PROBE_SECONDS = 2.0


@dataclass
class _Job:
    """A sequence with its way back to the request that waits for it."""

    sequence: Sequence
    detokenizer: Detokenizer
    deliver: Callable[[Piece | Exception], None]
    cancelled: bool = False


class TransformersEngine:
    """Serves `model` under `name`: at most `slots` sequences at a time.

    With temperature 0 an answer equals `model.generate(do_sample=False)` with its penalties off: the request decides
    how tokens are chosen, not the model's generation settings. That holds in float32; in bfloat16 batches
    round differently and near ties turn out the other way: 11 of 24 answers of 32 tokens changed in a batch of 8
    (SmolLM2-135M on a CPU; in float32 none did). Raises ValueError for a model that this engine would not serve right.
    """

    def __init__(self, model: nn.Module, tokenizer, name: str, *, slots: int, max_prompt: int, max_output: int):
        require_batchable(model)
        self.tokenizer, self.name = tokenizer, name
        self._prompts = Prompts(tokenizer, name, max_prompt)
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")
        ends = model.generation_config.eos_token_id
        self._ends = set(ends) if isinstance(ends, list) else {ends}
        self._batch = Batch(model, slots, max_prompt + max_output)
        self._jobs: dict[Sequence, _Job] = {}
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()  # None: finish
        self._owed = 0.0  # seconds that prompts were read while others waited for their next tokens
        self._failures = 0  # since the last whole answer
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    async def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """End the thread; the service calls this when all requests have been answered."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        self._tokenizing.shutdown()

    def alive(self) -> bool:
        """Whether the engine's thread runs. Without it only a new process helps."""
        return self._thread.is_alive()

    async def ready(self) -> bool:
        return self.alive() and self._failures < FAILURES

    async def prepare(self, body: Request) -> list[int]:
        """The prompt's tokens. Raises ApiError (400). In a thread: a long prompt would stop the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, self._prompts.tokens, body)

    async def generate(self, body: Request, prompt: list[int], max_tokens: int) -> AsyncIterator[Piece]:
        """The answer, piece by piece. Closing the iterator early frees the sequence's slot before the next token."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()
        sampling = Sampling(body.temperature, body.top_p, body.seed)
        job = _Job(
            Sequence(prompt, max_tokens, sampling),
            Detokenizer(self.tokenizer, body.stop_strings()),
            lambda item: loop.call_soon_threadsafe(pieces.put_nowait, item),
        )
        self._inbox.put(job)
        try:
            if self._ended:  # asked after the job was put: the thread answers every job that it still sees
                raise _failure(503)
            while True:
                item = await pieces.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish_reason:
                    return
        finally:
            job.cancelled = True

    # --- the engine's thread ---

    def _work(self) -> None:
        try:
            while self._turn():
                pass
        finally:  # whatever ends this thread, nobody waits for it
            self._ended = True
            self._fail_all(503)
            while not self._inbox.empty():
                if job := self._inbox.get():
                    job.deliver(_failure(503))

    def _turn(self) -> bool:
        """One token for everyone. A failure fails the requests of this batch; the next batch begins anew."""
        try:
            if not self._admit():
                return False
            if self._jobs:
                self._step()
            elif self._failures:
                self._probe()
        except Exception:
            log.exception("The engine failed.")
            self._failures += 1
            self._fail_all(500)
        return True

    def _admit(self) -> bool:
        """Drop cancelled sequences, let waiting ones join, sleep while there are none. False: time to end.

        Reading a prompt stops everyone else's answer. So after a join the batch decodes at least as long as the join
        took: however many short requests come, an answer takes at most about twice as long.
        """
        for job in [job for job in self._jobs.values() if job.cancelled]:
            self._end(job)
        while len(self._jobs) < self._batch.rows and not (self._jobs and self._owed > 0):
            try:
                job = self._inbox.get(not self._jobs, PROBE_SECONDS if self._failures else None)
            except queue.Empty:
                break
            if job is None:
                return False
            if not job.cancelled:
                self._join(job)
        return True

    def _join(self, job: _Job) -> None:
        alone, begin = not self._jobs, time.perf_counter()
        self._jobs[job.sequence] = job
        try:
            self._batch.join(job.sequence)
        except Exception:  # such as out of memory: this request fails, the others go on
            log.exception("Reading a prompt failed.")
            self._failures += 1
            job.deliver(_failure(500))
            self._end(job)
        else:
            self._deliver([job.sequence])
        self._owed = 0.0 if alone else self._owed + time.perf_counter() - begin

    def _step(self) -> None:
        begin = time.perf_counter()
        self._batch.step()
        self._owed = max(0.0, self._owed - (time.perf_counter() - begin))
        self._deliver(list(self._batch.sequences))

    def _probe(self) -> None:
        """While nobody asks: two tokens, to see whether the model computes again."""
        sequence = Sequence([0], 2)
        self._batch.join(sequence)
        self._batch.step()
        self._batch.leave(sequence)
        self._failures = 0

    def _fail_all(self, status: int) -> None:
        jobs = list(self._jobs.values())
        self._jobs.clear()
        for job in jobs:
            job.deliver(_failure(status))
        self._batch.clear()

    def _deliver(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            job, tokens = self._jobs[sequence], sequence.tokens
            ended, full = tokens[-1] in self._ends, len(tokens) == sequence.max_tokens
            text = job.detokenizer.push(tokens, last=ended or full)
            reason = "stop" if ended or job.detokenizer.stopped else "length" if full else None
            job.deliver(Piece(text, len(sequence.prompt), len(tokens), reason))
            if reason:
                self._end(job)
                self._failures = 0

    def _end(self, job: _Job) -> None:
        del self._jobs[job.sequence]
        if job.sequence in self._batch.sequences:
            self._batch.leave(job.sequence)


def _failure(status: int) -> ApiError:
    message = "The engine has ended." if status == 503 else "The model failed on this request."
    return ApiError(status, message, "server_error", code="engine")
