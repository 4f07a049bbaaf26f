"""Engines that fail as planted, on every machine."""

import os
import sys

import pytest

from common.engines import llamacpp, vllm_server

STAND_IN = """
import ctypes, os, resource, sys, time
import numpy as np

class Parameters:
    pass

def llama_model_quantize_default_params():
    return Parameters()

def llama_model_quantize(source, target, parameters):
    open(target, "wb").write(b"half")
    fault()
    return 0

class Llama:
    def __init__(self, file, n_ctx, **options):
        self.scores = np.arange(n_ctx * 5, dtype=np.float32).reshape(n_ctx, 5)
    def n_vocab(self):
        return 5
    def reset(self):
        pass
    def tokenize(self, text, add_bos, special):
        fault()
    def eval(self, ids):
        if len(ids) > 2:
            fault()

def fault():
    print("about to fail", file=sys.stderr, flush=True)
    {fault}
"""


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """plant(code) → from now on, workers import a `llama_cpp` that runs the code when it has work to do."""

    def write(fault: str) -> None:
        package = tmp_path / "stand-in"
        package.mkdir()
        (package / "llama_cpp.py").write_text(STAND_IN.replace("{fault}", fault))
        monkeypatch.setattr(llamacpp, "missing", lambda: "")
        monkeypatch.setenv("PYTHONPATH", f"{package}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    return write


@pytest.fixture
def plant_vllm(tmp_path, monkeypatch):
    """plant_vllm(code) → vLLM's environment is one whose Python runs this code; `port` is where it should listen."""

    def write(code: str) -> None:
        place = tmp_path / "serve" / "bin"
        place.mkdir(parents=True)
        program = place / "python"
        program.write_text(
            f"#!{sys.executable}\nimport sys\nport = int(sys.argv[sys.argv.index('--port') + 1])\n{code}"
        )
        program.chmod(0o755)
        (tmp_path / "serve" / ".ready").touch()
        monkeypatch.setattr(vllm_server, "ENVIRONMENT", tmp_path / "serve")

    return write
