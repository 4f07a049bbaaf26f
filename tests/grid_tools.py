"""What tells weights on a 4-bit grid from ordinary ones."""

import numpy as np
import torch

from common.methods.blocks import iter_linears
from common.methods.quantization import QuantizeConfig, rtn

BLOCK = 32  # weights that share a scale in Q4_1


def values_per_block(weight: torch.Tensor) -> torch.Tensor:
    """How many different values each block of 32 has."""
    ordered = np.sort(weight.detach().float().view(-1, BLOCK).numpy(), axis=1)  # PyTorch sorts short rows one by one
    return torch.from_numpy((ordered[:, 1:] != ordered[:, :-1]).sum(1) + 1)


def constant_share(model, group_size: int = BLOCK) -> float:
    """Share of RTN's squared error that is one constant per block of 32; 1 / 32 where errors are independent."""
    total = constant = 0.0
    for _, linear in iter_linears(model):
        rounded = rtn(linear.weight.detach(), QuantizeConfig(4, group_size, mse=False)).dequantize()
        error = (linear.weight.detach().float() - rounded).view(-1, BLOCK)
        total += error.square().sum().item()
        constant += BLOCK * error.mean(1).square().sum().item()
    return constant / total
