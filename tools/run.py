"""Run the course's notebooks in order and sum up what they measured.

    python -m tools.run                          all notebooks, profile by hardware, embedded model
    python -m tools.run --lab 3.1 --notebook 02  one of them
    python -m tools.run --record                 make the executed notebooks and their figures the committed ones

Executed copies are kept in `.work/runs/<profile>/`.
"""

import argparse
import datetime
import os
import sys
import time
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from common.course.embedded import embedded_folder
from common.course.environment import device_name
from common.course.settings import CHAPTER, PROFILES, ROOT, load_settings, resolve_profile, slug, work_folder
from common.measure import results
from tools import provenance, tables

LAB_OF_FOLDER = {
    "Lab-3.1-Quantization": "quantization",
    "Lab-3.2-Pruning": "pruning",
    "Lab-3.3-Distillation": "distillation",
}


def find_notebooks(lab: str = "", notebook: str = "") -> list[Path]:
    """The chapter's notebooks in order; `lab` ("3.1") and `notebook` ("02") narrow them down."""
    found = sorted(CHAPTER.glob(f"Lab-{lab}*/{notebook}*.ipynb"))
    if not found:
        known = ", ".join(f"{path.parent.name}/{path.stem}" for path in sorted(CHAPTER.glob("Lab-*/*.ipynb")))
        raise FileNotFoundError(f"No notebook matches --lab {lab!r} --notebook {notebook!r}. There are: {known}.")
    return found


def title(notebook: Path) -> str:
    return f"{notebook.parent.name}/{notebook.stem}"


def execute(notebook: Path, target: Path, parameters: dict) -> None:
    """Run one notebook in its own kernel, from its own folder; the executed copy is written as it goes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        notebook,
        target,
        parameters=parameters,
        cwd=notebook.parent,
        kernel_name="python3",
        extra_arguments=["--log-level=40"],  # the kernel's warnings about its own transport are no output of ours
        progress_bar=sys.stderr.isatty() or "CI" not in os.environ,
    )


def parameters(lab: str, options: argparse.Namespace) -> dict[str, str]:
    """What is injected into a lab's notebooks: nothing that is the default already, which would add a cell."""
    given = {"PROFILE": (options.profile, "auto")}
    if lab == "distillation":
        given |= {"TEACHER": (options.model, "embedded"), "STUDENT": (options.student, "layers")}
    else:
        given["MODEL"] = options.model, "embedded"
    return {name: value for name, (value, default) in given.items() if value != default}


def explain(error: PapermillExecutionError, notebook: Path, target: Path, options: argparse.Namespace) -> str:
    """A failing cell as a reader wants it: which cell, its code, the error, where to look, how to try again."""
    code = "\n".join(f"    {line}" for line in error.source.splitlines())
    return (
        f"\n❌ {title(notebook)}, cell [{error.exec_count}] failed:\n\n{code}\n\n"
        f"    {error.ename}: {error.evalue}\n\n"
        f"   Whole traceback: {shown(target)}\n"
        f"   Try again:       {again(notebook, options)}"
    )


def explain_death(notebook: Path, target: Path, options: argparse.Namespace) -> str:
    """The same for a kernel that is gone, which can say nothing itself."""
    return (
        f"\n❌ {title(notebook)}: its process was killed, most often because the main memory was full.\n\n"
        f"   Close other programs, or use a smaller profile (PROFILE=cpu, PROFILE=smoke).\n"
        f"   The cells that ran: {shown(target)}\n"
        f"   Try again:          {again(notebook, options)}"
    )


def again(notebook: Path, options: argparse.Namespace) -> str:
    """The command that runs this notebook alone, with the same options."""
    lab, number = notebook.parent.name.split("-")[1], notebook.stem.split("-")[0]
    return (
        f"make labs LAB={lab} NOTEBOOK={number}"
        + (f" PROFILE={options.profile}" if options.profile != "auto" else "")
        + (f" MODEL={options.model}" if options.model != "embedded" else "")
        + (f" STUDENT={options.student}" if options.student != "layers" else "")
    )


