"""Which record, which run and which commit made what a page shows: below each table of results, each drawn figure, and
at the head of each notebook."""

import html
import json
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

from docutils import nodes
from sphinx.transforms import SphinxTransform

from common.course.settings import CHAPTER, ROOT
from common.measure.results import read
from tools import tables
from tools.book import launch
from tools.book.english import is_english
from tools.book.links import source_page

OPEN = re.compile(r"<!-- results:([\w-]+) -->")
CLOSE = "<!-- /results -->"


@cache
def commit(path: Path) -> str:
    """The last commit that changed a file, such as `d705f0e`; "" outside a checkout, and in one without its history."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    return (
        ""
        if git("rev-parse", "--is-shallow-repository") != "false"
        else git("log", "-1", "--format=%h", "--", str(path))
    )


@cache
def _records() -> list[tuple[Path, list[dict]]]:
    return [(file, read(file)) for file in sorted(tables.COMMITTED.glob("*/*.json"))]


@cache
def _specs() -> dict:
    return tomllib.loads(tables.TABLES.read_text(encoding="utf-8"))


def of_table(key: str) -> dict[Path, set[str]]:
    """The files whose records fill a table, and the notebooks that measured them."""
    if key not in _specs():
        own = tables.COMMITTED / f"{key}.json"  # such as families.json: a table that is no selection of records
        return {own: set()} if own.exists() else {}
    chosen = {file: tables._select(records, _specs()[key]) for file, records in _records()}
    return {file: {r["notebook"] for r in found} for file, found in chosen.items() if found}


def notebook_of(lab: str, name: str) -> Path | None:
    """The notebook that a record names: `02-Prune` of the lab `pruning`."""
    folder = {"quantization": "Lab-3.1-*", "pruning": "Lab-3.2-*", "distillation": "Lab-3.3-*"}.get(lab, "Advanced")
    return next(iter(CHAPTER.glob(f"{folder}/{name}.ipynb")), None)


class Origins(SphinxTransform):
    """Adds the line that says where figures come from."""

    default_priority = 860  # before the links that it adds are looked at

    def apply(self, **kwargs) -> None:
        for node in [*self.document.findall(nodes.raw)]:
            if (opened := OPEN.search(node.astext())) and node.parent is not None:
                self._below_table(node, opened[1])
        for image in [*self.document.findall(nodes.image)]:
            self._below_figure(image)
        if (CHAPTER.parent / f"{self.env.docname}.ipynb").exists():
            self._at_head()

    def _link(self, path: Path, text: str) -> nodes.reference:
        if path.suffix == ".ipynb":
            page = str(path.relative_to(ROOT).with_suffix(""))
        else:
            page = source_page(path)
            self.env.book_links.setdefault(self.env.docname, {}).setdefault("sources", set()).add(path)
        uri = self.app.builder.get_relative_uri(self.env.docname, page)
        return nodes.reference("", text, refuri=uri, internal=True)

    def _line(self, *parts: nodes.Node | str) -> nodes.paragraph:
        line = nodes.paragraph(classes=["origin"])
        line.extend(nodes.Text(part) if isinstance(part, str) else part for part in parts)
        return line

    def _with_commit(self, path: Path, text: str) -> list[nodes.Node | str]:
        return [self._link(path, text), *self._commit(path)]

    def _commit(self, path: Path) -> list[str]:
        said = " (commit {})" if is_english(self.env.docname) else "（提交 {}）"
        return [said.format(made)] if (made := commit(path)) else []

    def _below_table(self, opened: nodes.raw, key: str) -> None:
        parts: list[nodes.Node | str] = []
        opening, between, comma, end = "紀錄：", "；", "，", "。"
        if is_english(self.env.docname):
            opening, between, comma, end = "Records: ", "; ", ", ", "."
        for file, notebooks in of_table(key).items():
            parts += [between if parts else opening, *self._with_commit(file, file.relative_to(ROOT).as_posix())]
            for name in sorted(notebooks):
                if notebook := notebook_of(file.stem, name):
                    parts += [comma, self._link(notebook, name)]
        closing = next((n for n in opened.parent.children[opened.parent.index(opened) :] if CLOSE in n.astext()), None)
        if parts and closing is not None:
            opened.parent.insert(opened.parent.index(closing), self._line(*parts, end))

    def _below_figure(self, image: nodes.image) -> None:
        drawn = ROOT / Path(self.env.docname).parent / image["uri"].split("#")[0]
        drawn = Path(drawn).resolve()
        script = drawn.with_name(f"draw_{drawn.stem.split('-')[0]}.py")
        holder = image.parent
        if drawn.suffix != ".svg" or not script.exists() or not isinstance(holder, nodes.paragraph):
            return
        before, after, end = ("圖由 ", " 畫出", "。")
        if is_english(self.env.docname):
            before, after, end = ("Drawn by ", "", ".")
        drawn_by = [self._link(script, script.name), after, *self._commit(drawn)]
        line = self._line(before, *drawn_by, end)
        holder.parent.insert(holder.parent.index(holder) + 1, line)

    def _at_head(self) -> None:
        path = ROOT / f"{self.env.docname}.ipynb"
        made = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("provenance")
        if made:
            said = f"輸出錄製於 {made['device']}，{made['date']}，設定檔 {made['profile']}；程式的指紋 {made['code']}"
        else:
            said = "這個 notebook 沒有錄製的輸出"
        at = commit(path)
        line = self._line(said, f"；提交 {at}。" if at else "。")
        title = next(iter(self.document.findall(nodes.title)))
        head = [nodes.raw("", launch.buttons(path), format="html"), line]
        title.parent.insert(title.parent.index(title) + 1, head)


class Diagrams(SphinxTransform):
    """Mermaid diagrams are drawn in the browser, from the text that stands in the page."""

    default_priority = 800

    def apply(self, **kwargs) -> None:
        for block in [*self.document.findall(nodes.literal_block)]:
            if block.get("language") == "mermaid":
                said = html.escape(
                    "流程圖：" + "、".join(re.findall(r'"([^"]+)"', block.astext())).replace("<br/>", " ")
                )
                drawn = f'<pre class="mermaid" role="img" aria-label="{said}">{html.escape(block.astext())}</pre>'
                block.replace_self(nodes.raw("", drawn, format="html"))
