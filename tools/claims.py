"""What the course says of its committed figures: `results/claims.toml`, and the small language it is written in.

A claim has a text, the records that it speaks of, and what holds of them on each device that has such records:

    text      what the documents say, in a sentence
    lab, notebook (default: any of the lab)
    devices   part of the devices' names, such as "NVIDIA", "CPU" or "H100" (default: every device)
    some      true: one such device is enough
    until     only records of that day or earlier: a claim about an old recording
    needs     only devices that have a record of this artifact
    protocol  what the protocol of each of these records must say
    figures   name = "key", "key:spread" or "notebook/key" (key: with * perhaps): the name stands for artifact → value
    holds     comparisons of numbers, name['artifact'], + - * /, min, max, abs, len
    relation  one of RELATIONS instead, for what needs more than arithmetic; `at_least` says of how many rows

A claim that no record is left for is false, except one about an old recording, which is then void: take it out.
"""

import ast
import fnmatch
import operator
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations

from tools import tables

FILE = tables.COMMITTED / "claims.toml"
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
OPERATORS |= {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq}
FUNCTIONS = {"min": min, "max": max, "abs": abs, "len": len}


@dataclass(frozen=True)
class Claim:
    """One claim, as it stands in the file."""

    text: str
    lab: str
    notebook: str = ""
    devices: str = ""
    some: bool = False
    until: str = "9999"
    needs: str = ""
    protocol: dict = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)
    holds: tuple[str, ...] = ()
    relation: str = ""
    at_least: int = 1


def load(text: str) -> list[Claim]:
    """The claims of a TOML text; TypeError for an unknown field, ValueError for a claim that says nothing."""
    claims = [Claim(**entry | {"holds": tuple(entry.get("holds", ()))}) for entry in tomllib.loads(text)["claim"]]
    for claim in claims:
        if bool(claim.holds) == bool(claim.relation) or claim.relation not in ("", *RELATIONS):
            raise ValueError(f"{claim.text!r} needs `holds` or one relation of {', '.join(RELATIONS)}.")
    return claims


def about(claim: Claim, records: list[dict]) -> dict[str, list[dict]]:
    """Device → its records of the claim's lab, for every device that ran the notebooks that the claim speaks of.

    A claim about any notebook of a lab is about the devices that have records of each of its keys.
    """
    mine = [r for r in records if r["lab"] == claim.lab and claim.devices in r["device"] and r["date"] <= claim.until]
    devices = {}
    for device in sorted({r["device"] for r in mine}):
        here = [r for r in mine if r["device"] == device]
        specs = [spec.partition(":")[0].rpartition("/") for spec in claim.figures.values() or ["*"]]
        wanted = {(notebook or claim.notebook, key) for notebook, _, key in specs}
        complete = all(
            any(r["notebook"] == notebook if notebook else fnmatch.fnmatchcase(r["key"], key) for r in here)
            for notebook, key in wanted
        )
        if complete and claim.needs in ("", *(r["artifact"] for r in here)):
            devices[device] = here
    return devices


def failures(claim: Claim, records: list[dict]) -> list[str]:
    """What does not hold, a line each; [] for a true claim."""
    found = about(claim, records)
    if not found:
        return ["there is no record that it speaks of"]
    if claim.relation:
        return RELATIONS[claim.relation](claim, found)
    wrong = {device: _wrong(claim, mine) for device, mine in found.items()}
    if claim.some and not all(wrong.values()):
        return []
    return [f"{device}: {line}" for device, lines in wrong.items() for line in lines]


def _wrong(claim: Claim, records: list[dict]) -> list[str]:
    names = {name: figures(claim, records, spec) for name, spec in claim.figures.items()}
    wrong = []
    for line in claim.holds:
        try:
            true = value(ast.parse(line, mode="eval").body, names)
        except KeyError as missing:
            wrong.append(f"{line}: no figure of {missing}")
            continue
        if true is not True:
            wrong.append(f"{line}, with {_used(line, names)}")
    return wrong


def figures(claim: Claim, records: list[dict], spec: str) -> dict[str, float]:
    """Artifact → value (or spread) of one key; of several keys, "key artifact" → value."""
    path, _, what = spec.partition(":")
    notebook, _, key = path.rpartition("/")
    notebook = notebook or claim.notebook
    found = {}
    for r in records:
        if notebook in ("", r["notebook"]) and fnmatch.fnmatchcase(r["key"], key):
            if not claim.protocol.items() <= r["protocol"].items():
                raise ValueError(f"{claim.text!r}: {r['artifact']} was measured under {r['protocol']}.")
            found[r["artifact"] if "*" not in key else f"{r['key']} {r['artifact']}"] = r[what or "value"]
    return found