def shown(path: Path) -> str:
    """A path as seen from the repository."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def shortened(value: float) -> str:
    """Four significant digits, large numbers in full."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def summary(done: list[tuple[Path, float]], records: list[dict]) -> str:
    """A line per notebook: time, peak memory, and the figures it marked as headlines."""
    lines = [f"{'notebook':36} {'time':>8} {'memory':>9}  key results"]
    for notebook, seconds in done:
        name = LAB_OF_FOLDER[notebook.parent.name], notebook.stem  # each lab has a 01-Setup
        mine = [r for r in records if (r["lab"], r["notebook"]) == name]
        memory = next((r["value"] for r in mine if r["key"] == "notebook-memory"), None)
        headlines = [f"{r['artifact']} {r['key']} {shortened(r['value'])} {r['unit']}" for r in mine if r["headline"]]
        shown_memory = f"{memory:.1f} GiB" if memory else "-"
        lines.append(f"{title(notebook):36} {seconds:6.0f} s {shown_memory:>9}  {' · '.join(headlines)}")
    return "\n".join(lines)


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
    aside = notebook.with_suffix(".new")
    nbformat.write(executed, aside)
    aside.replace(notebook)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the course's notebooks in order.")
    parser.add_argument("--lab", default="", help="only this lab, such as 3.1")
    parser.add_argument("--notebook", default="", help="only notebooks whose name begins so, such as 02")
    parser.add_argument("--profile", default="auto", choices=("auto", *PROFILES))
    parser.add_argument("--model", default="embedded", help="embedded, a Hub id, or a folder")
    parser.add_argument("--student", default="layers", help="Lab 3.3: layers (of the teacher), a Hub id, or a folder")
    parser.add_argument("--gpu-memory", type=float, metavar="GiB", help="cap the GPU allocator")
    parser.add_argument(
        "--record", action="store_true", help="make outputs and figures the committed ones (embedded model, not smoke)"
    )
    options = parser.parse_args(arguments)
    if options.record and (options.profile == "smoke" or (options.model, options.student) != ("embedded", "layers")):
        parser.error("--record keeps real figures of the embedded model: no smoke profile, no other model")
    try:
        profile, notebooks = resolve_profile(options.profile), find_notebooks(options.lab, options.notebook)
        if "embedded" in (options.model, options.student):
            embedded_folder()  # its first use takes half a minute and says so: here, where it is seen
    except (FileNotFoundError, RuntimeError) as error:  # each says what to do
        print(f"❌ {error}")
        return 1
    if options.gpu_memory:
        os.environ["COURSE_GPU_MEMORY"] = str(options.gpu_memory)

    runs = work_folder() / "runs" / profile
    done, records = [], []
    for number, notebook in enumerate(notebooks, start=1):
        target = runs / notebook.parent.name / notebook.name
        lab = LAB_OF_FOLDER[notebook.parent.name]
        device = device_name(load_settings(lab, profile, options.model))
        source = work_folder() / "results" / slug(device) / profile / f"{lab}.json"
        print(f"[{number}/{len(notebooks)}] {title(notebook)}", flush=True)
        start = time.perf_counter()
        try:
            execute(notebook, target, parameters(lab, options))
        except PapermillExecutionError as error:
            print(explain(error, notebook, target, options))
            return 1
        except DeadKernelError:
            print(explain_death(notebook, target, options))
            return 1
        done.append((notebook, time.perf_counter() - start))
        records += [r for r in results.read(source) if r["lab"] == lab and r not in records]
        if options.record:
            record(notebook, target, lab, profile, device, source)
    print(f"\n{summary(done, records)}\n")
    print(f"Executed notebooks: {shown(runs)}/\nFigures:            {shown(work_folder() / 'results')}/")
    print("Next: open them with `make notebook`, or read README.md for what the figures mean.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
