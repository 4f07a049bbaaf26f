"""The in-process engine: a transformers model, decoded in one thread by continuous batching."""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from jinja2 import TemplateError
from torch import nn

from common.serving.batching import Batch, Sampling, Sequence, require_batchable
from common.serving.detokenize import Detokenizer
from common.serving.schemas import ApiError, CompletionRequest, Piece, Request, invalid

log = logging.getLogger(__name__)


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
        self.tokenizer, self.name, self.max_prompt = tokenizer, name, max_prompt
        ends = model.generation_config.eos_token_id
        self._ends = set(ends) if isinstance(ends, list) else {ends}
        self._batch = Batch(model, slots, max_prompt + max_output)
        self._jobs: dict[Sequence, _Job] = {}
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()  # None: finish
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    async def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """End the thread; the service calls this when all requests have been answered."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    async def ready(self) -> bool:
        return self._thread.is_alive()

    def prepare(self, body: Request) -> list[int]:
        """The prompt's tokens. Raises ApiError (400) when there are none or too many, or no chat template."""
        if isinstance(body, CompletionRequest):
            tokens = self.tokenizer(body.prompt).input_ids
        elif not self.tokenizer.chat_template:
            raise invalid(f"Model {self.name!r} has no chat template; use /v1/completions.", "messages")
        else:
            messages = [message.plain() for message in body.messages]
            try:
                prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except TemplateError as error:
                raise invalid(f"The model's chat template refuses these messages: {error}", "messages") from error
            tokens = self.tokenizer(prompt, add_special_tokens=False).input_ids
        if not 0 < len(tokens) <= self.max_prompt:
            code = "context_length_exceeded" if tokens else None
            message = f"The prompt has {len(tokens)} tokens; 1 to {self.max_prompt} are allowed."
            raise ApiError(400, message, "invalid_request_error", code=code)
        return tokens

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
        while self._admit():
            try:
                self._batch.step()
                self._deliver(list(self._batch.sequences))
            except Exception as error:  # such as out of memory: these requests fail, the service lives on
                log.exception("A decoding step failed.")
                for job in list(self._jobs.values()):
                    self._end(job, error)

    def _admit(self) -> bool:
        """Drop cancelled sequences, let waiting ones join, sleep while there are none. False: time to end."""
        for job in [job for job in self._jobs.values() if job.cancelled]:
            self._end(job)
        while len(self._jobs) < self._batch.rows:
            try:
                job = self._inbox.get(block=not self._jobs)
            except queue.Empty:
                break
            if job is None:
                return False
            if not job.cancelled:
                self._join(job)
        return True

    def _join(self, job: _Job) -> None:
        self._jobs[job.sequence] = job
        try:
            self._batch.join(job.sequence)
        except Exception as error:
            log.exception("Reading a prompt failed.")
            self._end(job, error)
        else:
            self._deliver([job.sequence])

    def _deliver(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            job, tokens = self._jobs[sequence], sequence.tokens
            ended, full = tokens[-1] in self._ends, len(tokens) == sequence.max_tokens
            text = job.detokenizer.push(tokens, last=ended or full)
            reason = "stop" if ended or job.detokenizer.stopped else "length" if full else None
            job.deliver(Piece(text, len(sequence.prompt), len(tokens), reason))
            if reason:
                self._end(job)

    def _end(self, job: _Job, error: Exception | None = None) -> None:
        del self._jobs[job.sequence]
        if job.sequence in self._batch.sequences:
            self._batch.leave(job.sequence)
        if error is not None:
            job.deliver(ApiError(500, "The model failed on this request.", "server_error"))
