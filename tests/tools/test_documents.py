"""The documents keep the rules of WRITING_STYLE_GUIDE.md, and every check can fail: each has a planted example."""

import json
import tomllib

import pytest

from common.course.settings import CHAPTER, ROOT
from tools import tables
from tools.documents import bibliography, check, markdown, quantities
from tools.documents import code as document_code
from tools.documents.check import GUIDE, LAB_SECTIONS
from tools.documents.document import Document, Finding, read
from tools.documents.markdown import anchors, slug
from tools.run import find_notebooks

LAB = "# Lab 3.9: 名稱 - 副標\n\n" + "".join(f"## {n}. {title}\n\n文字\n\n" for n, title in enumerate(LAB_SECTIONS, 1))
THEORY = """# 第 3.9 章：名稱 (Name)

引言。

## 1. 基本概念 (Fundamentals)
## 2. 第一原理 (First Principles)
## 3. 知識體系 (Body of Knowledge)
## 4. 選擇與趨勢
## 5. 結論
## 6. 延伸閱讀
"""
BIB = """@article{frantar2023gptq,
  author = {Frantar, Elias and Alistarh, Dan},
  title = {GPTQ},
  year = {2023},
  eprint = {2210.17323},
  archivePrefix = {arXiv}
}
"""


@pytest.fixture
def write(tmp_path):
    """Writes a document into a folder; the name says what kind it is."""

    def writing(text: str, name: str = "README.md") -> Document:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return Document(path, text)

    return writing


def messages(findings) -> str:
    return "\n".join(map(str, findings))


def test_the_course_keeps_its_rules():
    findings = check.check()
    assert not findings, "\n" + messages(findings)


def test_structure_of_a_lab(write):
    name = "Lab-3.9-Name/README.md"
    assert not check.structure(write(LAB, name))
    assert "5. 技術優勢 is missing" in messages(check.structure(write(LAB.replace("## 5. 技術優勢", "## 優勢"), name)))
    swapped = LAB.replace("## 5.", "## 6!").replace("## 6.", "## 5.").replace("## 6!", "## 6.")
    assert check.structure(write(swapped, name))
    assert "title" in messages(check.structure(write(LAB.replace("# Lab 3.9: ", "# ", 1), name)))


@pytest.mark.parametrize(
    "gone", ["第 3.9 章：", "引言", "Fundamentals", "First", "Body", "選擇", "趨勢", "結論", "延伸"]
)
def test_structure_of_theory(write, gone):
    assert not check.structure(write(THEORY, "theory/3.9-Name.md"))
    assert check.structure(write(THEORY.replace(gone, ""), "theory/3.9-Name.md"))


def test_length(write):
    assert check.length(write("字" * 5000 + "\n```\n" + "字" * 100 + "\n```\n", "theory/3.9-Name.md"))
    assert not check.length(write("字" * 5001, "theory/3.9-Name.md"))


def test_a_labs_readme_is_short_and_its_tables_narrow(write):
    name = "Lab-3.9-Name/README.md"
    table = "\n| a | b | c | d | e | f |\n|---|---|---|---|---|---|\n"
    assert not check.length(write("字\n" * 400 + table, name))
    assert "451 lines" in messages(check.length(write("字\n" * 451, name)))
    wide = table.replace("| f |", "| f | g |").replace("|---|\n", "|---|---|\n")
    assert "README.md:401: length: a table of 7 columns" in messages(check.length(write("字\n" * 399 + wide, name)))
    assert not check.length(write("字\n" * 451 + wide, "Lab-3.9-Name/Measurements.md"))


def test_slugs_are_githubs():
    assert slug("4.2 本課程的實測結果") == "42-本課程的實測結果"
    assert slug("`code`、[Link](x.md) & **more**: Yes_it-is!") == "codelink--more-yes_it-is"


def test_repeated_headings_are_numbered(write):
    assert anchors(write("# A\n\n## B\n\n## B\n\n```\n# C\n```\n").path) == {"a", "b", "b-1"}


def test_headings_of_notebooks_are_named_as_jupyter_does(write):
    notebook = write('{"cells": [{"cell_type": "markdown", "source": ["## Step 1：甲 (A)"]}]}', "a.ipynb")
    assert anchors(notebook.path) == {"Step-1：甲-(A)"}
    for anchor in ("Step-1：甲-(A)", "Step-1：甲-%28A%29"):
        assert not check.broken_links(write(f"[a](a.ipynb#{anchor})"))
    assert check.broken_links(write("[a](a.ipynb#step-1甲-a)"))


