"""llama.cpp in a process of its own: whatever happens to it costs one error that says what it was.

The faults are planted in a stand-in for the package `llama_cpp`, so that they happen on every machine.
"""

import importlib.util
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from serving_tools import wait_until_gone

from common.engines import processes, selfcheck
from common.engines.llamacpp import LlamaCpp, quantize_gguf
from common.engines.processes import EngineDied

FAULTS = {
    "SIGSEGV": ("ctypes.string_at(0)", r"llama\.cpp crashed in its native code \(SIGSEGV\)"),
    "SIGILL": ("os.kill(os.getpid(), 4)", r"crashed in its native code \(SIGILL\)"),
    "SIGABRT": ("os.abort()", r"crashed in its native code \(SIGABRT\)"),
    "SIGKILL": ("os.kill(os.getpid(), 9)", r"was killed from outside \(SIGKILL"),
    "memory limit": (
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31)); np.zeros(1 << 34)",
        r"could not get the memory it asked for \(close other programs",
    ),
    "end": ("os._exit(3)", "ended with status 3"),
}


def workers() -> list[int]:
    below = psutil.Process().children(recursive=True)
    return [p.pid for p in below if "common.engines.llamacpp_worker" in p.cmdline()]


def ids(count: int) -> torch.Tensor:
    return torch.zeros(1, count, dtype=torch.long)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_death_is_one_error_that_names_the_engine_the_cause_and_the_file(plant, fault):
    code, message = FAULTS[fault]
    plant(code)
    with LlamaCpp(Path("model.gguf"), context=8) as engine:
        assert engine(ids(2)).logits.tolist() == [[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]]  # what comes before it is right
        with pytest.raises(EngineDied, match=message) as death:
            engine(ids(3))
        assert "model.gguf" in str(death.value)
        assert "selfcheck" in str(death.value)
        assert str(death.value).endswith("about to fail")  # what it said itself
        assert not workers()


def test_a_kill_that_the_system_counts_is_for_lack_of_memory(plant, monkeypatch):
    plant("os.kill(os.getpid(), 9)")
    with LlamaCpp(Path("model.gguf"), context=8) as engine:
        before = processes.out_of_memory_kills()
        monkeypatch.setattr(processes, "out_of_memory_kills", lambda: before + 1)
        with pytest.raises(EngineDied, match=r"because the main memory was full \(SIGKILL\): close other programs"):
            engine(ids(3))


def test_a_hang_ends_at_the_time_limit(plant):
    plant("time.sleep(600)")
    with LlamaCpp(Path("model.gguf"), context=8, time_limit=5) as engine:
        running = workers()
        engine(ids(2))
        engine._worker.time_limit = 0.5
        start = time.monotonic()
        with pytest.raises(EngineDied, match=r"llama\.cpp did not answer within 0\.5 s and was stopped"):
            engine(ids(3))
        assert time.monotonic() - start < 10
        assert running
        wait_until_gone(running)


def test_a_crash_while_quantizing_leaves_no_file(plant, tmp_path):
    plant("ctypes.string_at(0)")
    with pytest.raises(EngineDied, match=r"SIGSEGV.*f16\.gguf"):
        quantize_gguf(tmp_path / "f16.gguf", tmp_path / "q4.gguf", "Q4_K_M")
    assert not list(tmp_path.glob("q4*"))


def test_the_worker_ends_with_the_notebook(plant):
    """The kernel is killed and gets no chance to clean up, its worker being busy."""
    plant("time.sleep(600)")
    notebook = (
        "import torch; from common.engines import llamacpp; llamacpp.missing = lambda: ''\n"
        "engine = llamacpp.LlamaCpp('model.gguf', context=8)\n"
        "print('up', flush=True); engine(torch.zeros(1, 3, dtype=torch.long))"
    )
    kernel = subprocess.Popen([sys.executable, "-c", notebook], stdout=subprocess.PIPE, text=True)
    assert kernel.stdout.readline() == "up\n"
    running = workers()
    assert running
    kernel.kill()
    kernel.wait()
    wait_until_gone(running)


def test_an_error_of_the_operation_is_that_error(plant):
    plant("raise KeyError('no such token')")
    with LlamaCpp(Path("model.gguf"), context=8) as engine:
        with pytest.raises(KeyError, match="no such token"):
            engine(ids(3))
        assert engine(ids(1)).logits.shape == (1, 1, 5)  # the process lives on


def test_latency_is_measured_on_the_workers_clock(plant):
    """The 38 µs that a question and its answer take between two processes [measured] are not in it."""
    plant("pass")
    with LlamaCpp(Path("model.gguf"), context=8) as engine:
        run = engine.latency(context=4, runs=7)
        assert len(run.seconds) == 7
        assert 0 < max(run.seconds) < 0.01


# --- the self-check of `make engines` -------------------------------------------------------------------------------


def test_a_failing_engine_is_not_marked_ready_and_says_why(plant, capsys):
    plant("ctypes.string_at(0)")
    assert selfcheck.main() == 1
    said = capsys.readouterr().out
    assert "llama.cpp does not work on this machine" in said
    assert "SIGSEGV" in said


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama.cpp is not installed: make engines")
def test_the_installed_engine_passes_it(capsys):
    assert selfcheck.main() == 0
    assert "llama.cpp works on this machine" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama.cpp is not installed: make engines")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_the_library_holds_no_amx_instruction():
    """Those kernels die at the first quantized prompt (ggml-org/llama.cpp#26954); the CMake file leaves them out."""
    folder = Path(importlib.util.find_spec("llama_cpp").origin).parent / "lib"
    library = next(folder.glob("libggml-cpu.so*"))
    assert tile_instructions(library) == set()


def tile_instructions(library: Path) -> set[str]:
    """AMX instructions in a library: tileloadd, tdpbssd, tdpbf16ps, ..."""
    listing = subprocess.run(
        ["objdump", "--disassemble", "--no-show-raw-insn", library], capture_output=True, text=True, check=True
    )
    words = (line.split("\t")[-1].split(maxsplit=1) for line in listing.stdout.splitlines() if "\t" in line)
    return {word[0] for word in words if word and word[0].startswith(("tdp", "tile"))}


def test_signals_have_their_names():
    assert processes.cause_of_death(128 + signal.SIGBUS, 0) == "crashed in its native code (SIGBUS)"
    assert processes.cause_of_death(128 + signal.SIGTERM, 0) == "was ended by SIGTERM"
    assert processes.cause_of_death(255, 0) == "ended with status 255"
