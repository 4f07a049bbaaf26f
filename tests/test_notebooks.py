"""Every notebook: how it is built, that its committed outputs belong to it, and that it runs from top to bottom."""

import ast
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
LEDGER = provenance.ledger.load()
MACHINE_PATH = re.compile(r"/(root|home|work|tmp|Users|opt)/")
PROGRESS = re.compile(
    r"^.*(\d+%\||\d+(it|ex|\wB)? ?\[\d+:\d\d).*$", re.MULTILINE
)  # a bar of tqdm, with or without an end
each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=run.title)


def cells(file, kind=None):
    return [c for c in nbformat.read(file, as_version=4).cells if kind in (None, c.cell_type)]


def outputs(file):
    return [output for cell in cells(file, "code") for output in cell.outputs]


@each_notebook
def test_built_as_the_course_builds_notebooks(file):
    everything, code = cells(file), cells(file, "code")
    assert everything[0].source.startswith(("# Lab ", "# Advanced A"))
    assert "**目標**" in everything[0].source
    assert code[0].metadata.tags == ["parameters"]
    assert 'PROFILE = "auto"' in code[0].source
    assert "prepare(" in code[1].source
    assert code[-1].source == "recorder.finish()"
    for number, cell in enumerate(everything[:-1]):
        assert cell.source.strip(), f"cell {number} is empty"
    assert not re.search(r"\bif .*\bCI\b|%pip|!pip|except.*:\s*pass", "\n".join(c.source for c in code))


def draws(cell) -> bool:
    return cell.cell_type == "code" and bool(re.search(r"\b(\w+_)?plots\.\w+\(", cell.source))


@each_notebook
def test_claims_are_checked(file):
    """A ✅ comes from `check` or `verify`, or is compared by nbval; a notebook's own errors are two at most."""
    nodes = [node for c in cells(file, "code") for node in ast.walk(ast.parse(c.source))]
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert called & {"check", "verify"}
    assert sum(isinstance(node, ast.Raise) for node in nodes) <= 2
    assert not any(isinstance(node, ast.Assert) for node in nodes)
    for cell in cells(file, "code"):
        assert "✅" not in cell.source or "nbval-check-output" in cell.metadata.tags


LABS = [file for file in NOTEBOOKS if file.parent.name.startswith("Lab-")]


@pytest.mark.parametrize("file", LABS, ids=run.title)
def test_no_cell_copies_a_whole_model(file):
    """A student's may be a 7B, of which neither the card nor main memory has room for two."""
    code = "\n".join(cell.source for cell in cells(file, "code"))
    assert not re.search(r"deepcopy\((original|teacher|student)\)", code)


@each_notebook
def test_every_figure_is_guessed_first_and_answered_below(file):
    guessed, everything = False, cells(file)
    for number, cell in enumerate(everything):
        guessed |= cell.cell_type == "markdown" and "**先猜**" in cell.source
        if draws(cell):
            assert guessed, f"cell {number} shows a figure that nobody was asked to guess"
            answer = everything[number + 1]
            assert answer.cell_type == "markdown", f"no text answers the figure of cell {number}"
            assert not answer.source.startswith("#"), f"no text answers the figure of cell {number}"
            guessed = False


@each_notebook
def test_committed_outputs_are_from_one_clean_run_or_none(file):
    book = nbformat.read(file, as_version=4)
    if "provenance" not in book.metadata:  # not recorded yet: then it shows nothing at all
        assert not outputs(file)
        assert not any(cell.execution_count for cell in cells(file, "code"))
        return
    recorded = book.metadata.provenance
    if LEDGER.reasons(f"{recorded.lab}/{file.stem}", recorded.profile):  # it waits: what changed shows nothing
        code, changed = provenance.code_cells(book), provenance.changed_cells(book)
        showing = [n for n, cell in enumerate(code, start=1) if cell.outputs or cell.execution_count]
        assert not set(showing) & set(changed), "these cells are not those that were recorded: clear their outputs"
        counts = [cell.execution_count for cell in code if cell.execution_count]
        assert counts == sorted(set(counts))
    else:
        assert provenance.stale(book) == "", "record it again (make record NOTEBOOK=...), or enter it in the ledger"
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
    """Run all notebooks once at the smoke profile, in order, each in a fresh kernel, on six blocks of the model."""
    environment = os.environ | {"COURSE_WORK": str(ROOT / ".work" / "tests"), "TQDM_DISABLE": "0"}
    command = [sys.executable, "-m", "tools.run", "--profile", "smoke", "--model", "embedded-short", "--again"]
    elsewhere = tmp_path_factory.mktemp("elsewhere")  # notebooks find everything from any working directory
    return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=4500)


@pytest.mark.notebooks
@pytest.mark.timeout(4600)
def test_all_notebooks_run_at_smoke(smoke):
    assert smoke.returncode == 0, smoke.stdout[-3000:] + smoke.stderr[-2000:]
    for file in NOTEBOOKS:
        assert run.title(file) in smoke.stdout


def noise(text):
    """What is left of an error stream without progress bars, which end in a carriage return or in a new line."""
    return PROGRESS.sub("", text.replace("\r", "\n").replace("\x1b[A", "")).strip()


def test_noise_is_all_but_progress_bars():
    bars = (
        "\rlayers:   0%|          | 0/30 [00:00<?, ?it/s]\rlayers: 100%|██████████| 30/30 [00:02<00:00, 12.1it/s]\n"
        "\rGenerating: 3it [00:01,  2.10it/s]\r 12ex [00:00, 9ex/s]\n\x1b[A"
    )
    assert noise(bars) == ""
    warning = "Failed to load libtorchao.so\n<stdin>:1: UserWarning: 180 of 272 tensors"
    assert noise(f"{bars}{warning}\n{bars}") == warning


@pytest.mark.notebooks
@each_notebook
def test_nothing_but_progress_bars_on_stderr(smoke, file):
    """What a student sees in Jupyter."""
    executed = ROOT / ".work" / "tests" / "runs" / "smoke" / file.parent.name / file.name
    said = [
        noise("".join(o.text for o in cell.outputs if o.get("name") == "stderr")) for cell in cells(executed, "code")
    ]
    assert {number: text[:500] for number, text in enumerate(said, start=1) if text} == {}


@pytest.mark.notebooks
def test_make_labs_says_nothing_on_stderr_either(smoke):
    assert noise(smoke.stderr)[:2000] == ""


@pytest.mark.notebooks
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


@pytest.mark.notebooks
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


@pytest.mark.notebooks
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
