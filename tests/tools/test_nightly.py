"""The workflows, checked with actionlint; the nightly GPU run's steps, run here with stand-ins for make and gh."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from common.course.settings import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
NIGHTLY = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly-gpu.yml").read_text(encoding="utf-8"))
JOBS = NIGHTLY["jobs"]
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
    skipped = {job: re.findall(r"schedule != '(.*)'", JOBS[job]["if"]) for job in ("embedded", "llama", "long-tests")}
    assert skipped == {"embedded": [crons[1]], "llama": [crons[0]], "long-tests": [crons[1]]}
    assert NIGHTLY["permissions"] == {"contents": "read"}
    assert {job: JOBS[job]["permissions"] for job in JOBS if "permissions" in JOBS[job]} == {
        "report": {"issues": "write"}
    }


def commands(job: str) -> list[str]:
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


def test_the_steps_name_what_exists():
    text = "\n".join(commands("embedded") + commands("llama") + commands("long-tests"))
    for target in sorted(set(re.findall(r"make (\w+)", text))):
        subprocess.run(["make", "-n", target, "NOTEBOOK=01"], cwd=ROOT, check=True, capture_output=True, timeout=60)
    modules = re.findall(r"python -m (tools\.\w+)", text)
    assert modules == ["tools.drift", "tools.by_model"]
    for module in modules:
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists()


def test_the_notebooks_run_once_then_the_gpu_tests_then_the_comparison():
    notebooks, tests, comparison = commands("embedded")
    assert "make labs PROFILE=gpu GPU_MEMORY=15 AGAIN=1" in notebooks
    assert "pytest --color=no -m gpu" in tests
    assert "tools.drift" in comparison
    later = [step for step in JOBS["embedded"]["steps"] if step.get("run") in (tests, comparison)]
    assert [step["if"] for step in later] == ["${{ !cancelled() }}"] * 2, "a failing notebook does not hide the others"


def test_ci_checks_every_python_that_the_course_supports():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    supported = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    first, last = (int(minor) for minor in re.findall(r"3\.(\d+)", supported))
    assert jobs["check"]["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(first, last)]
    assert jobs["check"]["steps"][-1]["run"] == "make check"
    assert jobs["test"]["steps"][-1]["run"] == "bash .ci/run"


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


def test_llama_needs_a_token_and_the_small_model_does_not(tmp_path):
    script, _ = commands("llama")
    programs = {"bin/make": ""}
    environment = {"TEACHER": "a/teacher", "STUDENT": "a/student", "SMALL": "a/small"}
    without = execute(script, tmp_path, programs, HF_TOKEN="", **environment)
    small = "make labs GPU_MEMORY=15 MODEL=a/small LIMIT=36000"
    assert (without.returncode, called(tmp_path)) == (0, [small])
    assert "::notice::" in without.stdout
    assert execute(script, tmp_path, programs, HF_TOKEN="secret", **environment).returncode == 0
    assert called(tmp_path)[1:] == [
        small,
        "make labs LAB=3.1 GPU_MEMORY=15 MODEL=a/teacher LIMIT=36000",
        "make labs LAB=3.2 GPU_MEMORY=15 MODEL=a/teacher LIMIT=36000",
        "make labs LAB=3.3 GPU_MEMORY=15 MODEL=a/teacher STUDENT=a/student LIMIT=36000",
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


def test_figures_that_moved_are_in_the_issue(tmp_path):
    moved = "❌ quantization 02-Quantize: gptq perplexity is 141 ppl, 14.11 committed: more than 0.706 apart\n"
    body, _ = report(tmp_path, f"12 done\n1 passed\n{moved}")
    assert body == f"https://example.org/run\n\n~~~\n{moved}~~~\n"


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
