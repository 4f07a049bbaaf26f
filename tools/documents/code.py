"""What documents say of code: their Python blocks run, and the messages of their 故障 tables are the code's own."""

import ast
import contextlib
import io
import json
import re
import traceback
from collections.abc import Iterator

from common.course.settings import ROOT
from tools.documents.document import Document, Finding
from tools.documents.markdown import codes, python_blocks, sections, tables_of
from tools.run import find_notebooks

MARGIN = " '\".,:;()"
VALUE = re.compile(r"…|'[^']*'|\([^)]*\)|Lab-[\w./-]+|[\d.,]*\d")  # what a message fills in


def failing_code(document: Document) -> list[Finding]:
    """Runs a document's Python blocks, in order in one namespace, fragments aside; finds the first that raises."""
    namespace = {"__name__": "document"}
    for position, code, fragment in python_blocks(document.text):
        line = document.text.count("\n", 0, position)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                exec("" if fragment else compile("\n" * line + code, document.name, "exec"), namespace)
        except Exception as error:
            frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == document.name]
            at = frames[-1] if frames else getattr(error, "lineno", None) or line + 1
            return [Finding(document.name, at, f"code: {type(error).__name__}: {error}")]
    return []


def sources() -> Iterator[str]:
    """The Python that students run: the packages' files and the notebooks' code cells."""
    for folder in ("common", "tools", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            yield path.read_text(encoding="utf-8")
    for notebook in find_notebooks():
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                yield "".join(cell["source"])


def literals() -> str:
    """All strings of that code, the parts of f-strings apart, and the Makefile."""
    found = [(ROOT / "Makefile").read_text(encoding="utf-8")]
    for source in sources():
        with contextlib.suppress(SyntaxError):  # cells with magics
            nodes = ast.walk(ast.parse(source))
            found += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join(found)


def fixed_parts(message: str, code: str) -> list[str]:
    """What of a message does not vary: what lies between `…`, and, where that is no literal, between example values."""
    pieces = message.split("…")
    parts = [part for piece in pieces for part in ([piece] if piece.strip(MARGIN) in code else VALUE.split(piece))]
    return [part.strip(MARGIN) for part in parts if re.search(r"[A-Za-z]{3}", part)]


def invented_messages(document: Document, code: str) -> list[Finding]:
    """Rows of 故障 tables whose message no code prints.

    What a message fills in is `…` or an example value; a message of another package says so: «（bitsandbytes 的訊息）».
    """
    findings = []
    for start, section in sections(document.text, "故障"):
        for row in (row for rows in tables_of(section) for row in rows):
            for message in [] if "的訊息）" in row.cells[0] else codes(row.cells[0]):
                if any(part not in code for part in fixed_parts(message, code)):
                    findings.append(document.finding(start + row.start, f"message: no code says «{message}»"))
    return findings
