"""Measured figures: recorded by notebooks, committed per device, rendered into tables.

A record says what was measured (`key`, `artifact`), under which `protocol`, where, when and with which versions.
A table shows only records of one protocol per column; it refuses to mix them.

    python -m common.results render [--check]     fill the <!-- results:TABLE --> regions of all documents
"""

import argparse
import datetime
import hashlib
import json
import re
import sys
import tomllib
from pathlib import Path

from common.environment import GIB, device_name, usage, versions
from common.settings import ROOT, Settings, slug, work_folder

COMMITTED = ROOT / "results"
TABLES = COMMITTED / "tables.toml"
REGION = re.compile(r"(<!-- results:([\w-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def protocol_hash(protocol: dict) -> str:
    """A short stable name of a protocol: equal dicts, equal hash."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]


class Recorder:
    """Collects a notebook's figures and writes them at once to `.work/results/<device>/<lab>.json`."""

    def __init__(self, settings: Settings, notebook: str):
        self.settings, self.notebook = settings, notebook
        self.device = device_name(settings)
        self.file = work_folder() / "results" / slug(self.device) / settings.profile / f"{settings.lab}.json"

    def record(
        self,
        key: str,
        value: float,
        unit: str,
        *,
        artifact: str,
        protocol: dict,
        n: int = 1,
        spread: float | None = None,
        headline: bool = False,
    ) -> None:
        """Store one figure; measuring the same thing again replaces it.

        key: what is measured, such as "perplexity"; artifact: of which model; n: runs, windows or samples behind it;
        spread: its standard error or standard deviation, in `unit`; headline: shown in the summary of a run.
        """
        settings = self.settings
        record = {
            "lab": settings.lab,
            "notebook": self.notebook,
            "key": key,
            "artifact": artifact,
            "value": value,
            "unit": unit,
            "n": n,
            "spread": spread,
            "headline": headline,
            "protocol": protocol,
            "model": settings.model,
            "profile": settings.profile,
            "device": self.device,
            "versions": versions(),
            "date": datetime.date.today().isoformat(),
        }
        merge([record], self.file)

    def quality(self, quality, *, artifact: str, windows: int, headline: bool = False) -> None:
        """Store an `evaluation.Quality` under the lab's protocol for `windows` test windows."""
        settings = self.settings
        protocol = {
            "corpus": settings.corpus,
            "split": "test",
            "seqlen": settings.seqlen,
            "windows": windows,
            "dtype": str(settings.dtype),
        }
        self.record(
            "perplexity",
            quality.perplexity,
            "ppl",
            artifact=artifact,
            protocol=protocol,
            n=windows,
            spread=quality.standard_error,
            headline=headline,
        )
        compared = min(windows, settings.kl_windows)
        against = protocol | {"windows": compared, "against": "original"}
        for key, value, unit in (("kl", quality.kl, "nats/token"), ("top1", quality.top1, "share")):
            if value is not None:
                self.record(key, value, unit, artifact=artifact, protocol=against, n=compared)

    def finish(self) -> None:
        """Last step of every notebook: print and store the time and the memory it took."""
        used = usage()
        parts = {"notebook-seconds": (used.seconds, "s"), "notebook-memory": (used.memory_bytes / GIB, "GiB")}
        if used.gpu_bytes:
            parts["notebook-gpu-memory"] = (used.gpu_bytes / GIB, "GiB")
        for key, (value, unit) in parts.items():
            self.record(key, value, unit, artifact=self.notebook, protocol={})
        print(
            "✅",
            self.notebook,
            "·",
            " · ".join(f"{key[9:]} {value:.1f} {unit}" for key, (value, unit) in parts.items()),
        )


def _identity(record: dict) -> tuple:
    names = ("lab", "notebook", "key", "artifact", "model", "profile", "device")
    return (*(record[name] for name in names), protocol_hash(record["protocol"]))


def read(file: Path) -> list[dict]:
    """The records of one file; none if it does not exist."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def merge(records: list[dict], file: Path) -> None:
    """Add records to a file, each replacing the one of the same identity; written aside, then renamed."""
    merged = {_identity(record): record for record in read(file)} | {_identity(record): record for record in records}
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".new")
    content = json.dumps(sorted(merged.values(), key=_identity), indent=1, ensure_ascii=False)
    aside.write_text(content + "\n", encoding="utf-8")
    aside.replace(file)


def promote(notebook: str, source: Path) -> None:
    """Make a run's records of one notebook the committed ones, in place of all it had on that device and profile."""
    fresh = [record for record in read(source) if record["notebook"] == notebook]
    if not fresh:
        raise ValueError(f"{source.name} holds no record of notebook {notebook}.")
    target = COMMITTED / slug(fresh[0]["device"]) / source.name
    kept = [r for r in read(target) if (r["notebook"], r["profile"]) != (notebook, fresh[0]["profile"])]
    target.unlink(missing_ok=True)
    merge(kept + fresh, target)


def committed() -> list[dict]:
    """All committed records."""
    return [record for file in sorted(COMMITTED.glob("*/*.json")) for record in read(file)]


def _select(records: list[dict], spec: dict) -> list[dict]:
    """The records that a table is about: its lab and notebook, its columns' keys, its rows' artifacts."""
    return [
        r
        for r in records
        if r["lab"] == spec["lab"]
        and r["notebook"] == spec.get("notebook", r["notebook"])
        and r["key"] in spec["columns"]
        and r["artifact"] in spec["rows"]
    ]


def _format(record: dict, pattern: str) -> str:
    return pattern.format(record["value"], spread=record["spread"] or 0.0)


def render_table(spec: dict, records: list[dict]) -> str:
    """A Markdown table: a row per artifact, a column per key and device. Missing figures are shown as a dash.

    Raises ValueError where two records with different protocols, or models, would stand in one column.
    """
    chosen = _select(records, spec)
    if not chosen:
        return "（尚無紀錄：執行 `make record` 後產生。）\n"
    columns = [
        (key, device) for key in spec["columns"] for device in sorted({r["device"] for r in chosen if r["key"] == key})
    ]
    cells = {}
    for key, device in columns:
        column = [r for r in chosen if r["key"] == key and r["device"] == device]
        if len({(protocol_hash(r["protocol"]), r["model"], r["profile"]) for r in column}) > 1:
            raise ValueError(f"Table {spec['title']!r}: column {key} on {device} mixes protocols.")
        for record in column:
            cells[record["artifact"], key, device] = _format(record, spec["columns"][key]["format"])
    head = [spec["head"], *(f"{spec['columns'][key]['title']}（{device}）" for key, device in columns)]
    lines = [head, ["---"] + ["---:"] * len(columns)]
    for artifact, label in spec["rows"].items():
        row = [cells.get((artifact, key, device), "—") for key, device in columns]
        if set(row) != {"—"}:
            lines.append([label, *row])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n*{_caption(spec, chosen)}*\n"


def _caption(spec: dict, chosen: list[dict]) -> str:
    """Where the table's numbers come from, computed from its records."""
    dates = sorted({r["date"] for r in chosen})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} 至 {dates[-1]}"
    return f"{spec['title']}。來源：`results/`，{span} 執行。"


def render(documents: list[Path], check: bool = False) -> list[Path]:
    """Fill every region of `documents`; returns those whose text changed (with `check`, without writing them)."""
    tables = tomllib.loads(TABLES.read_text(encoding="utf-8"))
    records, changed = committed(), []

    def fill(match: re.Match) -> str:
        return match[1] + render_table(tables[match[2]], records) + match[3]

    for document in documents:
        text = document.read_text(encoding="utf-8")
        rendered = REGION.sub(fill, text)
        if rendered != text:
            changed.append(document)
            if not check:
                document.write_text(rendered, encoding="utf-8")
    return changed


def documents() -> list[Path]:
    """Every Markdown document of the course."""
    return [*ROOT.glob("*.md"), *sorted((ROOT / "03-Model_Compression").rglob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Render the results tables of the course's documents.")
    parser.add_argument("command", choices=["render"])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a document is out of date")
    arguments = parser.parse_args()
    changed = render(documents(), check=arguments.check)
    for document in changed:
        print(document.relative_to(ROOT), "is out of date" if arguments.check else "rendered")
    sys.exit(1 if arguments.check and changed else 0)


if __name__ == "__main__":
    main()
