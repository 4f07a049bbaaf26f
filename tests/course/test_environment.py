"""What the first cells of every notebook print."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from common.course import environment, memory
from common.course.memory import host_peak
from common.course.settings import ROOT, load_settings


def test_prepare_prints_every_value_with_its_meaning(capsys):
    settings = environment.prepare("quantization", "", "cpu")
    out = capsys.readouterr().out
    for name, value in settings.values().items():
        assert name in out
        assert str(value) in out
        assert settings.documentation[name] in out


FIRST_CELL = """
from common.course.environment import prepare
from common.methods import training
prepare("quantization", "", "cpu")
import gptqmodel
import torch
torch.eye(2).to_sparse_csr()
"""


@pytest.mark.slow
def test_no_library_greets():
    """Neither those that a first cell imports (torchao comes with transformers' trainer) nor those imported later."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | {"CI": "1"}

    def ran(code: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    prepared = ran(FIRST_CELL)
    assert prepared.stderr == ""
    assert prepared.stdout.startswith("profile cpu")
    assert "LogBar" not in prepared.stdout
    greeting = ran("import logbar")
    assert "LogBar" in greeting.stdout + greeting.stderr, "it does greet here: else the lines above say nothing"


def test_prepare_seeds(capsys):
    environment.prepare("quantization", "", "cpu")
    first = torch.rand(3)
    environment.prepare("quantization", "", "cpu")
    assert torch.equal(torch.rand(3), first)


def test_missing_package_gets_a_cross_and_advice(monkeypatch, capsys):
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    checks = environment.report(load_settings("quantization", "cpu"))
    out = capsys.readouterr().out
    assert "✅ torch" in out
    assert "❌ no-such-package" in out
    assert "make setup" in out
    with pytest.raises(RuntimeError, match=r"Fix these first: no-such-package \(advice above\)"):
        environment.require(checks)


def test_driver_without_cuda_build_is_a_warning_with_advice(monkeypatch, capsys):
    monkeypatch.setattr(environment, "driver_version", lambda: "580.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checks = environment.report(load_settings("quantization", "cpu"))
    out = capsys.readouterr().out
    assert "⚠️ GPU" in out
    assert "install its CUDA build" in out
    environment.require(checks)


def test_usage_counts_from_prepare(monkeypatch):
    monkeypatch.setattr(environment, "_started", time.perf_counter() - 3600)  # the kernel is an hour old
    environment.prepare("quantization", "", "cpu")
    used = environment.usage()
    assert 0 <= used.seconds < 10
    assert used.memory_bytes > 50e6


@pytest.mark.parametrize(("limit", "expected"), [("15", 15 / 80), ("200", 1.0), ("", None)])
def test_gpu_memory_cap(monkeypatch, limit, expected):
    fractions = []
    monkeypatch.setenv("COURSE_GPU_MEMORY", limit)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = type("Card", (), {"total_memory": 80 * memory.GIB})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    memory.cap_gpu_memory()
    assert fractions == ([] if expected is None else [pytest.approx(expected)])


AGAIN = """
import resource
import torch
from common.course.memory import keep_freed_memory
{first}
for half in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(30):
        torch.ones(25_000_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 30)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(memory.LIBC, "mallopt") or torch.cuda.is_available(), reason="glibc's, without a GPU")
def test_freed_memory_is_kept():
    """100 MB are 24,414 pages (fewer where they are large), which the system clears again if they were handed back.

    In the first half small objects settle here and there among what is freed; then it stays as it is.
    """

    def pages_cleared(first: str) -> float:
        code = [sys.executable, "-c", AGAIN.format(first=first)]
        return float(subprocess.run(code, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout)

    assert pages_cleared("keep_freed_memory()") < 0.1 * pages_cleared("")


def test_with_a_gpu_main_memory_is_handed_back_as_ever(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "LIBC", type("C", (), {"mallopt": lambda *_: pytest.fail("something is kept")})())
    memory.keep_freed_memory()


@pytest.fixture
def card(monkeypatch):
    """card(gibibytes, allocated=0): PyTorch sees a GPU of this size, with nothing else on it."""

    def make(size: float, allocated: float = 0):
        total, used = int(size * memory.GIB), int(allocated * memory.GIB)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        card = type("Card", (), {"total_memory": total})()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (total - used, total))
        for name in ("memory_allocated", "memory_reserved"):
            monkeypatch.setattr(torch.cuda, name, lambda _: used)

    monkeypatch.delenv("COURSE_GPU_MEMORY", raising=False)
    return make


def test_auto_goes_by_the_model_where_it_fills_the_card(card, monkeypatch, capsys):
    sizes = {"embedded": 0.25, "7b": 12.6}
    monkeypatch.setattr(environment, "model_bytes", lambda spec: sizes[spec] * memory.GIB)
    card(16)
    assert environment.choose_profile("auto", "embedded") == "gpu" and capsys.readouterr().out == ""
    assert environment.choose_profile("auto", "7b") == "gpu16"
    assert capsys.readouterr().out == "profile gpu16: in 16 bits this model is 12.6 GiB, the card has 16\n"
    assert environment.choose_profile("gpu", "7b") == "gpu", "who names a profile gets it"
    card(139)
    assert environment.choose_profile("auto", "7b") == "gpu"
    monkeypatch.setenv("COURSE_GPU_MEMORY", "15")
    assert environment.choose_profile("auto", "7b") == "gpu16", "a large card that imitates a small one"


def test_what_does_not_fit_is_refused_under_the_cap_too(card, monkeypatch, capsys):
    device = torch.device("cuda")
    card(139, allocated=5)
    memory.require_memory(20 * memory.GIB, "It", device)
    monkeypatch.setenv("COURSE_GPU_MEMORY", "15")
    assert memory.fits(9 * memory.GIB, "It", device) and capsys.readouterr().out == ""
    assert not memory.fits(11 * memory.GIB, "It", device)
    assert "Left out: It needs about 11.0 GiB on the cuda and 10.0 GiB are free" in capsys.readouterr().out


@pytest.mark.slow
def test_the_first_cell_of_a_notebook_prints_nothing_to_stderr():
    """torchao says which of its libraries it did not load, and PyTorch that torchao registers enumerations."""
    said = {}
    for course in ("", "import common.course\n"):
        code = f"import torch\n{course}import torchao.quantization"
        said[course] = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    noise = ("Failed to load", "Enum subclass")
    assert not any(words in said["import common.course\n"] for words in noise)
    assert any(words in said[""] for words in noise), "torchao is quiet by itself now: this can go"


def test_peak_memory_is_the_process_own_and_not_that_of_the_program_that_started_it():
    held = np.ones(2**28)  # 2 GiB here; what starts now inherits them in its `ru_maxrss`
    code = "from common.course.memory import host_peak; print(host_peak())"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 2**26 < int(said.stdout) < held.nbytes < host_peak()
