"""What is stale, which edit made it so, and what waits for its recording.

python -m tools.provenance            show it
python -m tools.provenance settle     take out of the ledger what has been recorded since
python -m tools.provenance release    exit 1 while anything is stale or waits
"""

import argparse
import sys

from tools import tables
from tools.notebooks import find_notebooks
from tools.provenance import ledger
from tools.provenance.fingerprint import read_notebook

SHOWN = 6  # of what changed under a recording


def main() -> int:
    parser = argparse.ArgumentParser(description="Which recordings no longer belong to their code.")
    parser.add_argument("command", nargs="?", default="show", choices=["show", "settle", "release"])
    parser.add_argument("--all", action="store_true", help="name everything that changed, not the first few")
    options = parser.parse_args()
    command = options.command
    if command == "settle":
        print("\n".join(f"✅ recorded: {name}" for name in ledger.settle(tables.committed())) or "nothing to settle")
        return 0
    reasons = {}
    for file in find_notebooks():
        reason = ledger.stale(read_notebook(file))
        reasons[file] = reason
        first, more = reason.split(", ")[:SHOWN], reason.count(", ") + 1 - SHOWN
        if more > 0 and not options.all:
            reason = f"{', '.join(first)} and {more} more (--all names them)"
        print(f"{'❌' if reason else '✅'} {file.parent.name}/{file.stem}{': ' if reason else ''}{reason}")
    waiting = ledger.report(ledger.load())
    print("\n".join(waiting or ["Nothing waits."]))
    return int(command == "release" and bool(waiting or any(reasons.values())))


if __name__ == "__main__":
    sys.exit(main())
