"""The English door: the two first pages, and which of their sections say the same."""

import json

from tools.book.links import slug

SECTIONS = {  # 中文 → English; the first of several is where English leads back to
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


def pages() -> dict[str, dict[str, str]]:
    """For the template: of either page, where its switch leads."""
    there = {slug(chinese): slug(english) for chinese, english in SECTIONS.items()}
    back = {slug(english): slug(chinese) for chinese, english in reversed(SECTIONS.items())}
    return {
        "README": {
            "page": "README.en",
            "name": "English",
            "lang": "en",
            "sections": json.dumps(there, ensure_ascii=False),
        },
        "README.en": {
            "page": "README",
            "name": "繁體中文",
            "lang": "zh-Hant-TW",
            "sections": json.dumps(back, ensure_ascii=False),
        },
    }
