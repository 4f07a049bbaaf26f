"""`python -m benchmarks.overnight`: the `gpu` profile's student of Lab 3.3 on a CPU, while you sleep.

Half the blocks, CE + KD, with the numbers of the `gpu` profile (512 tokens a window, 16 windows a step). Two stages,
and both may be interrupted and go on where they stopped: the teacher's soft labels, then the training, which keeps a
checkpoint every tenth of its steps. The student replaces the `cpu` profile's artifact `student`, so that notebook 04
compares and serves it.

    python -m benchmarks.overnight [--steps 150] [--again]

How long: steps · 16 · 512 tokens / (tokens per second of "stored soft labels", Measurements.md). 150 steps are 1.23
million tokens: about 45 minutes at the 453 tokens/s recorded on two cores with AMX, in bfloat16; several times that
where the processor computes in float32. The labels before that: 1,900 windows, about 11 minutes at 1,498 tokens/s, and
250 MB. The arithmetic is all there is so far: no such student has been recorded yet.
"""

import argparse
import shutil

import torch
from transformers.trainer_utils import get_last_checkpoint

from common.course import artifacts
from common.course.assets import load_model, load_tokenizer
from common.course.settings import load_settings, profile_values, seed_everything
from common.course.text import calibration_windows, evaluation_windows, load_corpus, token_windows
from common.measure.evaluation import Baseline, compare, evaluate
from common.methods.soft_labels import WindowDataset, make_soft_labels
from common.methods.training import DistillationTrainer, Objective, history, save_student, training_arguments

CHECKPOINTS = 10
GPU_NUMBERS = "train_seqlen", "train_windows", "batch_size", "valid_windows", "learning_rate", "label_batch"


def main(arguments: list[str] | None = None, **smaller) -> float:
    """Returns the student's perplexity; `smaller` replaces numbers of the profile, for tests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--model", default="embedded", help="the teacher; run 01-Setup with it first")
    parser.add_argument("--again", action="store_true", help="begin anew, not where the last run stopped")
    options = parser.parse_args(arguments)
    settings = load_settings("distillation", "cpu", options.model)
    seed_everything(settings.seed)
    large = profile_values("distillation", "gpu")
    settings = settings.replace(**{name: large[name] for name in GPU_NUMBERS} | smaller)
    folder = settings.artifacts / "overnight"
    if options.again:
        shutil.rmtree(folder, ignore_errors=True)
    untrained = artifacts.load(settings.artifacts / "student-untrained", "Lab-3.3-Distillation/01-Setup")
    teacher, tokenizer = load_model(settings.model, settings.dtype, settings.device), load_tokenizer(settings.model)
    corpus = load_corpus(settings.corpus)
    count = min(options.steps * settings.batch_size, settings.train_windows)
    windows = calibration_windows(tokenizer, corpus, count, settings.train_seqlen, settings.seed)
    valid = token_windows(tokenizer, corpus.valid, settings.seqlen, settings.valid_windows)
    tests = evaluation_windows(tokenizer, corpus, settings.seqlen, settings.eval_windows)
    labels = make_soft_labels(
        folder / "soft-labels",
        teacher,
        tokenizer,
        windows,
        k=settings.top_k,
        temperature=1.0,
        batch_size=settings.label_batch,
    )
    made = training_arguments(
        folder / "run",
        name="overnight",
        steps=options.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        evaluations=CHECKPOINTS,
        on_cpu=True,
        checkpoints=CHECKPOINTS,
    )
    student = load_model(str(untrained.folder), torch.float32, settings.device)
    data, objective = WindowDataset(windows, labels), Objective(settings.alpha)
    trainer = DistillationTrainer(student, made, data, objective, dtype=settings.dtype, valid=valid)
    trainer.train(resume_from_checkpoint=(folder / "run").is_dir() and get_last_checkpoint(folder / "run"))
    print("validation perplexity by step:", {s: round(p, 1) for s, p in history(trainer, "eval_perplexity").items()})
    on_tests = Baseline(len(tests))
    original, quality = evaluate(teacher, tests, keep=on_tests), evaluate(student, tests, against=on_tests)
    print(f"teacher {original.perplexity:.2f}, student {quality.perplexity:.2f}: {compare(quality, original)}")
    saved = save_student(
        settings.artifacts / "student",
        student,
        tokenizer,
        method="kd",
        settings={"steps": options.steps, "alpha": settings.alpha, "temperature": 1.0},
        parent=untrained.name,
    )
    print(f'saved as {saved.name}: run 04-Compare_and_Deploy with PROFILE = "cpu" to compare and serve it')
    shutil.rmtree(folder / "run", ignore_errors=True)
    return quality.perplexity


if __name__ == "__main__":
    main()
