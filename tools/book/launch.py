"""At the head of a notebook's page: download, Colab, Kaggle, and the cell that sets the course up there.

The cell is the chapter README's, with the commands for this notebook and those that it needs."""

import html
import os
import re
import subprocess
from functools import cache
from pathlib import Path
from urllib.parse import quote

from common.course.settings import CHAPTER, ROOT
from tools.notebooks import lab_number, needs

CELL = re.compile(r"```bash\n(%%bash\n.*?)```", re.S)
LABS = re.compile(r"^make labs LAB=\S+ NOTEBOOK=\S+(.*?)\s*(?:#.*)?$", re.M)


@cache
def repository() -> str:
    """`owner/name` on GitHub: of the workflow that builds, or of the checkout's origin; "" where neither is known."""
    done = subprocess.run(["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True, text=True)
    found = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?$", done.stdout.strip())
    return os.environ.get("GITHUB_REPOSITORY") or (found[1] if found else "")


def order(notebook: Path) -> list[Path]:
    """The notebooks to run: those that it needs, the first first, then itself."""
    found: list[Path] = []
    for title in needs(notebook):
        needed = CHAPTER / f"{title}.ipynb"
        found += [path for path in order(needed) if path not in found] if needed.exists() else []
    return [*found, notebook]


def cell(notebook: Path, readme: str) -> str:
    """The set-up cell for a notebook of the numbered ones; "" where the README has none, or for exercises."""
    found = CELL.search(readme)
    if not found or not re.match(r"[A\d]", notebook.name):
        return ""
    lines = [*LABS.finditer(found[1])]
    options = lines[-1][1] if lines else ""
    commands = [
        f"make labs LAB={lab_number(path)} NOTEBOOK={path.stem.split('-')[0]}{options}" for path in order(notebook)
    ]
    head = found[1][: lines[0].start()] if lines else found[1]
    name = repository()
    return (head.replace("REPOSITORY", f"https://github.com/{name}") if name else head) + "\n".join(commands) + "\n"


def buttons(notebook: Path) -> str:
    """HTML of the head's links and cell."""
    path = quote(notebook.relative_to(ROOT).as_posix())
    links = [(quote(notebook.name), "下載 .ipynb", " download")]
    if name := repository():
        links += [(f"https://colab.research.google.com/github/{name}/blob/main/{path}", "在 Colab 開啟", "")]
        links += [
            (f"https://kaggle.com/kernels/welcome?src=https://github.com/{name}/blob/main/{path}", "在 Kaggle 開啟", "")
        ]
    made = "".join(f'<a class="launch" href="{html.escape(to)}"{more}>{text}</a>' for to, text, more in links)
    setup = cell(notebook, (CHAPTER / "README.md").read_text(encoding="utf-8"))
    if setup:
        code = f'<div class="highlight"><pre>{html.escape(setup)}</pre></div>'
        made += f"<details><summary>在 Colab 或 Kaggle 上執行：第一格貼上這些</summary>{code}</details>"
    return f'<div class="launches">{made}</div>'
