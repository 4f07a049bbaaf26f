"""From a checkpoint to a report: each module's part in order, no weights run."""

import re
from pathlib import Path

from common.formats.gptq import OFFSET
from tools.doctor import numbers, structure
from tools.doctor.engines import predict
from tools.doctor.findings import Line, Report
from tools.doctor.reading import Checkpoint, open_checkpoint
from tools.doctor.structure import Plan

ROLES = {
    "embedding": r"embed_tokens|token_embd|\bwte\b|embed_in",
    "output head": r"lm_head|^output\.weight",
    "norms": r"norm|\bln_",
    "experts": r"expert",
    "attention": r"attn|attention",
    "MLP": r"mlp|ffn|feed_forward",
}


def examine(path: Path) -> tuple[Checkpoint, Report]:
    """Look at the folder or GGUF file `path`; FileNotFoundError where it is no checkpoint."""
    found = open_checkpoint(Path(path))
    plan = structure.plan(found)
    report = Report(found.path.name)
    report.findings = list(found.findings)
    report.findings += structure.check_tokenizer(found, plan)
    if plan:
        report.findings += structure.check_tensors(found, plan)
    report.findings += numbers.check_numbers(found, plan, _tokens(found))
    report.table = table(found, plan)
    report.facts = _facts(found, plan, report)
    report.engines = predict(found, report.findings)
    return found, report


def _tokens(found: Checkpoint) -> int:
    names = found.config.get("tokenizer.ggml.tokens")
    if names is not None:
        return sum(not re.fullmatch(r"\[PAD\d+\]", name) for name in names)
    return structure.tokenizer_ids(found) or 0


def table(found: Checkpoint, plan: Plan | None) -> list[Line]:
    """Bytes and bits of every kind of tensor; packed weights count as the numbers that they stand for."""
    rows = {}
    for weight in dict.fromkeys(t.weight for t in found.tensors.values()):
        parts = [t for t in found.tensors.values() if t.weight == weight]
        known = plan.shapes.get(weight) if plan else None
        count = known.numel() if known is not None else max(part.count for part in parts)
        stored = " + ".join(sorted({part.dtype for part in parts}))
        role = next((role for role, pattern in ROLES.items() if re.search(pattern, weight)), "other")
        row = rows.setdefault((list(ROLES).index(role) if role in ROLES else len(ROLES), role, stored), [0, 0, 0])
        for i, value in enumerate((1, sum(part.bytes for part in parts), count)):
            row[i] += value
    return [Line(role, row[0], stored, row[1], row[2]) for (_, role, stored), row in sorted(rows.items())]


def _facts(found: Checkpoint, plan: Plan | None, report: Report) -> dict[str, str]:
    facts = {"format": _format(found)}
    name = found.config.get("general.architecture") or (found.config.get("architectures") or ["unknown"])[0]
    weights, size = (sum(getattr(row, key) for row in report.table) for key in ("weights", "bytes"))
    facts["model"] = f"{name}, {weights:,} weights stored in {size / 1e6:,.2f} MB, {len(found.files)} file(s)"
    if found.kind in ("gptq", "awq"):
        group_size = found.settings.get("group_size", "unknown")
        facts["groups"] = "one a row" if group_size == -1 else f"{group_size} inputs"
        label, lacks = numbers.convention(found)
        stored = f"minus {lacks}" if found.kind == "gptq" and lacks else "as they are"
        facts["zero points"] = f"stored {stored}" + (f" ({label})" if found.kind == "gptq" else "")
    if plan:
        stored = any(t.weight == plan.head for t in found.tensors.values())
        facts["output head"] = f"{'tied' if plan.tied else 'untied'} by config, {'' if stored else 'not '}stored"
    elif found.kind == "gguf":
        facts["output head"] = "stored" if "output.weight" in found.tensors else "the embedding"
    return facts


def _format(found: Checkpoint) -> str:
    if found.kind == "gptq":
        label = numbers.convention(found)[0]
        version = {"gptq": "v1", "gptq_v2": "v2"}.get(label, label)
        said = "" if found.settings.get("checkpoint_format") in OFFSET else ", by default"
        kind = "symmetric" if found.settings.get("sym") else "asymmetric"
        return f"GPTQ {version}{said}, {found.settings.get('bits', '?')} bits, {kind}"
    if found.kind == "awq":
        return f"AWQ, {found.settings.get('bits', found.settings.get('w_bit', 4))} bits"
    names = {"sparse": "the course's sparse format", "gguf": "GGUF", "dense": "dense"}
    return names.get(found.kind, found.kind)
