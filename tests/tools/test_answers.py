"""Every question that theory, handout and teaching notes leave open has an answer, and every answer its question."""

import re

import pytest

from common.course.settings import CHAPTER

LABS = {"3.1": "Quantization", "3.2": "Pruning", "3.3": "Knowledge_Distillation"}
PAGE = (CHAPTER / "提問與答案.md").read_text(encoding="utf-8")


def section(text, head):
    """A section of a document, up to the next heading of its level."""
    return re.search(rf"^## {head}.*?(?=^## |\Z)", text, re.M | re.S)[0]


def asked(lab):
    """The questions, as they stand in the lab's documents."""
    folder = next(CHAPTER.glob(f"Lab-{lab}-*"))
    theory = (CHAPTER / "theory" / f"{lab}-{LABS[lab]}.md").read_text(encoding="utf-8").split("**怎麼讀")[0]
    able = section((folder / "README.md").read_text(encoding="utf-8"), r"\d+\. 結論")
    notes = section((folder / "Teaching_Notes.md").read_text(encoding="utf-8"), "提問")
    follow_ups = (row.rsplit(" | ", 1)[1].rstrip(" |") for row in re.findall(r"^\| \d.*$", notes, re.M))
    numbered = [*re.findall(r"^\d\. (.*)$", theory, re.M), *re.findall(r"^\d\. (.*)$", able, re.M)]
    return numbered + [question for question in follow_ups if question.endswith("？")]  # others have their answer there


def rows(lab):
    return re.findall(r"^\| (?!問題|---)(.*?) \| (.*) \| (.*) \|$", section(PAGE, f"Lab {lab}"), re.M)


@pytest.mark.parametrize("lab", LABS)
def test_every_question_has_an_answer_and_every_answer_its_question(lab):
    answered = [question for question, _, _ in rows(lab)]
    assert [question for question in asked(lab) if question not in answered] == [], "asked, and not answered"
    assert [question for question in answered if question not in asked(lab)] == [], "answered, and not asked any more"


@pytest.mark.parametrize("lab", LABS)
def test_every_answer_says_where_it_is_shown(lab):
    assert len(rows(lab)) >= 14
    assert all(answer and "](" in where for _, answer, where in rows(lab))