def value(node: ast.expr, names: dict[str, dict]):
    """The value of an expression; KeyError for an unknown name or artifact, SyntaxError for what is no arithmetic."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return names[node.id]
        case ast.Subscript():
            return value(node.value, names)[value(node.slice, names)]
        case ast.BinOp():
            return OPERATORS[type(node.op)](value(node.left, names), value(node.right, names))
        case ast.Compare():
            sides = [value(side, names) for side in (node.left, *node.comparators)]
            pairs = zip(node.ops, sides, sides[1:], strict=False)
            return all(OPERATORS[type(compare)](left, right) for compare, left, right in pairs)
        case ast.Call(func=ast.Name(id=name)) if name in FUNCTIONS:
            arguments = [value(argument, names) for argument in node.args]
            if name in ("min", "max") and isinstance(arguments[0], dict):
                return FUNCTIONS[name](arguments[0].values())
            return FUNCTIONS[name](*arguments)
    raise SyntaxError(f"no claim says {ast.unparse(node)!r}")


def _used(line: str, names: dict) -> str:
    used = [n for n in ast.walk(ast.parse(line, mode="eval")) if isinstance(n, ast.Subscript)]
    return ", ".join(f"{ast.unparse(n)} = {value(n, names):.6g}" for n in used) or str(names)


# --- what needs more than arithmetic ---------------------------------------------------------------------------------


def ranks_alike(claim: Claim, found: dict[str, list[dict]]) -> list[str]:
    """What stands in another order on a CPU, which saw fewer windows, differs there by less than it can tell."""
    wrong, compared = [], 0
    for cpu, gpu in [(a, b) for a in found for b in found if "CPU" in a and "NVIDIA" in b]:
        few, many = (figures(claim, found[device], "perplexity") for device in (cpu, gpu))
        errors = figures(claim, found[cpu], "perplexity:spread")
        errors = {name: 0.03 * few[name] if error is None else error for name, error in errors.items()}
        pairs = list(combinations(sorted(few.keys() & many.keys()), 2))
        compared += len(pairs)
        swapped = [(a, b) for a, b in pairs if (few[a] - few[b]) * (many[a] - many[b]) < 0]
        told_apart = [(a, b) for a, b in swapped if abs(many[a] - many[b]) > 0.01 * many[a]]  # OWL and uniform are not
        wrong += [f"{a}, {b}" for a, b in told_apart if abs(few[a] - few[b]) > errors[a] + errors[b]]
        wrong += [f"{cpu}, {gpu}: {len(swapped)} of {len(pairs)} pairs swapped"] * (len(swapped) > len(pairs) / 20)
    return wrong + [f"{compared} pairs of methods were compared"] * (compared < claim.at_least)


CALIBRATED = ("gptq-", "wanda-", "sparsegpt-", "awq-", "smoothquant-")


def no_library_is_better_or_faster(claim: Claim, found: dict[str, list[dict]]) -> list[str]:
    """The best perplexity, or within what other calibration data change (1 % where not measured); the least time."""
    wrong = []
    for device, records in found.items():
        perplexity, seconds, spread = (
            _by_setting(figures(claim, records, key)) for key in ("perplexity", "seconds", "perplexity-spread")
        )
        checked = 0
        for setting, found_here in perplexity.items():
            others = [library for library in found_here if not library.startswith(("ours", "RTN"))]
            if not others or not setting.startswith(CALIBRATED):
                continue
            checked += 1
            ours, noise = found_here["ours"], spread.get(setting, {}).get("ours", 0.01 * found_here["ours"])
            for library in others:
                if not ours < found_here[library] + noise:
                    wrong.append(f"{device}: {setting}, ours {ours:.2f}, {library} {found_here[library]:.2f}")
                if not seconds[setting]["ours"] < seconds[setting][library]:
                    wrong.append(f"{device}: {setting}, {library} takes less time")
            if not ours < found_here.get("RTN", float("inf")):
                wrong.append(f"{device}: {setting}, RTN is better")
        wrong += [f"{device}: {checked} settings were compared"] * (checked < claim.at_least)
    return wrong


def _by_setting(found: dict[str, float]) -> dict[str, dict[str, float]]:
    """setting → library → value, of artifacts "setting/library"."""
    grouped: dict[str, dict[str, float]] = {}
    for artifact, figure in found.items():
        setting, _, library = artifact.partition("/")
        grouped.setdefault(setting, {})[library] = figure
    return grouped


RELATIONS: dict[str, Callable[[Claim, dict[str, list[dict]]], list[str]]] = {
    "ranks alike on CPU and GPU": ranks_alike,
    "no library is better or faster": no_library_is_better_or_faster,
}
