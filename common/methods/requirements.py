"""What a step needs of a model, checked before the step changes anything.

Each need is a function that returns what is missing, in words, or None. What only a forward pass can tell (do the
blocks, called one by one, compute what the model does?) is proven by `capture.trace`.
"""

from collections.abc import Callable

import torch
from torch import nn

from common.methods.capture import walkable_blocks
from common.methods.experts import Matrix, left_out

Need = Callable[[nn.Module], str | None]


def known_layout(model: nn.Module) -> str | None:
    """No linear layer and no large share of the weights is in a layout that this course does not know how to read."""
    for block in walkable_blocks(model):
        if names := left_out(block.module):
            return f"{block.path}.{names[0]} holds weights in a layout not known here"
    return None


def finite_weights(model: nn.Module) -> str | None:
    """No weight of a layer that would be changed is NaN or inf."""
    for block in walkable_blocks(model):
        for name, linear in block.linears.items():
            low, high = linear.weight.detach().aminmax()  # both are NaN where one weight is
            if not torch.isfinite(low + high):
                return f"{block.path}.{name} has a weight that is NaN or inf"
    return None


def matrices_of_one_block(model: nn.Module) -> str | None:
    """No matrix belongs to two blocks: it would be changed twice, each time for the inputs of one of them."""
    first: dict[int, str] = {}
    for block in walkable_blocks(model):
        own = {id(_parameter(linear)): f"{block.path}.{name}" for name, linear in block.linears.items()}
        for parameter, name in own.items():
            if parameter in first:
                return f"{name} is the same matrix as {first[parameter]}"
        first |= own
    return None


def _parameter(linear: nn.Linear | Matrix) -> nn.Parameter:
    return getattr(linear.owner, linear.parameter) if isinstance(linear, Matrix) else linear.weight


def layers_of_their_own(model: nn.Module) -> str | None:
    """Every matrix is the weight of an `nn.Linear`: what a file format stores, and where activations can be rounded."""
    for block in walkable_blocks(model):
        for name, linear in block.linears.items():
            if isinstance(linear, Matrix):
                return f"{block.path}.{name} is no nn.Linear but part of a {type(linear.owner).__name__}"
    return None


EVERY_CHANGE = (known_layout, matrices_of_one_block, finite_weights)
NEEDS: dict[str, tuple[Need, ...]] = {
    "weights": EVERY_CHANGE,  # RTN, magnitude
    "calibration": EVERY_CHANGE,  # GPTQ, AWQ, Wanda, SparseGPT: `walk`
    "calibration by several processes": (layers_of_their_own, *EVERY_CHANGE),  # experts' tokens differ
    "rounded activations": (layers_of_their_own, *EVERY_CHANGE),  # W8A8
    "training on the grid": (layers_of_their_own, *EVERY_CHANGE),  # a parametrization belongs to a layer
    "layer files": (layers_of_their_own,),  # formats that store one layer under one name
}


def require_needs(model: nn.Module, step: str) -> None:
    """Raise ValueError, in one sentence, where `model` lacks what `step` (a key of NEEDS) needs."""
    for need in NEEDS[step]:
        if missing := need(model):
            raise ValueError(f"{type(model).__name__} does not have what this step needs ({step}): {missing}.")
