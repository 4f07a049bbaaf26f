"""The book's own code: what is in it, links, search terms, glossary, origins, the set-up cell."""

import re
import subprocess
from pathlib import Path

import pytest

from common.course.settings import CHAPTER, ROOT
from tests.book_tools import require_sphinx

require_sphinx()

from tools.book import contents, launch, links, origins, search, terms

LAB = CHAPTER / "Lab-3.1-Quantization"


def test_every_document_and_notebook_is_in_the_book_and_hangs_in_its_tree():
    lines = subprocess.run(
        ["git", "ls-files", "-z", "*.md", "*.ipynb"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    if not lines:
        pytest.skip("this is no checkout")
    wanted = {str(Path(name).with_suffix("")) for name in lines.split("\0") if name}
    assert wanted <= set(contents.documents())
    hung = [name for below in contents.trees().values() for names in below.values() for name in names]
    assert sorted([*hung, "README"]) == sorted([*contents.documents(), "genindex"])  # each once


def test_a_page_of_a_new_folder_is_not_left_out():
    found = [*contents.documents(), "03-Model_Compression/new", "NEW", "03-Model_Compression/Lab-3.1-Quantization/New"]
    trees = contents.trees(found)
    assert {"03-Model_Compression/new", "NEW"} <= set(trees["README"]["操作"])
    assert "03-Model_Compression/Lab-3.1-Quantization/New" in trees[str(LAB.relative_to(ROOT) / "README")][""]


def test_github_and_jupyter_anchors_name_the_same_heading():
    heading = "Step 4：GPTQ 的核心，十行 (GPTQ in ten lines)"
    jupyter = heading.replace(" ", "-").replace("(", "%28").replace(")", "%29")
    assert links.anchor(jupyter) == links.slug(heading) == "step-4gptq-的核心十行-gptq-in-ten-lines"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("零點", ["零", "點", "零點"]),
        ("4 位元 gptq_model()", ["4", "位", "元", "位元", "gptq_model"]),
        ("KL 散度", ["KL", "散", "度", "散度"]),
    ],
)
def test_a_text_is_found_by_its_pairs_and_its_names(text, expected):
    assert search.split(text) == expected


def test_the_glossary_is_the_style_guides():
    found = terms.glossary()
    assert found["零點"] == "zero point"
    assert found["軟標籤"] == "soft labels" and found["捨入誤差"] == "rounding error"
    assert found["非對稱量化"] == "asymmetric" and found["半結構化"] == "semi-structured"


def test_a_table_names_its_records_and_notebooks():
    found = origins.of_table("quantization-quality")
    assert {file.name for file in found} == {"quantization.json"}
    assert set().union(*found.values()) == {"03-Inference"}
    assert origins.notebook_of("quantization", "03-Inference") == LAB / "03-Inference.ipynb"
    assert origins.of_table("there-is-none") == {}
    assert re.fullmatch(r"[0-9a-f]{7,}|", origins.commit(ROOT / "Makefile"))


def test_the_setup_cell_is_the_chapters_with_what_the_notebook_needs(monkeypatch):
    monkeypatch.setattr(launch, "repository", lambda: "someone/course")
    made = launch.cell(LAB / "03-Inference.ipynb", (CHAPTER / "README.md").read_text(encoding="utf-8"))
    assert made.startswith("%%bash\ngit clone https://github.com/someone/course")
    runs = re.findall(r"make labs LAB=(\S+) NOTEBOOK=(\S+)", made)
    assert runs == [("3.1", "02"), ("3.1", "03")]
    buttons = launch.buttons(LAB / "03-Inference.ipynb")
    assert "colab.research.google.com/github/someone/course/blob/main/03-Model_Compression/Lab-3.1" in buttons


def test_without_a_known_repository_there_is_only_the_download(monkeypatch):
    monkeypatch.setattr(launch, "repository", lambda: "")
    buttons = launch.buttons(LAB / "Exercises.ipynb")
    assert 'href="Exercises.ipynb" download' in buttons and "colab" not in buttons
