"""Files and folders that are written whole or not at all: aside first, then renamed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _aside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `file` at the end of the block.

    An interruption leaves the previous file or none, never half; of a block that fails nothing stays.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    new = _aside(file, "new")
    try:
        yield new
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def write_whole(file: Path, text: str) -> None:
    """`whole_file` for a text."""
    with whole_file(file) as new:
        new.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` at the end of the block.

    As `whole_file`; but no system renames a folder onto a full one, so that a process killed between the two renames
    leaves the previous one aside: readers call `recover` first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    new, old = _aside(folder, "new"), _aside(folder, "old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Undo what was interrupted between the two renames of `whole_folder`, or finish what was interrupted after."""
    old = _aside(folder, "old")
    if not old.exists():
        return
    if folder.exists():
        shutil.rmtree(old)
    else:
        old.rename(folder)
