"""Servers that cannot outlive the notebook that started them.

`serve` starts a server for the length of a `with` block. Between the notebook and the server stands a guard, this
module run as a program, whose input is a pipe from the notebook: when the notebook leaves the block, fails or is
killed, the pipe closes, and the guard stops the server with everything the server started.
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

STOP_SECONDS = 15  # what a server has to finish its work after SIGTERM
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the loopback is never behind a proxy


def free_port() -> int:
    """A TCP port on the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serve(
    command: list[str], *, health: str, log: Path, timeout: float = 180, environment: dict | None = None
) -> Iterator[int]:
    """Run a server while the block lasts, its output in `log`; yields the guard's process id once `health` answers 200.

    environment: variables added to this process's. Raises RuntimeError with the end of the log when the server
    ends early, TimeoutError when `health` does not answer within `timeout` seconds.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        guard = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *map(str, command)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
            start_new_session=True,  # Ctrl-C reaches the notebook, which then leaves the block
        )
    try:
        _wait_until_healthy(guard, health, log, timeout)
        yield guard.pid
    finally:
        guard.stdin.close()
        guard.wait(2 * STOP_SECONDS)


def _wait_until_healthy(guard: subprocess.Popen, health: str, log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if guard.poll() is not None:
            raise RuntimeError(f"The server ended with status {guard.returncode}. The end of its log:\n{tail(log)}")
        try:
            with _direct.open(health, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)  # not listening yet, or not ready
    raise TimeoutError(f"{health} did not answer within {timeout:.0f} s. The end of the server's log:\n{tail(log)}")


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _stop(server: subprocess.Popen) -> None:
    """Ask the server's process group to end, then end what is left of it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_SECONDS)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def guard(command: list[str]) -> int:
    """Run `command` until it ends, or until standard input closes; returns its exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while server.poll() is None:
            readable, _, _ = select.select([sys.stdin], [], [], 0.2)
            if readable and not os.read(sys.stdin.fileno(), 1):
                break
    finally:
        _stop(server)
    return server.returncode


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1:]))