@pytest.mark.parametrize(
    "link",
    [
        "[x](gone.md)",
        "[x](#沒有)",
        "[x](README.md#gone)",
        "[x](a.ipynb)",
        "![x](https://e.org/x.png)",
        '<img src="gone.svg">',
    ],
)
def test_links(write, link):
    assert not check.broken_links(write("# 標題一\n\n[a](#標題一) [b](README.md) [c](https://e.org) `[d](no)`\n"))
    assert check.broken_links(write(f"# 標題一\n\n{link}\n"))


@pytest.mark.parametrize("wrong", ["這段代碼", "這段數據", "模型推理", "這段话"])
def test_terms(write, wrong):
    rules = check.glossary(GUIDE.read_text(encoding="utf-8"))
    assert not check.terms(write("這段程式碼，資料，推理模型，`代碼`"), rules)
    assert check.terms(write(wrong), rules)


def test_a_guide_without_its_table_is_refused():
    with pytest.raises(ValueError, match="has no table"):
        check.glossary("# 指南\n\n| 用 | 英文 |\n|---|---|\n| 量化 | quantization |\n")


@pytest.mark.parametrize("wrong", ["使用GPU計算", "第3層", "這樣,不行", "公式$x$是"])
def test_spacing(write, wrong):
    assert not check.spacing(write("## Step 3：2:4 稀疏 (Sparse)\n\n使用 GPU 計算，第 3 層。\n"))
    assert check.spacing(write(f"標題\n\n{wrong}\n"))


@pytest.mark.parametrize("wrong", ["見 /home/me/x", "TODO：補上", "🎉"])
def test_unwanted(write, wrong):
    assert not check.unwanted(write("⚠️ 見 `/tmp`、https://e.org/home/x、.work/runs 🚀"))
    assert check.unwanted(write(wrong))


def test_notebook_cells_are_read(write):
    cells = (
        '{"cells": [{"cell_type": "code", "source": ["x"]}, {"cell_type": "markdown", "source": ["# A\\n", "代碼"]}]}'
    )
    (cell,) = read(write(cells, "a.ipynb").path)
    assert "a.ipynb[cell 2]:2: term: 代碼" in messages(check.terms(cell, [("代碼", "程式碼", [])]))


def test_regions(write):
    assert "out of date" in messages(
        check.stale_regions(write("<!-- results:quantization-size -->\n| 1 |\n<!-- /results -->\n"))
    )
    assert "no table" in messages(check.stale_regions(write("<!-- results:nothing -->\n<!-- /results -->\n")))
    assert "closed" in messages(check.stale_regions(write("<!-- results:quantization-size -->\n")))


def test_code_runs_in_order_in_one_namespace(write):
    block = "```python\n{}\n```\n\n"
    good = block.format("x = 1") + "文字\n\n" + block.format("assert x == 1")
    assert not document_code.failing_code(write(good))
    (finding,) = document_code.failing_code(write(good + block.format("\nassert x == 2")))
    assert (finding.line, "AssertionError" in finding.message) == (13, True)
    assert document_code.failing_code(write(block.format("x = = 1")))
    assert not document_code.failing_code(write("<!-- fragment: needs a model -->\n" + block.format("model(1)")))
    assert document_code.failing_code(write("<!-- fragment: -->\n" + block.format("model(1)"))), "a reason is needed"


def troubleshooting(message: str) -> str:
    return f"## 故障診斷\n\n| 現象 | 原因 | 解決 |\n|---|---|---|\n| {message} | 因 | 解 |\n"


@pytest.mark.parametrize("wrong", ["`Out of cheese: …`", "`There is no stored model 'gptq'.`"])
def test_messages(write, wrong):
    code = document_code.literals()
    for right in (
        "`There is no saved model 'gptq'. Run notebook Lab-3.1-Quantization/02-Quantize first.`",
        "`bits must be 2 to 8, got ….`",
        "`CUDA error 7`（PyTorch 的訊息）",
        "比較慢",
    ):
        assert not document_code.invented_messages(write(troubleshooting(right)), code), right
    assert document_code.invented_messages(write(troubleshooting(wrong)), code)


