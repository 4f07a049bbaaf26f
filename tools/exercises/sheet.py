"""Score sheets of a class: JSON with everything, a page to read, a table for the register."""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import jinja2

from tools.exercises.grade import Marks

PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
<html lang="zh-Hant-TW">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Lab {{ lab }} 成績單</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
td.no { color: #a00000 } td.yes { color: #00600f } .note { color: #7a4b00 } h2 { margin-top: 3rem }
summary { cursor: pointer; padding: .2rem 0 }
</style>
<h1>Lab {{ lab }} 成績單</h1>
<p>{{ "含隱藏測試" if hidden else "只有公開的測試" }}；{{ class|length }} 份。</p>
<table>
<tr><th>學生</th><th class="number">得分</th>
{% for task in class[0].tasks %}<th class="number">{{ task.name }}</th>{% endfor %}</tr>
{% for one in class %}
<tr><td><a href="#s{{ loop.index }}">{{ one.student }}</a></td>
<td class="number">{{ one.gained }} / {{ one.points }}</td>
{% for task in one.tasks %}<td class="number">{{ task.gained }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% for one in class %}
<h2 id="s{{ loop.index }}">{{ one.student }}：{{ one.gained }} / {{ one.points }}</h2>
<p>{{ one.file }}，批改 {{ "%.1f"|format(one.seconds) }} 秒</p>
{% for note in one.notes %}<p class="note">⚠️ {{ note }}</p>{% endfor %}
{% for task in one.tasks %}
<details{{ " open" if task.gained < task.points or task.notes }}>
<summary>{{ "✅" if task.gained == task.points else "❌" }} {{ task.title }}
（{{ task.gained }} / {{ task.points }}）</summary>
{% for note in task.notes %}<p class="note">⚠️ {{ note }}</p>{% endfor %}
<table>
{% for mark in task.marks %}
<tr><td class="{{ 'yes' if mark.gained else 'no' }}">{{ "✅" if mark.gained else "❌" }} {{ mark.check }}</td>
<td>{{ mark.message }}</td><td class="number">{{ mark.gained }} / {{ mark.points }}</td></tr>
{% endfor %}
</table>
</details>
{% endfor %}
{% endfor %}
</html>
"""
)


def write(folder: Path, marks: list[Marks]) -> None:
    """Write a class's sheet.json, sheet.html and sheet.csv into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = [asdict(one) | {"points": one.points, "gained": one.gained} for one in marks]
    (folder / "sheet.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    page = PAGE.render({"class": marks, "lab": marks[0].lab, "hidden": marks[0].hidden})
    (folder / "sheet.html").write_text(page, encoding="utf-8")
    with open(folder / "sheet.csv", "w", encoding="utf-8-sig", newline="") as file:  # Excel wants the mark
        table = csv.writer(file)
        table.writerow(["student", "points", "of", *(task.name for task in marks[0].tasks), "notes"])
        for one in marks:
            notes = [*one.notes, *(f"{task.name}: {note}" for task in one.tasks for note in task.notes)]
            cells = [_text(one.student), one.gained, one.points, *(task.gained for task in one.tasks)]
            table.writerow([*cells, _text(" | ".join(notes))])


def _text(value: str) -> str:
    """A cell that a spreadsheet does not take for a formula."""
    return "'" + value if value[:1] in "=+-@\t\r" and value else value
