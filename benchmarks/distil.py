"""Training steps of distillation, ours and TRL's: same student, same teacher, same windows in the same order."""

import tempfile
from pathlib import Path

import torch
from torch import nn

from benchmarks.contenders import Clock, Task
from common.methods.distillation import evenly_spaced, student_from_teacher
from common.methods.soft_labels import make_soft_labels
from common.methods.training import DistillationTrainer, Objective, WindowDataset, history, training_arguments

WARM_UP = 2  # steps that are not timed


def _student(task: Task) -> nn.Module:
    return student_from_teacher(task.model, evenly_spaced(task.model.config.num_hidden_layers, 15))


def _arguments(folder: Path, task: Task, steps: int):
    made = training_arguments(
        folder,
        name="kd",
        steps=steps,
        batch_size=task.batch_size,
        learning_rate=1e-3,
        seed=0,
        evaluations=0,
        on_cpu=task.device.type == "cpu",
    )
    made.logging_steps = 1
    return made


def _steps(trainer, clock: Clock) -> dict[str, tuple[float, str]]:
    """Seconds per step, and the first step's loss, which all contenders share if they compute the same."""
    from transformers import TrainerCallback

    class Timed(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == WARM_UP:
                clock.__enter__()

    trainer.add_callback(Timed)
    trainer.train()
    clock.__exit__()
    steps = trainer.state.global_step - WARM_UP
    return {"step-seconds": (clock.seconds / steps, "s"), "first-loss": (history(trainer, "loss")[1], "nats/token")}


def ours(task: Task, clock: Clock, steps: int, stored: bool = False) -> dict[str, tuple[float, str]]:
    """KD only (α = 0, T = 1), the teacher computing along, or its top-64 labels read from disk."""
    with tempfile.TemporaryDirectory() as folder:
        labels = None
        if stored:
            options = {"k": 64, "temperature": 1.0, "batch_size": task.batch_size}
            labels = make_soft_labels(Path(folder) / "soft", task.model, task.tokenizer, task.windows, **options)
        trainer = DistillationTrainer(
            _student(task),
            _arguments(Path(folder) / "run", task, steps),
            WindowDataset(task.windows, labels),
            Objective(alpha=0.0),
            dtype=task.dtype,
            teacher=None if stored else task.model,
        )
        return _steps(trainer, clock)


def trl(task: Task, clock: Clock, steps: int) -> dict[str, tuple[float, str]]:
    """TRL's GKD trainer on given text only (λ = 0) with the forward KL (β = 0)."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def collate(examples):
        ids = torch.tensor([example["input_ids"] for example in examples])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    with tempfile.TemporaryDirectory() as folder:
        same = _arguments(Path(folder), task, steps).to_dict()
        names = ("max_steps", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "warmup_steps")
        names += ("weight_decay", "adam_beta2", "max_grad_norm", "optim", "seed", "use_cpu", "logging_steps")
        settings = GKDConfig(
            output_dir=folder,
            **{name: same[name] for name in names},
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            bf16=task.dtype == torch.bfloat16,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = GKDTrainer(
            model=_student(task),
            teacher_model=task.model,
            args=settings,
            data_collator=collate,
            train_dataset=Dataset.from_dict({"input_ids": task.windows.tolist()}),
            processing_class=task.tokenizer,
        )
        return _steps(trainer, clock)
