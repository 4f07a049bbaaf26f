"""The English pages: they say what the Chinese ones say, with the same figures, and cannot lag behind."""

import json
import re
from pathlib import Path

import pytest

from common.course.settings import ROOT
from tools import tables
from tools.documents.markdown import headings
from tools.notebooks import find_notebooks
from tools.wording import CHINESE, ENGLISH, wording

pytest.importorskip("docutils", reason="of the book's packages: requirements-book.txt")
from tools.book.english import HOME, LAB

PAGES = sorted([*ROOT.glob("README.en.md"), *ROOT.glob("03-Model_Compression/*/README.en.md")])
LABS = [page for page in PAGES if page.parent != ROOT]
FENCE = re.compile(r"```.*?```", re.S)
BILINGUAL = re.compile(r"\([A-Za-z\d][^()]*(?:\([^()]*\)[^()]*)*\)(?: · [^·()]+)*\s*$")


def chinese_of(page: Path) -> Path:
    return page.with_name("README.md")


def section(page: Path, title: str) -> str:
    """The text under a heading, to the next one of its level or above; "" where there is none."""
    text = page.read_text(encoding="utf-8")
    found = headings(text)
    at = next((i for i, heading in enumerate(found) if heading.text == title), None)
    if at is None:
        return ""
    end = next((h.start for h in found[at + 1 :] if h.level <= found[at].level), len(text))
    return text[found[at].start : end].partition("\n")[2]


def figures(text: str) -> list[str]:
    """The numbers that a text says, the places of its links and what is rendered left out."""
    text = re.sub(r"\]\([^()\s]*(?:\([^()]*\))?[^()\s]*\)", "]", tables.REGION.sub("", text))
    return sorted(re.findall(r"\d+(?:\.\d+)?", text))


def linked(text: str) -> list[str]:
    """Where the rows of a text's tables lead."""
    rows = "\n".join(line for line in tables.REGION.sub("", text).splitlines() if line.startswith("|"))
    return re.findall(r"\]\(([^)]+)\)", rows)


def same(lab: Path) -> list[tuple[str, str]]:
    """Headings of a lab's Chinese page and of its English one whose sections say the same."""
    return [pair for pair in LAB.items() if re.match(r"4\.\d|9\.", pair[0]) and section(chinese_of(lab), pair[0])]


def test_home_and_every_lab_have_an_english_page():
    assert len(LABS) == len(list(ROOT.glob("03-Model_Compression/Lab-*"))) == 3
    assert len(PAGES) == 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_sections_that_the_switch_leads_to_exist(page):
    pairs = LAB if page in LABS else HOME
    here = {heading.text for heading in headings(page.read_text(encoding="utf-8"))}
    there = {heading.text for heading in headings(chinese_of(page).read_text(encoding="utf-8"))}
    common = [pair for pair in pairs.items() if pair[0] in there]
    assert {english for _, english in common} <= here
    assert here & set(pairs.values()) == {english for _, english in common}, "an English section without its Chinese"


@pytest.mark.parametrize("page", LABS, ids=lambda page: page.parent.name)
def test_results_and_aims_say_the_same_figures_tables_and_links(page):
    pairs = same(page)
    assert {english for _, english in pairs} >= {"Results", "What you will learn"}
    for chinese, english in pairs:
        there, here = section(chinese_of(page), chinese), section(page, english)
        assert figures(here) == figures(there), english
        assert linked(here) == linked(there), english
        assert [m[2] for m in tables.REGION.finditer(here)] == [m[2] for m in tables.REGION.finditer(there)]
        assert here.count("![") == there.count("![")


def test_the_two_homes_show_the_same_tables():
    named = [
        {m[2] for m in tables.REGION.finditer((ROOT / name).read_text())} for name in ("README.md", "README.en.md")
    ]
    assert named[0] == named[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_an_english_page_holds_no_chinese_but_places_and_the_name_of_the_language(page):
    text = re.sub(r"\]\([^)]*(?:\([^)]*\))?[^)]*\)", "]", page.read_text(encoding="utf-8"))
    assert set(re.findall(r"[\u3400-\u9fff，。；：（）、]+", text)) == {"繁體中文"}


def test_every_heading_of_a_notebook_has_its_english():
    lacking = []
    for notebook in [*find_notebooks(), *ROOT.glob("03-Model_Compression/*/Exercises.ipynb")]:
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
            source = FENCE.sub("", "".join(cell["source"])) if cell["cell_type"] == "markdown" else ""
            titles = re.findall(r"^#{1,4} (.*)$", source, re.M)
            lacking += [
                f"{notebook.stem}: {title}"
                for title in titles
                if re.search(r"[\u3400-\u9fff]", title) and not BILINGUAL.search(title)
            ]
    assert lacking == []


def test_a_figure_that_only_one_language_has_is_noticed():
    assert figures("快 2.35 倍（[紀錄](M.md#7b)）") == figures("2.35 times ([record](N.md#8))") == ["2.35"]
    assert figures("快 2.35 倍") != figures("2.53 times")
    assert linked("| a | [b](c.md#d) |\n[e](f)") == ["c.md#d"]


def test_a_label_without_english_is_refused_by_name():
    assert CHINESE.of("模型") == "模型" and ENGLISH.of("模型") == "Model"
    assert ENGLISH.of("{:,.0f}（{ratio:.3f}×）") == "{:,.0f} ({ratio:.3f}×)"
    with pytest.raises(ValueError, match=r"results/english\.toml has no English for «沒有的詞»"):
        ENGLISH.of("沒有的詞")
    assert wording(Path("README.en.md")) is ENGLISH and wording(Path("README.md")) is CHINESE
