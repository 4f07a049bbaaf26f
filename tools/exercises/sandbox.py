"""A process that runs one answer, and the line to it.

The answer's process holds the answer and nothing else: no checks, no secret seed. It is forked from a server that has
imported torch, gets a memory limit, and may from then on read no file but installed packages, write none, start no
process and open no connection (an audit hook, PEP 578, which cannot be taken out). Checks call the answer's functions
through a pipe that carries tensors, numbers, texts and lists of them; what comes back is read by torch's safe
unpickler. The asking side waits as long as it was told to, then kills.
"""

import io
import multiprocessing
import os
import pickle
import resource
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import torch

GIB = 2**30
START = 120.0  # seconds for what is ours: the process, and the code that runs before the answer
REPLY_BYTES = 256 * 2**20
OURS = ("common", "tools", "benchmarks")
REFUSED = (
    *("socket.", "subprocess.", "ctypes.", "shutil.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork"),
    *("os.kill", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.putenv", "signal."),
)
READABLE = tuple({os.path.realpath(p) for p in (sys.prefix, sys.base_prefix)} | {sys.prefix, "/dev/null", "/proc/self"})


class Wrong(AssertionError):
    """An answer that raised an error, or returned what cannot be read."""


class Stopped(AssertionError):
    """An answer whose process is no more: it took too long, too much memory, or ended itself."""


class Unsendable(Exception):
    """In the answer's process: it returned what the pipe does not carry."""


class Sandbox:
    """An answer's process; use it as a context. Raises Wrong or Stopped where its cell cannot even be run."""

    def __init__(self, before: str, cell: str, seconds: float, memory: int):
        self.seconds, self.stopped = seconds, ""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", __name__])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, before, cell, memory), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self) -> "Sandbox":
        try:
            self._receive(START)
            self._receive(self.seconds)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def call(self, name: str, args: tuple, kwargs: dict) -> Any:
        """What the answer's function returns. Raises Wrong, Stopped or NotImplementedError."""
        if self.stopped:
            raise Stopped(self.stopped)
        self.connection.send_bytes(_packed((name, args, kwargs)))
        return self._receive(self.seconds)

    def _receive(self, seconds: float) -> Any:
        try:
            if not self.connection.poll(seconds):
                self._stop(f"It took longer than {seconds:g} s: an endless loop?")
            kind, *said = torch.load(io.BytesIO(self.connection.recv_bytes(REPLY_BYTES)), weights_only=True)
        except (EOFError, ConnectionError):
            self.process.join(5)
            status = self.process.exitcode
            self._stop(f"It was killed ({signal.Signals(-status).name})." if status and status < 0 else _ended(status))
        except (OSError, RuntimeError, ValueError, TypeError, pickle.UnpicklingError) as error:
            self._stop(f"What came back cannot be read ({type(error).__name__}).")
        if kind == "returned":
            return said[0]
        error, message = said
        if error == "NotImplementedError":
            raise NotImplementedError
        if error == "SystemExit":
            self._stop("It calls exit(), which ends the whole program.")
        if "MemoryError" in error or "can't allocate memory" in message:
            raise Wrong("It wants more memory than an answer may take.")
        if error == "Unsendable":
            raise Wrong(f"It {message}.")
        raise Wrong(f"It raised {error}: {message}")

    def _stop(self, why: str) -> None:
        self.stopped = why
        self.process.kill()
        raise Stopped(why)


def _ended(status: int | None) -> str:
    return f"It ended its own process (exit status {status})."


def _packed(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _serve(connection: Connection, before: str, cell: str, memory: int) -> None:
    """The answer's process: runs the cell, then answers calls until it is killed."""
    torch.set_num_threads(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    names: dict[str, Any] = {"__name__": "answer"}
    exec(before, names)
    connection.send_bytes(_packed(("returned", None)))
    _confine(memory)
    reply = _attempt(lambda: exec(compile(cell, "answer", "exec"), names))
    while True:
        connection.send_bytes(reply)
        name, args, kwargs = torch.load(io.BytesIO(connection.recv_bytes()), weights_only=True)
        if callable(names.get(name)):
            reply = _attempt(lambda: names[name](*args, **kwargs))  # noqa: B023 - called at once
        else:
            reply = _packed(("raised", "NameError", f"the cell defines no function {name}"))


def _attempt(work) -> bytes:
    """What `work` returned or raised, packed."""
    try:
        value = _plain(work())
        try:
            return _packed(("returned", value))
        except (pickle.PicklingError, NotImplementedError, AttributeError) as error:
            raise Unsendable(f"returned {type(value).__name__}, not tensors, numbers or texts") from error
    except BaseException as error:  # SystemExit too: it is told by name
        return _packed(("raised", type(error).__name__, str(error)[:300]))


def _plain(value: Any) -> Any:
    """`value` as the pipe carries it; Unsendable where it holds something else."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().as_subclass(torch.Tensor)
    if isinstance(value, list | tuple):
        return (tuple if type(value) is tuple else list)(map(_plain, value))
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    for kind in (bool, int, float, str):
        if isinstance(value, kind):  # NumPy's float64 is a float too
            return kind(value)
    if value is None:
        return value
    raise Unsendable(f"returned {type(value).__name__}, not tensors, numbers or texts")


def _confine(memory: int) -> None:
    """From here on this process may compute, and nothing else."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_guard)


def _guard(event: str, args: tuple) -> None:
    if event == "open":
        path, _, flags = args
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if isinstance(path, int):
            return
        if writes or not os.fsdecode(path).startswith(READABLE):
            raise PermissionError("an answer may not open files")
    elif event == "import" and args[0].split(".")[0] in OURS:
        raise PermissionError(f"an answer may not import {args[0]}")
    elif event.startswith(REFUSED):
        raise PermissionError(f"an answer may not use {event}")
