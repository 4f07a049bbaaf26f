"""The families of decoders that each step of the course takes, as the tests recorded them in results/families.json."""

import json

from common.course.settings import ROOT

FILE = ROOT / "results" / "families.json"
RIGHT = "right"


def table() -> str:
    """A Markdown table: for each step the families that are refused by name; with the others it was right."""
    recorded: dict[str, dict[str, str]] = json.loads(FILE.read_text(encoding="utf-8"))
    refused: dict[tuple[str, ...], list[str]] = {}
    for step in next(iter(recorded.values())):
        names = tuple(sorted(family for family, steps in recorded.items() if steps[step] != RIGHT))
        refused.setdefault(names, []).append(step)
    lines = ["| 步驟 | 對的家族 | 以一句話拒絕的家族 |", "| --- | ---: | --- |"]
    for names, steps in sorted(refused.items(), key=lambda item: len(item[0])):
        lines.append(f"| {'、'.join(steps)} | {len(recorded) - len(names)} | {'、'.join(names) or '無'} |")
    everything = "、".join(sorted(recorded))
    source = f"試過的 {len(recorded)} 個家族（transformers 的名字）：{everything}。來源：`results/families.json`。"
    return "\n".join(lines) + f"\n\n*{source}*\n"
