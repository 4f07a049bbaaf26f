"""The map of the house: the rooms, what is in them, and who imports whom. Draws 03-Model_Compression/figures/map.svg.

python -m tools.map
"""

import ast
import html
from graphlib import TopologicalSorter
from pathlib import Path

from common.course.settings import CHAPTER, ROOT
from tools.provenance.tree import PACKAGES, Tree, imports

FLOORS = (  # a room may import what stands on a lower floor, never one on a higher
    ("tools", "benchmarks", "common.serving", "common.parallel"),
    ("common.engines",),
    ("common.formats",),
    ("common.methods",),
    ("common.measure",),
    ("common.course",),
)
ROOMS = {  # what each is for, as the README says it
    "tools": "執行、檢查、發布課程",
    "benchmarks": "與其他套件並排執行",
    "common.serving": "服務與負載測試",
    "common.parallel": "多張 GPU",
    "common.engines": "別人的推論引擎",
    "common.formats": "硬碟上的檔案",
    "common.methods": "課程教的方法",
    "common.measure": "品質與速度的數字",
    "common.course": "每個 notebook 的開頭",
}
FILE = CHAPTER / "figures" / "map.svg"
WIDTH, FLOOR, LETTER, LINE = 1000, 118, 7.2, 17


def room(module: str) -> str:
    """The room that a module stands in: its longest prefix among ROOMS; "" for none."""
    return max((r for r in ROOMS if f"{module}.".startswith(f"{r}.")), key=len, default="")


def modules(root: Path = ROOT) -> dict[str, set[str]]:
    """Module → the modules of ours that it imports, anywhere in it."""
    found, tree = {}, Tree(root)
    for file in sorted(f for package in PACKAGES for f in (root / package).rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for bound in imports(node, tree.module(name)).values():
                    whole = f"{bound.module}.{bound.name}"
                    target = whole if tree.module(whole) else bound.module
                    found[name] |= {target} if tree.module(target) else set()
    return found


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a room on a higher floor."""
    floor = {name: number for number, rooms in enumerate(FLOORS) for name in rooms}
    pairs = [(a, b) for a, targets in graph.items() for b in targets if room(a) and room(b)]
    return sorted(f"{a} imports {b}" for a, b in pairs if floor[room(b)] < floor[room(a)])


def check_circles(graph: dict[str, set[str]]) -> None:
    """Raises graphlib.CycleError where modules import one another in a circle."""
    TopologicalSorter({name: targets - {name} for name, targets in graph.items()}).prepare()


def draw(graph: dict[str, set[str]]) -> str:
    """The map as SVG: a floor per line, a box per room with its modules, an arrow per import between rooms."""
    boxes, parts = {}, []
    for number, rooms in enumerate(FLOORS):
        width = (WIDTH - 40 - 24 * (len(rooms) - 1)) / len(rooms)
        for place, name in enumerate(rooms):
            x, y = 20 + place * (width + 24), 20 + number * (FLOOR + 34)
            boxes[name] = (x, y, width)
            members = {m[len(name) + 1 :].split(".")[0] for m in graph if room(m) == name and m != name}
            parts.append(_box(x, y, width, name, sorted(members - {"__main__"})))
    links = sorted({(room(a), room(b)) for a, targets in graph.items() for b in targets} - {("", "")})
    arrows = [_arrow(boxes[a], boxes[b]) for a, b in links if a and b and boxes[a][1] < boxes[b][1]]
    height = 20 + len(FLOORS) * (FLOOR + 34)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">'
    marker = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    )
    marker += '<path d="M0 0L8 4L0 8z" fill="#8a97a8"/></marker></defs><rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, marker, *arrows, *parts, "</svg>"]) + "\n"


def _box(x: float, y: float, width: float, name: str, members: list[str]) -> str:
    lines, line = [], ""
    for member in members:
        if line and (len(line) + len(member) + 2) * LETTER > width - 20:
            lines, line = [*lines, line], ""
        line = f"{line}  {member}".strip()
    rows = "".join(
        f'<text x="{x + 10:.0f}" y="{y + 44 + LINE * n:.0f}" font-size="12.5" fill="#333">{html.escape(row)}</text>'
        for n, row in enumerate([*lines, line])
    )
    title = f"{name.replace('.', '/')}/　{ROOMS[name]}"
    return (
        f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{FLOOR}" rx="6" fill="#f3f6fa" stroke="#4c6a92"/>'
        f'<text x="{x + 10:.0f}" y="{y + 22}" font-size="14" font-weight="bold" fill="#1f3a5f">{title}</text>{rows}'
    )


def _arrow(upper: tuple, lower: tuple) -> str:
    """From the foot of the upper box to the head of the lower one, at the upper one's middle, beside the others."""
    shift = (upper[1] * 7 + lower[1] * 13) % 240 - 120  # arrows over several floors do not lie on one another
    x = min(max(upper[0] + upper[2] / 2 + shift, upper[0] + 12), upper[0] + upper[2] - 12)
    return (
        f'<path d="M{x:.0f} {upper[1] + FLOOR}V{lower[1]}" fill="none" stroke="#8a97a8" stroke-width="1.3" '
        'marker-end="url(#tip)"/>'
    )


def main() -> None:
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(draw(modules()), encoding="utf-8")
    print(f"drew {FILE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
