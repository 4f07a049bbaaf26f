"""Run the course's notebooks in order and sum up what they measured.

    python -m tools.run                          all notebooks, profile by hardware, embedded model
    python -m tools.run --lab 3.1 --notebook 02  one of them
    python -m tools.run --again                  also those that have run already, with the same code and inputs
    python -m tools.run --record                 make the executed notebooks and their figures the committed ones

A notebook that fails stops only those that need what it makes. Executed copies are kept in `.work/runs/<profile>/`.
"""

import argparse
import datetime
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat

from common.course.embedded import SPECS, embedded_folder
from common.course.environment import choose_profile, device_name
from common.course.files import whole_file
from common.course.settings import PROFILES, load_settings, slug, work_folder
from common.measure import results
from tools import provenance, tables
from tools.done import Stamps
from tools.kernels import NotebookFailed, execute
from tools.notebooks import LAB_OF_FOLDER, find_notebooks, lab_number, needs, shown, title

CELL_LIMIT = 3600  # seconds; the longest cell of the recorded runs takes some minutes


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook: `state` is a key of MARKS."""

    notebook: Path
    state: str
    why: str = ""
    seconds: float = 0.0


MARKS = {"done": "✅", "already done": "✅", "failed": "❌", "not run": "➖"}


def parameters(lab: str, options: argparse.Namespace) -> dict[str, str]:
    """What is injected into a lab's notebooks: nothing that is the default already, which would add a cell."""
    given = {"PROFILE": (options.profile, "auto")}
    if lab == "distillation":
        given |= {"TEACHER": (options.model, "embedded"), "STUDENT": (options.student, "layers")}
    else:
        given["MODEL"] = options.model, "embedded"
    return {name: value for name, (value, default) in given.items() if value != default}


def explain(error: NotebookFailed, notebook: Path, target: Path, options: argparse.Namespace) -> str:
    """What stopped a notebook, as a reader wants it: cell, code, error, what to do, where to look, how to try again."""
    code = "\n".join(f"    {line}" for line in error.source.splitlines())
    parts = [f"\n❌ {title(notebook)}, {error}", code, f"    {error.detail}" if error.detail else ""]
    ends = [
        f"   {error.advice}\n" if error.advice else "",
        f"   The cells that ran: {shown(target)}\n",
        f"   Try again:          {again(notebook, options)}\n",
    ]
    return "\n\n".join(part for part in parts if part) + "\n\n" + "".join(ends)


def again(notebook: Path, options: argparse.Namespace) -> str:
    """The command that runs this notebook alone, with the same options."""
    return (
        f"make labs LAB={lab_number(notebook)} NOTEBOOK={notebook.stem.split('-')[0]}"
        + (f" PROFILE={options.profile}" if options.profile != "auto" else "")
        + (f" MODEL={options.model}" if options.model != "embedded" else "")
        + (f" STUDENT={options.student}" if options.student != "layers" else "")
    )


def shortened(value: float) -> str:
    """Four significant digits, large numbers in full."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def summary(outcomes: list[Outcome], records: list[dict]) -> str:
    """A line per notebook: time, peak memory and the figures it marked as headlines, or why there are none."""
    lines = [f"   {'notebook':36} {'time':>8} {'memory':>9}  key results"]
    for outcome in outcomes:
        notebook, mark = outcome.notebook, MARKS[outcome.state]
        if outcome.state in ("failed", "not run"):
            lines.append(f"{mark} {title(notebook):36} {outcome.state}: {outcome.why}")
            continue
        name = LAB_OF_FOLDER[notebook.parent.name], notebook.stem  # each lab has a 01-Setup
        mine = [r for r in records if (r["lab"], r["notebook"]) == name]
        memory = next((r["value"] for r in mine if r["key"] == "notebook-memory"), None)
        headlines = [f"{r['artifact']} {r['key']} {shortened(r['value'])} {r['unit']}" for r in mine if r["headline"]]
        if outcome.why:  # when it was done already
            headlines.insert(0, f"{outcome.state}, {outcome.why}")
        shown_memory = f"{memory:.1f} GiB" if memory else "-"
        lines.append(f"{mark} {title(notebook):36} {outcome.seconds:6.0f} s {shown_memory:>9}  {' · '.join(headlines)}")
    count = {state: sum(outcome.state == state for outcome in outcomes) for state in MARKS}
    return "\n".join([*lines, "", " · ".join(f"{number} {state}" for state, number in count.items() if number)])


def without_progress(outputs: list) -> list:
    """A cell's outputs without progress bars (widgets, stderr) and empty prints; consecutive prints joined."""
    kept = []
    for output in outputs:
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}) or output.get("name") == "stderr":
            continue
        if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return [output for output in kept if output.output_type != "stream" or output.text.strip()]


