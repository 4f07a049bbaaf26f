"""A deck as one HTML file that asks no other host for anything: pages snap to the window, and print one a sheet.

Keys: arrows, space and page keys turn, Home and End, f for the whole screen.
"""

import html

from tools.slides.deck import Slide, rendered

STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #5b6570; --mark: #0b62a4; }
* { box-sizing: border-box; }
html { scroll-snap-type: y mandatory; }
body { margin: 0; color: var(--ink);
  font: 3vmin/1.55 "Noto Sans TC", "PingFang TC", "Microsoft JhengHei", sans-serif; }
section { height: 100vh; scroll-snap-align: start; padding: 5vmin 8vmin 7vmin; overflow: auto; position: relative;
  display: flex; flex-direction: column; }
h2 { margin: 0 0 2vmin; font-size: 1.5em; color: var(--mark); border-bottom: 2px solid; }
h2 p { margin: 0; }
section.title { justify-content: center; background: #f1f6fa; }
section.title h2 { font-size: 2.1em; }
section.question { border-left: 1.2vmin solid var(--mark); }
section > div { flex: 1; min-height: 0; }
img { display: block; margin: 0 auto 1.5vmin; max-width: 100%; max-height: 62vh; }
table { border-collapse: collapse; margin: 1vmin 0; font-size: .8em; }
th, td { border-bottom: 1px solid #ccd3da; padding: .3em .8em; text-align: right; }
th:first-child, td:first-child { text-align: left; }
pre { font-size: .72em; line-height: 1.35; white-space: pre-wrap; overflow-wrap: anywhere;
  background: #f5f6f7; padding: 1vmin; }
footer { position: absolute; right: 3vmin; bottom: 2vmin; color: var(--soft); font-size: .65em; }
@page { size: 297mm 167mm; margin: 0; }
@media print { section { break-after: page; height: 167mm; } body { font-size: 5mm; } }
"""
SCRIPT = """
const pages = [...document.querySelectorAll("section")];
const at = () => pages.findIndex((page) => page.getBoundingClientRect().bottom > innerHeight / 2);
const go = (i) => pages[Math.max(0, Math.min(pages.length - 1, i))].scrollIntoView();
const steps = { ArrowRight: 1, ArrowDown: 1, PageDown: 1, " ": 1, ArrowLeft: -1, ArrowUp: -1, PageUp: -1 };
const fit = () => { // what is too much for a page is shown smaller, on paper too
  for (const page of pages)
    for (let zoom = 1; zoom > 0.4 && (zoom === 1 || page.scrollHeight > page.clientHeight + 1); zoom -= 0.05)
      page.children[1].style.zoom = zoom;
};
addEventListener("load", fit);
addEventListener("resize", fit);
matchMedia("print").addEventListener("change", fit);
addEventListener("keydown", (event) => {
  if (event.key in steps) go(at() + steps[event.key]);
  else if (event.key === "Home") go(0);
  else if (event.key === "End") go(pages.length - 1);
  else if (event.key === "f" && document.fullscreenElement) document.exitFullscreen();
  else if (event.key === "f") document.documentElement.requestFullscreen();
  else return;
  event.preventDefault();
});
"""


def page(title: str, slides: list[Slide]) -> str:
    """The HTML file of a deck."""
    sections = "\n".join(
        f'<section id="s{number}" class="{slide.kind}"><h2>{rendered(slide.title)}</h2>\n<div>{slide.body}</div>\n'
        f"<footer>{html.escape(title)} · {number} / {len(slides)}</footer></section>"
        for number, slide in enumerate(slides, start=1)
    )
    return f"""<!DOCTYPE html>
<html lang="zh-Hant-TW">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>{STYLE}</style></head>
<body>
{sections}
<script>{SCRIPT}</script>
</body>
</html>
"""
