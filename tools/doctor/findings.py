"""What the doctor says: findings, and what an engine will make of a checkpoint."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: its name, what was seen, and what to do."""

    name: str
    seen: str
    do: str


@dataclass(frozen=True)
class Prediction:
    """Whether an engine of this machine can load the checkpoint, by which rule, and what to do where it cannot."""

    engine: str
    loads: bool
    why: str  # with its source
    do: str = ""


@dataclass(frozen=True)
class Line:
    """One row of the table of tensors."""

    role: str
    count: int
    stored: str  # dtypes
    bytes: int
    weights: int  # numbers that they stand for

    @property
    def bits(self) -> float:
        return 8 * self.bytes / self.weights


@dataclass
class Report:
    """All that `examine` found out."""

    name: str
    facts: dict[str, str] = field(default_factory=dict)
    table: list[Line] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    engines: list[Prediction] = field(default_factory=list)
    behaviour: dict[str, str] = field(default_factory=dict)

    def render(self) -> str:
        """The page."""
        lines = [f"# {self.name}", ""]
        lines += [f"{name:14} {value}" for name, value in self.facts.items()]
        lines += ["", f"{'tensors':16}{'count':>6}  {'stored as':28}{'MB':>10}{'bits/weight':>13}"]
        for row in self.table:
            lines.append(f"{row.role:16}{row.count:6}  {row.stored:28}{row.bytes / 1e6:10.2f}{row.bits:13.2f}")
        total, weights = sum(row.bytes for row in self.table), sum(row.weights for row in self.table)
        if weights:
            lines.append(f"{'all':16}{'':6}  {'':28}{total / 1e6:10.2f}{8 * total / weights:13.2f}")
        lines += ["", "engines of this machine (predicted by rule)"]
        for engine in self.engines:
            lines.append(f"{'✅' if engine.loads else '❌'} {engine.engine:13} {engine.why}")
            lines += [f"   → {engine.do}"] if engine.do else []
        if self.behaviour:
            lines += ["", "behaviour"] + [f"{name:14} {value}" for name, value in self.behaviour.items()]
        lines += ["", f"findings: {len(self.findings) or 'none'}"]
        for finding in self.findings:
            lines += [f"❌ {finding.name}: {finding.seen}", f"   → {finding.do}"]
        return "\n".join(lines)
