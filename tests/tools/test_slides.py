"""The decks: every step is there, what the notebooks recorded is shown, and nothing is fetched."""

import re

import nbformat
import pytest
from nbformat import v4

from tools.exercises.master import LABS
from tools.notebooks import find_notebooks
from tools.slides.__main__ import write
from tools.slides.deck import slides_of, steps
from tools.slides.page import page

FETCHED = re.compile(
    r"""<(?:link|iframe|object|embed|base)\b|\bsrc\s*=\s*["'](?!data:)|@import|url\(|\bimport\(|fetch\("""
)


@pytest.fixture
def a_notebook(tmp_path):
    """Save a notebook of cells, given as markdown or as a code cell's outputs."""

    def save(*cells):
        book = v4.new_notebook()
        for cell in cells:
            book.cells.append(v4.new_markdown_cell(cell) if isinstance(cell, str) else v4.new_code_cell(outputs=cell))
        nbformat.write(book, tmp_path / "01-Test.ipynb")
        return tmp_path / "01-Test.ipynb"

    return save


def picture(data="AAAA"):
    return v4.new_output("display_data", {"image/png": data})


@pytest.mark.parametrize("lab", LABS)
def test_every_step_of_every_notebook_has_a_slide_and_every_guess_is_asked(lab):
    for notebook in find_notebooks(lab):
        slides = slides_of(notebook)
        assert [step for step in steps(notebook) if step not in [slide.title for slide in slides]] == []
        source = "\n".join(cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "markdown")
        assert sum(slide.body.count("先猜</strong>") for slide in slides) == source.count("**先猜**")


@pytest.mark.parametrize("lab", LABS)
def test_a_deck_holds_all_recorded_pictures_and_fetches_nothing(lab, tmp_path):
    text = write(lab, tmp_path).read_text(encoding="utf-8")
    recorded = [
        output
        for notebook in find_notebooks(lab)
        for cell in nbformat.read(notebook, 4).cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert text.count('src="data:image/png') == len(recorded)
    assert FETCHED.findall(text) == []
    assert "$" not in re.sub(r"<(pre|table|script).*?</\1>", "", text, flags=re.S), "a formula was not rendered"


def test_question_comes_before_the_picture_and_meaning_after(a_notebook):
    notebook = a_notebook(
        "# A lab",
        "## Step 1：Why\n\nBecause.\n\n**先猜**：how much?",
        [picture()],
        "It is much.\n\n## Step 2：Then\n\nSo.",
    )
    kinds = [(slide.kind, slide.title) for slide in slides_of(notebook)]
    assert kinds == [("title", "Step 1：Why"), ("answer", "Step 1：Why"), ("question", "Step 2：Then")]
    asked, answered, _ = slides_of(notebook)
    assert "how much?" in asked.body and "<img" not in asked.body
    assert answered.body.index("<img") < answered.body.index("It is much.")


def test_a_guess_between_two_pictures_asks_before_the_second(a_notebook):
    notebook = a_notebook("# A\n\nFirst.", [picture("AAAA")], "Meaning.\n\n**先猜**：next?", [picture("BBBB")], "Done.")
    found = [(slide.kind, "先猜" in slide.body, "<img" in slide.body) for slide in slides_of(notebook)]
    assert found == [
        ("title", False, False),
        ("answer", False, True),
        ("question", True, False),
        ("answer", False, True),
    ]


def test_links_pictures_of_others_and_scripts_do_not_come_along(a_notebook):
    table = v4.new_output("display_data", {"text/html": "<style>@import 'x'</style><table><td>1</td></table>"})
    notebook = a_notebook("# A\n\n[text](https://example.com) ![](https://example.com/a.png)", [table])
    text = page("A", slides_of(notebook))
    assert "text" in text and "<table>" in text
    assert "example.com" not in text and FETCHED.findall(text) == []


def test_formulas_are_math_and_titles_are_escaped(a_notebook):
    text = page("A", slides_of(a_notebook("# A < B\n\nLet $x_i$ be\n\n$$y=\\tfrac12$$")))
    assert text.count("<math") == 2 and "A &lt; B" in text
