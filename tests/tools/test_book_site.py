"""The built book in a real Chromium, opened from a folder: pages, search, links, widgets."""

import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt

from tests.book_tools import open_page, require_sphinx

require_sphinx()

from tools import tables
from tools.book.links import SOURCE

pytestmark = pytest.mark.slow
LAB = "03-Model_Compression/Lab-3.1-Quantization"


def _kind(file: Path) -> tuple[frozenset[str], frozenset[str]]:
    """What a page is made of: its elements, and the names of the files that it loads."""
    text = re.sub(r"<script>.*?</script>", "", file.read_text(encoding="utf-8"), flags=re.S)
    loaded = re.findall(r'<(?:script|img|link|iframe)\b[^<>]*?\s(?:src|href)="([^"]*)"', text)
    return frozenset(re.findall(r"<([a-z][\w-]*)", text)), frozenset(target.rpartition("/")[2] for target in loaded)


def to_open(site: Path) -> list[Path]:
    """Every page; of those that show a file of code or records, the longest of each kind: the rest differ in text."""
    shown = sorted((site / SOURCE).rglob("*.html"), key=lambda file: file.stat().st_size)
    longest = {_kind(file): file for file in shown}
    return sorted({*site.rglob("*.html")} - {*shown} | {*longest.values()})


def test_every_page_opens_from_a_folder_on_a_phone_without_a_request_elsewhere_or_an_error(site, page):
    page.set_viewport_size({"width": 360, "height": 740})
    pages = to_open(site)
    assert len(pages) > 50
    assert any(SOURCE in file.relative_to(site).parts for file in pages)
    faults = {}
    for file in pages:
        page.complaints.clear()
        open_page(page, file)
        wrong = page.evaluate("""() => [
            ...[...document.images].filter((i) => !i.naturalWidth).map((i) => `no picture: ${i.src}`),
            ...[...document.images].filter((i) => !i.hasAttribute("alt")).map((i) => `no alternative: ${i.src}`),
            ...[...document.querySelectorAll("mjx-merror, [data-mjx-error]")].map((e) => `formula: ${e.textContent}`),
            ...(document.documentElement.scrollWidth > innerWidth ? ["wider than a phone"] : []),
            ...(document.querySelectorAll("h1").length === 1 ? [] : ["not one first heading"]),
        ]""")
        if page.complaints or wrong:
            faults[file.relative_to(site).as_posix()] = [*page.complaints, *wrong]
    assert faults == {}


def test_a_request_elsewhere_and_an_error_are_noticed(page, tmp_path):
    text = "<h1>x</h1><img src='https://example.invalid/x.png' alt=''><script>throw new Error('broken')</script>"
    (tmp_path / "a.html").write_text(text, encoding="utf-8")
    open_page(page, tmp_path / "a.html")
    assert any("asked elsewhere: https://example.invalid/x.png" in said for said in page.complaints)
    assert any("broken" in said for said in page.complaints)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("零點", ["03-Model_Compression/theory/3.1-Quantization.html"]),
        ("gptq_model", ["03-Model_Compression/Lab-3.1-Quantization/README.html"]),
        ("縮放因子", ["03-Model_Compression/theory/3.1-Quantization.html"]),
    ],
)
def test_search_finds_chinese_words_and_names_in_code(site, page, question, expected):
    open_page(page, site / "search.html", f"?q={question}")
    page.wait_for_function("document.querySelector('#search-results .search-summary')?.textContent.startsWith('找到')")
    found = page.eval_on_selector_all("#search-results li a", "links => links.map((a) => decodeURIComponent(a.href))")
    here = [re.sub(r"[?#].*", "", link).removeprefix(site.as_uri() + "/") for link in found]
    assert set(expected) <= set(here)
    for name in {link for link in here if link.endswith(".html")}:
        assert question in re.sub(r"<[^>]+>|\s", "", (site / name).read_text(encoding="utf-8")), name
    assert page.complaints == []


def test_what_is_nowhere_is_not_found(site, page):
    open_page(page, site / "search.html", "?q=龘龘")
    page.wait_for_function("document.querySelector('#search-results .search-summary')?.textContent")
    assert page.locator("#search-results li").count() == 0


@cache
def _page(file: Path) -> tuple[frozenset[str], tuple[str, ...]]:
    """Ids, and targets of links, of a page."""
    text = re.sub(r"<script\b.*?</script>", "", file.read_text(encoding="utf-8"), flags=re.S)
    ids = frozenset(re.findall(r'<[a-z][^<>]*?\s(?:id|name)="([^"]+)"', text))
    return ids, tuple(re.findall(r'<[a-z][^<>]*?\s(?:href|src)="([^"]*)"', text))


