"""What is in the book, and in which order: the documents of the repository, found where they stand."""

from pathlib import Path

from common.course.settings import ROOT

FOLDERS = ("*", "03-Model_Compression/*", "03-Model_Compression/*/*", "book/*")
DOCUMENTS = [folder + suffix for folder in FOLDERS for suffix in (".md", ".ipynb")]
LEFT_OUT = [".*", "**/.*", "common", "tests", "tools", "benchmarks", "results", "build", "book/static"]
CHAPTER = "03-Model_Compression"


def documents(root: Path = ROOT) -> list[str]:
    """Every page that is made of a file, without its suffix, as Sphinx names it."""
    return sorted(
        str(path.relative_to(root).with_suffix(""))
        for pattern in DOCUMENTS
        for path in root.glob(pattern)
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    )


def _below(folder: str, found: list[str]) -> list[str]:
    """The pages of a folder beside its README: notebooks in their order, exercises, then the documents."""
    pages = [name for name in found if name.startswith(f"{folder}/") and "/" not in name[len(folder) + 1 :]]
    notebooks = [name for name in pages if (ROOT / f"{name}.ipynb").exists()]
    return notebooks + [name for name in pages if name not in notebooks and name != f"{folder}/README"]


def trees(found: list[str] | None = None) -> dict[str, dict[str, list[str]]]:
    """Page → caption → the pages below it. What stands in no chapter's folder is under 操作 or 參考, none is left out.

    The pages of a folder hang below its README.
    """
    found = documents() if found is None else found
    labs = [name for name in found if name.startswith(f"{CHAPTER}/Lab-") and name.endswith("/README")]
    theory = {name.split("/")[-1].split("-")[0]: name for name in found if name.startswith(f"{CHAPTER}/theory/3.")}
    home: dict[str, list[str]] = {"開始": [f"{CHAPTER}/README"]}
    for lab in labs:
        number = lab.split("/")[-2].split("-")[1]
        home[f"Lab {number}"] = [*([theory[number]] if number in theory else []), lab]
    home["延伸"] = [f"{CHAPTER}/Advanced/README", f"{CHAPTER}/Comparisons"]
    home["動手玩"] = [f"book/{name}" for name in ("grid", "sweep", "roofline", "pareto")]
    last = [f"{CHAPTER}/theory/references", "book/glossary", "genindex", "README.en"]
    folders = {lab.rpartition("/")[0] for lab in labs} | {f"{CHAPTER}/Advanced"}
    named = {name for names in home.values() for name in names} | set(last) | {"README"}
    home["操作"] = [name for name in found if name not in named and name.rpartition("/")[0] not in folders]
    home["參考"] = last
    known = {*found, "genindex"}
    home = {caption: [name for name in names if name in known] for caption, names in home.items()}
    tree = {f"{folder}/README": {"": _below(folder, found)} for folder in sorted(folders)}
    return {"README": home} | {page: below for page, below in tree.items() if page in known and below[""]}


def toctree(page: str) -> str:
    """The directives that hang what is below it on a page."""
    blocks = []
    for caption, names in trees().get(page, {}).items():
        named = f":caption: {caption}\n" if caption else ""
        blocks.append(f"\n\n```{{toctree}}\n:hidden:\n{named}\n" + "\n".join(f"/{name}" for name in names) + "\n```\n")
    return "".join(blocks)
