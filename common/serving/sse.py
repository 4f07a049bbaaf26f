"""Server-sent events (WHATWG HTML, 9.2): how answers are streamed, and how those of a model server are read."""

import json
import re
from collections.abc import AsyncIterator

LINE_END = re.compile(rb"\r\n|\n|\r")


def event(content: dict) -> str:
    """One event. JSON in ASCII: many readers end a line at U+2028 or U+0085, too, which an answer may hold."""
    return f"data: {json.dumps(content)}\n\n"


async def read_events(chunks: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The data of the events in a body, however it is cut. Raises ValueError for what is not UTF-8."""
    data: list[str] = []
    async for line in _lines(chunks):
        if not line and data:
            yield "\n".join(data)
            data = []
        name, _, value = line.decode().partition(":")
        if name == "data":
            data.append(value.removeprefix(" "))


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The lines that are complete: of the standard's three ends, \\r\\n may be cut in two."""
    rest = b""
    async for chunk in chunks:
        rest += chunk
        held = b"\r" if rest.endswith(b"\r") else b""
        *lines, rest = LINE_END.split(rest.removesuffix(held))
        rest += held
        for line in lines:
            yield line
    if rest.endswith(b"\r"):
        yield rest.removesuffix(b"\r")
