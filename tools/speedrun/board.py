"""The speed-run's table: results/speedrun.json, and the same as Markdown for `tools.tables`."""

import datetime
import json
from dataclasses import asdict
from pathlib import Path

from common.course.files import write_whole
from common.course.settings import ROOT
from tools.speedrun.rules import Refused, Statement

FILE = ROOT / "results" / "speedrun.json"


def read(file: Path = FILE) -> list[dict]:
    """All entries, the nearest to the original first."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def add(statement: Statement, size: int, sha256: str, found: dict, file: Path = FILE) -> dict:
    """Put an entry into the table, in place of an earlier one of this name and author. Raises Refused for a copy."""
    entries = read(file)
    own = (statement.author, statement.name)
    for entry in entries:
        if entry["sha256"] == sha256 and (entry["author"], entry["name"]) != own:
            raise Refused(f"These are the bytes of {entry['name']!r} by {entry['author']}.")
    made = asdict(statement) | {"bytes": size, "sha256": sha256, "date": datetime.date.today().isoformat()} | found
    kept = [entry for entry in entries if (entry["author"], entry["name"]) != own]
    entries = sorted([*kept, made], key=lambda entry: entry["kl"])
    write_whole(file, json.dumps(entries, ensure_ascii=False, indent=1) + "\n")
    return made


def table(file: Path = FILE) -> str:
    """A Markdown table, the nearest first."""
    if not file.exists():
        return "（尚無紀錄：`make submit` 之後產生。）\n"
    lines = ["| 名次 | 名稱 | 作者 | 方法 | MB | 校準 token | KL 散度，nats/token | 日期 |"]
    lines += ["| ---: | --- | --- | --- | ---: | ---: | ---: | --- |"]
    for rank, entry in enumerate(read(file), start=1):
        size, kl = f"{entry['bytes'] / 1e6:.2f}", f"{entry['kl']:.4f} ± {entry['standard_error']:.4f}"
        told = [entry["name"], entry["author"], entry["method"], size, f"{entry['calibration_tokens']:,}", kl]
        lines.append(f"| {rank} | {' | '.join(told)} | {entry['date']} |")
    return "\n".join(lines) + "\n\n*±：視窗之間的標準誤。來源：`results/speedrun.json`，由 `make submit` 寫成。*\n"
