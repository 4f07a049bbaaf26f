"""The workflows, checked with actionlint; the nightly GPU run's steps, run here with stand-ins for make and gh."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from nbval.plugin import IPyNbCell, get_sanitize_patterns

from common.course.settings import ROOT
from tools import run

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
NIGHTLY = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly-gpu.yml").read_text(encoding="utf-8"))
JOBS = NIGHTLY["jobs"]
SANITIZE = ROOT / "tests" / "nbval-sanitize.cfg"
PATTERNS = dict(get_sanitize_patterns(SANITIZE.read_text(encoding="utf-8")))
FAILED_CELL = '❌ Lab-3.1-Quantization/02-Quantize, cell [9] failed:\n\n    raise ValueError("worse")\n'


def actionlint(workflow: str) -> str:
    """What actionlint finds in a workflow's text; without shellcheck, which not every machine has."""
    options = ["-config-file", ".github/actionlint.yaml", "-shellcheck=", "-oneline", "-"]
    command = [Path(sys.executable).with_name("actionlint"), *options]
    return subprocess.run(command, cwd=ROOT, input=workflow, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflows(file):
    workflow = file.read_text(encoding="utf-8")
    assert actionlint(workflow) == ""
    assert "[syntax-check]" in actionlint(workflow.replace("runs-on:", "runs:"))


def test_each_cron_runs_one_job_and_only_the_report_may_write():
    crons = [entry["cron"] for entry in NIGHTLY[True]["schedule"]]  # YAML 1.1 reads the key `on` as true
    skipped = {job: re.findall(r"schedule != '(.*)'", JOBS[job]["if"]) for job in ("embedded", "llama")}
    assert skipped == {"embedded": [crons[1]], "llama": [crons[0]]}
    assert NIGHTLY["permissions"] == {"contents": "read"}
    assert {job: JOBS[job]["permissions"] for job in JOBS if "permissions" in JOBS[job]} == {
        "report": {"issues": "write"}
    }


def commands(job: str) -> list[str]:
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


def test_the_steps_name_what_exists():
    text = "\n".join(commands("embedded") + commands("llama"))
    for target in sorted(set(re.findall(r"make (\w+)", text))):
        subprocess.run(["make", "-n", target, "NOTEBOOK=01"], cwd=ROOT, check=True, capture_output=True, timeout=60)
    paths = re.findall(r"(?:tests|03-Model_Compression)[\w$./-]*", text)
    assert "tests/nbval-sanitize.cfg" in paths
    for path in paths:
        assert (ROOT / path).exists(), path


def execute(script: str, folder: Path, programs: dict[str, str], **environment) -> subprocess.CompletedProcess:
    """Run a step as GitHub does for `shell: bash`, with stand-ins for some programs; each logs its arguments."""
    assert NIGHTLY["defaults"]["run"]["shell"] == "bash"
    for name, body in programs.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'#!/bin/bash\necho "{file.name} $*" >> "{folder}/called"\n{body}\n', encoding="utf-8")
        file.chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=folder,
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def called(folder: Path) -> list[str]:
    return (folder / "called").read_text(encoding="utf-8").splitlines() if (folder / "called").exists() else []


def test_a_failing_notebook_fails_the_step_and_is_in_the_log(tmp_path):
    script = commands("embedded")[0]
    assert execute(script, tmp_path, {"bin/make": "echo fine"}).returncode == 0
    assert execute(script, tmp_path, {"bin/make": "echo broken; exit 2"}).returncode == 2
    assert (tmp_path / ".work" / "run.log").read_text(encoding="utf-8") == "broken\n"


def test_llama_needs_a_token(tmp_path):
    (script,) = commands("llama")
    programs = {"bin/make": ""}
    environment = {"TEACHER": "a/teacher", "STUDENT": "a/student"}
    without = execute(script, tmp_path, programs, HF_TOKEN="", **environment)
    assert (without.returncode, called(tmp_path)) == (0, [])
    assert without.stdout.startswith("::notice::")
    assert execute(script, tmp_path, programs, HF_TOKEN="secret", **environment).returncode == 0
    assert called(tmp_path) == [
        "make labs LAB=3.1 PROFILE=gpu MODEL=a/teacher",
        "make labs LAB=3.2 PROFILE=gpu MODEL=a/teacher",
        "make labs LAB=3.3 PROFILE=gpu MODEL=a/teacher STUDENT=a/student",
    ]
    assert execute(script, tmp_path, programs | {"bin/make": "exit 2"}, HF_TOKEN="x", **environment).returncode == 2


def report(folder: Path, log: str | None, open_issue: str = "") -> tuple[str, list[str]]:
    """Run the report's step on a log; the body it wrote, and how it called gh."""
    if log is not None:
        (folder / "embedded").mkdir()
        (folder / "embedded" / "run.log").write_text(log, encoding="utf-8")
    (script,) = commands("report")
    gh = f'case "$*" in "issue list"*) echo "{open_issue}";; esac'
    done = execute(script, folder, {"bin/gh": gh}, RUN="https://example.org/run")
    assert done.returncode == 0, done.stderr
    return (folder / "body.md").read_text(encoding="utf-8"), called(folder)


