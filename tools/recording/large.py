"""On the GPU host: the labs with stand-ins of Llama-2-7B and TinyLlama, as a 16 GB card would run them; a table.

    python3 tools/recording/large.py SECONDS OUT [--alone] [--small]     again for the rest

The stand-ins are drawn on the card. PyTorch may use 15 GiB of it (GPU_MEMORY), and every process is watched: what it
has of main memory, and of that what no file backs. Labs run side by side, since the card has room for several such
notebooks (--alone: one after the other, for times that nothing else disturbs). After each notebook, OUT/large.md and
OUT/large.json (at home: results/large.json) hold the table so far, OUT/large.tar.gz the executed notebooks, their
figures and the logs.
--small: tiny stand-ins and the smoke profile, on a CPU, to try all of it.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
LIMIT = 15  # GiB of the card
# Labs side by side; a notebook with the seconds that it is expected to take there. The last ones alone, at the end.
LANES = (
    (("3.1", "01", 60), ("3.1", "02", 240), ("3.1", "03", 90)),
    (("3.2", "01", 40), ("3.2", "02", 200), ("3.2", "03", 150), ("3.2", "04", 300)),
    (("3.3", "01", 60), ("3.3", "02", 90), ("3.3", "03", 150)),
)
LAST = ("3.1", "04", 280)
STATES = {0: "done", 124: "out of time"}


@dataclass
class Row:
    """One notebook in the table; memory in GiB."""

    notebook: str
    state: str
    seconds: float
    card: float | None  # peak of PyTorch's allocator; only where the notebook came to its end
    resident: float  # peak in main memory of its processes together
    anonymous: float  # of that, what no file backs: what must really be there
    side_by_side: bool


class Watch(threading.Thread):
    """The largest resident and anonymous memory of a process and its children."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.resident, self.anonymous, self.done = pid, 0, 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(1):
            try:
                process = psutil.Process(self.pid)
                found = [memory_of(p) for p in (process, *process.children(recursive=True))]
            except psutil.NoSuchProcess:
                continue
            self.resident = max(self.resident, sum(resident for resident, _ in found))
            self.anonymous = max(self.anonymous, sum(anonymous for _, anonymous in found))


def memory_of(process: psutil.Process) -> tuple[int, int]:
    """Resident and anonymous bytes of a process."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:] if ":" in line}
        return fields["Rss"], fields["Anonymous"]
    except (OSError, KeyError, psutil.Error):
        return 0, 0


def device() -> str:
    """The first GPU's name; "CPU" without one."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "CPU"


