"""How much a weight matters, and the mask that keeps those that matter most."""

import torch
from torch import Tensor

from common.methods.compensation import finite


class InputNorms:
    """‖x_j‖₂ of every input channel j over all tokens: Wanda's statistic."""

    def __init__(self, in_features: int, like: Tensor):
        self.squares = torch.zeros(in_features, device=like.device)

    def add(self, inputs: Tensor) -> None:
        for chunk in inputs.split(4096):  # small enough to stay in a CPU's cache
            self.squares += chunk.float().square().sum(0)

    @property
    def norms(self) -> Tensor:
        """[in_features]"""
        return finite(self.squares).sqrt()


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """|W_ij| · ‖x_j‖₂ [out, in]: what removing one weight changes at the output (Wanda, equation 1)."""
    return weight.float().abs() * norms


def keep_highest(scores: Tensor, sparsity: float) -> Tensor:
    """True for all but the lowest round(sparsity · n) of the n scores in each row; of equal scores the first go."""
    removed = round(sparsity * scores.shape[-1])
    if removed == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(removed, dim=-1, keepdim=True).values  # to sort them all takes five times as long
    below, equal = scores < threshold, scores == threshold
    still_to_go = removed - below.sum(-1, keepdim=True)
    return ~(below | (equal & (equal.cumsum(-1, dtype=torch.int32) <= still_to_go)))
