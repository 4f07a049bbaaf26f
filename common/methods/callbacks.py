"""What watches a training: a guard against NaN, and a progress bar."""

from pathlib import Path

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
