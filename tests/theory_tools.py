"""For the tests of the theory documents: a document's text, and its Python blocks run again."""

import contextlib
import functools
import io
import re

from common.course.settings import ROOT

THEORY = ROOT / "03-Model_Compression" / "theory"
BLOCK = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)
WORKED = re.compile(r"<!-- worked -->\n(.*?)<!-- /worked -->", re.DOTALL)


def read(name: str) -> str:
    """The text of a theory document, such as "3.1-Quantization"."""
    return (THEORY / f"{name}.md").read_text(encoding="utf-8")


@functools.cache
def run_blocks(name: str) -> tuple[dict, list[tuple[str, str]]]:
    """The names that a document's blocks leave behind, and (what each prints, what the document says it prints)."""
    names, printed = {}, []
    for code, stated in BLOCK.findall(read(name)):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, name, "exec"), names)
        printed.append(("\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n", stated))
    return names, printed