class Session:
    """One call: what time is left, where things are, what has been found."""

    def __init__(self, options: argparse.Namespace):
        self.end, self.out, self.small = time.monotonic() + options.seconds, options.out, options.small
        self.alone = options.alone or options.small
        self.host = Path(os.environ.get("HOST", "/tmp/host")) / "large"
        self.models, self.lock = self._fast_folder() / "stand-ins", threading.Lock()
        self.out.mkdir(parents=True, exist_ok=True)
        (self.host / "logs").mkdir(parents=True, exist_ok=True)
        table = self.host / "large.json"
        self.rows = [Row(**row) for row in json.loads(table.read_text())["rows"]] if table.exists() else []
        site = f"{self.host.parent / 'site'}{os.pathsep}{ROOT}"
        self.environment = os.environ | {"PYTHONPATH": site, "COURSE_WORK": str(self.work("")), "CI": "1"}
        self.environment |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "TQDM_MININTERVAL": "10"}

    def _fast_folder(self) -> Path:
        """Main memory where it has room: the disk of a lent machine is small, and 16 GB is a quarter of it."""
        shared = Path("/dev/shm")
        roomy = not self.small and shared.is_dir() and shutil.disk_usage(shared).free > 30e9
        return shared if roomy else self.host

    def work(self, lab: str) -> Path:
        """Where a lab's runs keep what they make: apart, since labs run side by side; the embedded model is shared."""
        folder = self.host / "work" / lab
        if lab and not (folder / "models").is_symlink():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "models").symlink_to(self.work("") / "models")
        return folder

    def left(self) -> float:
        return self.end - time.monotonic()

    def stand_in(self, shape: str) -> Path:
        folder = self.models / shape
        if not (folder / "artifact.json").exists():
            start = time.monotonic()
            small = ["--small"] if self.small else []
            command = [sys.executable, "-m", "tools.stand_in", shape, str(folder), *small]
            self.work("").mkdir(parents=True, exist_ok=True)
            subprocess.run(command, cwd=ROOT, env=self.environment, check=True)
            print(f"{shape}: made in {time.monotonic() - start:.0f} s", flush=True)
        return folder

    def run(self, lab: str, number: str, side_by_side: bool) -> int:
        """Run one notebook and put it into the table; returns the exit status of `tools.run`."""
        name = f"{lab}-{number}"
        profile, memory = ("smoke", []) if self.small else ("gpu16", ["--gpu-memory", str(LIMIT)])
        command = [sys.executable, "-m", "tools.run", "--lab", lab, "--notebook", number, "--profile", profile, *memory]
        command += ["--model", str(self.stand_in("llama-2-7b")), "--student", str(self.stand_in("tinyllama-1.1b"))]
        log, start = self.host / "logs" / f"{name}.log", time.monotonic()
        with log.open("w") as stream:
            given = {"cwd": ROOT, "env": self.environment | {"COURSE_WORK": str(self.work(lab))}}
            process = subprocess.Popen(command, stdout=stream, stderr=stream, **given)
            watch = Watch(process.pid)
            watch.start()
            try:
                status = process.wait(max(1, self.left() - 5))
            except subprocess.TimeoutExpired:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                process.wait()
                status = 124
            watch.done.set()
        seconds = time.monotonic() - start
        sizes = [size / GIB for size in (watch.resident, watch.anonymous)]
        state = STATES.get(status, "failed")
        row = Row(name, state, round(seconds, 1), self.card_peak(lab, number), *sizes, side_by_side)
        with self.lock:
            self.rows = [other for other in self.rows if other.notebook != name] + [row]
            self.write()
        print(f"{name}: {state}, {seconds:.0f} s, {max(0, self.left()):.0f} s left", flush=True)
        if status:
            print(log.read_text(encoding="utf-8", errors="replace")[-1500:], flush=True)
        return status

    def card_peak(self, lab: str, number: str) -> float | None:
        """What the notebook recorded of the card, if it came to its end."""
        name = {"3.1": "quantization", "3.2": "pruning", "3.3": "distillation"}[lab]
        for file in (self.work(lab) / "results").rglob(f"{name}.json"):
            for record in json.loads(file.read_text(encoding="utf-8")):
                if record["notebook"].startswith(number) and record["key"] == "notebook-gpu-memory":
                    return record["value"]
        return None

    def lane(self, notebooks: tuple) -> None:
        """A lab's notebooks in order, as far as the time goes; none after one that failed."""
        for lab, number, expected in notebooks:
            if any(row.notebook == f"{lab}-{number}" and row.state == "done" for row in self.rows):
                continue
            if self.left() < (1 if self.small else expected):
                print(f"{lab}-{number}: {self.left():.0f} s are too few", flush=True)
                return
            failed = self.run(lab, number, side_by_side=not self.alone)
            if (lab, number) == ("3.2", "03"):
                self.forget("*sparse*", "wanda")  # 23 GB that no later notebook needs
            if failed and number != "04":
                return

    def forget(self, *names: str) -> None:
        """Delete saved models: the disk of the host is small."""
        for name in names:
            for folder in self.work("").glob(f"*/artifacts/*/*/{name}"):
                shutil.rmtree(folder, ignore_errors=True)

    def write(self) -> None:
        rows = sorted(self.rows, key=lambda row: row.notebook)
        run = {"device": device(), "date": datetime.date.today().isoformat(), "limit": LIMIT}
        text = json.dumps(run | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        lines = [
            "| notebook | | seconds | card, GiB | main memory, GiB | of it anonymous |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            card = "" if row.card is None else f"{row.card:.1f}"
            seconds = f"{row.seconds:.0f}{'*' if row.side_by_side else ''}"
            cells = (row.notebook, row.state, seconds, card, f"{row.resident:.1f}", f"{row.anonymous:.1f}")
            lines.append(f"| {' | '.join(cells)} |")
        note = "\n\\* with the other labs on the same card at the same time\n"
        for folder in (self.host, self.out):
            (folder / "large.json").write_text(text, encoding="utf-8")
            (folder / "large.md").write_text("\n".join(lines) + "\n" + note, encoding="utf-8")
        with tarfile.open(self.out / "large.tar.gz", "w:gz") as packed:
            for folder in (self.host / "logs", *self.work("").glob("*/runs"), *self.work("").glob("*/results")):
                packed.add(folder, folder.relative_to(self.host))

    def all(self) -> None:
        for shape in ("llama-2-7b", "tinyllama-1.1b"):
            self.stand_in(shape)
        if self.alone:
            for lane in LANES:
                self.lane(lane)
        else:
            threads = [threading.Thread(target=self.lane, args=(lane,)) for lane in LANES]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.alone = True
        if self.left() > LAST[2] or self.small:
            self.forget(
                "student*", "soft-labels", "train-windows", "recovery", "*sparse*", "wanda"
            )  # 3.1-04 wants 57 GB
        self.lane((LAST,))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the labs with stand-ins of a 7B as a 16 GB card would.")
    parser.add_argument("seconds", type=float)
    parser.add_argument("out", type=Path)
    parser.add_argument("--alone", action="store_true", help="one notebook at a time")
    parser.add_argument("--small", action="store_true", help="tiny stand-ins and the smoke profile")
    session = Session(parser.parse_args(arguments))
    session.all()
    print((session.out / "large.md").read_text(encoding="utf-8"))
    return int(any(row.state != "done" for row in session.rows))


if __name__ == "__main__":
    sys.exit(main())
