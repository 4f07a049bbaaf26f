"""Links among the repository's files become links of the book.

To a document: its page, the anchor found by GitHub's rule and by Jupyter's alike. To a file of code or of figures, or a
folder: a page that shows it, made by `tools.book.sources`.
"""

import os
import re
from pathlib import Path
from urllib.parse import unquote

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform

from common.course.settings import ROOT

SOURCE = "source"  # the folder of the pages that show files


def slug(title: str) -> str:
    """GitHub's anchor of a heading, or of Jupyter's anchor: lower case, punctuation gone, blanks to hyphens."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def anchor(target: str) -> str:
    """What a link names within a document: the slug of a heading, however it is written."""
    return slug(unquote(target))


def source_page(path: Path) -> str:
    """The page, without .html, that shows a file or a folder of the repository."""
    name = path.relative_to(ROOT).as_posix()
    return f"{SOURCE}/{name}/index" if path.is_dir() else f"{SOURCE}/{name}"


def _place(docname: str, target: str) -> Path:
    return Path(os.path.normpath(ROOT / Path(docname).parent / unquote(target)))


class WithinTheBook(SphinxTransform):
    """Before links are resolved: anchors to GitHub's rule, files and folders to the pages that show them."""

    default_priority = 870  # before MyST resolves `#anchor`, before Sphinx copies what is to be downloaded

    def apply(self, **kwargs) -> None:
        slugs = getattr(self.document, "myst_slugs", {})
        for link in self.document.findall(nodes.reference):
            if link.get("id_link") and anchor(link["refuri"][1:]) in slugs:
                link["refuri"] = f"#{anchor(link['refuri'][1:])}"
        for link in [*self.document.findall(addnodes.download_reference)]:
            self._to_source(link, link["reftarget"])
        for link in [*self.document.findall(addnodes.pending_xref)]:
            if link["reftype"] == "myst" and link["refdomain"] is None:
                self._to_source(link, link["reftarget"])

    def _to_source(self, link: nodes.Element, target: str) -> None:
        file, _, line = target.partition("#")
        path = _place(self.env.docname, file)
        if not path.exists() or not path.is_relative_to(ROOT):
            return
        readme = path / "README.md"
        if readme.is_file():
            docname = readme.relative_to(ROOT).with_suffix("").as_posix()
        else:
            docname = source_page(path)
            self.env.book_links.setdefault(self.env.docname, {}).setdefault("sources", set()).add(path)
        uri = self.app.builder.get_relative_uri(self.env.docname, docname)
        place = f"#{line.replace('L', 'L-')}" if line else ""
        reference = nodes.reference("", "", *link.children, refuri=uri + place, internal=True, classes=["source"])
        link.replace_self(reference)


class Anchors(SphinxPostTransform):
    """Links to a section of another page: Jupyter's way to write it becomes GitHub's."""

    default_priority = 5  # before MyST's resolver

    def run(self, **kwargs) -> None:
        for link in self.document.findall(addnodes.pending_xref):
            if link["reftype"] == "myst" and link.get("reftargetid"):
                slugs = self.env.metadata[link["reftarget"]].get("myst_slugs", {})
                wanted = anchor(link["reftargetid"])
                if wanted in slugs:
                    link["reftargetid"] = wanted
