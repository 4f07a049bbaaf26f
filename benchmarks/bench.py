"""`make bench`: the course's methods beside the well-known implementations, on one model, one text, one evaluation.

    python -m benchmarks.bench [--only gptq] [--profile auto] [--record]

Every measurement runs in a process of its own (so that peaks of memory are its own), the contenders alternating, once
per seed of the calibration data. What has been measured with the profile's numbers stays in .work/bench and is not
measured again; an implementation that cannot run is listed with its error. `--record` makes the figures the committed
ones; rows that were not measured keep theirs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import contenders, distil, reference
from benchmarks.contenders import Clock, Contender, Task
from common.course.assets import load_model, load_tokenizer, locate
from common.course.environment import prepare
from common.course.settings import PROFILES, Settings, load_settings, slug, work_folder
from common.course.text import calibration_windows, evaluation_windows, load_corpus
from common.measure.evaluation import Baseline, evaluate
from common.measure.results import Recorder, merge, protocol_hash, read
from common.methods.pruning import PruneConfig
from common.methods.quantization import QuantizeConfig
from tools import tables

Figures = dict[str, tuple[float, str]]  # key → (value, unit)
NOTEBOOK = "bench"  # the name under which records are kept
REFERENCE_WINDOWS = 4  # of calibration text, on which our perplexity is compared with lm-eval's

GRIDS = {
    "w4-g64-sym": QuantizeConfig(4, 64, sym=True),
    "w4-g64-asym": QuantizeConfig(4, 64),
    "w3-g64-asym": QuantizeConfig(3, 64),
}
QUANTIZERS = {
    "RTN": contenders.ours_rtn,
    "ours": contenders.ours_gptq,
    "GPTQModel": contenders.gptqmodel_gptq,
    "llm-compressor": contenders.llmcompressor_gptq,
    "optimum": contenders.optimum_gptq,
}
PRUNINGS = [
    PruneConfig(method, 0.5, pattern) for method in ("wanda", "sparsegpt") for pattern in ("unstructured", "2:4")
]


@dataclass(frozen=True)
class Row:
    """One implementation of one thing."""

    setting: str  # what is done, such as "gptq-w4-g64-sym"
    library: str
    measure: Callable[[Task, Clock, "Evaluation"], Figures]
    repeat: bool = True  # once per seed; else with the first only: it uses no calibration data

    @property
    def name(self) -> str:
        return f"{self.setting}/{self.library}"


def rows() -> list[Row]:
    """Everything that is measured; the original comes first, since the others are compared with it."""
    found = [Row("original", "ours", partial(quality_of, contenders.original), repeat=False)]
    for grid, config in GRIDS.items():
        for library, contender in QUANTIZERS.items():
            measure = partial(quality_of, partial(contender, config=config))
            found.append(Row(f"gptq-{grid}", library, measure, repeat=library != "RTN"))
    for config in PRUNINGS:
        for library, contender in (
            ("ours", contenders.ours_prune),
            ("llm-compressor", contenders.llmcompressor_prune),
        ):
            found.append(Row(config.label, library, partial(quality_of, partial(contender, config=config))))
    by_layer = partial(contenders.ours_prune, config=PRUNINGS[0], at_once=False)  # as SparseGPT goes through a block
    found.append(Row("wanda-50", "ours, layer by layer", partial(quality_of, by_layer)))
    grid = GRIDS["w4-g64-asym"]
    for setting, library, contender, repeat in (
        ("awq-w4-g64-asym", "ours", partial(contenders.ours_awq, config=grid), True),
        ("awq-w4-g64-asym", "llm-compressor", partial(contenders.llmcompressor_awq, config=grid), True),
        ("smoothquant-w8a8", "ours", partial(contenders.ours_smoothquant, alpha=0.5), True),
        ("smoothquant-w8a8", "llm-compressor", partial(contenders.llmcompressor_smoothquant, alpha=0.5), True),
        ("nf4", "bitsandbytes", partial(contenders.bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="nf4"), False),
        ("int8", "bitsandbytes", partial(contenders.bitsandbytes, load_in_8bit=True), False),
    ):
        found.append(Row(setting, library, partial(quality_of, contender), repeat))
    for library, step in (
        ("ours", distil.ours),
        ("TRL", distil.trl),
        ("ours, stored labels", partial(distil.ours, stored=True)),
    ):
        found.append(Row("kd-step", library, partial(_of_steps, step)))
    found.append(Row("reference", "lm-eval", _of_reference, repeat=False))
    return found


@dataclass(frozen=True)
class Evaluation:
    """What every contender's result is measured on."""

    settings: Settings
    tests: torch.Tensor
    baseline: Path  # the original's logits, kept by the row that measures the original


