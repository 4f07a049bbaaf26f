"""Compare a run's figures with the committed ones: what the nightly does after it ran the notebooks.

    python -m tools.drift [--profile gpu]      exit status 1, and a line each, where figures moved or are missing

What is compared follows from a record's unit. Speeds are left out: they belong to the machine and to what else ran on
it. The tolerances are bounds on what rounding and another GPU may do, with room; a bug moves figures further.
"""

import argparse
import sys

from common.course.settings import PROFILES, work_folder
from common.measure import results
from common.measure.results import protocol_hash
from tools import tables
from tools.notebooks import LAB_OF_FOLDER, shown

# unit → (relative, absolute) difference that is allowed: whichever allows more
TOLERANCES = {
    "bytes": (0.001, 0),  # the header of a file
    "bytes/token": (0, 0),
    "bits": (0.01, 0),  # group sizes and headers are what they are; sparse patterns may differ in a few weights
    "ratio": (0.05, 0),
    "ppl": (0.05, 0),  # in bfloat16, GPTQ's choice of 4-bit codes and ten training steps follow the rounding of sums
    "nats/token": (0.10, 0.01),
    "share": (0, 0.03),
    "relative": (0.10, 0),
    "steps": (0.5, 0),  # the best of a flat learning curve: a validation or two earlier or later is the same student
}
ON_THE_SAME_DEVICE = {
    "MB": (0.10, 0),
    "GiB": (0.25, 0),  # of the whole process: the allocator's and the libraries' part varies
}
SPEEDS = {"s", "ms", "µs", "tokens/s", "requests/s", "users", "×", "× dense", "%"}  # %: of a time
SPEED_KEYS = {"service-overhead", "notebook-seconds"}  # the first is a share of time; the second is held to SLOWER
SLOWER = 2.0  # a notebook that takes more than so many times as long, on the same device


def identity(record: dict) -> tuple:
    """What a record is about, wherever it was measured."""
    names = ("lab", "notebook", "key", "artifact", "model", "profile")
    return (*(record[name] for name in names), protocol_hash(record["protocol"]))


def moved(old: dict, new: dict) -> str:
    """How `new` differs from the committed `old` by more than is allowed; "" where it does not.

    Raises ValueError for a unit that no table above names.
    """
    same_device = old["device"] == new["device"]
    unit, before, after = old["unit"], old["value"], new["value"]
    if old["key"] == "notebook-seconds":
        slow = same_device and after > SLOWER * before
        return f"{after:.0f} s, {before:.0f} s committed: more than {SLOWER:g} times as long" if slow else ""
    if unit in SPEEDS or old["key"] in SPEED_KEYS or (unit in ON_THE_SAME_DEVICE and not same_device):
        return ""
    if unit not in TOLERANCES | ON_THE_SAME_DEVICE:
        raise ValueError(f"Unit {unit!r} of {old['key']!r} has no tolerance: name it in tools/drift.py.")
    relative, absolute = (TOLERANCES | ON_THE_SAME_DEVICE)[unit]
    allowed = max(relative * abs(before), absolute)
    if abs(after - before) <= allowed:  # false for NaN, too
        return ""
    return f"{after:.6g} {unit}, {before:.6g} committed: more than {allowed:.3g} apart"


def compare(committed: list[dict], fresh: list[dict]) -> list[str]:
    """A line per committed figure that moved or that the run did not measure.

    A figure that several devices have is compared with the one of the run's device, else with any of them.
    """
    here = {record["device"] for record in fresh}
    old = {identity(record): record for record in sorted(committed, key=lambda record: record["device"] in here)}
    new = {identity(record): record for record in fresh}
    lines = []
    for key, record in old.items():
        name = f"{record['lab']} {record['notebook']}: {record['artifact']} {record['key']}"
        if key not in new:
            lines.append(f"❌ {name} is committed, and this run did not measure it")
        elif difference := moved(record, new[key]):
            lines.append(f"❌ {name} is {difference}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare a run's figures with the committed ones.")
    parser.add_argument("--profile", default="gpu", choices=PROFILES)
    profile = parser.parse_args(arguments).profile
    labs = set(LAB_OF_FOLDER.values())
    committed = [r for r in tables.committed() if r["profile"] == profile and r["lab"] in labs]
    folder = work_folder() / "results"
    fresh = [r for file in sorted(folder.glob(f"*/{profile}/*.json")) for r in results.read(file)]
    fresh = [r for r in fresh if r["model"] == "embedded"]
    if not committed or not fresh:
        print(f"❌ Nothing to compare: {len(committed)} committed and {len(fresh)} new figures ({shown(folder)}).")
        return 1
    lines = compare(committed, fresh)
    print("\n".join([*lines, f"{len(committed)} committed figures, {len(fresh)} new ones, {len(lines)} disagree."]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
