"""A Chromium for the book's tests: the installed one, or Debian's unpacked into .work without root.

python -m tools.book.browser
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tools import debian

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass(frozen=True)
class Program:
    path: Path
    environment: dict[str, str]


def chromium() -> Program:
    """Raises debian.NotToBeHad."""
    environment = dict(os.environ)
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return Program(Path(found), environment)
    root = debian.unpacked("chromium", whole=True)
    libraries = [str(path) for path in (root / "usr/lib").glob("*-linux-gnu*") if path.is_dir()]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, environment.get("LD_LIBRARY_PATH", "")]).rstrip(":")
    return Program(root / "usr/lib/chromium/chromium", environment)


if __name__ == "__main__":
    print(chromium().path)
