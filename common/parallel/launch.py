"""Start a program once per card with torchrun, and tell in one message why it failed."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from common.course.settings import ROOT
from common.engines import processes

# NVLink multicast stays off in NCCL, PyTorch and NVSHMEM: on a shared host, a program that uses it can take the
# cards of others out of service.
QUIET_LINKS = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
RESULT, JOB = "result.json", "job.json"


def launch(module: str, count: int, job: dict, folder: Path, launcher: str = "torchrun", timeout: float = 1800) -> dict:
    """Run `python -m module folder` in `count` processes that know of one another; returns what the first one wrote.

    job: what to do, written to folder/job.json. launcher: "torchrun", or "accelerate" (`accelerate launch`).
    What a run leaves in `folder` lets the next one go on where it stopped. Raises RuntimeError with the message of
    the process that failed first, TimeoutError after `timeout` seconds; all processes have ended by then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JOB).write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")
    for old in (folder / RESULT, *folder.glob("error-*.txt")):
        old.unlink(missing_ok=True)
    where = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    log = folder / "log.txt"
    with log.open("wb") as output:
        guard = subprocess.Popen(
            [sys.executable, processes.__file__, *_command(launcher, count), "-m", module, str(folder)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | QUIET_LINKS | where,
            start_new_session=True,
        )
        try:
            status = guard.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(
                f"{module} did not end within {timeout:.0f} s on {count} processes; see {log}."
            ) from error
        finally:
            guard.stdin.close()  # the guard stops what still runs
            guard.wait()
    if status:
        raise RuntimeError(f"{_reason(folder, log)} Run it again: it goes on from the last state that was saved.")
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))


def _command(launcher: str, count: int) -> list[str]:
    """Both launchers set the same variables (RANK, WORLD_SIZE, ...), accelerate's only for several GPUs."""
    if launcher == "accelerate" and count > 1:
        numbers = [f"--num_processes={count}", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
        return [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *numbers]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]


def _reason(folder: Path, log: Path) -> str:
    """By which signal the first process to fail was killed, or what it said; the others only lost touch with it."""
    text = log.read_text(encoding="utf-8", errors="replace")
    failed = re.findall(r"^ +rank +: (\d+) .*\n +exitcode +: (-?\d+)", text, re.MULTILINE)  # the root cause is the last
    for rank, status in failed:  # a killed process leaves no time: the one that lost touch with it seems to be first
        if int(status) < 0 and int(status) != -signal.SIGTERM:  # torchrun itself ends the others with SIGTERM
            return f"Process {rank} was ended by {signal.Signals(-int(status)).name}."
    rank = failed[-1][0] if failed else "0"
    said = folder / f"error-{rank}.txt"
    if said.exists():
        return f"Process {rank} failed: {said.read_text(encoding='utf-8').strip()}"
    return f"The processes ended without a message. The end of their log:\n{processes.tail(log)}\n"
