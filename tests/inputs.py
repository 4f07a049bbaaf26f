"""Inputs that several tests need."""

import torch


def correlated_inputs(features: int, tokens: int, seed: int) -> torch.Tensor:
    """Inputs like a language model's: correlated channels, a few of them much larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    size = torch.exp(torch.randn(features, generator=generator))
    return (torch.randn(tokens, features, generator=generator) @ (mixing + 0.3)) * size