def without_parameters(executed: nbformat.NotebookNode) -> None:
    """Take out the cell that papermill injected (the provenance names the profile), and number the others anew."""
    executed.cells = [c for c in executed.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    for number, cell in enumerate((c for c in executed.cells if c.cell_type == "code"), start=1):
        cell.execution_count = number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number


def record(notebook: Path, target: Path, lab: str, profile: str, device: str, source: Path) -> None:
    """Put an executed notebook, stamped with its provenance, and its figures in place of the committed ones."""
    executed = nbformat.read(target, as_version=4)
    for key in ("papermill", "widgets"):
        executed.metadata.pop(key, None)
    without_parameters(executed)
    for cell in executed.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs = without_progress(cell.outputs)
    provenance.stamp(executed, lab, profile, device, datetime.date.today().isoformat())
    tables.promote(notebook.stem, source)
    with whole_file(notebook) as new:
        nbformat.write(executed, new)


def run_one(notebook: Path, options: argparse.Namespace, profile: str, missing: set[str]) -> tuple[Outcome, list[dict]]:
    """Run one notebook, unless it has run already or what it needs is `missing`; its outcome and its lab's records."""
    lab = LAB_OF_FOLDER[notebook.parent.name]
    settings = load_settings(lab, profile, options.model)
    device = device_name(settings)
    source = work_folder() / "results" / slug(device) / profile / f"{lab}.json"
    target = work_folder() / "runs" / profile / notebook.parent.name / notebook.name
    stamps = Stamps(settings, options.student if lab == "distillation" else "-", device)
    if lacking := [name for name in needs(notebook) if name in missing]:
        outcome = Outcome(notebook, "not run", f"it needs what {' and '.join(lacking)} makes")
        print(f"   not run: {outcome.why}")
        return outcome, []
    if not (options.again or options.record) and (stamp := stamps.find(notebook, lab)):
        print(f"   already done, {stamp['date']}; AGAIN=1 runs it anew")
        return Outcome(notebook, "already done", stamp["date"], stamp["seconds"]), results.read(source)
    stamps.remove(notebook)
    began, start = time.time(), time.perf_counter()
    try:
        execute(notebook, target, parameters(lab, options), options.cell_limit)
    except NotebookFailed as error:
        print(explain(error, notebook, target, options))
        return Outcome(notebook, "failed", str(error)), []
    seconds = time.perf_counter() - start
    stamps.add(notebook, lab, began, seconds)
    if options.record:
        record(notebook, target, lab, profile, device, source)
    return Outcome(notebook, "done", seconds=seconds), results.read(source)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the course's notebooks in order.")
    parser.add_argument("--lab", default="", help="only this lab, such as 3.1")
    parser.add_argument("--notebook", default="", help="only notebooks whose name begins so, such as 02")
    parser.add_argument("--profile", default="auto", choices=("auto", *PROFILES))
    parser.add_argument("--model", default="embedded", help="embedded, a Hub id, or a folder")
    parser.add_argument("--student", default="layers", help="Lab 3.3: layers (of the teacher), a Hub id, or a folder")
    parser.add_argument("--gpu-memory", type=float, metavar="GiB", help="cap the GPU allocator")
    parser.add_argument("--cell-limit", type=int, default=CELL_LIMIT, metavar="SECONDS", help="what one cell may take")
    parser.add_argument("--again", action="store_true", help="run also what has run already")
    parser.add_argument(
        "--record", action="store_true", help="make outputs and figures the committed ones (embedded model, not smoke)"
    )
    options = parser.parse_args(arguments)
    if options.record and (options.profile == "smoke" or (options.model, options.student) != ("embedded", "layers")):
        parser.error("--record keeps real figures of the embedded model: no smoke profile, no other model")
    for name in ("model", "student"):  # a notebook runs in its own folder
        if Path(getattr(options, name)).is_dir():
            setattr(options, name, str(Path(getattr(options, name)).resolve()))
    if options.gpu_memory:
        os.environ["COURSE_GPU_MEMORY"] = str(options.gpu_memory)
    try:
        profile, notebooks = (
            choose_profile(options.profile, options.model),
            find_notebooks(options.lab, options.notebook),
        )
        if options.model in SPECS:
            embedded_folder(options.model)  # its first use takes half a minute and says so: here, where it is seen
    except (OSError, RuntimeError) as error:  # each says what to do
        print(f"❌ {error}")
        return 1
    outcomes, records = [], []
    for number, notebook in enumerate(notebooks, start=1):
        print(f"[{number}/{len(notebooks)}] {title(notebook)}", flush=True)
        missing = {title(outcome.notebook) for outcome in outcomes if outcome.state in ("failed", "not run")}
        outcome, fresh = run_one(notebook, options, profile, missing)
        outcomes.append(outcome)
        records += [r for r in fresh if r["model"] == options.model and r not in records]
    print(f"\n{summary(outcomes, records)}\n")
    print(f"Executed notebooks: {shown(work_folder() / 'runs' / profile)}/")
    print(f"Figures:            {shown(work_folder() / 'results')}/")
    if any(outcome.state in ("failed", "not run") for outcome in outcomes):
        return 1
    print("Next: open them with `make notebook`, or read README.md for what the figures mean.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
