"""One meaning per public name in `common`."""

import ast
from collections import defaultdict
from pathlib import Path

from common.course.settings import ROOT

SAME = {  # asked of each program, engine or format by its module's name: `llamacpp.missing()`, `awq.unpack_linear`
    "main",
    "missing",
    "unpack_linear",
}


def named_twice(folder: Path) -> dict[str, list[str]]:
    """Public functions and classes that more than one module defines, with those modules."""
    found = defaultdict(list)
    for file in sorted(folder.rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
                found[node.name].append(file.relative_to(folder).as_posix())
    return {name: files for name, files in found.items() if len(files) > 1}


def test_a_public_name_has_one_meaning():
    twice = named_twice(ROOT / "common")
    assert not {name: files for name, files in twice.items() if name not in SAME}
    assert twice.keys() == SAME


def test_a_name_given_twice_is_found(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/one.py", "two.py"):
        (tmp_path / name).write_text("class Objective: ...\ndef _own(): ...\n")
    assert named_twice(tmp_path) == {"Objective": ["a/one.py", "two.py"]}
