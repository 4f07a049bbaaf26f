"""What Lab 3.2's checks compare answers with, where that would give the answer away in the notebook."""

from collections.abc import Callable

import torch
from torch import Tensor

from common.course.exercises_given import pruned


def linear_sparsities(shares: list[float], sparsity: float, span: float) -> Tensor:
    """Sparsities that fall linearly with the share of outliers over 2 · span, with this mean."""
    share = torch.tensor(shares)
    return sparsity - (share - share.mean()) / (share.max() - share.min()) * 2 * span


def pruning_error(forward: Callable, weights: list[Tensor], inputs: Tensor, sparsities: list[float]) -> float:
    """Relative squared error at a network's output when its blocks are pruned to these sparsities."""
    dense = forward(weights, inputs)
    changed = forward([pruned(w, s) for w, s in zip(weights, sparsities, strict=True)], inputs)
    return ((changed - dense).square().sum() / dense.square().sum()).item()


def best_without(weight: Tensor, matrix: Tensor, j: int) -> tuple[float, Tensor]:
    """The lowest error of all weights without input j, and these weights with a column of zeros in its place."""
    rest = [i for i in range(len(matrix)) if i != j]
    found = torch.zeros_like(weight, dtype=torch.float64)
    found[:, rest] = weight.double() @ torch.linalg.solve(matrix[rest][:, rest], matrix[rest]).T
    change = found - weight
    return ((change @ matrix) * change).sum().item(), found


def two_of_four(rng: torch.Generator, rows: int = 5, columns: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """A 2:4 weight, and the same written out by hand: values and metadata."""
    weight, values, metadata = torch.zeros(rows, columns).bfloat16(), [], torch.zeros(rows, columns // 8).long()
    for row in range(rows):
        for group in range(columns // 4):
            first, second = sorted(torch.randperm(4, generator=rng)[:2].tolist())
            numbers = (torch.randn(2, generator=rng).abs() + 0.5).bfloat16()
            weight[row, 4 * group + first], weight[row, 4 * group + second] = numbers
            values.append(numbers)
            metadata[row, group // 2] += (first + 4 * second) * 16 ** (group % 2)
    return weight, torch.cat(values).view(rows, -1), metadata
