"""Notebook 3.1-04 with engines that fail: each costs its own rows, and the service half still runs."""

import nbformat
import pytest
import torch
from IPython.display import display

from common.course import claims
from common.course.assets import load_model, load_tokenizer
from common.course.settings import CHAPTER, load_settings
from common.engines import vllm_server
from common.engines.selfcheck import tiny_llama
from common.formats.gptq import save_gptq
from common.methods.quantization import QuantizeConfig, rtn_model

NOTEBOOK = nbformat.read(CHAPTER / "Lab-3.1-Quantization" / "04-Deploy.ipynb", as_version=4)
REFUSAL = "Bfloat16 is only supported on GPUs with compute capability of at least 8.0"


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """notebook(from, to) → names after its code cells between these two, run on a tiny random Llama."""
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "work"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    tiny_llama(tmp_path / "model")
    spec = str(tmp_path / "model")
    model, tokenizer = load_model(spec, torch.float32), load_tokenizer(spec)
    quantized = rtn_model(model, QuantizeConfig(bits=4, group_size=64))
    target = load_settings("quantization", "smoke", spec).artifacts / "gptq"
    save_gptq(target, model, tokenizer, quantized, method="gptq", parent="original")
    names = {"PROFILE": "smoke", "MODEL": spec, "display": display}

    def run(first: str, last: str) -> dict:
        ids = [cell.id for cell in NOTEBOOK.cells]
        for cell in NOTEBOOK.cells[ids.index(first) : ids.index(last) + 1]:
            if cell.cell_type == "code":
                exec(compile(cell.source, cell.id, "exec"), names)
        return names

    yield run
    claims.about("embedded")


@pytest.mark.slow
def test_llama_cpp_crashes_and_vllm_does_not_start(notebook, plant, plant_vllm, capsys):
    plant("ctypes.string_at(0)")
    plant_vllm(f"sys.exit({REFUSAL!r})")
    names = notebook("cell-04", "cell-24")
    said = capsys.readouterr().out
    assert "⚠️ llama.cpp crashed in its native code (SIGSEGV) while it worked on f16.gguf" in said
    assert f"⚠️ vLLM ended with status 1. The end of its log:\n{REFUSAL}" in said
    assert names["quality"].keys() == {"original", "gptq"}  # their rows stand
    assert names["speed"].keys() == {"original"}
    assert names["rates"].keys() == {"transformers, generate", "transformers, CUDA graph"}
    names = notebook("cell-27", "cell-29")  # the service answers
    names["servers"].close()
    assert "answers: direct, through HTTP and batched are the same text" in capsys.readouterr().out


@pytest.mark.slow
def test_without_engines_and_for_a_family_that_gguf_does_not_know(notebook, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(vllm_server, "ENVIRONMENT", tmp_path / "nowhere")
    monkeypatch.setattr("common.formats.gguf._check", unknown_family)
    names = notebook("cell-04", "cell-24")
    said = capsys.readouterr().out
    assert "⚠️ no GGUF file of this model, so no llama.cpp below: not this family" in said
    assert "make serve-env" in said
    assert names["quality"].keys() == {"original", "gptq"}


def unknown_family(config, source):
    raise ValueError("not this family")
