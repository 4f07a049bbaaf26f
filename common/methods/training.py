"""Training a student with `transformers.Trainer`: data, loss, validation and checkpoints."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from common.course import artifacts, checkpoint
from common.measure.cuda_graph import Body, graphed_body
from common.measure.evaluation import Baseline, evaluate
from common.methods.callbacks import FiniteGradients, KeepBest, Progress
from common.methods.distillation import (
    distillation_loss,
    hidden_state_loss,
    last_relations,
    minilm_loss,
    require_relations,
)
from common.methods.head_loss import DIVERGENCES, cross_entropy_and_gradient, head_loss, top_k_kd_and_gradient
from common.methods.output_head import output_head, require_output_head
from common.methods.proofs import require_same_when_loaded
from common.methods.soft_labels import WindowDataset

# Float32 weights and gradients are 8 bytes; the two moments another 8, or 2 where bitsandbytes keeps them in 8 bits.
BYTES_PER_PARAMETER = {"adamw_torch_fused": 16, "adamw_8bit": 10}


def make_optimizer(name: str, parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer that `transformers` calls so, for a loop of one's own."""
    if name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit, GlobalOptimManager

        GlobalOptimManager.get_instance().initialize()  # else a former Trainer's exceptions hold, by position
        return AdamW8bit(parameters, learning_rate)
    return torch.optim.AdamW(parameters, learning_rate, fused=True)


@dataclass(frozen=True)
class Objective:
    """What a student learns from."""

    alpha: float = 1.0  # weight of the hard labels; the teacher's soft labels get 1 - alpha
    temperature: float = 1.0
    minilm: float = 0.0  # weight of MiniLM's last-block relations, added to the rest
    hidden: float = 0.0  # weight of Minitron's last hidden states (`hidden_state_loss`), added to the rest
    divergence: str = "forward"  # of `head_loss.DIVERGENCES`; others than the forward KL need a teacher that computes


class DistillationTrainer(Trainer):
    """A Trainer whose loss is an `Objective`, from stored soft labels or from a teacher that computes along.

    dtype: what matrix products are computed in; weights and optimizer stay in float32.
    valid, against: validation windows, and the teacher's logits on them; each evaluation logs the student's
    perplexity and its KL divergence from the teacher, and the student ends with the weights that did best in it.
    """

    def __init__(
        self,
        student: nn.Module,
        arguments: TrainingArguments,
        data: WindowDataset,
        objective: Objective,
        *,
        dtype: torch.dtype = torch.float32,
        teacher: nn.Module | None = None,
        valid: Tensor | None = None,
        against: Baseline | None = None,
    ):
        if objective.alpha < 1 and teacher is None and data.soft_labels is None:
            raise ValueError("alpha < 1 learns from soft labels: give the dataset some, or the trainer a teacher.")
        if data.soft_labels is not None and data.soft_labels.temperature != objective.temperature:
            raise ValueError(
                f"The soft labels were made at temperature {data.soft_labels.temperature}, training asks for "
                f"{objective.temperature}: make them again (02-Prepare_Data) or train at their temperature."
            )
        if (objective.minilm or objective.hidden or objective.divergence != "forward") and teacher is None:
            raise ValueError(
                "MiniLM's attention, hidden states and other divergences than the forward KL are not in stored soft "
                "labels: give the trainer a teacher."
            )
        if objective.hidden and arguments.save_strategy != "no":
            raise ValueError("Checkpoints do not hold the projection of hidden states: train with checkpoints = 0.")
        for model in (student,) if teacher is None else (student, teacher):
            require_output_head(model)
            if objective.minilm:
                require_relations(model)
        watching = [FiniteGradients, Progress] + [KeepBest] * (arguments.eval_strategy != "no")
        given = {"train_dataset": data, "eval_dataset": valid, "callbacks": watching}
        arguments.use_cache = getattr(student.config, "use_cache", False)  # else Trainer writes False into the student
        super().__init__(student, arguments, data_collator=data.collate, **given)
        self.remove_callback(PrinterCallback)
        if arguments.gradient_checkpointing:  # here already, for who computes a step without `train`
            self.model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
        self.objective, self.compute_dtype, self.teacher = objective, dtype, teacher
        self.against = against
        self.bodies: dict[nn.Module, Callable[[Tensor], Tensor]] = {}  # of models in training, by model
        self.model_accepts_loss_kwargs = False  # our loss is a mean over the batch already
        self.projection = None  # from the student's hidden states to the teacher's, where they are compared
        if objective.hidden:
            widths = (m.config.get_text_config().hidden_size for m in (self.model, teacher))
            self.projection = nn.Linear(*widths, bias=False, device=self.model.device)

    def autocast(self):
        wanted = self.compute_dtype != torch.float32
        return torch.autocast(self.args.device.type, self.compute_dtype, enabled=wanted, cache_enabled=False)

    def train(self, *args, **kwargs):
        """Train, then let go of the CUDA graphs and the memory of all activations that they hold."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.bodies.clear()

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.projection is not None:
            optimizer.add_param_group({"params": self.projection.parameters()})
        return optimizer

    def save_model(self, *args, **kwargs):
        """A checkpoint to resume from, whatever the generation settings."""
        with checkpoint.default_generation(self.model):
            super().save_model(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
        """Mean loss over the batch's tokens that have a predecessor."""
        labels, soft = inputs["input_ids"][:, 1:].flatten(), ()
        with self.autocast():
            hidden, relations = self._forward(model, inputs["input_ids"])
            if self.teacher is not None:
                with torch.no_grad():
                    taught, teacher_relations = self._forward(self.teacher, inputs["input_ids"])
        if self.objective.alpha < 1 and self.objective.divergence == "forward" and "top_ids" in inputs:
            soft = inputs["top_ids"].flatten(0, 1), inputs["log_probs"].flatten(0, 1)
        elif self.objective.alpha < 1:
            soft = (taught,)
        head = output_head(model).to(self.compute_dtype)
        total = head_loss(hidden.to(self.compute_dtype), head, self._loss_and_gradient, labels, *soft) / len(labels)
        if self.objective.minilm:
            total = total + self.objective.minilm * minilm_loss(relations, teacher_relations)
        if self.projection is not None:
            total = total + self.objective.hidden * hidden_state_loss(self.projection(hidden.float()), taught)
        return total

    def _loss_and_gradient(self, logits: Tensor, labels: Tensor, *soft: Tensor) -> tuple[Tensor, Tensor]:
        """The objective's loss and gradient; soft: stored labels (ids, log_probs), or the teacher's hidden states."""
        alpha, temperature = self.objective.alpha, self.objective.temperature
        if not soft:
            return cross_entropy_and_gradient(logits, labels)
        if len(soft) == 2:
            divergence, gradient = top_k_kd_and_gradient(logits, *soft, temperature)
        else:
            apart = DIVERGENCES[self.objective.divergence]
            divergence, gradient = apart(logits, output_head(self.teacher)(*soft), temperature)
        if not alpha:
            return divergence, gradient
        hard, to_answer = cross_entropy_and_gradient(logits, labels)
        return distillation_loss(hard, divergence, alpha), gradient.lerp_(to_answer, alpha)

    def _forward(self, model, ids: Tensor) -> tuple[Tensor, tuple | None]:
        """Last hidden states of every position that predicts a token [tokens, hidden], and MiniLM's relations."""
        if self.objective.minilm:
            out = Body(model).base(input_ids=ids, use_cache=False, output_hidden_states=True)
            hidden, relations = out.last_hidden_state, last_relations(model, out.hidden_states[-2])
        else:
            if model not in self.bodies:
                recomputed = model.training and self.args.gradient_checkpointing  # which no graph can hold
                self.bodies[model] = Body(model) if recomputed else graphed_body(model, ids)
            hidden, relations = self.bodies[model](ids), None
        return hidden[:, :-1].flatten(0, 1), relations

    def evaluate(self, *_, **__) -> dict[str, float]:
        """Perplexity on the validation windows, and KL divergence from the teacher; logged like any evaluation."""
        with self.autocast():
            quality = evaluate(self.model, self.eval_dataset, against=self.against)
        metrics = {"eval_perplexity": quality.perplexity}
        if quality.kl is not None:
            metrics["eval_kl"] = quality.kl
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class OneCard(TrainingArguments):
    """On a second card Trainer would wrap the model in DataParallel."""

    @property
    def n_gpu(self) -> int:
        return min(super().n_gpu, 1)


