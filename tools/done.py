"""What `make labs` has done already: a stamp per notebook, model and device, in `.work/runs/<profile>/done.json`.

A notebook need not run again while its code (`tools.provenance`), the library versions and what it loads are the same
and what it made is still there. Artifacts are known by their `artifact.json`, which holds the hash of their weights.
"""

import datetime
import hashlib
import json
from pathlib import Path

import nbformat

from common.course.artifacts import DESCRIPTION
from common.course.environment import versions
from common.course.files import write_whole
from common.course.settings import ROOT, Settings, work_folder
from tools import provenance
from tools.notebooks import code, needs, title

ENGINES = (".venv/.engines", ".venv-serve/.ready")  # marks of the engines that are set up


class Stamps:
    """The stamps of one run's profile, model and device."""

    def __init__(self, settings: Settings, student: str, device: str):
        self.file = work_folder() / "runs" / settings.profile / "done.json"
        self.settings, self.of = settings, f"{settings.model} · {student} · {device}"

    def _read(self) -> dict:
        return json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}

    def _of(self, name: str) -> dict:
        return self._read().get(f"{name} · {self.of}", {})

    def _state(self, notebook: Path, lab: str) -> dict:
        """All that the outcome of a notebook depends on."""
        book = nbformat.read(notebook, as_version=4)
        uses_engines = "common.engines" in code(notebook)
        local = Path(self.settings.model)  # a folder can get another model
        return {
            "code": provenance.fingerprint(book, lab, self.settings.profile),
            "versions": versions(),
            "engines": [mark for mark in ENGINES if uses_engines and (ROOT / mark).exists()],
            "model": sorted([f.name, f.stat().st_mtime_ns] for f in local.iterdir()) if local.is_dir() else [],
            "inputs": {name: self._of(name).get("made", {}) for name in needs(notebook)},
        }

    def _artifacts(self) -> dict[str, str]:
        """Name → hash of the description of every artifact that this profile and model have."""
        files = self.settings.artifacts.glob(f"*/{DESCRIPTION}")
        return {file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    def find(self, notebook: Path, lab: str) -> dict:
        """The stamp of a notebook that need not run again: its `date` and `seconds`; {} where it must run."""
        stamp, there = self._of(title(notebook)), self._artifacts()
        if not stamp or stamp["state"] != self._state(notebook, lab):
            return {}
        return stamp if all(there.get(name) == known for name, known in stamp["made"].items()) else {}

    def add(self, notebook: Path, lab: str, began: float, seconds: float) -> None:
        """Stamp a notebook that ran to its end; `began`: when, as time.time() has it."""
        written = {n for n in self._artifacts() if _changed(self.settings.artifacts / n) >= began}
        stamp = {
            "date": datetime.datetime.now().isoformat(sep=" ", timespec="minutes"),
            "seconds": round(seconds, 1),
            "made": {name: known for name, known in sorted(self._artifacts().items()) if name in written},
            "state": self._state(notebook, lab),
        }
        self._write(self._read() | {f"{title(notebook)} · {self.of}": stamp})

    def remove(self, notebook: Path) -> None:
        """Forget a notebook before it runs: an interruption leaves no stamp."""
        self._write({key: stamp for key, stamp in self._read().items() if key != f"{title(notebook)} · {self.of}"})

    def _write(self, stamps: dict) -> None:
        write_whole(self.file, json.dumps(stamps, indent=1, ensure_ascii=False) + "\n")


def _changed(folder: Path) -> float:
    return (folder / DESCRIPTION).stat().st_mtime
