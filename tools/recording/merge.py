"""Bring home what tools/recording/record.sh packed: executed notebooks and their figures become the committed ones.

python tools/recording/merge.py recorded.tar.gz
"""

import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import nbformat

from common.course.settings import CHAPTER
from common.measure import results
from tools import tables
from tools.run import LAB_OF_FOLDER


def merge(archive: Path) -> list[str]:
    """Returns the notebooks that were brought home. Raises FileNotFoundError where one's figures are missing."""
    merged = []
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        for notebook in sorted(Path(folder, "recorded").rglob("*.ipynb")):
            lab = LAB_OF_FOLDER[notebook.parent.name]
            sources = list(Path(folder, "work", "results").glob(f"*/*/{lab}.json"))
            holders = [s for s in sources if any(r["notebook"] == notebook.stem for r in results.read(s))]
            if len(holders) != 1:
                raise FileNotFoundError(f"{notebook.stem}: {len(holders)} files hold its figures, one is needed.")
            code = nbformat.read(notebook, as_version=4).metadata["provenance"]["code"]  # of where it was recorded
            tables.promote(notebook.stem, holders[0], code=code)
            shutil.copy(notebook, CHAPTER / notebook.parent.name / notebook.name)
            merged.append(f"{notebook.parent.name}/{notebook.name}")
    return merged


if __name__ == "__main__":
    print("\n".join(merge(Path(sys.argv[1]))), "\nNow: make settle tables figures test")