def dead_links(site: Path) -> list[str]:
    faults = []
    for file in sorted(site.rglob("*.html")):
        for target in sorted(set(_page(file)[1])):
            if re.match(r"(?:https?|mailto|data):", target):
                continue
            name, _, place = unquote(target.replace("&amp;", "&")).partition("#")
            to = (file.parent / name.partition("?")[0]).resolve() if name else file
            if not to.exists():
                faults.append(f"{file.relative_to(site)}: there is no {target}")
            elif place and to.suffix == ".html" and place not in _page(to)[0]:
                faults.append(f"{file.relative_to(site)}: no such place: {target}")
    return faults


def test_no_link_is_dead(site):
    assert dead_links(site) == []


def test_a_dead_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#there">x</a> <a href="c.html">y</a>', encoding="utf-8")
    (tmp_path / "b.html").write_text('<h1 id="here">x</h1>', encoding="utf-8")
    assert dead_links(tmp_path) == ["a.html: no such place: b.html#there", "a.html: there is no c.html"]


def test_a_table_is_sorted_by_a_click(site, page):
    open_page(page, site / "03-Model_Compression/README.html")
    table = page.locator("table:has(th:has-text('時間，秒'))").first
    shown = lambda: [float(t) for t in table.locator("tbody tr td:nth-child(2)").all_inner_texts()]  # noqa: E731
    table.locator("th:nth-child(2) button.sort").click()
    assert shown() == sorted(shown())
    table.locator("th:nth-child(2) button.sort").click()
    assert shown() == sorted(shown(), reverse=True)


def test_a_table_of_several_devices_shows_one_at_a_time(site, page, tmp_path):
    """Which committed table has two devices changes with every recording: this one is rendered of planted records."""
    devices = ("AMD EPYC CPU, 2 cores", "NVIDIA H200")
    record = {"lab": "lab", "notebook": "01", "key": "bytes", "spread": None, "protocol": {}, "model": "embedded"}
    record |= {"profile": "gpu", "versions": {}, "date": "2026-11-30"}
    records = [record | {"artifact": "gptq", "device": device, "value": i} for i, device in enumerate(devices)]
    spec = {"title": "x", "lab": "lab", "head": "x", "rows": {"gptq": "GPTQ"}}
    spec["columns"] = {"bytes": {"title": "位元組", "format": "{:.0f}"}}
    table = MarkdownIt("commonmark").enable("table").render(tables.render_table(spec, records))
    script = f'<script src="{(site / "_static/tables.js").as_uri()}"></script>'
    (tmp_path / "a.html").write_text(f"<meta charset=utf-8>{script}<article>{table}</article>", encoding="utf-8")
    open_page(page, tmp_path / "a.html")
    heads = page.locator("th:visible")
    assert heads.all_inner_texts() == ["x", *(f"位元組（{device}）" for device in devices)]
    for device in devices:
        page.locator(".devices button", has_text=device).click()
        assert heads.all_inner_texts() == ["x", f"位元組（{device}）"]
        assert page.locator("td:visible").all_inner_texts() == ["GPTQ", str(devices.index(device))]
    page.locator(".devices button", has_text="全部裝置").click()
    assert heads.count() == 3
    assert page.complaints == []


def test_the_english_door_keeps_the_place(site, page):
    page.set_viewport_size({"width": 1280, "height": 800})  # where the sidebar is in sight
    open_page(page, site / "README.html", "#" + "主要結果")
    page.wait_for_timeout(200)
    page.locator("a.language").click()
    page.wait_for_url("**/README.en.html#what-it-measured")
    open_page(page, site / LAB / "README.html", "#42-本課程的實測結果")
    page.wait_for_timeout(200)
    page.locator("a.language").click()
    page.wait_for_url("**/README.en.html#results")
    assert page.locator("article [lang=en]").count() == 1
    page.wait_for_timeout(200)
    page.locator("a.language").click()
    page.wait_for_function("decodeURIComponent(location.hash) === '#42-本課程的實測結果'")


def test_headings_are_shown_in_english_everywhere_once_asked_for(site, page):
    page.set_viewport_size({"width": 1280, "height": 800})
    open_page(page, site / LAB / "02-Quantize.html")
    page.locator("button.language").click()
    titles = page.locator("article h1, article h2").all_inner_texts()
    assert any("Step 2: Round-to-nearest, RTN" in title for title in titles), titles
    open_page(page, site / LAB / "Exercises.html")
    assert any("1: A grid for one group · 5 points · 5 min" in t for t in page.locator("article h2").all_inner_texts())
