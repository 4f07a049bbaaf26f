"""Every number with a unit says where it comes from, and what the text repeats of a table stands in it: two checks.

WRITING_STYLE_GUIDE.md, section 5, states the rule for writers.
"""

import re
from collections.abc import Iterator

from tools.documents.document import Document, Finding
from tools.documents.markdown import REGION, blocks, headings, prose, sections, tables_of, without

QUANTITY = re.compile(
    r"(?<![\w.,–-])\d[\d,.]*(?:[–~]\d[\d,.]*)? ?"
    r"(?:%|倍|秒|毫秒|微秒|分鐘|小時|位元組|×(?! ?[\d$`])"
    r"|(?:ms|µs|[KMGT]i?B(?:/s)?|tok(?:en)?s?/s|nats|TFLOPS|seconds?|minutes?|hours?|times)(?![A-Za-z]))"
)
LINK = re.compile(r"\]\(|https?://")
LINK_ELSEWHERE = re.compile(r"\]\((?!#)|https?://")
OWN_TABLES = re.compile(r"\]\(#|[上下]表|^怎麼讀|^讀法")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
DECIMAL = re.compile(r"(?<![\w.,§/-])\d[\d,]*\.\d+(?![\w.]*\d)")
WORD = re.compile(
    r"來源|目標|估計|設定(?!檔)|預設|協定|假設|門檻|上限|下限|不超過|以內|"
    r"\b(?:[Ss]ources?|[Tt]argets?|[Ee]stimates?d?|[Dd]efaults?|[Aa]ssum\w+)\b"
)
HEAD_SOURCE = re.compile(r"來源|目標|估計|假設|[Ss]ource|[Tt]arget|[Ee]stimate")
CLAIM = re.compile(r"[快慢省少多高低小大降增減漲升剩佔達約用需](?:[了到至約出為掉要]|不到)* ?$")
MEMORY = re.compile(r" ?(?:以上|以下)?的? ?(?:顯示卡|GPU|卡|主記憶體|記憶體|機器|筆電|VRAM|RAM)")
DEVICE = re.compile(r"(?:(?:[A-Z]+\d+\w*|RTX \d+)[ （(]*|不到 ?)$")
SENTENCE = re.compile(r"[^。！？]+[。！？]?")
ITEM = re.compile(r" *(?:[-*+]|\d+\.) ")


def statements(text: str) -> Iterator[tuple[int, str, str]]:
    """Position, text, and what it may lean on for a source, of every paragraph, list item and table row.

    A paragraph stands alone. A list item leans on the line that opens the list; a row on the paragraph before the table
    and, where the table has a column for sources, on its cell there.
    """
    opening = ""
    for position, block in blocks(text):
        lines = block.splitlines(keepends=True)
        if rows := next(tables_of(block), []):
            for row in rows:
                given = [
                    cell for title, cell in zip(rows[0].cells, row.cells, strict=False) if HEAD_SOURCE.search(title)
                ]
                yield position + row.start, row.text, opening + ("來源" if any(given) else "")
        elif any(ITEM.match(line) for line in lines):
            first = "" if ITEM.match(lines[0]) else lines[0]
            for item in re.findall(r"[^\n]+\n?(?:(?! *(?:[-*+]|\d+\.) )[^\n]+\n?)*", block):
                yield position, item, first + (opening if opening.rstrip().endswith("：") else "")
                position += len(item)
        else:
            yield position, block, ""
        opening = block


def sentences(text: str) -> Iterator[tuple[int, str, str, str]]:
    """Position and text of every sentence, with its statement and what that may lean on for a source."""
    for start, statement, support in statements(text):
        for sentence in SENTENCE.finditer(statement):
            yield start + sentence.start(), sentence[0], statement, support


def is_name(before: str, quantity: str, after: str) -> bool:
    """Whether a quantity only names something: a card by its memory, or a setting by its round percentage (claims, when
    a word of change or use stands before them), or the outcome of a formula that stands before it."""
    if re.search(r"[=≈] *$", before):
        return True
    if CLAIM.search(before) and not DEVICE.search(before):
        return False
    if quantity.endswith(("GB", "GiB")):
        return bool(MEMORY.match(after) or DEVICE.search(before))
    return bool(re.fullmatch(r"\d*[05] ?%", quantity))


def unsourced(document: Document) -> list[Finding]:
    """Numbers with a unit, outside rendered regions, formulas and code, whose statement carries no source.

    READMEs, the labs' pages of measurements and theory documents only. Exercises give numbers and compute others
    from them; they are let be.
    """
    theory = document.path.parent.name == "theory" and document.path.name != "references.md"
    if not (theory or document.path.name.startswith(("README", "Measurements"))):
        return []
    findings, raw = [], without(document.text, REGION)
    exercises = [(start, start + len(text)) for start, text in sections(raw, "練習|習題")]
    shown_text = prose(raw)
    for start, sentence, statement, support in sentences(raw):
        exercise = any(first <= start < last for first, last in exercises)
        if exercise or LINK.search(statement + support) or WORD.search(sentence + support):
            continue
        shown = shown_text[start : start + len(sentence)]
        for match in QUANTITY.finditer(shown):
            at = start + match.start()
            if not is_name(raw[max(0, at - 12) : at], match[0], shown[match.end() :]):
                findings.append(document.finding(at, f"number: «{match[0]}» has no source"))
    return findings


def misquoted(document: Document) -> list[Finding]:
    """Decimal figures in statements about the document's own tables that no rendered region of it holds.

    A figure may be shorter than the table's: it must be what the table's rounds to. Formulas, numbers of sections, and
    sentences that name another source are let be.
    """
    raw = without(document.text, REGION)
    shown_text = prose(raw)
    held = [float(n.replace(",", "")) for region in REGION.findall(document.text) for n in NUMBER.findall(region)]
    numbered = {heading.text.split()[0] for heading in headings(document.text)}
    findings = []
    for start, sentence, statement, support in sentences(raw):
        about_tables = OWN_TABLES.search(support + statement)
        if not about_tables or LINK_ELSEWHERE.search(sentence) or WORD.search(sentence):
            continue
        for match in DECIMAL.finditer(shown_text[start : start + len(sentence)]):
            figure = match[0].replace(",", "")
            places = len(figure.split(".")[1])
            if figure not in numbered and not any(f"{value:.{places}f}" == figure for value in held):
                findings.append(document.finding(start + match.start(), f"quoted: no table has «{match[0]}»"))
    return findings
