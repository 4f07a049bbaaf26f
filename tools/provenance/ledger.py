"""The ledger: which changes of code were accepted without a new recording, and what waits to be recorded anew.

accepted: a fingerprint `old` that is as good as `new`, with the reason and what proved it (a test, a rerun with the
same figures). waiting: notebooks and records ("pruning/02-Prune") of a profile that are to be recorded anew, with the
reason and the day since when. Work can land before the recording; `make release-check` fails until nothing waits.
"""

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from common.course.files import write_whole
from tools.provenance.fingerprint import changes, code_of, find_notebook, parts, read_notebook

FILE = Path(__file__).with_name("ledger.toml")
HEAD = "# What waits for its recording, and which changes need none. `python -m tools.provenance` shows it.\n"


@dataclass(frozen=True)
class Accepted:
    """A change that can move no figure, and what proved it."""

    old: str
    new: str
    reason: str
    proof: str


@dataclass(frozen=True)
class Waiting:
    """What is to be recorded anew at one profile."""

    profile: str
    since: str  # ISO date
    reason: str
    what: tuple[str, ...]  # "lab/notebook"


@dataclass(frozen=True)
class Ledger:
    accepted: list[Accepted] = field(default_factory=list)
    waiting: list[Waiting] = field(default_factory=list)

    def accepts(self, old: str, new: str) -> bool:
        """Whether figures of `old` stand for `new`, in one step or several."""
        reached, before = {old}, set()
        while reached != before:
            before, reached = reached, reached | {a.new for a in self.accepted if a.old in reached}
        return new in reached

    def reasons(self, name: str, profile: str) -> list[str]:
        """Why "lab/notebook" waits; [] where it does not."""
        return [w.reason for w in self.waiting if w.profile == profile and name in w.what]


def load(file: Path = FILE) -> Ledger:
    """Read the ledger; an entry that lacks something, or has something else, raises TypeError."""
    found = tomllib.loads(file.read_text(encoding="utf-8"))
    waiting = [Waiting(**entry | {"what": tuple(entry.get("what", ()))}) for entry in found.get("waiting", [])]
    return Ledger([Accepted(**entry) for entry in found.get("accepted", [])], waiting)


def save(ledger: Ledger, file: Path = FILE) -> None:
    """Write the ledger."""
    lines = [HEAD]
    for entry in ledger.accepted:
        lines += ["[[accepted]]", *(f"{name} = {_quoted(value)}" for name, value in vars(entry).items()), ""]
    for entry in ledger.waiting:
        plain = {name: value for name, value in vars(entry).items() if name != "what"}
        lines += ["[[waiting]]", *(f"{name} = {_quoted(value)}" for name, value in plain.items())]
        lines += ["what = [", *(f"    {_quoted(name)}," for name in entry.what), "]", ""]
    write_whole(file, "\n".join(lines))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a JSON string is a TOML string


def stale(notebook, ledger: Ledger | None = None) -> str:
    """Why a notebook's outputs no longer belong to its code; "" when they do."""
    recorded = notebook.metadata.get("provenance")
    if not recorded:
        return "it has no recorded run"
    now = parts(notebook, recorded["lab"], recorded["profile"])
    if now["code"] == recorded.get("code") or (ledger or load()).accepts(recorded.get("code", ""), now["code"]):
        return ""
    changed = changes(recorded, now) or ["what a name stands for"]
    return f"changed since its outputs were recorded: {', '.join(changed)}"


def settled(name: str, entry: Waiting, records: list[dict], ledger: Ledger) -> bool:
    """Whether what waited was recorded since, with today's code."""
    lab, _, notebook = name.partition("/")
    file = find_notebook(lab, notebook)
    book = read_notebook(file) if file else None
    if book is not None and book.metadata.get("provenance", {}).get("profile") == entry.profile:
        return not stale(book, ledger) and book.metadata["provenance"]["date"] >= entry.since
    mine = [r for r in records if (f"{r['lab']}/{r['notebook']}", r["profile"]) == (name, entry.profile)]
    now = code_of(lab, notebook, entry.profile)
    return bool(mine) and all(
        r["date"] >= entry.since and (r["code"] == now or ledger.accepts(r["code"], now)) for r in mine
    )


def settle(records: list[dict], file: Path = FILE) -> list[str]:
    """Take out of the ledger what has been recorded; returns it."""
    ledger, done, left = load(file), [], []
    for entry in ledger.waiting:
        finished = [name for name in entry.what if settled(name, entry, records, ledger)]
        done += [f"{name} ({entry.profile})" for name in finished]
        rest = tuple(name for name in entry.what if name not in finished)
        left += [Waiting(entry.profile, entry.since, entry.reason, rest)] if rest else []
    if done:
        save(Ledger(ledger.accepted, left), file)
    return done


def report(ledger: Ledger) -> list[str]:
    """What waits, a line each with its reason."""
    return [f"⏳ {', '.join(e.what)} ({e.profile}, since {e.since}): {e.reason}." for e in ledger.waiting]
