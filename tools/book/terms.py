"""The glossary: the style guide's table as a page, hover texts where a page first uses a term, and index entries."""

import re
from functools import cache

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

from common.course.settings import ROOT
from tools.book.english import is_english
from tools.documents.markdown import slug, tables_of

GUIDE = ROOT / "WRITING_STYLE_GUIDE.md"
HEAD = ["用", "英文", "", "用", "英文"]
GLOSSARY = "book/glossary"
NOT_WITHIN = (
    nodes.title,
    nodes.reference,
    nodes.literal,
    nodes.literal_block,
    nodes.raw,
    nodes.math,
    nodes.math_block,
    addnodes.pending_xref,
)


def _pairs(chinese: str, english: str) -> list[tuple[str, str]]:
    """The single terms of one entry: 縮放因子、零點 / scale, zero point. 對稱／非對稱量化 / symmetric / asymmetric."""
    terms = re.split(r"[、／]", chinese)
    meanings = re.split(r"\s*/\s*|,\s*", english)
    if len(terms) != len(meanings):
        return [(chinese, english)]
    if len(last := meanings[-1].split()) == 2 and "/" in english:  # soft / hard labels
        meanings = [word if " " in word else f"{word} {last[-1]}" for word in meanings]
    ending = re.search(r"(量化|標籤|誤差|模型|結構化)$", terms[-1])
    end = ending[0] if ending and "／" in chinese else ""
    whole = [term if term.endswith(end) or not end else term + end for term in terms]
    return list(zip(whole, meanings, strict=True))


@cache
def glossary() -> dict[str, str]:
    """Term → English, from the style guide's table. Raises ValueError where the guide has no such table."""
    table = next((t for t in tables_of(GUIDE.read_text(encoding="utf-8")) if t[0].cells == HEAD), None)
    if not table:
        raise ValueError(f"{GUIDE.name} has no table «| {' | '.join(HEAD)} |».")
    found = {}
    for row in table[1:]:
        for chinese, english in (row.cells[:2], row.cells[3:]):
            found.update(_pairs(chinese, english) if chinese else [])
    return found


def anchor(term: str) -> str:
    return f"term-{slug(term)}"


class GlossaryList(Directive):
    """`{glossary-list}`: every term with its English."""

    def run(self) -> list[nodes.Node]:
        items = nodes.definition_list(classes=["glossary"])
        for term, english in sorted(glossary().items(), key=lambda pair: pair[1].lower()):
            name = nodes.term("", term, ids=[anchor(term)])
            items += nodes.definition_list_item("", name, nodes.definition("", nodes.paragraph("", english)))
        return [items]


class FirstUse(SphinxTransform):
    """Where a page first uses a term: a link to the glossary with the English to hover over, and an index entry."""

    default_priority = 840  # before Sphinx collects the index entries (850)

    def apply(self, **kwargs) -> None:
        here = self.env.docname
        if here == GLOSSARY or is_english(here):
            return
        unseen = dict(glossary())
        pattern = re.compile("|".join(map(re.escape, sorted(unseen, key=len, reverse=True))))
        home = self.app.builder.get_relative_uri(here, GLOSSARY)
        for text in [*self.document.findall(nodes.Text)]:
            if any(isinstance(above, NOT_WITHIN) for above in _above(text)):
                continue
            parts, end = [], 0
            for match in pattern.finditer(text):
                if not (english := unseen.pop(match[0], "")):
                    continue
                parts += [nodes.Text(text[end : match.start()]), *self._link(match[0], english, home)]
                end = match.end()
            if parts:
                text.parent.replace(
                    text,
                    [
                        part
                        for part in (*parts, nodes.Text(text[end:]))
                        if part.astext() or part.children or isinstance(part, addnodes.index)
                    ],
                )

    def _link(self, term: str, english: str, home: str) -> list[nodes.Node]:
        place = f"index-{slug(term)}"
        link = nodes.reference(
            "", term, refuri=f"{home}#{anchor(term)}", internal=True, reftitle=english, classes=["term"], ids=[place]
        )
        entries = [
            ("single", f"{term} ({english})", place, "", None),
            ("single", f"{english}; {term}", place, "", None),
        ]
        return [addnodes.index(entries=entries), link]


def _above(node: nodes.Node):
    while (node := node.parent) is not None:
        yield node
