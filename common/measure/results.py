"""Measured figures, as notebooks record them.

A record says what was measured (`key`, `artifact`), under which `protocol`, where, when and with which versions.
`tools.tables` makes them the committed ones and renders tables from them.
"""

import datetime
import hashlib
import json
from pathlib import Path

from common.course.environment import device_name, usage, versions
from common.course.files import write_whole
from common.course.memory import GIB
from common.course.settings import Settings, slug, work_folder
from common.measure.evaluation import compare, estimate


def protocol_hash(protocol: dict) -> str:
    """A short stable name of a protocol: equal dicts, equal hash."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]


class Recorder:
    """Writes a notebook's figures as they come to `.work/results/<device>/<profile>/<lab>.json`."""

    def __init__(self, settings: Settings):
        self.settings, self.notebook = settings, settings.notebook
        self.device = device_name(settings)
        self.file = work_folder() / "results" / slug(self.device) / settings.profile / f"{settings.lab}.json"
        # A run begins without the figures of the run before it, some of which it may no longer measure.
        mine = (self.notebook, settings.model)
        write([r for r in read(self.file) if (r["notebook"], r["model"]) != mine], self.file)

    def record(
        self,
        key: str,
        value: float,
        unit: str,
        *,
        artifact: str,
        protocol: dict,
        n: int = 1,
        spread: float | None = None,
        interval: tuple[float, float] | None = None,
        headline: bool = False,
    ) -> None:
        """Store one figure; measuring the same thing again replaces it.

        key: what is measured, such as "perplexity"; artifact: of which model; n: runs, windows or samples behind it;
        spread: its standard error or standard deviation, in `unit`; interval: its 95 % interval, in `unit`;
        headline: shown in the summary of a run.
        """
        settings = self.settings
        record = {
            "lab": settings.lab,
            "notebook": self.notebook,
            "key": key,
            "artifact": artifact,
            "value": value,
            "unit": unit,
            "n": n,
            "spread": spread,
            "headline": headline,
            "protocol": protocol,
            "model": settings.model,
            "profile": settings.profile,
            "device": self.device,
            "versions": versions(),
            "date": datetime.date.today().isoformat(),
        }
        if interval is not None:
            record["interval"] = list(interval)
        merge([record], self.file)

    def estimate(self, key: str, found, unit: str, **same) -> None:
        """Store an `evaluation.Estimate` with its standard error and its interval; the rest as in `record`."""
        interval = (found.low, found.high)
        self.record(key, found.value, unit, spread=found.standard_error, interval=interval, **same)

    def rows(self, key: str, values: dict[str, float], unit: str, *, spread: dict | None = None, **same) -> None:
        """Store one figure per artifact: `values` and `spread` by artifact, the rest as in `record`."""
        for artifact, value in values.items():
            self.record(key, value, unit, artifact=artifact, spread=(spread or {}).get(artifact), **same)

    def decoding(self, batch: int = 1) -> dict:
        """Protocol of a decoding speed: so many sequences, each with `context_tokens` tokens in its KV cache."""
        settings = self.settings
        return {"context": settings.context_tokens, "batch": batch, "cuda graph": settings.device.type == "cuda"}

    def latency(self, key: str, latency, *, artifact: str, percentiles: tuple[int, ...] = (50,)) -> None:
        """Store percentiles of a `benchmarking.Latency` of one sequence, in milliseconds, as `tpot-p50` and so on."""
        n, protocol = len(latency.seconds), self.decoding()
        for q in percentiles:
            milliseconds = latency.percentile(q) * 1e3
            self.record(f"{key}-p{q}", milliseconds, "ms", artifact=artifact, protocol=protocol, n=n)

    def quality(self, quality, *, artifact: str, headline: bool = False, reference=None, corpus: str = "") -> None:
        """Store an `evaluation.Quality` under the lab's protocol.

        reference: the original's Quality on the same windows; adds the paired comparison. corpus: where not the lab's.
        """
        settings, windows = self.settings, len(quality.losses)
        protocol = {
            "corpus": corpus or settings.corpus,
            "split": "test",
            "seqlen": settings.seqlen,
            "windows": windows,
            "dtype": str(settings.dtype),
        }
        self.record(
            "perplexity",
            quality.perplexity,
            "ppl",
            artifact=artifact,
            protocol=protocol,
            n=windows,
            spread=quality.standard_error,
            headline=headline,
        )
        compared = len(quality.divergences)
        against = protocol | {"windows": compared, "against": "original"}
        same = {"artifact": artifact, "protocol": against, "n": compared}
        if compared > 1:  # each of them compares both models already, so their mean is a paired figure
            self.estimate("kl", estimate(quality.divergences), "nats/token", **same)
        elif quality.kl is not None:
            self.record("kl", quality.kl, "nats/token", **same)
        if quality.top1 is not None:
            self.record("top1", quality.top1, "share", **same)
        if reference is not None:
            self._comparison(compare(quality, reference), artifact, protocol | {"against": "original"}, windows)

    def _comparison(self, comparison, artifact: str, protocol: dict, n: int) -> None:
        same = {"artifact": artifact, "protocol": protocol, "n": n}
        self.estimate("log-perplexity-difference", comparison.log_perplexity, "nats/token", **same)
        self.estimate("perplexity-ratio", comparison.ratio, "ratio", **same)
        for key in ("flips", "right_before", "right_after"):
            self.record(key.replace("_", "-"), getattr(comparison, key), "share", **same)

    def finish(self) -> None:
        """Last step of every notebook: print and store the time and the memory it took."""
        used = usage()
        parts = {"notebook-seconds": (used.seconds, "s"), "notebook-memory": (used.memory_bytes / GIB, "GiB")}
        if used.gpu_bytes:
            parts["notebook-gpu-memory"] = (used.gpu_bytes / GIB, "GiB")
        for key, (value, unit) in parts.items():
            self.record(key, value, unit, artifact=self.notebook, protocol={})
        print(
            "✅",
            self.notebook,
            "·",
            " · ".join(f"{key[9:]} {value:.1f} {unit}" for key, (value, unit) in parts.items()),
        )


def identity(record: dict) -> tuple:
    names = ("lab", "notebook", "key", "artifact", "model", "profile", "device")
    return (*(record[name] for name in names), protocol_hash(record["protocol"]))


def read(file: Path) -> list[dict]:
    """The records of one file; none if it does not exist."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def merge(records: list[dict], file: Path) -> None:
    """Add records to a file, each replacing the one of the same identity."""
    write([*read(file), *records], file)


def write(records: list[dict], file: Path) -> None:
    """Make `records` the content of a file, one on each line; of equal identities the last one stays."""
    merged = {identity(record): record for record in records}
    lines = [json.dumps(merged[key], ensure_ascii=False) for key in sorted(merged)]
    write_whole(file, "[\n" + ",\n".join(lines) + "\n]\n")