def quality_of(contender: Contender, task: Task, clock: Clock, evaluation: Evaluation) -> Figures:
    """Compress, then evaluate: perplexity, KL to the original, seconds, peak memory, bytes on disk."""
    model, saved_bytes = contender(task, clock)
    model.eval()
    if evaluation.baseline.exists():
        against = Baseline(0, torch.load(evaluation.baseline, mmap=True, weights_only=True))
        quality = evaluate(model, evaluation.tests, against=against)
    else:
        keep = Baseline(evaluation.settings.divergence_windows)
        quality = evaluate(model, evaluation.tests, keep=keep)
        torch.save(keep.logits, evaluation.baseline)
    figures = {"perplexity": (quality.perplexity, "ppl")}
    if quality.kl is not None:
        figures |= {"kl": (quality.kl, "nats/token"), "seconds": (clock.seconds, "s"), "peak": (clock.peak / 1e6, "MB")}
    if saved_bytes:
        figures["bytes"] = (saved_bytes(), "bytes")
    return figures


def _of_steps(step, task: Task, clock: Clock, evaluation: Evaluation) -> Figures:
    settings = evaluation.settings
    task = replace(task, windows=task.windows[:, : settings.kd_seqlen], batch_size=settings.kd_batch)
    return step(task, clock, settings.kd_steps) | {"peak": (clock.peak / 1e6, "MB")}


def _of_reference(task: Task, clock: Clock, evaluation: Evaluation) -> Figures:
    seqlen = task.windows.shape[1]
    return reference.lm_eval(task, clock, tokens=REFERENCE_WINDOWS * seqlen, seqlen=seqlen)


# --- one measurement, in a process of its own ------------------------------------------------------------------------


def measure(row: Row, seed: int, settings: Settings, folder: Path) -> Figures:
    """The figures of one row with the calibration data of one seed."""
    tokenizer, corpus = load_tokenizer(settings.model), load_corpus(settings.corpus)
    with tempfile.TemporaryDirectory() as out:
        task = Task(
            folder=Path(locate(settings.model)),
            model=load_model(settings.model, settings.dtype, settings.device),
            tokenizer=tokenizer,
            windows=calibration_windows(tokenizer, corpus, settings.nsamples, settings.seqlen, seed),
            batch_size=settings.batch_size,
            out=Path(out),
        )
        tests = evaluation_windows(tokenizer, corpus, settings.seqlen, settings.quality_windows)
        return row.measure(task, Clock(device=settings.device), Evaluation(settings, tests, folder / "baseline.pt"))


def work(name: str, seed: int, profile: str, folder: Path) -> None:
    """The whole of a measuring process: leaves figures, or the error, in a file."""
    row = next(row for row in rows() if row.name == name)
    settings = prepare("benchmark", NOTEBOOK, profile)
    try:
        outcome = {"figures": measure(row, seed, settings, folder)}
    except Exception as error:  # a library that cannot run here is a result, too
        traceback.print_exc()
        outcome = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    _file(folder, row, seed).write_text(json.dumps(outcome), encoding="utf-8")


# --- all of them -----------------------------------------------------------------------------------------------------


def _file(folder: Path, row: Row, seed: int) -> Path:
    return folder / f"{slug(row.name)}.{seed}.json"


def choose(everything: list[Row], only: str) -> list[Row]:
    """The row of that name, else those whose names begin so; always with the original, the base of comparison."""
    exact = [row for row in everything if row.name == only]
    chosen = exact or [row for row in everything if row.name.startswith(only)]
    return [row for row in everything if row.setting == "original" or row in chosen]


def schedule(chosen: list[Row], seeds: list[int]) -> list[tuple[Row, int]]:
    """Contenders alternate: all of them with one seed, then all with the next."""
    return [(row, seed) for seed in seeds for row in chosen if row.repeat or seed == seeds[0]]


def run_all(chosen: list[Row], settings: Settings, folder: Path, limit: float) -> None:
    """Measure what has not been measured yet; an interruption loses at most the measurement under way.

    What took longer than `longest_repeated` seconds is not repeated (its n says so).
    """
    plan = schedule(chosen, settings.seeds)
    for number, (row, seed) in enumerate(plan, start=1):
        file = _file(folder, row, seed)
        if not file.exists() and _worth_repeating(_file(folder, row, settings.seeds[0]), settings.longest_repeated):
            print(f"[{number}/{len(plan)}] {row.name}, seed {seed} ...", end=" ", flush=True)
            command = [sys.executable, "-m", "benchmarks.bench", "--profile", settings.profile]
            command += ["--work", row.name, str(seed)]
            with file.with_suffix(".log").open("w", encoding="utf-8") as log:
                try:
                    status = subprocess.run(command, stdout=log, stderr=log, timeout=limit).returncode
                    error = f"the process ended with status {status}"
                except subprocess.TimeoutExpired:
                    error = f"not done within {limit:.0f} s"
            if not file.exists():
                file.write_text(json.dumps({"error": error}), encoding="utf-8")
            outcome = json.loads(file.read_text(encoding="utf-8"))
            print(outcome.get("error") or _short(outcome["figures"]), flush=True)


