"""File a run's records by model: a folder for each, as the run had them by device, profile and lab.

python -m tools.by_model .work/results .work/by-model
"""

import argparse
import sys
from pathlib import Path

from common.course.settings import slug
from common.measure.results import read, write


def file_by_model(source: Path, target: Path) -> list[Path]:
    """Split every file of records under `source`; returns what was written, `target`/MODEL/DEVICE/PROFILE/LAB.json."""
    written = []
    for file in sorted(source.rglob("*.json")):
        records = read(file)
        for model in sorted({record["model"] for record in records}):
            written.append(target / slug(model) / file.relative_to(source))
            write([record for record in records if record["model"] == model], written[-1])
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="File a run's records by model.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args(arguments)
    for file in file_by_model(options.source, options.target):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
