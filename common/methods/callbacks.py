"""What watches a training: a guard against NaN, a progress bar, and the weights that did best in validation."""

import math
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint


class FiniteGradients(TrainerCallback):
    """Stops before a gradient that is not finite reaches the weights, so that every checkpoint is good."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if not norm.isfinite():
            last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
            kept = f"The last good checkpoint is {Path(last).name}" if last else "There is no checkpoint yet"
            raise FloatingPointError(
                f"The loss or its gradient is NaN or infinite at step {state.global_step + 1}. {kept}. "
                "Lower the learning rate, then resume."
            )


class Progress(TrainerCallback):
    """One progress bar with the latest loss and validation perplexity."""

    def __init__(self):
        self.bar, self.shown = tqdm(disable=True), {}

    def on_train_begin(self, args, state, control, **_):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=args.run_name, unit="step")

    def on_step_end(self, args, state, control, **_):
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **_):
        self.shown |= {name: f"{logs[name]:.3g}" for name in ("loss", "eval_perplexity") if name in logs}
        self.bar.set_postfix(self.shown)

    def on_train_end(self, args, state, control, **_):
        self.bar.close()


class KeepBest(TrainerCallback):
    """Keeps the weights with the lowest validation perplexity, and puts them into the model when training ends.

    Early stopping without the stopping. They lie in a file of the run's folder, so that a run which is interrupted and
    resumed has not forgotten what did best before.
    """

    perplexity = 0.0  # so far; no evaluation outside of training is better

    def on_train_begin(self, args, state, control, **_):
        self.file, self.perplexity = Path(args.output_dir) / "best.safetensors", math.inf
        if state.global_step == 0:
            self.file.unlink(missing_ok=True)
        elif self.file.exists():
            with safe_open(self.file, framework="pt") as best:
                self.perplexity = float(best.metadata()["perplexity"])

    def on_evaluate(self, args, state, control, metrics=None, model=None, **_):
        if metrics["eval_perplexity"] < self.perplexity:
            self.perplexity = metrics["eval_perplexity"]
            unfinished = self.file.with_suffix(".part")
            self.file.parent.mkdir(parents=True, exist_ok=True)
            save_model(model, str(unfinished), {"perplexity": repr(self.perplexity)})
            unfinished.replace(self.file)

    def on_train_end(self, args, state, control, model=None, **_):
        if self.file.exists():
            load_model(model, str(self.file))
            self.file.unlink()
        self.perplexity = 0.0
