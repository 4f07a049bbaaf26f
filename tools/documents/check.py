"""Checks that keep the documents honest; WRITING_STYLE_GUIDE.md names them rule by rule.

    python -m tools.documents check     one line per finding; exit 1 when there is any
    python -m tools.documents render    write references.md from references.bib

A check is a pure function from a document to its findings. Those about code, numbers and the bibliography are in
`tools.documents.code`, `tools.documents.quantities` and `tools.documents.bibliography`.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

import autocorrect_py

from common.course.settings import ROOT
from tools import tables
from tools.documents import bibliography
from tools.documents.code import failing_code, invented_messages, literals
from tools.documents.document import Document, Finding, read
from tools.documents.markdown import (
    COMMENT,
    anchors,
    blanked,
    headings,
    links,
    prose,
    tables_of,
    without,
    without_blocks_of_code,
    without_code_in_lines,
)
from tools.documents.quantities import misquoted, unsourced
from tools.run import find_notebooks

GUIDE = ROOT / "WRITING_STYLE_GUIDE.md"
GLOSSARY = ["不用", "改用", "例外"]  # the head of its table
LEAST_CHARACTERS = 5000  # of Chinese in a theory document
MOST_LINES = 450  # of a lab's README, which is read in half an hour

LAB_SECTIONS = (
    "技術背景與動機",
    "核心原理",
    "實現原理與步驟",
    "性能表現與對比",
    "技術優勢",
    "實驗設計與實作",
    "實戰參數調優",
    "部署最佳實踐",
    "結論與學習成果",
    "技術限制與改進方向",
    "參考資料",
)
THEORY_PARTS = ("Fundamentals", "First Principles", "Body of Knowledge", "選擇", "趨勢|前沿", "結論|小結", "延伸閱讀")
SIGNPOST = "[✅❌⚠💡📊🔧🚀📚🎯]"
EMOJI = re.compile(rf"(?!{SIGNPOST})[\U0001F300-\U0001FAFF\u2600-\u27BF\u2B50\u2B55]")
UNWANTED = re.compile(r"(?<![\w.:/-])/(?:home|root|work|Users|mnt|tmp)/\w|\b(?:TODO|FIXME|XXX|TBD)\b")
HAN = re.compile(r"[\u4e00-\u9fff]")

# A full-width colon is right in our headings («Step 4：vLLM», «Step 5：4 位元»); autocorrect takes the first for
# English and the second for a time of day.
autocorrect_py.load_config("rules: {halfwidth-punctuation: 0, halfwidth-word: 0, space-dollar: 1}")


def is_lab(document: Document) -> bool:
    """Whether it is a lab's README."""
    return document.path.name == "README.md" and document.path.parent.name.startswith("Lab-")


def is_theory(document: Document) -> bool:
    """Whether it is one of the theory documents."""
    return document.path.parent.name == "theory" and bool(re.match(r"3\.\d", document.path.name))


def missing_sections(titles: list[str]) -> list[str]:
    """What a lab's README lacks of its eleven numbered sections, given its headings of level 2."""
    wanted = [f"{number}. {title}" for number, title in enumerate(LAB_SECTIONS, start=1)]
    numbered = [title for title in titles if re.match(r"\d+\. ", title)]
    lacking = [title for title in wanted if title not in numbered]
    return lacking or ([] if numbered == wanted else ["the order of the sections"])


def missing_parts(titles: list[str]) -> list[str]:
    """What a theory document lacks of its parts, in order, given its headings of levels 2 and 3."""
    lacking = []
    for part in THEORY_PARTS:
        at = next((i for i, title in enumerate(titles) if re.search(part, title)), None)
        lacking += [f"{part} (in its place)"] if at is None else []
        titles = titles[at or 0 :]
    return lacking


def structure(document: Document) -> list[Finding]:
    """A lab's README has its title and eleven sections; a theory document its title, introduction and parts."""
    found = [(heading.start, heading.level, heading.text) for heading in headings(document.text)]
    if is_lab(document):
        title_form, lacking = r"Lab 3\.\d: .+", missing_sections([title for _, level, title in found if level == 2])
    elif is_theory(document):
        title_form, lacking = r"第 3\.\d 章：.+ \(.+\)", missing_parts([t for _, level, t in found if level in (2, 3)])
        opening = document.text[: next((start for start, level, _ in found if level == 2), None)]
        lacking += [] if HAN.search(opening.partition("\n")[2]) else ["an introduction"]
    else:
        return []
    title = next((title for _, level, title in found if level == 1), "")
    lacking += [] if re.fullmatch(title_form, title) else [f"a title of the form «{title_form}»"]
    return [document.finding(0, f"structure: {each} is missing") for each in lacking]


def length(document: Document) -> list[Finding]:
    """Theory documents hold enough Chinese, code and formulas aside; a lab's README is short, its tables narrow."""
    if is_lab(document):
        lines = document.text.count("\n")
        heads = [head for head, *_ in tables_of(document.text)]
        found = [(0, f"{lines} lines, at most {MOST_LINES} wanted")] if lines > MOST_LINES else []
        found += [(h.start, f"a table of {len(h.cells)} columns") for h in heads if len(h.cells) > tables.MOST_COLUMNS]
        return [document.finding(position, f"length: {message}") for position, message in found]
    count = len(HAN.findall(prose(document.text)))
    if not is_theory(document) or count > LEAST_CHARACTERS:
        return []
    return [document.finding(0, f"length: {count} Chinese characters, more than {LEAST_CHARACTERS} wanted")]


