"""References with the way back: below each entry of references.md, the pages that cite it."""

import re

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform

REFERENCES = "03-Model_Compression/theory/references"
KEY = re.compile(r'<a id="([\w-]+)">')


class Citations(SphinxTransform):
    """Remembers which keys a page cites."""

    default_priority = 865

    def apply(self, **kwargs) -> None:
        links = self.document.findall(addnodes.pending_xref)
        keys = {link["reftargetid"] for link in links if link["reftarget"] == REFERENCES and link.get("reftargetid")}
        if keys:
            self.env.book_links.setdefault(self.env.docname, {})["cites"] = keys


class CitedBy(SphinxPostTransform):
    default_priority = 20

    def run(self, **kwargs) -> None:
        if self.env.docname != REFERENCES:
            return
        for item in self.document.findall(nodes.list_item):
            raw = next((n for n in item.findall(nodes.raw) if KEY.search(n.astext())), None)
            if raw is None:
                continue
            key = KEY.search(raw.astext())[1]
            citing = [name for name, found in sorted(self.env.book_links.items()) if key in found.get("cites", ())]
            line = nodes.inline("", " 引用於：" if citing else "", classes=["cited-by"])
            for number, name in enumerate(citing):
                uri = self.app.builder.get_relative_uri(REFERENCES, name)
                line += [nodes.Text("、")] if number else []
                line += nodes.reference("", self.env.titles[name].astext(), refuri=uri, internal=True)
            item[0] += line
