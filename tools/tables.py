"""Committed figures: kept per device in `results/`, rendered into the tables of the documents.

A table shows only records of one protocol per column; it refuses to mix them.

    python -m tools.tables render [--check]     fill the <!-- results:TABLE --> regions of all documents
"""

import argparse
import re
import sys
import tomllib
from functools import partial
from pathlib import Path

from common.course.settings import ROOT, slug
from common.measure.results import protocol_hash, read, write
from tools import families, large, provenance
from tools.exercises import trials
from tools.speedrun import board
from tools.wording import CHINESE, Wording, wording

COMMITTED = ROOT / "results"
TABLES = COMMITTED / "tables.toml"
MOST_COLUMNS = 6  # of a table that is read in a document
OWN = {"families": families.table, "exercises": trials.table, "speedrun": board.table, "large": large.table}
REGION = re.compile(r"(<!-- results:([\w-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def promote(notebook: str, source: Path, model: str = "embedded", code: str = "") -> None:
    """Make a run's records of one notebook and model the committed ones, in place of all it had on that device.

    Each is stamped with `code`, the fingerprint of what measured it (default: of today's code), where it has none yet.
    """
    fresh = [r for r in read(source) if (r["notebook"], r["model"]) == (notebook, model)]
    if not fresh:
        raise ValueError(f"{source.name} holds no record of notebook {notebook} with model {model}.")
    lab, profile = fresh[0]["lab"], fresh[0]["profile"]
    code = code or provenance.code_of(lab, notebook, profile)
    target = COMMITTED / slug(fresh[0]["device"]) / source.name
    kept = [r for r in read(target) if (r["notebook"], r["profile"]) != (notebook, profile)]
    write(kept + [{"code": code} | record for record in fresh], target)


def committed() -> list[dict]:
    """All committed records."""
    return [record for file in sorted(COMMITTED.glob("*/*.json")) for record in read(file)]


def _select(records: list[dict], spec: dict) -> list[dict]:
    """The records that a table is about: its lab and notebook, its columns' keys, its rows."""
    return [
        r
        for r in records
        if r["lab"] == spec["lab"]
        and r["notebook"] == spec.get("notebook", r["notebook"])
        and any(_belongs(r, name, column) for name, column in spec["columns"].items())
        and _row(r, spec) in spec["rows"]
    ]


def _row(record: dict, spec: dict) -> str:
    """In which row a record stands: its artifact's, or that of its protocol's `by`, such as a number of items."""
    return str(record["protocol"].get(spec["by"])) if "by" in spec else record["artifact"]


def _belongs(record: dict, name: str, column: dict) -> bool:
    """Whether a record stands in a column: of its key (the column's name by default), under what `where` asks for."""
    where = column.get("where", {})
    return record["key"] == column.get("key", name) and where.items() <= record["protocol"].items()


def render_table(spec: dict, records: list[dict], words: Wording = CHINESE) -> str:
    """Markdown tables: a row per artifact, a column per key. Missing figures are shown as a dash.

    Several devices stand side by side where that makes at most MOST_COLUMNS, else each has a table of its own.
    A column's format may use the value, its {spread}, its interval's ends {low} and {high}, and its {ratio} to the
    table's first row.
    Raises ValueError where two records with different protocols, or models, would stand in one column.
    """
    chosen = _select(records, spec)
    if not chosen:
        return words.none
    columns = [
        (key, device)
        for key, column in spec["columns"].items()
        for device in sorted({r["device"] for r in chosen if _belongs(r, key, column)})
    ]
    spec = _in(words, spec)
    cells = _cells(spec, chosen, columns)
    devices = sorted({device for _, device in columns})
    if len(devices) > 1 and len(columns) + 1 <= MOST_COLUMNS:
        heads = [words.column.format(title=spec["columns"][key]["title"], device=device) for key, device in columns]
        below = words.below.format(title=spec["title"], caption=_caption(chosen, words))
        return f"{_rows(spec, heads, columns, cells)}\n\n*{below}*\n"
    parts = []
    for device in devices:
        mine = [column for column in columns if column[1] == device]
        heads = [spec["columns"][key]["title"] for key, _ in mine]
        below = _caption([r for r in chosen if r["device"] == device], words)
        above = words.device.format(device=device, title=spec["title"])
        parts.append(f"{above}\n\n{_rows(spec, heads, mine, cells)}\n\n*{below}*\n")
    return "\n".join(parts)


def _in(words: Wording, spec: dict) -> dict:
    """A table with its labels in a language."""
    columns = {
        key: column | {"title": words.of(column["title"]), "format": words.of(column["format"])}
        for key, column in spec["columns"].items()
    }
    rows = {artifact: words.of(label) for artifact, label in spec["rows"].items()}
    return spec | {"title": words.of(spec["title"]), "head": words.of(spec["head"]), "columns": columns, "rows": rows}


def _cells(spec: dict, chosen: list[dict], columns: list[tuple[str, str]]) -> dict[tuple[str, str, str], str]:
    """(artifact, key, device) → the figure as it is shown."""
    cells = {}
    for key, device in columns:
        column = [r for r in chosen if _belongs(r, key, spec["columns"][key]) and r["device"] == device]
        by = spec.get("by")
        common = [{name: value for name, value in r["protocol"].items() if name != by} for r in column]
        if len({(protocol_hash(p), r["model"], r["profile"]) for p, r in zip(common, column, strict=True)}) > 1:
            raise ValueError(f"Table {spec['title']!r}: column {key} on {device} mixes protocols.")
        values = {_row(r, spec): r["value"] for r in column}
        first = next((values[row] for row in spec["rows"] if row in values), None)
        for r in column:
            form, spread = spec["columns"][key]["format"], r["spread"] or 0.0
            low, high = r.get("interval") or (r["value"], r["value"])
            named = {"spread": spread, "low": low, "high": high, "ratio": r["value"] / first if first else 1.0}
            cells[_row(r, spec), key, device] = form.format(r["value"], **named)
    return cells


def _rows(spec: dict, heads: list[str], columns: list[tuple[str, str]], cells: dict) -> str:
    lines = [[spec["head"], *heads], ["---"] + ["---:"] * len(columns)]
    for artifact, label in spec["rows"].items():
        row = [cells.get((artifact, key, device), "—") for key, device in columns]
        if set(row) != {"—"}:
            lines.append([label, *row])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _caption(chosen: list[dict], words: Wording) -> str:
    """Where the table's numbers come from, computed from its records."""
    dates = sorted({r["date"] for r in chosen})
    span = dates[0] if len(dates) == 1 else words.span.format(first=dates[0], last=dates[-1])
    stated: dict[str, dict] = {}
    for name, value in ((name, value) for r in chosen for name, value in r["protocol"].items()):
        stated.setdefault(name, {})[str(value).removeprefix("torch.")] = None
    said = words.comma.join(f"{words.names.get(name, name)} {' / '.join(values)}" for name, values in stated.items())
    protocol = words.protocol.format(said=said) if said else ""
    return f"{protocol}{words.source.format(span=span)}{_mixed(chosen, words)}"


def _mixed(chosen: list[dict], words: Wording) -> str:
    """A sentence where the rows are not of one code, or not of one set of libraries; "" where they are."""
    codes: dict[tuple, set[str]] = {}
    for r in chosen:
        codes.setdefault((r["notebook"], r["profile"], r["device"]), set()).add(r.get("code"))
    several = sorted({device for (_, _, device), found in codes.items() if len(found) > 1})
    versions = {name: {r["versions"].get(name, words.lacking) for r in chosen} for name in chosen[0]["versions"]}
    differ = [f"{name} {' / '.join(sorted(found))}" for name, found in versions.items() if len(found) > 1]
    said = [words.codes.format(devices=words.comma.join(several))] if several else []
    said += [words.versions.format(found=words.clause.join(differ))] if differ else []
    return words.warning.format(said=words.part.join(said)) if said else ""


def render(documents: list[Path], check: bool = False) -> list[Path]:
    """Fill every region of `documents`; returns those whose text changed (with `check`, without writing them)."""
    tables = tomllib.loads(TABLES.read_text(encoding="utf-8"))
    records, changed = committed(), []

    def fill(match: re.Match, words: Wording) -> str:
        own = OWN.get(match[2])
        return match[1] + (own() if own else render_table(tables[match[2]], records, words)) + match[3]

    for document in documents:
        text = document.read_text(encoding="utf-8")
        rendered = REGION.sub(partial(fill, words=wording(document)), text)
        if rendered != text:
            changed.append(document)
            if not check:
                document.write_text(rendered, encoding="utf-8")
    return changed


def documents() -> list[Path]:
    """Every Markdown document of the course, and the book's own pages."""
    folders = [ROOT / "book", ROOT / "03-Model_Compression"]
    return [*ROOT.glob("*.md"), *(path for folder in folders for path in sorted(folder.rglob("*.md")))]


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
