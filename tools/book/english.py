"""The English door: pages that have one in English, and which of their sections say the same."""

import json

from common.course.settings import ROOT
from tools.book.links import slug

ENDING = "README.en"
HOME = {  # 中文 → English; the first of several is where English leads back to
    "這是給誰的": "What it is",
    "快速開始": "Run it",
    "要花多久、佔多少空間": "Run it",
    "設定檔 (profiles)": "Run it",
    "模型": "Run it",
    "主要結果": "What it measured",
    "數字從哪裡來": "How to judge it",
    "版本": "Limits",
    "授權與出處": "Licences",
}
LAB = {
    "概述": "Overview",
    "4.2 本課程的實測結果": "Results",
    "4. 性能表現與對比": "Results",
    "4.3 7B 形狀：4 位元快多少、壓縮要多久": "At 7B's shape",
    "9. 結論與學習成果": "What you will learn",
}


def is_english(page: str) -> bool:
    return page.endswith(ENDING)


def chinese(page: str) -> str:
    """The page of which this one is the English."""
    return page.removesuffix(".en")


def sections(page: str) -> dict[str, str]:
    """中文 → English: headings of a page that say the same; `page` is either of the two."""
    return LAB if "/Lab-" in page else HOME


def pages() -> dict[str, dict[str, str]]:
    """For the template: of each page that has another language, where its switch leads."""
    found = {}
    for file in [*ROOT.glob(f"{ENDING}.md"), *sorted(ROOT.glob(f"*/Lab-*/{ENDING}.md"))]:
        page = file.relative_to(ROOT).as_posix().removesuffix(".md")
        pairs = [(slug(there), slug(here)) for there, here in sections(page).items()]
        back = {english: there for there, english in reversed(pairs)}
        found[chinese(page)] = _switch(page, "English", "en", dict(pairs))
        found[page] = _switch(chinese(page), "繁體中文", "zh-Hant-TW", back)
    return found


def _switch(page: str, name: str, lang: str, places: dict[str, str]) -> dict[str, str]:
    return {"page": page, "name": name, "lang": lang, "sections": json.dumps(places, ensure_ascii=False)}
