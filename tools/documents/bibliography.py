"""The course's one bibliography: `references.bib`, and `references.md` rendered from it, to which documents link."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import bibtexparser

from common.course.settings import CHAPTER
from tools.documents.document import Document, Finding
from tools.documents.markdown import links

BIB = CHAPTER / "theory" / "references.bib"
RENDERED = BIB.with_suffix(".md")

HEAD = """# 參考文獻 (References)

由 [references.bib](references.bib) 渲染（`python -m tools.documents render`），請勿手改。
文件以鍵引用：`references.md#鍵`。

"""


@dataclass(frozen=True)
class Entry:
    """One entry; `line` is where it begins in the .bib."""

    key: str
    line: int
    fields: dict[str, str]

    @property
    def url(self) -> str:
        """Where the paper is: arXiv if it has an id there."""
        return (
            f"https://arxiv.org/abs/{self.fields['eprint']}" if "eprint" in self.fields else self.fields.get("url", "")
        )

    @property
    def markdown(self) -> str:
        """The entry as a list item that can be linked to."""
        f = self.fields
        venue = f.get("booktitle") or f.get("journal") or f.get("publisher") or f.get("howpublished")
        shown = f"arXiv:{f['eprint']}" if "eprint" in f else self.url
        parts = [_names(f.get("author", "")), f"*{f.get('title')}*", venue, f.get("year"), f"[{shown}]({self.url})"]
        return f'- <a id="{self.key}"></a>' + ". ".join(part for part in parts if part) + "."


def _names(authors: str) -> str:
    """«Frantar, Elias and Alistarh, Dan» as «Elias Frantar, Dan Alistarh»; of more than six, the first and «et al.»"""
    names = [" ".join(reversed(name.split(", ", 1))) for name in re.split(r"\s+and\s+", authors)]
    if names[-1] == "others" or len(names) > 6:
        return f"{names[0]} et al"
    return ", ".join(names)


def entries(bib: str) -> list[Entry]:
    """The entries of a BibTeX text, in its order. Raises ValueError for what is no BibTeX, or for a key twice."""
    library = bibtexparser.parse_string(bib)
    if library.failed_blocks:
        block = library.failed_blocks[0]
        raise ValueError(f"references.bib:{block.start_line + 1}: cannot be read: {block.error}")
    return [
        Entry(e.key, e.start_line + 1, {f.key: re.sub(r"[{}]|\s+(?=\s)", "", str(f.value)) for f in e.fields})
        for e in library.entries
    ]


def render(bib: str) -> str:
    """The text of references.md: entries by first author's name and year."""
    chosen = sorted(entries(bib), key=lambda e: (e.key.lower(), e.fields.get("year", "")))
    return HEAD + "\n".join(entry.markdown for entry in chosen) + "\n"


def incomplete(bib: str) -> list[Finding]:
    """Entries without title, author, year, or a place to read them; arXiv ids that are none, or stand twice."""
    findings, places = [], {}
    for entry in entries(bib):
        missing = [field for field in ("title", "author", "year") if not entry.fields.get(field)]
        missing += [] if entry.url else ["eprint or url"]
        eprint = entry.fields.get("eprint")
        if eprint and not re.fullmatch(r"\d{4}\.\d{4,5}|[a-z-]+/\d{7}", eprint):
            missing.append(f"a valid arXiv id, not {eprint!r}")
        if eprint and entry.fields.get("archivePrefix", entry.fields.get("archiveprefix")) != "arXiv":
            missing.append("archivePrefix = {arXiv}")
        if entry.url in places:
            missing.append(f"a paper of its own: {places[entry.url]} is the same")
        places.setdefault(entry.url, entry.key)
        findings += [Finding(BIB.name, entry.line, f"{entry.key} lacks {', '.join(missing)}")] if missing else []
    return findings


def citations(documents: Iterable[Document], bib: str) -> list[Finding]:
    """Keys that documents cite and the bibliography has not, and entries that no document cites."""
    known, cited, findings = {entry.key: entry for entry in entries(bib)}, set(), []
    for document in documents:
        for position, _, target in links(document.text):
            file, _, key = target.partition("#")
            if Path(file).name == RENDERED.name and key:
                cited.add(key)
                if key not in known:
                    findings.append(document.finding(position, f"references.bib has no entry {key}"))
    unused = [Finding(BIB.name, known[key].line, f"no document cites {key}") for key in known.keys() - cited]
    return findings + sorted(unused, key=lambda finding: finding.line)


def stale(bib: str, rendered: str) -> list[Finding]:
    """Whether references.md is not what the bibliography renders to."""
    message = "is out of date: python -m tools.documents render"
    return [] if rendered == render(bib) else [Finding(RENDERED.name, 1, message)]


def check(documents: Iterable[Document]) -> list[Finding]:
    """The committed bibliography against all documents."""
    bib = BIB.read_text(encoding="utf-8")
    rendered = RENDERED.read_text(encoding="utf-8") if RENDERED.exists() else ""
    return incomplete(bib) + stale(bib, rendered) + citations(documents, bib)


def write() -> None:
    """Render references.md from references.bib."""
    RENDERED.write_text(render(BIB.read_text(encoding="utf-8")), encoding="utf-8")
