"""python -m tools.doctor FOLDER_OR_ID [--parent FOLDER_OR_ID]

Looks at a checkpoint (dense, GPTQ, AWQ, compressed-tensors, bitsandbytes, torchao, GGUF, the course's sparse format).
Exit status 1 where it found something wrong.
"""

import argparse
import sys
from pathlib import Path

from common.course.assets import local_folder
from tools.doctor.behaviour import behaviour, parent_of
from tools.doctor.examine import examine


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a .gguf file, a Hub id, or `embedded`")
    parser.add_argument("--parent", default="", help="the model that it was made from (default: as artifact.json says)")
    options = parser.parse_args(arguments)
    path = Path(options.model)
    try:
        found, report = examine(path if path.exists() else local_folder(options.model))
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    if not report.findings:
        try:
            report.behaviour = behaviour(found, options.parent or parent_of(found))
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            report.behaviour = {"not run": f"{type(error).__name__}: {error}"}
    print(report.render())
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