def test_a_failing_cell_opens_an_issue(tmp_path):
    body, calls = report(tmp_path, f"[1/12] Lab-3.1-Quantization/01-Setup\n\n{FAILED_CELL}")
    assert body == f"https://example.org/run\n\n~~~\n{FAILED_CELL}~~~\n"
    assert [call.split(" --")[0] for call in calls] == [
        "gh issue list",
        "gh label create nightly-gpu",
        "gh issue create",
    ]
    assert "--label nightly-gpu" in calls[0]
    assert "--label nightly-gpu" in calls[2]


def test_a_second_failure_comments_on_the_open_issue(tmp_path):
    body, calls = report(tmp_path, FAILED_CELL, open_issue="7")
    assert calls[1:] == ["gh issue comment 7 --body-file body.md"]
    assert FAILED_CELL in body


def test_a_report_is_never_empty_nor_too_long(tmp_path):
    for name in ("setup", "nothing", "long"):
        (tmp_path / name).mkdir()
    body, _ = report(tmp_path / "setup", "\n".join(f"pip {number}" for number in range(99)))
    assert "pip 49\n" in body and "pip 48\n" not in body and "pip 98" in body
    body, _ = report(tmp_path / "nothing", None)
    assert "https://example.org/run" in body
    body, _ = report(tmp_path / "long", FAILED_CELL + ("誤差" * 999 + "\n") * 400)
    assert FAILED_CELL in body and 50_000 < len(body) < 65_536


def sanitized(text: str) -> str:
    """A text as nbval compares it."""
    return IPyNbCell.sanitize(SimpleNamespace(parent=SimpleNamespace(sanitize_patterns=PATTERNS)), text)


# Lines that one notebook printed on two machines or on two days.
SAME = [
    ("✅ 02-Quantize · seconds 669.0 s · memory 4.1 GiB", "✅ 02-Quantize · seconds 430.8 s · memory 3.8 GiB"),
    ("P50 57.6 ms, P99 66.8 ms per token", "P50 8.1 ms, P99 9 ms per token"),
    ("16 windows in 23 s (67 tokens/s)", "16 windows in 4 s (1902.5 tokens/s)"),
    ("GPTQ runs at 1.16× the original's speed: faster", "GPTQ runs at 2.18× the original's speed: faster"),
    ("✅ CPU    AMD EPYC, 2 logical cores, 24 GiB", "✅ CPU    Intel(R) Xeon(R) Processor, 16 logical cores, 126 GiB"),
    ("cpu · AMD EPYC CPU, 2 cores · bfloat16", "cpu · NVIDIA H100 80GB HBM3 · bfloat16"),
    ("On this device (AMD EPYC CPU, 2 cores), with kernel", "On this device (NVIDIA A10), with kernel"),
]
# Lines that say different things.
DIFFERENT = [
    ("✅ group_size 64 divides every layer", "✅ group_size 32 divides every layer"),
    ("GPTQ runs at 1.16× the original's speed: faster", "GPTQ runs at 0.69× the original's speed: slower"),
    ("✅ 02-Quantize · seconds 669.0 s", "❌ 02-Quantize · seconds 669.0 s"),
    ("8 GB card: largest model whose weights fit: 7B 4-bit", "8 GB card: largest model whose weights fit: 1.1B 8-bit"),
    ("perplexity 12.64", "perplexity 14.15"),
    ("7B up_proj (11008 × 4096): faster at 4096 tokens", "7B up_proj (11008 × 4096): faster at 512 tokens"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_what_varies_is_not_compared(one, other):
    assert one != other
    assert sanitized(one) == sanitized(other)
    assert sanitized(f"before\n{one}\nafter") == f"before\n{sanitized(one)}\nafter"


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_what_is_claimed_is_compared(one, other):
    assert sanitized(one) != sanitized(other)


def test_every_pattern_is_about_something_that_the_notebooks_print():
    texts = [
        output.text
        for file in run.find_notebooks()
        for cell in nbformat.read(file, as_version=4).cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    ]
    assert len(PATTERNS) == 5
    for pattern in PATTERNS:
        assert any(re.search(pattern, text) for text in texts), pattern


def write_notebook(file: Path, committed: str, printed: str) -> str:
    cell = nbformat.v4.new_code_cell(f"print({printed!r})", execution_count=1)
    cell.metadata.tags = ["nbval-check-output"]
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=f"{committed}\n")]
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), file)
    return str(file)


def test_nbval_accepts_other_times_and_reports_other_claims(tmp_path):
    """The nightly's own nbval command, on one notebook of either kind; what it prints ends up in the issue."""
    write_notebook(tmp_path / "times.ipynb", "✅ done in 2.0 s", "✅ done in 3.5 s")
    write_notebook(tmp_path / "claims.ipynb", "✅ faster", "✅ slower")
    options = commands("embedded")[1].replace("\\\n", "").split(" 2>&1")[0].split()[3:-1]
    options[options.index("tests/nbval-sanitize.cfg")] = str(SANITIZE)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    body, _ = report(tmp_path, done.stdout)
    assert body.startswith("https://example.org/run\n\n~~~\n=====")
    assert "✅ slower" in body
    assert "times.ipynb" not in body.partition("slowest")[0]  # it passed; only the list of durations names it
