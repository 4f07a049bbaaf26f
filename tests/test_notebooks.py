"""Every notebook: how it is built, that its committed outputs belong to it, and that it runs from top to bottom."""

import os
import re
import subprocess
import sys

import nbformat
import pytest

from common.course.environment import device_name
from common.course.settings import ROOT, load_settings, slug
from common.measure import results
from tools import provenance, run, tables

NOTEBOOKS = run.find_notebooks()
MACHINE_PATH = re.compile(r"/(root|home|work|tmp|Users|opt)/")
each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=run.title)


def cells(file, kind=None):
    return [c for c in nbformat.read(file, as_version=4).cells if kind in (None, c.cell_type)]


def outputs(file):
    return [output for cell in cells(file, "code") for output in cell.outputs]


@each_notebook
def test_built_as_the_course_builds_notebooks(file):
    everything, code = cells(file), cells(file, "code")
    assert everything[0].source.startswith("# Lab ")
    assert "**目標**" in everything[0].source
    assert code[0].metadata.tags == ["parameters"]
    assert 'PROFILE = "auto"' in code[0].source
    assert "prepare(" in code[1].source
    assert code[-1].source == "recorder.finish()"
    for number, cell in enumerate(everything[:-1]):
        assert cell.source.strip(), f"cell {number} is empty"
    assert not re.search(r"\bif .*\bCI\b|%pip|!pip|except.*:\s*pass", "\n".join(c.source for c in code))


@each_notebook
def test_claims_are_checked(file):
    source = "\n".join(c.source for c in cells(file, "code"))
    assert (
        source.count("raise ") + source.count("assert_close")
        >= source.count('print(f"✅') + source.count('print("✅') - 1
    )


@each_notebook
def test_committed_outputs_are_from_one_clean_run_or_none(file):
    book = nbformat.read(file, as_version=4)
    if "provenance" not in book.metadata:  # not recorded yet: then it shows nothing at all
        assert not outputs(file)
        assert not any(cell.execution_count for cell in cells(file, "code"))
        return
    assert provenance.stale(book) == "", "record it again: make record NOTEBOOK=..."
    counts = [cell.execution_count for cell in cells(file, "code")]
    assert counts == list(range(1, len(counts) + 1))
    assert not [output for output in outputs(file) if output.output_type == "error"]
    text = str(outputs(file))
    assert not MACHINE_PATH.search(re.sub(r"data:image[^']*|'image/png': '[^']*'", "", text))


@each_notebook
def test_committed_figures_exist_for_the_recorded_device(file):
    recorded = nbformat.read(file, as_version=4).metadata.get("provenance")
    if recorded is None:
        pytest.skip("not recorded yet")
    mine = [r for r in tables.committed() if r["notebook"] == file.stem and r["device"] == recorded.device]
    assert {"notebook-seconds", "notebook-memory"} <= {r["key"] for r in mine}


def test_documents_show_the_committed_figures():
    stale = tables.render(tables.documents(), check=True)
    assert not stale, "run: make tables"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Run all notebooks once at the smoke profile, in order, each in a fresh kernel."""
    environment = os.environ | {"COURSE_WORK": str(ROOT / ".work" / "tests"), "TQDM_DISABLE": "0"}
    command = [sys.executable, "-m", "tools.run", "--profile", "smoke"]
    elsewhere = tmp_path_factory.mktemp("elsewhere")  # notebooks find everything from any working directory
    return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=4500)


@pytest.mark.timeout(4600)
def test_all_notebooks_run_at_smoke(smoke):
    assert smoke.returncode == 0, smoke.stdout[-3000:] + smoke.stderr[-2000:]
    for file in NOTEBOOKS:
        assert run.title(file) in smoke.stdout


def test_smoke_run_measured_what_it_should(smoke):
    device_folder = slug(device_name(load_settings("quantization", "smoke")))
    records = results.read(ROOT / ".work" / "tests" / "results" / device_folder / "smoke" / "quantization.json")
    keys = {(r["notebook"], r["artifact"], r["key"]) for r in records}
    assert {
        ("01-Setup", "original", "perplexity"),
        ("02-Quantize", "gptq", "bytes"),
        ("03-Inference", "gptq", "kl"),
        ("03-Inference", "original", "tpot-p99"),
    } <= keys


def test_inference_without_its_artifact_names_the_notebook(tmp_path):
    """Notebook 03 alone, on a machine where 02 never ran."""
    models = ROOT / ".work" / "tests" / "models"
    if models.exists():  # the unpacked embedded model is not what is missing
        (tmp_path / "models").symlink_to(models)
    command = [sys.executable, "-m", "tools.run", "--lab", "3.1", "--notebook", "03", "--profile", "smoke"]
    environment = os.environ | {"COURSE_WORK": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "Run notebook Lab-3.1-Quantization/02-Quantize first" in done.stdout


def test_setup_notebooks_give_the_committed_outputs():
    """nbval runs the Setup notebooks; cells tagged nbval-check-output must print what is committed."""
    setups = [str(file) for file in NOTEBOOKS if file.stem == "01-Setup"]
    checked = [c for file in NOTEBOOKS if file.stem == "01-Setup" for c in cells(file, "code")]
    assert any("nbval-check-output" in cell.metadata.get("tags", []) for cell in checked)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", *setups]
    environment = os.environ | {"COURSE_WORK": str(ROOT / ".work" / "tests"), "TQDM_DISABLE": "0"}
    unpack = [sys.executable, "-c", "from common.course.embedded import embedded_folder; embedded_folder()"]
    subprocess.run(unpack, cwd=ROOT, env=environment, check=True)  # its first use says so; nbval compares stderr, too
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]
