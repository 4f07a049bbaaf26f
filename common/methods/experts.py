"""Every matrix of a block that multiplies activations, whatever it is stored in.

Most are the weight of an `nn.Linear`. In a mixture of experts, transformers keeps those of all experts in one 3-D
parameter, and a fused kernel multiplies by them; GPT-2's `Conv1D` stores its weight the other way round. A `Matrix`
presents such a piece as if it were a linear layer of its own: its weight [out, in] is a view, so that what a method
writes arrives in the model. `unfused` lets the model's own code run while each product with such a piece goes through
its `Matrix`, whose hooks thus see the tokens that were routed to it, and no others.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
STORED_IN_BY_OUT = {"AriaGroupedExpertsGemm", "Llama4TextExperts"}  # each matrix [in, out]: x @ W
STORED_OUT_BY_IN = {"JetMoeParallelExperts", "InklingSharedExperts"}  # each matrix [out, in]: F.linear(x, W)
TOO_LARGE = 0.1  # share of a block's weights that no matrix may leave out


class Matrix(nn.Module):
    """One matrix inside a larger parameter, with the interface of a bias-free `nn.Linear`.

    It is the `index`-th of `count` equal pieces along the parameter's first dimension; `transposed`: stored [in, out].
    """

    def __init__(self, owner: nn.Module, parameter: str, index: int, count: int, transposed: bool):
        super().__init__()
        object.__setattr__(self, "owner", owner)  # no submodule: the owner moves and saves its parameter
        self.parameter, self.index, self.count, self.transposed = parameter, index, count, transposed
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:
        """A view [out_features, in_features] of the parameter as it is now, on the device where it is now."""
        stored = getattr(self.owner, self.parameter)
        stored = stored.view(self.count, -1, stored.shape[-1])[self.index]
        return stored.T if self.transposed else stored

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def block_linears(block: nn.Module) -> dict[str, nn.Linear | Matrix]:
    """The matrices of a block by name: `mlp.up_proj` of a layer, `mlp.experts.3.down_proj` of the fourth expert.

    A router that derives from `nn.Linear` and returns its choice is none: like other routers it stays as it is.
    Raises ValueError where there is none, and where one is no plain matrix of numbers of 16 bits or more.
    """
    found: dict[str, nn.Linear | Matrix] = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            weight = getattr(module, "weight", None)
            if not (isinstance(weight, Tensor) and type(weight.data) is Tensor and weight.dtype in FLOATS):
                raise ValueError(f"{name} is quantized already ({type(module).__name__}): load the original weights.")
            if type(module).forward is nn.Linear.forward or _multiplies(module):
                found[name] = module
        else:
            found |= {f"{name}.{piece}".rstrip("."): matrix for piece, matrix in _pieces(module)}
    if not found:
        raise ValueError(f"{type(block).__name__} has no torch.nn.Linear layer: is the model already quantized?")
    return found


@torch.no_grad()
def _multiplies(module: nn.Linear) -> bool:
    """Whether a subclass with a forward of its own (Falcon's; not Llama 4's router) still computes x·Wᵀ + b."""
    x = torch.linspace(-1, 1, module.in_features, device=module.weight.device, dtype=module.weight.dtype)[None]
    tolerance = torch.finfo(x.dtype).eps ** 0.5
    try:
        return torch.allclose(module(x), F.linear(x, module.weight, module.bias), rtol=tolerance, atol=tolerance)
    except (RuntimeError, TypeError):  # it wants another shape, or returns something else
        return False


def _pieces(module: nn.Module) -> Iterator[tuple[str, Matrix]]:
    """The matrices that a module keeps in a parameter of another shape, by name."""
    kind = type(module).__name__
    if isinstance(module, Conv1D):
        yield "", Matrix(module, "weight", 0, 1, transposed=True)
    elif kind == "DbrxExpertGLU":  # all experts below one another
        for index in range(module.moe_num_experts):
            for name in ("w1", "v1", "w2"):
                yield f"{index}.{name}", Matrix(module, name, index, module.moe_num_experts, transposed=name == "w2")
    elif kind in STORED_IN_BY_OUT | STORED_OUT_BY_IN or hasattr(module, "is_transposed"):
        # `is_transposed` is what transformers' `use_experts_implementation` sets, whose layouts are otherwise alike
        transposed = getattr(module, "is_transposed", kind in STORED_IN_BY_OUT)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                for index in range(len(parameter)):
                    yield f"{index}.{name}", Matrix(module, name, index, len(parameter), transposed)


def left_out(block: nn.Module) -> list[str]:
    """Weights that no matrix covers, in a layout not known here: a large share of a block, or any linear layer.

    Layers that derive from `nn.Linear` and multiply otherwise: routers stay as they are, others (DeepSeek V4 multiplies
    groups of inputs by parts of one matrix) would be forgotten.
    """
    covered, linears = set(), block_linears(block)
    modules = [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    others = [name for name, module in modules if name not in linears and "Router" not in type(module).__name__]
    for linear in linears.values():
        covered.add(id(getattr(linear.owner, linear.parameter) if isinstance(linear, Matrix) else linear.weight))
    sizes = {name: (p, p.numel()) for name, p in block.named_parameters() if p.squeeze().dim() >= 2}
    total = sum(size for _, size in sizes.values())
    return others + [name for name, (p, size) in sizes.items() if id(p) not in covered and size > TOO_LARGE * total]


class _Products(TorchFunctionMode):
    """Sends every product with a piece of a parameter through the `Matrix` that stands for the piece."""

    TIMES = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)

    def __init__(self, pieces: list[Matrix]):
        super().__init__()
        self.at = {piece.weight.data_ptr(): piece for piece in pieces}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.linear and (piece := self.piece(args[1])):
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            product = self.through(piece, args[0], args[1])
            return product if bias is None else product + bias
        if function in self.TIMES and (piece := self.piece(args[1])):
            return self.through(piece, args[0], args[1].T)
        if function is torch.addmm and (piece := self.piece(args[2])):
            return args[0] + self.through(piece, args[1], args[2].T)
        if function is torch.bmm and self.piece(args[1]):  # every expert at once: x [experts, tokens, in]
            pairs = zip(args[0], args[1], strict=True)
            return torch.stack([self.through(self.piece(stored), x, stored.T) for x, stored in pairs])
        return function(*args, **kwargs)

    def piece(self, weight) -> Matrix | None:
        return self.at.get(weight.data_ptr()) if isinstance(weight, Tensor) else None

    def through(self, piece: Matrix, x: Tensor, weight: Tensor) -> Tensor:
        own = piece.weight
        if (weight.shape, weight.stride()) != (own.shape, own.stride()):
            kind = type(piece.owner).__name__
            raise ValueError(f"{kind}.{piece.parameter} is multiplied in another layout than this course knows.")
        return piece(x)


@contextmanager
def unfused(linears: dict[str, nn.Linear | Matrix]):
    """Within it, whatever is multiplied by one of the matrices passes through that matrix's hooks."""
    pieces = [linear for linear in linears.values() if isinstance(linear, Matrix)]
    if not pieces:
        yield
        return
    with _Products(pieces):
        yield


@contextmanager
def one_by_one(model: nn.Module):
    """Let a mixture of experts loop over its experts, as its authors wrote it, instead of calling a fused kernel."""
    if not any(hasattr(module, "is_transposed") for module in model.modules()):
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
