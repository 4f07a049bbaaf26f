"""The integer grid of a quantized matrix: a scale and a zero point for every group, and the search for its range."""

from dataclasses import dataclass

import torch
from torch import Tensor

SHRINK_STEPS = torch.linspace(1.0, 0.5, 26).tolist()  # clipping candidates, as fractions of the full range


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of every group: both [out_features, groups], float32 with integer zeros."""

    scale: Tensor
    zero: Tensor
    max_code: int

    def encode(self, weight: Tensor, group) -> Tensor:
        """Nearest codes for `weight`; `group` selects the group of each of its columns."""
        return nearest_codes(weight, self.scale[:, group], self.zero[:, group], self.max_code)

    def decode(self, codes: Tensor, group) -> Tensor:
        return (codes - self.zero[:, group]) * self.scale[:, group]


def nearest_codes(weight: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    return (weight / scale + zero).round_().clamp_(0, max_code)


def clipped_scale(w: Tensor, scale: Tensor, zero: Tensor, max_code: int, cost: Tensor) -> Tensor:
    """The multiple of `scale` with the lowest weighted squared error, chosen for each group."""
    best_error, best_scale = torch.full_like(scale, torch.inf), scale
    for shrink in SHRINK_STEPS:
        candidate = scale * shrink
        error = (w / candidate).add_(zero).round_().clamp_(0, max_code).sub_(zero).mul_(candidate).sub_(w)
        error = error.square_().mul_(cost).sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, candidate, best_scale)
    return best_scale
