"""How much of a vector's size stands in its largest entries."""

import torch
from torch import Tensor


def kurtosis(values: Tensor) -> Tensor:
    """E[x⁴] / E[x²]² along the last dimension: 3 of a normal distribution, its length where one value holds it all."""
    square = values.float().square()
    return square.square().mean(-1) / square.mean(-1).square()


class TokenKurtosis:
    """The mean kurtosis of a linear layer's inputs, token by token: what `collect` may gather."""

    def __init__(self, in_features: int, like: Tensor):
        self.total, self.tokens = torch.zeros((), device=like.device), 0

    def add(self, inputs: Tensor) -> None:
        self.total += kurtosis(inputs).sum()
        self.tokens += len(inputs)

    @property
    def mean(self) -> float:
        return (self.total / self.tokens).item()
