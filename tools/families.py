"""The families of decoders that each step of the course takes, as the tests recorded them in results/families.json."""

import json

from common.course.settings import ROOT

FILE = ROOT / "results" / "families.json"
RIGHT = "right"


def table() -> str:
    """A Markdown table: in a row the families that the same steps refuse by name; all other steps are right."""
    recorded: dict[str, dict[str, str]] = json.loads(FILE.read_text(encoding="utf-8"))
    steps, alike = list(next(iter(recorded.values()))), {}
    for family, outcomes in sorted(recorded.items()):
        refused = tuple(step for step in steps if outcomes[step] != RIGHT)
        alike.setdefault(refused, []).append(family)
    lines = ["| 以一句話拒絕的步驟 | 家族數 | 家族（transformers 的名字） |", "| --- | ---: | --- |"]
    for refused, families in sorted(alike.items(), key=lambda item: (len(item[0]), -len(item[1]), item[0])):
        lines.append(f"| {'、'.join(refused) or '沒有'} | {len(families)} | {'、'.join(families)} |")
    source = f"{len(recorded)} 個家族，每個 {len(steps)} 個步驟：{'、'.join(steps)}。來源：`results/families.json`。"
    return "\n".join(lines) + f"\n\n*{source}*\n"
