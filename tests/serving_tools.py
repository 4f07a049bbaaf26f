"""For the service's tests: the tiny model behind real HTTP, in this process or in one of its own."""

import os
import threading
import time
from collections.abc import Collection
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import torch
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from common.engines.processes import free_port
from common.serving.api import Limits, create_app
from common.serving.connections import uvicorn_config
from common.serving.engine import TransformersEngine
from tools import debian

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
LIMITS = Limits(slots=4, queue=8, max_prompt=100, max_output=120, max_bytes=20000, timeout=30)


def make_engine(model, tokenizer, limits=LIMITS, delay=0.0) -> TransformersEngine:
    """The in-process engine for the tiny model; `delay` seconds are added to each decoding step."""
    sizes = {"slots": limits.slots, "max_prompt": limits.max_prompt, "max_output": limits.max_output}
    engine = TransformersEngine(model, tokenizer, "tiny", **sizes)
    step = engine._batch.step
    engine._batch.step = lambda: (time.sleep(delay), step())
    return engine


def distributed(package: str, name: str) -> Path:
    """A program of the distribution. Where it cannot be had the test is skipped; in `make test` on Debian it fails."""
    try:
        return debian.program(package, name)
    except debian.NotToBeHad as error:
        if os.environ.get("COURSE_ENGINES") and debian.shutil.which("apt-get"):
            raise
        pytest.skip(str(error))


@contextmanager
def listening(engine, limits=LIMITS, api_key="", **options):
    """The service on a free port, in a thread; yields its URL."""
    port = free_port()
    app = create_app(engine, limits, api_key, **options)
    server = uvicorn.Server(uvicorn_config(app, limits, port=port))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started, 10)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(40)


def wait_until(condition, seconds: float) -> float:
    """Wait for `condition()`; the seconds that it took. Fails after `seconds`."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not within {seconds} s"
        time.sleep(0.01)
    return time.monotonic() - start


def alive(pid: int) -> bool:
    """Whether a process still does anything: one that ended and waits to be reaped does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(pids: Collection[int]) -> None:
    """Fails after 10 s. SIGKILL is no instant: the kernel takes a moment to clear a process's memory away."""
    wait_until(lambda: not any(map(alive, pids)), 10)


def process_of(url: str) -> psutil.Process:
    """The process that serves `url`."""
    port = url.rsplit(":", 1)[1]
    below = psutil.Process().children(recursive=True)
    return next(p for p in below if p.cmdline()[1:3] == ["-m", "common.serving"] and port in p.cmdline())


def metric(url: str, name: str, **labels) -> float:
    """The sum of a metric's samples that have these labels."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    samples = [s for family in families for s in family.samples if s.name == name]
    return sum(s.value for s in samples if labels.items() <= s.labels.items())


def direct(model, tokenizer, prompt: str, max_tokens: int) -> str:
    """What `model.generate` says: greedy, alone."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    mask = torch.ones_like(ids)  # else generate takes a prompt's own eos for padding
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False)
