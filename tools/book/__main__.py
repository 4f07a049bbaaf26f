"""Build the book: python -m tools.book [folder]. Nothing is executed and nothing fetched."""

import sys

from sphinx.cmd.build import main as sphinx

from common.course.settings import ROOT, work_folder


def main(argv: list[str]) -> int:
    out = argv[0] if argv else str(work_folder() / "book" / "html")
    trees = str(work_folder() / "book" / "doctrees")
    options = ["-c", str(ROOT / "book"), "-d", trees, "-b", "html", "-j", "2", "-q"]
    code = sphinx([*options, str(ROOT), out])
    print(f"The book: {out}/index.html")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
