"""Run one notebook in a kernel of its own, and tell by its true name what stopped it.

nbclient raises DeadKernelError without the status of the process that is gone. The manager here keeps it, and watches
the main memory meanwhile, so that «the memory was full» is said only with evidence.
"""

import os
import re
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import papermill
import psutil
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from common.course.memory import GIB

CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)
FULL = 0.03  # share of the main memory; with less available, programs that guard it begin to kill
SMALLER = "Close other programs, or use a smaller profile (PROFILE=cpu, PROFILE=smoke)."
NO_MEMORY = re.compile(r"MemoryError|OutOfMemoryError|can't allocate memory|not enough memory")


class NotebookFailed(Exception):
    """A notebook that did not reach its end. Its text says in a few words why.

    cell: the number that Jupyter shows, 0 where no cell ran; source: its code; detail: the error that it raised;
    advice: what to do.
    """

    def __init__(self, what: str, cell: int = 0, source: str = "", detail: str = "", advice: str = ""):
        super().__init__(f"cell [{cell}] {what}" if cell else what)
        self.source, self.detail, self.advice = source, detail, advice


@dataclass
class Watch:
    """What is seen of a kernel's process and of the main memory while it runs, once a second."""

    status: int | None = None  # as subprocess has it: −N for signal N
    lowest: float = 1.0  # share of the main memory that was available, at the worst moment
    kills_before: int = field(default_factory=lambda: out_of_memory_kills())

    def look(self, status: int | None) -> None:
        if self.status is None:
            self.status = status
        memory = psutil.virtual_memory()
        self.lowest = min(self.lowest, memory.available / memory.total)

    def memory_evidence(self) -> str:
        """Why a killed process was killed for want of memory; "" where nothing says so."""
        if out_of_memory_kills() > self.kills_before:
            return "the system counts a process that it killed for want of memory"
        if self.lowest < FULL:
            total = psutil.virtual_memory().total / GIB
            return f"at the worst moment {self.lowest * total:.2f} of {total:.1f} GiB were available"
        return ""


def out_of_memory_kills(root: Path = Path("/")) -> int:
    """How many processes Linux killed for want of memory: in our control group, else on the machine; 0 elsewhere."""
    ours = {}
    if (root / "proc/self/cgroup").exists():
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            ours[controllers] = path.lstrip("/")
    files = [
        root / "sys/fs/cgroup" / ours.get("", "") / "memory.events",  # version 2
        root / "sys/fs/cgroup/memory" / ours.get("memory", "") / "memory.oom_control",  # version 1
        root / "proc/vmstat",
    ]
    for file in files:
        if file.exists() and (found := re.search(r"^oom_kill (\d+)$", file.read_text(encoding="utf-8"), re.MULTILINE)):
            return int(found[1])
    return 0


class WatchedKernelManager(AsyncKernelManager):
    """Keeps the exit status of its kernel; nbclient asks once a second whether it lives."""

    watch: Watch  # set by `execute`

    async def is_alive(self) -> bool:
        self.watch.look(await self.provisioner.poll() if self.has_kernel else None)
        return await super().is_alive()


def execute(notebook: Path, target: Path, parameters: dict, limit: int | None = None) -> None:
    """Run a notebook in its own kernel, from its own folder; the executed copy is written as it goes.

    limit: seconds that one cell may take. Raises NotebookFailed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # the copy of an earlier run says nothing about this one
    watch = Watch()
    try:
        papermill.execute_notebook(
            notebook,
            target,
            parameters=parameters,
            cwd=notebook.parent,
            kernel_name="python3",
            kernel_manager_class=type("Manager", (WatchedKernelManager,), {"watch": watch}),
            execution_timeout=limit,
            start_timeout=180,
            extra_arguments=["--log-level=50"],  # at 40 it tells that it was interrupted, which is how it is ended
            progress_bar=sys.stderr.isatty() or "CI" not in os.environ,
        )
    except PapermillExecutionError as error:
        advice = SMALLER if NO_MEMORY.search(f"{error.ename}: {error.evalue}") else ""
        detail = f"{error.ename}: {error.evalue}"
        raise NotebookFailed("failed", error.exec_count, error.source, detail, advice) from error
    except CellTimeoutError as error:
        what = f"took longer than the limit of {limit} s for one cell"
        advice = "If the machine is only slow, allow more: LIMIT=..., in seconds."
        raise NotebookFailed(what, *_last_cell(target), advice=advice) from error
    except DeadKernelError as error:
        what, advice = cause_of_death(watch)
        raise NotebookFailed(what, *_last_cell(target), advice=advice) from error
    except RuntimeError as error:  # of nbclient, which waits for the kernel's first answer
        what = "its kernel did not start"
        raise NotebookFailed(what, detail=str(error), advice="Close other programs, then try again.") from error


def cause_of_death(watch: Watch) -> tuple[str, str]:
    """What ended a kernel's process, and what to do about it."""
    status = watch.status
    if status is None or status >= 0:
        return f"ended its own process (exit status {status})", "Look for exit() in the cell, or in what it calls."
    name = signal.Signals(-status).name
    if -status in CRASHES:
        advice = (
            "A compiled library crashed, not Python code: the memory was not the reason. Run it once more; where it "
            "happens again, report the cell and the processor."
        )
        return f"crashed in native code ({name})", advice
    if evidence := watch.memory_evidence():
        return f"was killed because the main memory was full ({name}: {evidence})", SMALLER
    advice = "Nothing says that the memory was full. Did someone stop it, or a limit of a batch system?"
    return f"was killed from outside ({name})", advice


def _last_cell(target: Path) -> tuple[int, str]:
    """Number and source of the code cell that began last, from what papermill noted in the executed copy."""
    cells = [c for c in nbformat.read(target, as_version=4).cells if c.cell_type == "code"]
    begun = [n for n, c in enumerate(cells, start=1) if c.metadata.get("papermill", {}).get("status") != "pending"]
    return (begun[-1], cells[begun[-1] - 1].source) if begun else (0, "")
