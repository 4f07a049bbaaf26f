"""Programs of others, in processes that cannot outlive the notebook that started them, nor take it with them.

Between the notebook and the program stands a guard, this module run as a program, whose input is a pipe from the
notebook: when the notebook leaves the block, fails or is killed, the pipe closes, and the guard stops the program with
everything the program started. What goes wrong with the program is told by its true name, in one `EngineDied`.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import psutil

STOP_SECONDS = 15  # what a program has to finish its work after SIGTERM
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the loopback is never behind a proxy


class EngineDied(RuntimeError):
    """An engine's process crashed, was killed, ended or hangs. The message says which, and what to do."""


def out_of_memory_kills() -> int:
    """How many processes Linux has killed for lack of memory since it started; 0 where it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def cause_of_death(status: int, kills_before: int) -> str:
    """Why a guarded program ended: "crashed in its native code (SIGSEGV)", from the guard's exit status.

    kills_before: what `out_of_memory_kills` said when it was started.
    """
    if status - 128 not in set(signal.Signals):
        return f"ended with status {status}"
    ended_by = signal.Signals(status - 128)
    if ended_by in CRASHES:
        return f"crashed in its native code ({ended_by.name})"
    if ended_by == signal.SIGKILL and out_of_memory_kills() > kills_before:
        return (
            "was killed by the system because the main memory was full (SIGKILL): "
            "close other programs, or choose a smaller profile or model"
        )
    if ended_by == signal.SIGKILL:
        free = psutil.virtual_memory().available / 2**30
        return f"was killed from outside (SIGKILL; {free:.1f} GiB of memory are free now)"
    return f"was ended by {ended_by.name}"


def free_port() -> int:
    """A TCP port on the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_guarded(
    command: list[str], output: BinaryIO, *, environment: dict | None = None, pass_fds: tuple[int, ...] = ()
) -> subprocess.Popen:
    """Start `command` under a guard, whose process this returns; `output` takes what both print.

    The program ends when the guard's standard input closes. The guard ends when the program does, with its exit
    status, or 128 + the signal that ended it. environment: variables added to this process's; pass_fds: open files
    that the program inherits.
    """
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), *map(str, command)],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=os.environ | (environment or {}),
        pass_fds=pass_fds,
        start_new_session=True,  # Ctrl-C reaches the notebook, which then leaves the block
    )


def stop_guarded(guard: subprocess.Popen) -> int:
    """End a guarded program and all that it started; the guard's exit status."""
    guard.stdin.close()
    return guard.wait(3 * STOP_SECONDS)


@contextlib.contextmanager
def serve_command(
    command: list[str],
    *,
    health: str,
    log: Path,
    name: str = "The server",
    timeout: float = 180,
    environment: dict | None = None,
) -> Iterator[int]:
    """Run a server while the block lasts, its output in `log`; yields the guard's process id once `health` answers 200.

    environment: variables added to this process's. Raises EngineDied with the end of the log when the server ends
    early, while the block lasts or when `health` does not answer within `timeout` seconds.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    kills = out_of_memory_kills()
    with log.open("wb") as output:
        guard = start_guarded(command, output, environment=environment)
    try:
        _wait_until_healthy(guard, health, timeout, f"{name} did not answer {health}", log)
        yield guard.pid
    except Exception as error:
        with contextlib.suppress(subprocess.TimeoutExpired):
            guard.wait(1)  # what failed in the block may be how the block noticed
        if guard.poll() is None:
            raise
        cause = cause_of_death(guard.returncode, kills)
        raise EngineDied(f"{name} {cause}. The end of its log:\n{tail(log)}") from error
    finally:
        stop_guarded(guard)


def _wait_until_healthy(guard: subprocess.Popen, health: str, timeout: float, failure: str, log: Path) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if guard.poll() is not None:
            raise ConnectionError("it ended before it answered")
        try:
            with _direct.open(health, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)  # not listening yet, or not ready
    raise EngineDied(f"{failure} within {timeout:.0f} s. The end of its log:\n{tail(log)}")


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _stop(server: subprocess.Popen) -> None:
    """Ask the server's process group to end, then end what is left of it; returns when nothing of it runs."""
    for request, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, request)
        deadline = time.monotonic() + patience
        while _group_runs(server) and time.monotonic() < deadline:
            time.sleep(0.05)
    server.wait()


def _group_runs(server: subprocess.Popen) -> bool:
    """Whether a process of the server's group still does anything; one that ended and waits to be reaped does not."""
    server.poll()
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == server.pid and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False


def guard(command: list[str]) -> int:
    """Run `command` until it ends, or until standard input closes; its exit status, or 128 + its signal."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # close_fds=False: the program inherits what the guard was told to pass on.
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, close_fds=False)
    try:
        while server.poll() is None:
            readable, _, _ = select.select([sys.stdin], [], [], 0.2)
            if readable and not os.read(sys.stdin.fileno(), 1):
                break
    finally:
        _stop(server)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1:]))