def training_arguments(
    folder: Path,
    *,
    name: str,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    evaluations: int,
    on_cpu: bool,
    checkpoints: int = 0,
    weight_decay: float = 0.1,
    optimizer: str = "adamw_torch_fused",
    gradient_checkpointing: bool = False,
) -> TrainingArguments:
    """AdamW with warm-up over a tenth of the steps and cosine decay to zero.

    optimizer: transformers' name of another one, such as "adamw_8bit" (bitsandbytes). gradient_checkpointing: compute
    activations again in the backward pass instead of keeping them.
    """
    return OneCard(
        output_dir=str(folder),
        run_name=name,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        weight_decay=weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        optim=optimizer,
        gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if gradient_checkpointing else None,
        seed=seed,
        use_cpu=on_cpu,
        eval_strategy="steps" if evaluations else "no",
        eval_steps=max(1, steps // evaluations) if evaluations else None,
        save_strategy="steps" if checkpoints else "no",
        save_steps=max(1, steps // checkpoints) if checkpoints else 500,
        save_total_limit=2,
        logging_steps=max(1, steps // 50),
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        disable_tqdm=True,
        report_to=[],
    )


def history(trainer: Trainer, key: str) -> dict[int, float]:
    """step → value of what a trainer logged under `key`, such as "loss", "eval_perplexity" or "eval_kl"."""
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


def save_student(
    folder: Path, student: nn.Module, tokenizer, *, method: str, settings: dict, parent: str
) -> artifacts.Artifact:
    """Save a trained model with its tokenizer, in bfloat16: the precision that it will be used in.

    Raises ValueError, and saves nothing, when what would be loaded is another model.
    """

    def write(path: Path) -> None:
        saved = copy.deepcopy(student).to("cpu", torch.bfloat16)
        checkpoint.save_model(path, saved)
        tokenizer.save_pretrained(path)
        require_same_when_loaded(path, student)

    size = 2 * sum(p.numel() for p in student.parameters())
    return artifacts.save(folder, write, method=method, settings=settings, parent=parent, expected_bytes=size)
