"""What produced a notebook's outputs: hashes of its own cells and of the `common` code it ran with."""

import ast
import hashlib
import json
from pathlib import Path

import nbformat

from common.course.settings import ROOT, profile_values, shared_rows

PACKAGE = ROOT / "common"


def _code_lines(source: str) -> str:
    """A module's text without docstrings, comment lines and blank lines: what can change a result."""
    tree = ast.parse(source)
    dropped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            dropped.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines(), start=1)
    return "\n".join(
        line.rstrip() for n, line in lines if n not in dropped and line.strip() and not line.lstrip().startswith("#")
    )


def _imports(source: str) -> set[str]:
    """Names of the `common` modules that a piece of code imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "common":
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("common."):
            found.add(node.module.split(".")[1])
    return found


def _files(name: str) -> list[Path]:
    """The file of a module of `common`, or the files of a package in it."""
    folder, file = PACKAGE / name, PACKAGE / f"{name}.py"
    return sorted(folder.glob("*.py")) if folder.is_dir() else [file] if file.exists() else []


def modules_used(source: str) -> list[Path]:
    """The files of `common` that `source` imports, directly or through one another, with the table of profiles."""
    found, waiting = set(), _imports(source)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            for file in _files(name):
                waiting |= _imports(file.read_text(encoding="utf-8"))
    return [file for name in sorted(found) for file in _files(name)]


def fingerprint(notebook: nbformat.NotebookNode, lab: str, profile: str) -> dict[str, str]:
    """Hashes that change when a notebook's code, the `common` code behind it, or the numbers it uses change."""
    code = "\n".join(
        cell.source
        for cell in notebook.cells
        if cell.cell_type == "code" and not {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", []))
    )
    common = "\n".join(_code_lines(file.read_text(encoding="utf-8")) for file in modules_used(code))
    used = {name: value for name, value in profile_values(lab, profile).items() if f"settings.{name}" in code}
    shared = {name: value for name, value in profile_values(lab, profile).items() if name in shared_rows()}
    numbers = json.dumps(used | shared, sort_keys=True)
    return {"cells": _sha(code), "common": _sha(common), "numbers": _sha(numbers)}


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stamp(notebook: nbformat.NotebookNode, lab: str, profile: str, device: str, date: str) -> None:
    """Write into a notebook's metadata what produced its outputs."""
    hashes = fingerprint(notebook, lab, profile)
    notebook.metadata["provenance"] = {"lab": lab, "profile": profile, "device": device, "date": date, **hashes}


def stale(notebook: nbformat.NotebookNode) -> str:
    """Why a notebook's outputs no longer belong to its code; "" when they do."""
    recorded = notebook.metadata.get("provenance")
    if not recorded:
        return "it has no recorded run"
    now = fingerprint(notebook, recorded["lab"], recorded["profile"])
    changed = [name for name in now if recorded.get(name) != now[name]]
    return f"changed since its outputs were recorded: {', '.join(changed)}" if changed else ""
