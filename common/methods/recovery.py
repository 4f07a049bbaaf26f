"""Win back what pruning cost: a short distillation from the dense model, with the zeros held at zero.

What is trained is small enough for a card that just holds the model: W + M ⊙ (B·A), a low-rank change (LoRA, Hu et
al., arXiv:2106.09685) under the mask of the weights that stayed. Merged, it is as sparse as before.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from common.methods.blocks import iter_linears
from common.methods.soft_labels import SoftLabels, WindowDataset, to_store, top_k_and_tail
from common.methods.streaming import Streamed
from common.methods.training import DistillationTrainer, Objective, training_arguments


class MaskedLoRA(nn.Module):
    """W ↦ W + M ⊙ (B·A), M the weights that are not zero (W itself says which); at the beginning B = 0."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, weight.shape[1], device=weight.device) / weight.shape[1] ** 0.5)
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (weight != 0) * (self.B.to(weight.dtype) @ self.A.to(weight.dtype))


def add_lora(model: nn.Module, rank: int) -> list[nn.Parameter]:
    """Give every nn.Linear of the blocks a `MaskedLoRA`, and freeze all else; returns what is to be trained.

    The matrices of experts that a kernel of their own multiplies stay as they are.
    """
    model.requires_grad_(False)
    for linear in (linear for _, linear in iter_linears(model) if isinstance(linear, nn.Linear)):
        parametrize.register_parametrization(linear, "weight", MaskedLoRA(linear.weight, rank))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def merge_lora(model: nn.Module) -> None:
    """Make the changed weights the model's own; zeros are still zeros."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def teacher_labels(teacher: nn.Module, windows: Tensor, k: int, device: torch.device) -> SoftLabels:
    """The k likeliest tokens of every position with their log-probabilities, in main memory.

    The teacher may be larger than the card: its blocks pass through one at a time.
    """
    logits = Streamed(teacher, device).stream(windows)
    ids, log_probs = zip(*(to_store(*top_k_and_tail(row[:-1], k, temperature=1.0)) for row in logits), strict=True)
    return SoftLabels(np.stack(ids), np.stack(log_probs), temperature=1.0)


def retrain(
    model: nn.Module,
    windows: Tensor,
    labels: SoftLabels,
    *,
    steps: int,
    batch_size: int,
    folder: Path,
    device: torch.device,
    rank: int = 16,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> None:
    """Distil the dense model's `labels` on windows [n, seqlen] into a pruned model, in place; its zeros stay.

    It ends on `device`. Activations are computed again in the backward pass (checkpointing), so that only one block's
    are held: beside the weights there is room for little else.
    """
    add_lora(model, rank)
    arguments = training_arguments(
        folder,
        name="retrain",
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        evaluations=0,
        on_cpu=device.type == "cpu",
        weight_decay=0.0,
        gradient_checkpointing=True,
    )
    dtype = next(model.parameters()).dtype
    DistillationTrainer(model, arguments, WindowDataset(windows, labels), Objective(alpha=0.0), dtype=dtype).train()
    model.gradient_checkpointing_disable()
    model.eval()
    merge_lora(model)
