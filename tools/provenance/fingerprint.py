"""The fingerprint of a notebook, or of a script of `benchmarks`: what of the course's code its figures depend on."""

from pathlib import Path

import nbformat

from common.course.settings import CHAPTER, ROOT
from tools.provenance.form import Form, Reader
from tools.provenance.reach import Reached, cell_module, code_cells, digest
from tools.provenance.tree import Module, Tree

SCRIPTS = {  # lab → what measures it
    "benchmark": "benchmarks.bench",
    "shape": "benchmarks.shape_7b",
    "students": "benchmarks.students",
}
UNKNOWN = "before fingerprints"  # the code of records that are older than this
SHORT = 8  # characters of the digests that only tell which part changed


def parts(notebook: nbformat.NotebookNode, lab: str, profile: str, tree: Tree | None = None) -> dict:
    """What a notebook's figures depend on, piece by piece.

    cells: a digest per code cell; definitions: name → digest of its own code; numbers: row of `profiles.toml` → value;
    code: the fingerprint of all three.
    """
    tree = tree or Tree(ROOT)
    module, cells = _read_cells(notebook, tree)
    return _parts(tree, lab, profile, cells, module)


def _read_cells(notebook: nbformat.NotebookNode, tree: Tree) -> tuple[Module, list[Form]]:
    module, bodies = cell_module(code_cells(notebook))
    reader = Reader(tree, module, keep_words=True)
    return module, [reader.read(*body) for body in bodies]


def changed_cells(notebook: nbformat.NotebookNode) -> list[int]:
    """Which code cells (from 1, without the parameters) are not those of the recorded run."""
    recorded = notebook.metadata["provenance"]["cells"]
    _, cells = _read_cells(notebook, Tree(ROOT))
    return [number for number, form in enumerate(cells, start=1) if _short(form.text) not in recorded]


def _short(text: str) -> str:
    return digest(text)[:SHORT]


def script_parts(name: str, lab: str, profile: str, tree: Tree | None = None) -> dict:
    """The same for a module that is run, such as "benchmarks.bench": its cells are its definitions."""
    tree = tree or Tree(ROOT)
    module = tree.module(name)
    reader = Reader(tree, module)
    return _parts(tree, lab, profile, [reader.read(d.statement) for d in module.definitions], module)


def _parts(tree: Tree, lab: str, profile: str, cells: list[Form], module: Module) -> dict:
    reached = Reached(tree)
    reached.follow([target for form in cells for target in form.refers])
    reached.follow(reached.imported(module))
    named = reached.rows.union(*(form.rows for form in cells))
    numbers = {name: value for name, value in tree.numbers(lab, profile).items() if {name, "*"} & named}
    definitions = [reached.line(reached.form(d)) for d in reached.definitions]
    everything = [*map(reached.line, cells), *sorted(set(definitions)), repr(sorted(numbers.items()))]
    return {
        "code": digest("\n".join(everything)),
        "cells": [_short(form.text) for form in cells],
        "definitions": {name: own[:SHORT] for name, own in sorted(reached.digests().items())},
        "numbers": numbers,
    }


def fingerprint(notebook: nbformat.NotebookNode, lab: str, profile: str) -> dict[str, str]:
    """`code`, which changes when anything does that can change a figure, and digests of the three things behind it."""
    found = parts(notebook, lab, profile)
    return {"code": found["code"]} | {name: digest(repr(found[name])) for name in ("cells", "definitions", "numbers")}


def find_notebook(lab: str, name: str) -> Path | None:
    """The file of a lab's notebook, such as ("pruning", "02-Prune"); None where there is none."""
    folders = (f"Lab-*-{lab.title()}", lab.title())
    return next((file for folder in folders for file in CHAPTER.glob(f"{folder}/{name}.ipynb")), None)


def read_notebook(file: Path) -> nbformat.NotebookNode:
    return nbformat.read(file, as_version=4)


def code_of(lab: str, name: str, profile: str) -> str:
    """The fingerprint of today's code of a notebook, or of the script that measures a lab without notebooks."""
    if lab in SCRIPTS:
        return script_parts(SCRIPTS[lab], lab, profile)["code"]
    file = find_notebook(lab, name)
    if file is None:
        raise ValueError(f"No notebook {name} in lab {lab!r}, and no script measures it.")
    return parts(read_notebook(file), lab, profile)["code"]


def stamp(notebook: nbformat.NotebookNode, lab: str, profile: str, device: str, date: str) -> None:
    """Write into a notebook's metadata what produced its outputs."""
    about = {"lab": lab, "profile": profile, "device": device, "date": date}
    notebook.metadata["provenance"] = about | parts(notebook, lab, profile)


def changes(recorded: dict, now: dict) -> list[str]:
    """Which cells, definitions and numbers differ. What only moved, or was only renamed with its file, does not."""
    if "definitions" not in recorded:
        return ["it was recorded before fingerprints of this kind"]
    cells = [f"cell {n}" for n, cell in enumerate(now["cells"], start=1) if cell not in recorded["cells"]]
    cells += ["a cell is gone"] if set(recorded["cells"]) - set(now["cells"]) and not cells else []
    old, new = recorded["definitions"], now["definitions"]
    moved = set(old.values()) & set(new.values())
    names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    edited = sorted(name for name in names if not {old.get(name), new.get(name)} - {None} <= moved)
    rows = {**recorded["numbers"], **now["numbers"]}
    differ = sorted(name for name in rows if recorded["numbers"].get(name) != now["numbers"].get(name))
    return cells + edited + [f"settings.{name}" for name in differ]
