"""Verify a submission to the speed-run and put it into the table.

python -m tools.speedrun FOLDER [--check]
"""

import argparse
import sys
from pathlib import Path

from tools.speedrun import board
from tools.speedrun.measure import measured
from tools.speedrun.rules import Refused, examine, fingerprint


def main() -> None:
    parser = argparse.ArgumentParser(description="Verify a submission and put it into the table.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="verify and measure only; the table stays as it is")
    arguments = parser.parse_args()
    try:
        statement, size = examine(arguments.folder)
        found = measured(arguments.folder)
        print(f"{statement.name}: {size:,} bytes, KL {found['kl']:.4f} ± {found['standard_error']:.4f} nats per token")
        if not arguments.check:
            board.add(statement, size, fingerprint(arguments.folder), found)
            print("In the table: results/speedrun.json. Render it: python -m tools.tables render")
    except Refused as error:
        sys.exit(f"Refused. {error}")


if __name__ == "__main__":
    main()
