"""Win back what pruning cost: a short distillation from the dense model, with the zeros held at zero.

What is trained is small enough for a card that just holds the model: W + M ⊙ (B·A), a low-rank change (LoRA, Hu et
al., arXiv:2106.09685) under the mask of the weights that stayed. Merged, it is as sparse as before.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from common.methods.blocks import iter_linears
from common.methods.distillation import top_k_kd_loss
from common.methods.soft_labels import top_k_and_tail
from common.methods.streaming import Streamed


class MaskedLoRA(nn.Module):
    """W ↦ W + M ⊙ (B·A), M the weights that are not zero; at the beginning B = 0."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.mask = nn.Buffer(weight != 0)
        self.A = nn.Parameter(torch.randn(rank, weight.shape[1], device=weight.device) / weight.shape[1] ** 0.5)
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.mask * (self.B.to(weight.dtype) @ self.A.to(weight.dtype))


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


def teacher_labels(teacher: nn.Module, windows: Tensor, k: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The k likeliest tokens of every position with their log-probabilities, a pair per window, on the CPU.

    The teacher may be larger than the card: its blocks pass through one at a time.
    """
    labels = (top_k_and_tail(logits[:-1], k, temperature=1.0) for logits in Streamed(teacher, device).stream(windows))
    return [(ids.cpu(), log_probs.cpu()) for ids, log_probs in labels]


def in_random_order(count: int, size: int, steps: int) -> Iterator[list[int]]:
    """Which windows each step reads: all of them in a random order, then again in another."""
    order: list[int] = []
    for _ in range(steps):
        while len(order) < size:
            order += torch.randperm(count).tolist()
        batch, order = order[:size], order[size:]
        yield batch


def retrain(
    model: nn.Module,
    windows: Tensor,
    labels: list[tuple[Tensor, Tensor]],
    *,
    steps: int,
    batch_size: int,
    rank: int = 16,
    learning_rate: float = 1e-3,
) -> None:
    """Distil the dense model's `labels` on windows [n, seqlen] into a pruned model, in place; its zeros stay.

    Activations are computed again in the backward pass (checkpointing), so that only one block's are held.
    """
    trained = add_lora(model, rank)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)
    for batch in tqdm(in_random_order(len(windows), batch_size, steps), total=steps, desc="retrain", unit="step"):
        logits = model(input_ids=windows[batch].to(model.device), use_cache=False).logits[:, :-1].flatten(0, 1)
        ids, log_probs = (torch.cat(parts).to(model.device) for parts in zip(*(labels[i] for i in batch), strict=True))
        loss = top_k_kd_loss(logits, ids, log_probs, temperature=1.0) / len(logits)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.gradient_checkpointing_disable()
    model.eval()
    merge_lora(model)
