"""Servers end with the block that started them: however it is left, and with everything they started themselves."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from serving_tools import alive, wait_until, wait_until_gone

from common.engines import processes
from common.engines.processes import EngineDied, free_port, serve_command

# A server with a child of its own, as vLLM has; both write their process ids.
SERVER = """
import http.server, os, subprocess, sys, threading
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("pids", os.getpid(), child.pid, flush=True)
{extra}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"ok")
http.server.HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
"""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"


@pytest.fixture
def server(tmp_path):
    """(command, health url, log) of a small server; `extra` is code it runs first."""

    def make(extra: str = "") -> dict:
        port = free_port()
        command = [sys.executable, "-c", SERVER.format(port=port, extra=extra)]
        return {"command": command, "health": f"http://127.0.0.1:{port}/health", "log": tmp_path / "server.log"}

    return make


def pids(log: Path) -> list[int]:
    return [int(word) for word in log.read_text().split("pids ")[1].splitlines()[0].split()]


def test_answers_inside_the_block_and_is_gone_after_it(server):
    options = server()
    with serve_command(**options):
        assert urllib.request.urlopen(options["health"]).read() == b"ok"
        running = pids(options["log"])
        assert all(map(alive, running))
    wait_until_gone(running)


def test_is_stopped_when_the_block_fails(server):
    options = server()
    with pytest.raises(ZeroDivisionError), serve_command(**options):
        running = pids(options["log"])
        raise ZeroDivisionError
    wait_until_gone(running)


def test_a_server_that_ignores_sigterm_is_killed(server, monkeypatch):
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.5)
    options = server(STUBBORN)
    process = subprocess.Popen(options["command"], stdout=options["log"].open("wb"), start_new_session=True)
    while "pids" not in options["log"].read_text():
        time.sleep(0.05)
    time.sleep(0.2)  # until SIGTERM is ignored
    processes._stop(process)
    assert process.returncode == -signal.SIGKILL
    wait_until_gone(pids(options["log"]))


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
def test_is_stopped_when_the_notebook_is_killed(server, death):
    """The kernel gets no chance to clean up."""
    options = server()
    notebook = f"""
import pathlib, time
from common.engines.processes import serve_command
with serve_command({options["command"]!r}, health={options["health"]!r}, log=pathlib.Path({str(options["log"])!r})):
    print("up", flush=True)
    time.sleep(600)
"""
    kernel = subprocess.Popen([sys.executable, "-c", notebook], stdout=subprocess.PIPE, text=True)
    assert kernel.stdout.readline() == "up\n"
    running = pids(options["log"])
    os.kill(kernel.pid, death)
    kernel.wait()
    wait_until_gone(running)


def test_a_server_that_ends_early_shows_its_log(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with (
        pytest.raises(EngineDied, match=r"The server ended with status 1.*\n.*no such model"),
        serve_command(command, health="http://127.0.0.1:1/health", log=tmp_path / "log"),
    ):
        raise AssertionError("the block must not run")


def test_a_server_that_dies_while_it_is_used_is_named(server):
    """What the block itself sees is only a connection that failed."""
    options = server()
    with (
        pytest.raises(EngineDied, match=r"vLLM crashed in its native code \(SIGSEGV\)"),
        serve_command(**options, name="vLLM"),
    ):
        os.kill(pids(options["log"])[0], signal.SIGSEGV)
        urllib.request.urlopen(options["health"])
    wait_until_gone(pids(options["log"]))


def test_all_that_a_server_started_may_finish_its_work(server, tmp_path):
    """The server ends at once, its child needs a second after SIGTERM to put its work away: it is waited for."""
    saved = tmp_path / "saved"
    child = (
        "import pathlib, signal, sys, time\n"
        f"save = lambda *_: (time.sleep(1), pathlib.Path({str(saved)!r}).write_text('work'), sys.exit())\n"
        "signal.signal(signal.SIGTERM, save); print('ready', flush=True); time.sleep(600)"
    )
    options = server(f"subprocess.Popen([sys.executable, '-c', {child!r}])")
    with serve_command(**options):
        wait_until(lambda: "ready" in options["log"].read_text(), 10)
    assert saved.read_text() == "work"  # here, not some time later


def test_a_server_that_never_answers_times_out_and_is_stopped(tmp_path):
    command = [sys.executable, "-c", "import os, time; print('pids', os.getpid(), flush=True); time.sleep(600)"]
    with (
        pytest.raises(EngineDied, match=r"The server did not answer \S+ within 1 s"),
        serve_command(command, health="http://127.0.0.1:1/health", log=tmp_path / "log", timeout=1),
    ):
        raise AssertionError("the block must not run")
    wait_until_gone(pids(tmp_path / "log"))