def test_the_labs_pages_of_messages_are_checked():
    code, pages = document_code.literals(), sorted(CHAPTER.glob("Lab-*/Troubleshooting.md"))
    assert len(pages) == 3
    for page in pages:
        text = page.read_text(encoding="utf-8").replace("There is no saved model", "There is no stored model")
        assert "There is no stored model" in messages(document_code.invented_messages(Document(page, text), code))


def test_every_table_of_the_results_stands_in_a_document():
    shown = {match[2] for path in tables.documents() for match in tables.REGION.finditer(path.read_text("utf-8"))}
    assert set(tomllib.loads(tables.TABLES.read_text("utf-8"))) <= shown


@pytest.mark.parametrize(
    "wrong",
    [
        "快了 2.3 倍。",
        "其中 37 % 的權重。",
        "來源：某處。\n\n- 甲，3 秒",
        "省 50 % 的記憶體。",
        "用了 12.5 GiB。",
        "用了 12 GB 記憶體。",
        "這是預設。快了 3 倍。",
        "只要 3–5 分鐘。",
        "| 模型 | 大小 |\n|---|---|\n| A | 3 MB |",
        "| 模型 | 大小 | 來源 |\n|---|---|---|\n| A | 3 MB | |",
        "- 甲，3 秒（來源：某處）\n- 乙，4 秒",
        "延遲 3 ms。\n\n來源：另一段。",
    ],
)
def test_numbers(write, wrong):
    for right in (
        "快 2.3 倍（[論文](https://e.org)）。",
        "估計 20 分鐘。",
        "其中 35 % 的權重。",
        "來源：某處：\n\n- 甲，3 秒",
        "假設頻寬是 50 GB/s。",
        "門檻是 3 秒，上限 4 秒。",
        "一張 16 GB 顯示卡，H100 80GB，剪 50 % 的權重。",
        "16 / 4.3125 ≈ 3.7 倍，$2 \\times 3$ GB，`3 GB`，64 × 512。",
        "LLaMA 的大小。來源：某表。\n\n| 模型 | 大小 |\n|---|---|\n| A | 3 MB |",
        "<!-- results:x -->\n| 3 MB |\n<!-- /results -->",
    ):
        assert not quantities.unsourced(write(right)), right
    assert quantities.unsourced(write(wrong))


@pytest.mark.parametrize(
    "wrong",
    [
        "學生是 19.3（上表）。",
        "怎麼讀：由 19.23 升到 31.2。",
        "怎麼讀：\n\n1. 看第一列。\n2. 差 0.6。",
        "[表](#42-結果)裡的 1,203.5。",
    ],
)
def test_figures_repeated_in_the_text_are_the_tables(write, wrong):
    table = "## 4.2 結果\n\n<!-- results:x -->\n| 19.23 ± 0.48 | 1,204.46（1.05×） |\n<!-- /results -->\n\n"
    for right in (
        "學生是 19.2（上表），慢 1.05 倍；1,204.5 也對，見 4.2。",
        "怎麼讀：$19.23/12.66\\approx1.52$ 倍；`0.6` 是參數。",
        "別人的 5.12（[論文](https://e.org)），與上表無關。",
        "沒有說到表的 7.77。",
    ):
        assert not quantities.misquoted(write(table + right)), right
    assert len(quantities.misquoted(write(table + wrong))) == 1


def test_bibliography_entries_are_complete():
    assert not bibliography.incomplete(BIB)
    for field in ("author", "title", "year", "eprint", "archivePrefix"):
        assert bibliography.incomplete(BIB.replace(f"{field} =", "note ="))
    assert bibliography.incomplete(BIB.replace("2210.17323", "22.17"))
    assert bibliography.incomplete(BIB + BIB.replace("frantar2023gptq", "frantar2022gptq"))
    assert not bibliography.incomplete(BIB.replace("eprint = {2210.17323}", "url = {https://e.org}"))


def test_bibliography_that_cannot_be_read_is_refused():
    for broken in (BIB + BIB, BIB.replace("},", "", 1)):
        with pytest.raises(ValueError, match="cannot be read"):
            bibliography.entries(broken)


