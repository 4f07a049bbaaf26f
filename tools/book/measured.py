"""Data of the widgets that show what was measured, made at build from results/ and from the theory's figures."""

import importlib.util
import json
from functools import cache
from pathlib import Path
from types import ModuleType

from common.course.settings import CHAPTER, ROOT
from tools.book.links import slug
from tools.book.origins import notebook_of
from tools.book.sources import RECORDS, record_place
from tools.documents.markdown import headings

QUALITY = ("perplexity", "engine-perplexity", "trained-perplexity")
SIZE = {"bytes": 1, "engine-size": 1e6}  # key → bytes of its unit
SPEED = ("throughput-b1", "engine-decode", "engine-throughput-1")  # tokens/s, one sequence
SAME = ("corpus", "split", "seqlen", "windows", "dtype", "text")  # what makes two perplexities comparable
DRAWN = CHAPTER / "theory" / "figures" / "draw_quantization.py"


@cache
def _steps(notebook: Path) -> list[tuple[str, str]]:
    """Code, and the anchor of the heading above it, of every code cell."""
    found, above = [], ""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            above = slug(titles[-1].text) if (titles := headings(source)) else above
        elif cell["cell_type"] == "code":
            found.append((source, above))
    return found


def step_of(notebook: Path, record: dict) -> str:
    """Where in a notebook a record was made: the heading above the cell that writes its key; "" if none names it."""
    named = (above for source, above in _steps(notebook) if "recorder." in source and f'"{record["key"]}"' in source)
    whole = (above for source, above in _steps(notebook) if "recorder.quality(" in source)
    return next(named, "") or next(whole, "")


def _page(record: dict) -> str:
    """The book's page that tells of a record's run, from its root."""
    notebook = notebook_of(record["lab"], record["notebook"])
    if notebook is None:
        return f"{CHAPTER.name}/Comparisons.html"
    place = step_of(notebook, record)
    return f"{notebook.relative_to(ROOT).with_suffix('')}.html" + (f"#{place}" if place else "")


def _beside(records: list[dict], record: dict, keys: tuple[str, ...]) -> dict | None:
    """The record of one of `keys` for the same artifact, of the same notebook before any other's."""
    found = [r for r in records if r["key"] in keys and r["artifact"] == record["artifact"]]
    found = [r for r in found if r["profile"] == record["profile"]]
    return min(found, key=lambda r: r["notebook"] != record["notebook"], default=None)


def points() -> list[dict]:
    """Every measured perplexity, with the size and the speed of the same model where they were measured."""
    made = []
    for file in RECORDS:
        records = json.loads(file.read_text(encoding="utf-8"))
        for number, record in enumerate(records):
            if record["key"] not in QUALITY:
                continue
            size, speed = _beside(records, record, tuple(SIZE)), _beside(records, record, SPEED)
            protocol = "，".join(f"{k} {record['protocol'][k]}" for k in SAME if k in record["protocol"])
            made.append(
                {
                    "name": record["artifact"],
                    "device": record["device"],
                    "source": f"{record['lab']} · {record['notebook']}",
                    "protocol": protocol,
                    "corpus": record["protocol"].get("corpus", ""),
                    "perplexity": record["value"],
                    "bytes": size and size["value"] * SIZE[size["key"]],
                    "speed": speed and speed["value"],
                    "date": record["date"],
                    "record": f"source/{file.relative_to(ROOT)}.html#{record_place(number)}",
                    "page": _page(record),
                }
            )
    return made


@cache
def figure() -> ModuleType:
    """The script that draws the theory's figures: its constants, its roofline."""
    spec = importlib.util.spec_from_file_location(DRAWN.stem, DRAWN)
    drawn = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawn)
    return drawn


def roofline() -> dict:
    """Cards and measured gains, as the theory's figure has them."""
    drawn = figure()
    gains = [
        {"name": name, "batch": batch, "gain": gain}
        for name, found in sorted(drawn.measured_speedups().items())
        for batch, gain in sorted(found.items())
    ]
    sheet = {"name": "H100 SXM（規格表）", "peak": drawn.PEAK, "bandwidth": drawn.BANDWIDTH}
    exercise = {"name": "第 3.1 章習題 8 的卡", "peak": 300e12, "bandwidth": 1e12}
    return {"bits": drawn.BITS, "cards": [sheet, exercise], "measured": gains}


def write(folder: Path) -> None:
    """The two as scripts, since a page that is opened from a folder may not read files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, variable, data in (("roofline", "bookRoofline", roofline()), ("pareto", "bookPoints", points())):
        text = f"window.{variable} = {json.dumps(data, ensure_ascii=False)};\n"
        (folder / f"{name}.js").write_text(text, encoding="utf-8")