def broken_links(document: Document) -> list[Finding]:
    """Relative links name a file, and an anchor that it has; images are not fetched from elsewhere."""
    findings = []
    for position, image, target in links(document.text):
        if re.match(r"[a-z]+:", target):
            if image:
                findings.append(document.finding(position, f"link: image from elsewhere: {target}"))
            continue
        file, _, anchor = unquote(target).partition("#")
        path = (document.path.parent / file).resolve() if file else document.path
        if not path.exists():
            findings.append(document.finding(position, f"link: there is no {file}"))
        elif anchor and (path.is_dir() or anchor not in anchors(path)):
            findings.append(document.finding(position, f"link: {file or 'this document'} has no anchor #{anchor}"))
    return findings


def glossary(guide: str) -> list[tuple[str, str, list[str]]]:
    """The guide's 不用/改用/例外 table: a term, what to write for it, words that hold it and are right.

    Raises ValueError when the guide has no such table."""
    rules = []
    for head, *rows in tables_of(guide):
        if head.cells == GLOSSARY:
            for wrong, right, exceptions in (row.cells for row in rows):
                rules += [(term, right, [e for e in exceptions.split("、") if e]) for term in wrong.split("、")]
    if not rules:
        raise ValueError(f"{GUIDE.name} has no table «| 不用 | 改用 | 例外 |».")
    return rules


def terms(document: Document, rules: list[tuple[str, str, list[str]]]) -> list[Finding]:
    """Words of the guide's table that Taiwan does not use, and simplified characters (those that Big5 lacks)."""
    text = without(without_code_in_lines(document.text), COMMENT)
    if document.path == GUIDE:
        own = [rows for rows in tables_of(document.text) if rows[0].cells == GLOSSARY]
        text = blanked(text, [(row.start, row.start + len(row.text)) for rows in own for row in rows])
    findings = []
    for wrong, right, exceptions in rules:
        for match in re.finditer(re.escape(wrong), re.sub("|".join(map(re.escape, exceptions)) or r"$^", blank, text)):
            findings.append(document.finding(match.start(), f"term: {wrong} → {right}"))
    for match in HAN.finditer(text):
        try:
            match[0].encode("big5hkscs")
        except UnicodeEncodeError:
            findings.append(document.finding(match.start(), f"term: {match[0]} is not a Traditional character"))
    return findings


def blank(match: re.Match) -> str:
    """Blanks as long as the match."""
    return " " * len(match[0])


def spacing(document: Document) -> list[Finding]:
    """Punctuation and the spaces between Chinese and Latin, as autocorrect has them."""
    without_signposts = re.sub(rf"{SIGNPOST}\ufe0f? ", "", document.text)  # a space after one is right
    lint = autocorrect_py.lint_for(without_signposts, "markdown")
    first = document.finding(0, "")
    return [Finding(first.place, each.line, f"spacing: «{each.old}» → «{each.new}»") for each in lint.lines]


def unwanted(document: Document) -> list[Finding]:
    """Paths of somebody's machine, notes to oneself, emoji beyond the nine signposts."""
    found = [*UNWANTED.finditer(without_code_in_lines(document.text)), *EMOJI.finditer(document.text)]
    return [document.finding(match.start(), f"unwanted: {match[0]}") for match in found]


def stale_regions(document: Document) -> list[Finding]:
    """Results regions show what the committed records say, name a table, and are closed."""
    text = document.text
    outside = without_blocks_of_code(text)
    opened = list(re.finditer(r"^<!-- results:([\w-]+) -->$", outside, re.M))
    closed = len(re.findall(r"^<!-- /results -->$", outside, re.M))
    if len(opened) != closed:
        return [document.finding(0, f"region: {len(opened)} results regions are opened and {closed} closed")]
    try:
        changed = tables.render([document.path], check=True)
    except KeyError as key:
        at = next((m.start() for m in opened if m[1] == key.args[0]), 0)
        return [document.finding(at, f"region: results/tables.toml has no table {key}")]
    except ValueError as error:
        return [document.finding(0, f"region: {error}")]
    return [document.finding(0, "region: results tables are out of date: make tables")] if changed else []


def check_document(document: Document, rules: list[tuple[str, str, list[str]]], code: str) -> list[Finding]:
    """All checks that look at one document or notebook cell."""
    findings = broken_links(document) + terms(document, rules) + spacing(document) + unwanted(document)
    if document.cell:
        return findings
    findings += structure(document) + length(document) + unsourced(document) + stale_regions(document)
    findings += misquoted(document)
    return findings + invented_messages(document, code) + failing_code(document)


def check(paths: Iterable[Path] = ()) -> list[Finding]:
    """Everything, or only what concerns the documents and notebooks at `paths`."""
    everything = [document for path in [*tables.documents(), *find_notebooks()] for document in read(path)]
    rules, code = glossary(GUIDE.read_text(encoding="utf-8")), literals()
    chosen = {path.resolve() for path in paths} or {document.path for document in everything}
    findings = [
        finding
        for document in everything
        if document.path in chosen
        for finding in check_document(document, rules, code)
    ]
    return findings + ([] if paths else bibliography.check(everything))


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the course's documents, or render the bibliography.")
    parser.add_argument("command", choices=["check", "render"])
    parser.add_argument("paths", nargs="*", type=Path, help="check only these documents")
    arguments = parser.parse_args()
    if arguments.command == "render":
        bibliography.write()
        return
    findings = check(arguments.paths)
    for finding in findings:
        print(finding)
    print(f"{len(findings)} findings", file=sys.stderr)
    sys.exit(1 if findings else 0)