def _worth_repeating(first: Path, longest: int) -> bool:
    """Whether the measurement in `first` did not fail and was short enough; True where there is none yet."""
    if not first.exists():
        return True
    figures = json.loads(first.read_text(encoding="utf-8")).get("figures")
    return figures is not None and figures.get("seconds", (0,))[0] <= longest


def _short(figures: Figures) -> str:
    return " · ".join(f"{key} {value:.4g} {unit}" for key, (value, unit) in figures.items())


def summarize(figures: list[dict]) -> dict[str, tuple[float, float | None, str]]:
    """key → (value, spread, unit) over runs: median of times and peaks, mean of quality; standard deviations."""
    found = {}
    for key, (_, unit) in figures[0].items():
        values = [run[key][0] for run in figures]
        middle = statistics.median if key in ("seconds", "peak", "step-seconds") else statistics.fmean
        found[key] = (middle(values), statistics.stdev(values) if len(values) > 1 else None, unit)
    return found


def protocol(row: Row, key: str, settings: Settings) -> dict:
    """Under what a row's figure was measured."""
    shared = {"corpus": settings.corpus, "dtype": str(settings.dtype)}
    if row.setting == "reference":
        return shared | {"text": f"{REFERENCE_WINDOWS} calibration windows", "seqlen": settings.seqlen}
    if row.setting == "kd-step":
        timed = settings.kd_steps - distil.WARM_UP
        return shared | {"batch": settings.kd_batch, "seqlen": settings.kd_seqlen, "steps timed": timed}
    return shared | {
        "calibration": f"{settings.nsamples}x{settings.seqlen}",
        "windows": settings.divergence_windows if key == "kl" else settings.quality_windows,
        "seqlen": settings.seqlen,
    }


def collect(chosen: list[Row], settings: Settings, folder: Path) -> tuple[list[str], Recorder]:
    """Record every row's figures; returns lines about rows that could not run, and the recorder."""
    recorder, failed = Recorder(settings), []
    for row in chosen:
        files = [file for seed in settings.seeds if (file := _file(folder, row, seed)).exists()]
        outcomes = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        good = [outcome["figures"] for outcome in outcomes if "figures" in outcome]
        errors = [outcome["error"] for outcome in outcomes if "error" in outcome]
        measured = summarize(good) | {"runs": (len(good), None, "runs")} if good else {}
        if "perplexity" in measured and len(good) > 1:
            measured["perplexity-spread"] = (measured["perplexity"][1], None, "ppl")
        for key, (value, spread, unit) in measured.items():
            under = protocol(row, key, settings)
            recorder.record(key, value, unit, artifact=row.name, n=len(good), spread=spread, protocol=under)
        if errors:
            recorder.record("failed", len(errors), "runs", artifact=row.name, protocol={"error": errors[0]})
            failed.append(f"{row.name}: {errors[0]}")
    return failed, recorder


def keep_unmeasured(recorder: Recorder) -> None:
    """Rows that were not measured this time keep their committed figures: a GPU may be lent for parts only."""
    measured = {record["artifact"] for record in read(recorder.file)}
    committed = read(tables.COMMITTED / slug(recorder.device) / recorder.file.name)
    kept = [r for r in committed if r["profile"] == recorder.settings.profile and r["artifact"] not in measured]
    merge(kept, recorder.file)


def main() -> None:
    parser = argparse.ArgumentParser(description="The course's methods beside the well-known implementations.")
    parser.add_argument("--only", default="", help="a row by its name, or rows whose names begin so, such as gptq-w4")
    parser.add_argument("--profile", default="auto", choices=("auto", *PROFILES))
    parser.add_argument("--limit", type=float, default=1800, metavar="SECONDS", help="longest time for a measurement")
    parser.add_argument("--record", action="store_true", help="make the figures the committed ones")
    parser.add_argument("--work", nargs=2, metavar=("ROW", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = load_settings("benchmark", options.profile)
    numbers = {name: str(value) for name, value in settings.values().items()}
    folder = work_folder() / "bench" / f"{settings.profile}-{protocol_hash(numbers)[:6]}"  # other numbers, other folder
    folder.mkdir(parents=True, exist_ok=True)
    if options.work:
        name, seed = options.work
        return work(name, int(seed), settings.profile, folder)
    everything = rows()
    chosen = choose(everything, options.only)
    run_all(chosen, settings, folder, options.limit)
    failed, recorder = collect(everything, settings, folder)
    if failed:
        print("\nCould not run:\n  " + "\n  ".join(failed))
    if options.record:
        keep_unmeasured(recorder)
        tables.promote(NOTEBOOK, recorder.file)
    print(f"\nFigures: {recorder.file}\nLogs of every measurement: {folder}/*.log")


if __name__ == "__main__":
    main()