def test_citations_and_entries_match(write):
    cites = "[Frantar et al., 2023](../theory/references.md#{})"
    assert not bibliography.citations([write(cites.format("frantar2023gptq"))], BIB)
    assert "no entry nobody1999" in messages(bibliography.citations([write(cites.format("nobody1999"))], BIB))
    assert "no document cites" in messages(bibliography.citations([write("文字")], BIB))


def test_rendered_bibliography():
    rendered = bibliography.render(BIB)
    assert '<a id="frantar2023gptq"></a>Elias Frantar, Dan Alistarh. *GPTQ*. 2023.' in rendered
    assert not bibliography.stale(BIB, rendered)
    assert bibliography.stale(BIB.replace("2023}", "2024}"), rendered)


def test_the_command_lists_findings_and_fails(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["documents", "check"])
    for findings, status in (([], 0), ([Finding("README.md", 3, "term: 代碼 → 程式碼")], 1)):
        monkeypatch.setattr(check, "check", lambda paths, findings=findings: findings)
        with pytest.raises(SystemExit) as stopped:
            check.main()
        assert stopped.value.code == status
    assert "README.md:3: term: 代碼 → 程式碼" in capsys.readouterr().out


def test_all_notebooks_are_recorded_where_the_readme_says_so():
    if "十二個 notebook 都附上執行過的輸出" in (ROOT / "README.md").read_text(encoding="utf-8"):
        labs = [path for path in find_notebooks() if path.parent.name.startswith("Lab-")]
        found = {path: json.loads(path.read_text(encoding="utf-8"))["metadata"] for path in labs}
        assert len(found) == 12
        assert not [path.name for path, metadata in found.items() if "provenance" not in metadata]


def test_numbers_are_asked_for_in_readmes_and_theory_but_not_in_exercises(write):
    for name, asked in (
        ("theory/3.9-Name.md", 1),
        ("README.en.md", 1),
        ("Measurements.md", 1),
        ("theory/references.md", 0),
        ("GPU.md", 0),
    ):
        assert len(quantities.unsourced(write("快了 2.3 倍。", name))) == asked, name
    assert not quantities.unsourced(write("## 7. 練習\n\n一張卡快了 2.3 倍，要多久？\n"))
    assert quantities.unsourced(write("## 7. 練習\n\n文字\n\n## 8. 結論\n\n快了 2.3 倍。\n"))


# --- Markdown --------------------------------------------------------------------------------------------------------

MARKDOWN = """# 標題

> ```python
> x = "[a](gone.md)"
> ```

<!-- # 不是標題 [b](gone.md) -->

段落裡的 `[c](gone.md)`，第二行的 [d](here.md) 與
<a href="there.md">e</a>、\\`不是程式碼\\`。

| 訊息 | 說明 |
|---|---|
| `one \\| two` | 三 |

<!-- fragment: x -->
```py
y = 1
```
"""


def test_markdown_is_read_as_a_renderer_does():
    assert [(h.level, h.text) for h in markdown.headings(MARKDOWN)] == [(1, "標題")]
    found = [(MARKDOWN.count("\n", 0, at) + 1, target) for at, _, target in markdown.links(MARKDOWN)]
    assert found == [(9, "here.md"), (10, "there.md")]
    blocks = [(MARKDOWN.count("\n", 0, at) + 1, code, part) for at, code, part in markdown.python_blocks(MARKDOWN)]
    assert blocks == [(4, 'x = "[a](gone.md)"\n', False), (18, "y = 1\n", True)]
    ((head, row),) = markdown.tables_of(MARKDOWN)
    assert head.cells == ["訊息", "說明"]
    assert (row.cells, row.text) == (["`one | two`", "三"], "| `one \\| two` | 三 |\n")
    assert markdown.codes(row.cells[0]) == ["one | two"]


def test_prose_is_what_is_no_code_no_comment_and_no_formula():
    text = MARKDOWN + "\n公式 $x$ 與 ``有 ` 的程式碼``\n"
    shown = markdown.prose(text)
    assert len(shown) == len(text)
    assert shown.count("\n") == text.count("\n")
    assert not any(gone in shown for gone in ("gone.md", "不是標題", "one", "y = 1", "$x$", "有 ` 的"))
    assert all(there in shown for there in ("# 標題", "[d](here.md)", "不是程式碼", "三", "公式"))
