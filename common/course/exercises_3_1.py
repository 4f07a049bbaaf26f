"""What Lab 3.1's checks compare answers with, where that would give the answer away in the notebook."""

import math

import torch
from torch import Tensor

from common.course.exercises import error_at_output
from common.course.exercises_given import quantized


def codes_for(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The codes nearest to weights, as floats; scale and zero of every weight."""
    return (weight / scale + zero).round().clamp(0, 2**bits - 1)


def awq_weights(weight: Tensor, inputs: Tensor, alpha: float, powers_first: bool = False) -> Tensor:
    """The 3-bit weights in groups of 16 that inference sees with this α; powers_first: the mistaken order."""
    size = inputs.abs()
    scale = (size**alpha).mean(0) if powers_first else size.mean(0) ** alpha
    return quantized(weight * scale, 3, 16) / scale


def awq_errors(weight: Tensor, inputs: Tensor, alphas: list[float]) -> dict[float, float]:
    """The error at the output with each α."""
    return {alpha: error_at_output(weight, awq_weights(weight, inputs, alpha), inputs) for alpha in alphas}


def hessian_patient(rng: torch.Generator, dead: int) -> tuple[dict, Tensor]:
    """A Hessian with dead channels, and what it should be."""
    inputs = torch.randn(100, 12, generator=rng) * torch.linspace(0.1, 2, 12)
    inputs[:, torch.randperm(12, generator=rng)[:dead]] = 0
    matrix = inputs.T @ inputs / 50
    diagonal = matrix.diagonal()
    wanted = torch.where(diagonal == 0, diagonal[diagonal > 0].mean(), diagonal)
    return {"kind": "hessian", "hessian": matrix}, matrix - torch.diag(diagonal) + torch.diag(wanted)


def log_patient(rng: torch.Generator, sick: bool) -> tuple[dict, float]:
    """A record of a perplexity, and what it should be."""
    tokens = int(torch.randint(20_000, 90_000, (), generator=rng))
    words, nll = round(tokens / 1.274), tokens * (1.5 + torch.rand((), generator=rng).item())
    shown = round(math.exp(nll / (words if sick else tokens)), 2)
    record = {"kind": "log", "nll": nll, "tokens": tokens, "words": words, "perplexity": shown}
    return record, math.exp(nll / tokens)
