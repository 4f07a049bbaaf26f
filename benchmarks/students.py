"""`python -m benchmarks.students`: which learning rate is fair to whom, and what training on the quantized grid brings.

    python -m benchmarks.students [--profile auto] [--processes 3] [--seconds 190] [--record]

1. Sweep: CE, KD and CE + KD, the same student, steps and data, each with every learning rate; validation text chooses.
2. Winners: each objective at its own best rate with more orders of the data; compared on the same test windows.
3. Quantization-aware training from GPTQ's codes, with the teacher's KL (QAD) and with the labels only (QAT).
4. Narrow students, whose hidden states have fewer channels: logits alone, MiniLM, hidden states through a projection.

Every run is a job; several processes may share them out (each job's result is a file of its folder, and a job that is
done is not done again). With `--seconds` no job begins that would not end in time. `--record` makes the figures the
committed ones.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from common.course.assets import load_model, load_tokenizer, locate
from common.course.files import write_whole
from common.course.settings import PROFILES, Settings, load_settings, seed_everything, slug, work_folder
from common.course.text import calibration_windows, evaluation_windows, load_corpus, token_windows
from common.measure.evaluation import Baseline, Quality, compare, estimate, evaluate, quality_of
from common.measure.results import Recorder, protocol_hash
from common.methods.distillation import most_influential, narrow_student, student_from_teacher
from common.methods.qad import finish_qad, prepare_qad
from common.methods.quantization import QuantizeConfig, gptq_model
from common.methods.soft_labels import SoftLabels, WindowDataset, make_soft_labels
from common.methods.structured import block_influence
from common.methods.training import DistillationTrainer, Objective, history, training_arguments
from tools import tables

NOTEBOOK = "students"  # the name under which records are kept
SHIPPED = "embedded-as-shipped"
OBJECTIVES = {"CE": 1.0, "KD": 0.0, "CE + KD": None}  # weight of the hard labels; None: the profile's
NARROW = {"logits": {}, "logits + MiniLM": {"minilm": 1.0}, "logits + hidden states": {"hidden": 1.0}}


@dataclass(frozen=True)
class Job:
    """One training run (or one measurement), by its name; seconds: what it took on an H200, to plan with."""

    name: str
    run: Callable[["Bench"], dict[str, Quality]]
    seconds: float


class Bench:
    """What the jobs share: models, text and soft labels, made when they are first asked for."""

    def __init__(self, settings: Settings, folder: Path):
        self.settings, self.folder = settings, folder
        self.tokenizer, self.corpus = load_tokenizer(settings.model), load_corpus(settings.corpus)
        self.train = self._training_windows()
        self.valid = token_windows(self.tokenizer, self.corpus.valid, settings.seqlen, settings.valid_windows)
        self.tests = evaluation_windows(self.tokenizer, self.corpus, settings.seqlen, settings.eval_windows)

    def _training_windows(self) -> Tensor:
        settings = self.settings
        windows = settings.train_windows, settings.train_seqlen
        return calibration_windows(self.tokenizer, self.corpus, *windows, settings.seed)

    @cached_property
    def teacher(self) -> nn.Module:
        return self.original(self.settings.model)

    def original(self, model: str) -> nn.Module:
        return load_model(model, self.settings.dtype, self.settings.device).requires_grad_(False)

    @cached_property
    def on_tests(self) -> Baseline:
        kept = Baseline(len(self.tests))
        evaluate(self.teacher, self.tests, keep=kept)
        return kept

    @cached_property
    def blocks(self) -> list[int]:
        settings = self.settings
        text = token_windows(self.tokenizer, self.corpus.valid, settings.seqlen, settings.influence_windows)
        influence = block_influence(self.teacher, text)
        return most_influential(influence, max(1, round(settings.keep_share * len(influence))))

    @cached_property
    def labels(self) -> SoftLabels:
        settings = self.settings
        options = {"k": settings.top_k, "temperature": 1.0, "batch_size": settings.label_batch}
        return make_soft_labels(self.folder / "soft-labels", self.teacher, self.tokenizer, self.train, **options)

    def trained(self, student: nn.Module, objective: Objective, *, labels=None, teacher=None, **arguments) -> dict:
        """Train in place; step → training loss."""
        settings = self.settings
        chosen = {"batch_size": settings.batch_size, "steps": settings.steps, "seed": settings.seeds[0]} | arguments
        made = training_arguments(
            self.folder / "run", name="student", evaluations=0, on_cpu=settings.device.type == "cpu", **chosen
        )
        data = WindowDataset(self.train, labels)
        trainer = DistillationTrainer(student, made, data, objective, dtype=settings.dtype, teacher=teacher)
        trainer.train()
        return history(trainer, "loss")

    def quality(self, model: nn.Module, against: Baseline) -> dict[str, Quality]:
        """On validation text, by which one may choose, and on test text."""
        settings = self.settings
        wanted = settings.dtype != next(model.parameters()).dtype
        with torch.autocast(settings.device.type, settings.dtype, enabled=wanted):
            return {"valid": evaluate(model, self.valid), "test": evaluate(model, self.tests, against=against)}


# --- the jobs -------------------------------------------------------------------------------------------------------


def sweep_name(objective: str, rate: float, seed: int) -> str:
    return f"{objective}, {rate:g}, seed {seed}"


def train_one(bench: Bench, objective: str, rate: float, seed: int) -> dict[str, Quality]:
    student = student_from_teacher(bench.teacher, bench.blocks)
    alpha = bench.settings.alpha if OBJECTIVES[objective] is None else OBJECTIVES[objective]
    labels = bench.labels if alpha < 1 else None
    bench.trained(student, Objective(alpha), labels=labels, learning_rate=rate, seed=seed)
    return bench.quality(student, bench.on_tests)


def winner(bench: Bench, objective: str) -> float:
    """The learning rate with the lowest validation loss of the sweep; waits for what other processes have begun."""
    first = bench.settings.seeds[0]
    names = {rate: sweep_name(objective, rate, first) for rate in bench.settings.learning_rates}
    while missing := [name for name in names.values() if not file_of(bench.folder, name).exists()]:
        if not any(claim_of(bench.folder, name).exists() for name in missing):
            raise RuntimeError(f"The sweep lacks {', '.join(missing)}, and nobody is at it.")
        time.sleep(0.5)
    return min(names, key=lambda rate: read_outcome(bench.folder, names[rate])["valid"].losses.mean())


def repeat_winner(bench: Bench, objective: str, seed: int) -> dict[str, Quality]:
    return train_one(bench, objective, winner(bench, objective), seed)


def qad_name(model: str, bits: int, arm: str) -> str:
    return f"{model}, {arm}" if arm == "original" else f"{model}, {bits} bits, {arm}"


def quantization_aware(bench: Bench, model: str, bits: int, arm: str) -> dict[str, Quality]:
    """GPTQ, and from its codes QAD (the original's KL) or QAT (the labels only); "original" is the model itself."""
    settings, original = bench.settings, bench.original(model)
    kept = Baseline(len(bench.tests))
    measured = {"valid": evaluate(original, bench.valid), "test": evaluate(original, bench.tests, keep=kept)}
    if arm == "original":
        return measured
    student = load_model(model, settings.dtype, settings.device)
    calibration = bench.train[: settings.nsamples]
    quantized = gptq_model(student, calibration, QuantizeConfig(bits=bits), batch_size=settings.label_batch)
    if arm != "GPTQ":
        prepare_qad(student, quantized)
        rate = settings.qad_learning_rate if bits < 4 else settings.qad_finer_rate
        teacher = None if arm == "QAT" else original
        options = {"steps": settings.qad_steps, "learning_rate": rate, "weight_decay": 0.0, "teacher": teacher}
        bench.trained(student, Objective(alpha=1.0 if arm == "QAT" else 0.0), **options)
        finish_qad(student, settings.dtype)
    return bench.quality(student, kept)


def train_narrow(bench: Bench, name: str) -> dict[str, Quality]:
    settings, teacher = bench.settings, bench.teacher
    text = teacher.config.get_text_config()
    step = 8 * text.num_attention_heads  # what families and fast kernels want widths to be multiples of
    width = round(settings.narrow_share * text.hidden_size / step) * step
    student = narrow_student(teacher, width)
    objective = Objective(settings.alpha, **NARROW[name])
    rate = sorted(settings.learning_rates)[len(settings.learning_rates) // 2]
    bench.trained(student, objective, teacher=teacher, steps=settings.narrow_steps, learning_rate=rate)
    return bench.quality(student, bench.on_tests)


def jobs(settings: Settings) -> list[Job]:
    """All jobs, the most wanted first; what waits for others comes late."""
    first, *others = settings.seeds
    found = [
        Job(sweep_name(o, rate, first), lambda b, o=o, r=rate: train_one(b, o, r, first), 8)
        for o in OBJECTIVES
        for rate in settings.learning_rates
    ]
    quantized = [
        Job(qad_name(model, bits, arm), lambda b, it=(model, bits, arm): quantization_aware(b, *it), 8 + 27 * trained)
        for model in [settings.model] + [SHIPPED] * (settings.model == "embedded")
        for arm, trained in (("QAD", True), ("GPTQ", False), ("original", False), ("QAT", True))
        for bits in settings.qad_bits
        if not (arm == "original" and bits != settings.qad_bits[0])  # of which there is one
        if not (arm == "QAT" and (model == SHIPPED or bits != min(settings.qad_bits)))
    ]
    repeated = [
        Job(f"winner {o}, seed {seed}", lambda b, o=o, s=seed: repeat_winner(b, o, s), 8)
        for seed in others
        for o in OBJECTIVES
    ]
    narrow = [Job(f"narrow, {name}", lambda b, name=name: train_narrow(b, name), 10) for name in NARROW]
    shipped = [job for job in quantized if job.name.startswith(SHIPPED)]
    own = [job for job in quantized if job not in shipped]
    first_trained = len(settings.qad_bits)  # the longest ones begin first
    return own[:first_trained] + found + repeated + own[first_trained:] + narrow + shipped


# --- who does them --------------------------------------------------------------------------------------------------


def file_of(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '-').replace(',', '')}.json"


def claim_of(folder: Path, name: str) -> Path:
    return file_of(folder, name).with_suffix(".claim")


def claimed(folder: Path, name: str) -> bool:
    """Whether this process is the first to take the job."""
    try:
        claim_of(folder, name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def write_outcome(folder: Path, name: str, measured: dict[str, Quality], seconds: float) -> None:
    of_one = {
        split: {"losses": q.losses.tolist(), "divergences": q.divergences.tolist(), "top1": q.top1}
        for split, q in measured.items()
    }
    write_whole(file_of(folder, name), json.dumps({"seconds": seconds} | of_one))


def read_outcome(folder: Path, name: str) -> dict[str, Quality]:
    """Qualities by split, without the single tokens."""
    found = json.loads(file_of(folder, name).read_text(encoding="utf-8"))
    return {split: restored(found[split]) for split in ("valid", "test")}


def restored(found: dict) -> Quality:
    losses = torch.tensor(found["losses"], dtype=torch.float64)
    nothing = torch.zeros(len(losses), 1, dtype=torch.int32)
    quality = quality_of(losses, nothing.bool(), nothing)
    quality.divergences, quality.top1 = torch.tensor(found["divergences"], dtype=torch.float64), found["top1"]
    quality.kl = quality.divergences.mean().item() if len(quality.divergences) else None
    return quality


def work(bench: Bench, until: float) -> list[str]:
    """Take one job after the other that nobody has taken and that still fits; returns those that failed."""
    failed = []
    for job in jobs(bench.settings):
        if file_of(bench.folder, job.name).exists() or time.time() + job.seconds > until:
            continue
        if claimed(bench.folder, job.name):
            begin = time.perf_counter()
            try:
                write_outcome(bench.folder, job.name, job.run(bench), time.perf_counter() - begin)
                print(f"{job.name}: {time.perf_counter() - begin:.1f} s", flush=True)
            except Exception:  # whatever happens to one must not cost the others: time on a GPU is lent
                traceback.print_exc()
                failed.append(job.name)
            finally:
                claim_of(bench.folder, job.name).unlink()
    return failed


# --- what came out --------------------------------------------------------------------------------------------------


def collect(bench: Bench) -> Recorder:
    """Record what the finished jobs found."""
    settings, recorder = bench.settings, Recorder(bench.settings)
    done = {job.name: read_outcome(bench.folder, job.name) for job in jobs(settings) if is_done(bench, job.name)}
    text = {"corpus": settings.corpus, "seqlen": settings.seqlen}
    sweep = text | {"steps": settings.steps, "dtype": str(settings.dtype)}
    first, *others = settings.seeds
    best: dict[str, list[Quality]] = {}
    for objective in OBJECTIVES:
        names = {rate: sweep_name(objective, rate, first) for rate in settings.learning_rates}
        runs = {rate: done[name] for rate, name in names.items() if name in done}
        for rate, run in runs.items():
            for split, q in run.items():
                protocol = sweep | {"split": split, "windows": len(q.losses)}
                row = {"artifact": objective, "protocol": protocol, "n": len(q.losses)}
                recorder.record(f"at-{rate:g}", q.perplexity, "ppl", **row)
        if len(runs) == len(names):
            chosen = min(runs, key=lambda rate: runs[rate]["valid"].losses.mean())
            repeats = [f"winner {objective}, seed {seed}" for seed in others]
            best[objective] = [q["test"] for q in [runs[chosen], *(done[n] for n in repeats if n in done)]]
            record_best(recorder, objective, chosen, best[objective], sweep)
    if {"CE", "CE + KD"} <= best.keys():
        record_pairs(recorder, best, sweep)
    record_quantized(recorder, done, text)
    for name in NARROW:
        if f"narrow, {name}" in done:
            narrow = sweep | {"steps": settings.narrow_steps, "split": "test", "windows": len(bench.tests)}
            record_quality(recorder, f"narrow, {name}", done[f"narrow, {name}"]["test"], narrow)
    return recorder


def is_done(bench: Bench, name: str) -> bool:
    return file_of(bench.folder, name).exists()


def record_quality(recorder: Recorder, artifact: str, quality: Quality, protocol: dict) -> None:
    n = len(quality.losses)
    recorder.record("perplexity", quality.perplexity, "ppl", artifact=artifact, protocol=protocol, n=n)
    if quality.kl is not None:
        recorder.record("kl", quality.kl, "nats/token", artifact=artifact, protocol=protocol, n=n)


def record_best(recorder: Recorder, objective: str, rate: float, runs: list[Quality], sweep: dict) -> None:
    """An objective at its own best rate: mean over the orders of the data, and how much these differ."""
    protocol = sweep | {"split": "test", "windows": len(runs[0].losses)}
    row = {"artifact": objective, "protocol": protocol, "n": len(runs)}
    recorder.record("best-rate", rate, "peak", **row)
    for key, unit in (("perplexity", "ppl"), ("kl", "nats/token")):
        values = torch.tensor([getattr(run, key) for run in runs], dtype=torch.float64)
        spread = values.std().item() if len(runs) > 1 else None
        recorder.record(f"best-{key}", values.mean().item(), unit, spread=spread, **row)


def record_pairs(recorder: Recorder, best: dict[str, list[Quality]], sweep: dict) -> None:
    """Each objective against CE: the same windows, their losses averaged over the orders of the data."""
    losses = {name: torch.stack([run.losses for run in runs]).mean(0) for name, runs in best.items()}
    protocol = sweep | {"split": "test", "windows": len(losses["CE"]), "against": "CE"}
    for name in losses.keys() - {"CE"} if len(losses["CE"]) > 1 else ():
        found = estimate(losses[name] - losses["CE"])
        recorder.estimate("best-difference", found, "nats/token", artifact=name, protocol=protocol, n=len(best[name]))


def record_quantized(recorder: Recorder, done: dict, text: dict) -> None:
    """Quantization-aware training beside GPTQ and the original, of the same model, on the same windows."""
    settings = recorder.settings
    for model in (settings.model, SHIPPED):
        protocol = text | {"weights": model, "split": "test", "windows": settings.eval_windows}
        protocol |= {"steps": settings.qad_steps}
        originals = done.get(qad_name(model, settings.qad_bits[0], "original"))
        for bits, arm in product(settings.qad_bits, ("original", "GPTQ", "QAD", "QAT")):
            if (outcome := done.get(qad_name(model, bits, arm))) is None:
                continue
            artifact = arm if arm == "original" else f"{arm}, {bits} bits"
            artifact += ", as shipped" if model == SHIPPED else ""
            record_quality(recorder, artifact, outcome["test"], protocol)
            if originals and arm != "original" and settings.eval_windows > 1:
                ratio = compare(outcome["test"], originals["test"]).ratio
                same = {"artifact": artifact, "protocol": protocol | {"against": "original"}}
                recorder.estimate("perplexity-ratio", ratio, "ratio", n=settings.eval_windows, **same)


def folder_of(settings: Settings) -> Path:
    """Where outcomes are kept: another place for other numbers, so that nothing is mixed."""
    numbers = {name: str(value) for name, value in settings.values().items()}
    return work_folder() / "students" / f"{slug(settings.model)}-{settings.profile}-{protocol_hash(numbers)[:6]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="auto", choices=("auto", *PROFILES))
    parser.add_argument("--model", default="embedded", help="another one is measured in a folder of its own")
    parser.add_argument("--processes", type=int, default=1, help="processes that share the device and the jobs")
    parser.add_argument("--seconds", type=float, default=1e9, help="no job begins that would not end in time")
    parser.add_argument("--record", action="store_true", help="make the figures the committed ones")
    parser.add_argument("--work", type=float, metavar="UNTIL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    until = options.work or time.time() + options.seconds
    settings = load_settings("students", options.profile, options.model).replace(notebook=NOTEBOOK)
    seed_everything(settings.seed)
    for model in dict.fromkeys([settings.model] + [SHIPPED] * (settings.model == "embedded")):
        locate(model)  # once, before several processes want it
    folder = folder_of(settings)
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(settings, folder)
    if options.work:
        raise SystemExit(1 if work(bench, until) else 0)
    for stale in folder.glob("*.claim"):  # of a run that was killed
        stale.unlink()
    print(
        f"{bench.labels.ids.nbytes / 1e6:.0f} MB of ids in the soft labels", flush=True
    )  # made once, for all processes
    command = [sys.executable, "-m", "benchmarks.students", "--profile", settings.profile, "--model", settings.model]
    command += ["--work", str(until)]
    others = [subprocess.Popen(command) for _ in range(options.processes - 1)]
    failed = work(bench, until)
    failed += [f"process {number}" for number, process in enumerate(others, start=2) if process.wait()]
    recorder = collect(bench)
    if options.record:
        tables.promote(NOTEBOOK, recorder.file, settings.model)
    missing = [job.name for job in jobs(settings) if not is_done(bench, job.name)]
    print(f"Figures: {recorder.file}" + (f"\nNot measured: {'; '.join(missing)}" if missing else ""))
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
