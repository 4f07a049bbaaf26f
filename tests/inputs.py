"""Inputs that several tests need."""

import torch

from common.methods.compensation import Hessian


def correlated_inputs(features: int, tokens: int, seed: int) -> torch.Tensor:
    """Inputs like a language model's: correlated channels, a few of them much larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    size = torch.exp(torch.randn(features, generator=generator))
    return (torch.randn(tokens, features, generator=generator) @ (mixing + 0.3)) * size


def layer(rows: int, features: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A random weight matrix and the Hessian of correlated inputs."""
    weight = torch.randn(rows, features, generator=torch.Generator().manual_seed(100 + seed))
    statistic = Hessian(features, weight)
    statistic.add(correlated_inputs(features, 4 * features, seed))
    return weight, statistic.matrix
