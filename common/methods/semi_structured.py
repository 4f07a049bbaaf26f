"""2:4 weights on sparse tensor cores: one product, cuSPARSELt's, called in ever better ways.

A layer's product is Y [tokens, out] = X Wᵀ, but cuSPARSELt wants the sparse matrix first: Yᵀ = W Xᵀ. The way in which
that becomes Y decides over a model's speed; `LADDER` is the order in which the course finds out:

    as it comes                 Yᵀ read as Y, column by column: the fast kernels of attention do not take it
    copied                      every product copied into rows
    copied for attention        only those that attention reads (q, k, v)
    + searched                  cuSPARSELt tries its algorithms for this shape and keeps the fastest
    + transposed by the kernel  the kernel itself writes rows, so that nothing is copied

(Mishra et al., arXiv:2104.08378; https://docs.nvidia.com/cuda/cusparselt.)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.course.private import compress_2_4, fastest_2_4, product_2_4
from common.measure.benchmarking import per_product
from common.methods.blocks import iter_linears

TOKENS = 8  # cuSPARSELt multiplies 16-bit matrices whose sides are multiples of this
Way = Callable[[Tensor, Tensor, int], Tensor]


def as_it_comes(packed: Tensor, x: Tensor, algorithm: int = 0) -> Tensor:
    """Y [tokens, out] of x [tokens, in], in columns: no work, and the caller pays for it."""
    return product_2_4(packed, x.T, algorithm).T


def copied(packed: Tensor, x: Tensor, algorithm: int = 0) -> Tensor:
    """Y in rows, by a second kernel that reads and writes all of it."""
    return as_it_comes(packed, x, algorithm).contiguous()


def transposed(packed: Tensor, x: Tensor, algorithm: int = 0) -> Tensor:
    """Y in rows, written so by the product's own kernel."""
    return product_2_4(packed, x.T, algorithm, transpose_result=True)


@dataclass(frozen=True)
class Rung:
    """How a model's sparse layers multiply."""

    attention: Way  # q, k and v
    others: Way
    search: bool = False  # for the fastest algorithm, once per shape


LADDER = {
    "as it comes": Rung(as_it_comes, as_it_comes),
    "copied": Rung(copied, copied),
    "copied for attention": Rung(copied, as_it_comes),
    "+ searched": Rung(copied, as_it_comes, search=True),
    "+ transposed by the kernel": Rung(transposed, transposed, search=True),
}
_found: dict[tuple, int] = {}  # algorithms, by what they were searched for


def fastest(packed: Tensor, x: Tensor, way: Way) -> int:
    """The algorithm that cuSPARSELt finds fastest for this shape, layout of x and way; no graph can record a search."""
    key = (packed.numel(), x.shape, x.stride(), way is transposed, x.device)
    if key not in _found:
        _found[key] = fastest_2_4(packed, x.T, transpose_result=way is transposed)
    return _found[key]


class SparseLinear(nn.Module):
    """A linear layer whose 2:4 weight is kept compressed. ValueError where it is not 2:4."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        if weight.shape[1] % 4 or (weight.unflatten(1, (-1, 4)) != 0).sum(-1).max() > 2:
            raise ValueError("More than two of four consecutive weights are not zero: prune to 2:4 first.")
        self.packed = nn.Buffer(compress_2_4(weight.contiguous()))  # half the values, and two bits where each stood
        self.bias = linear.bias
        self.way, self.search = as_it_comes, False

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(end_dim=-2)
        if not (rows.is_contiguous() or rows.T.is_contiguous()):  # PyTorch would take it for one of the two
            rows = rows.contiguous()
        padded = F.pad(rows, (0, 0, 0, -len(rows) % TOKENS)) if len(rows) % TOKENS else rows
        algorithm = fastest(self.packed, padded, self.way) if self.search else 0
        y = self.way(self.packed, padded, algorithm)[: len(rows)].unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def make_sparse(model: nn.Module) -> None:
    """Replace the linear layers of a model's blocks, pruned to 2:4, by `SparseLinear`, in place.

    ValueError where a layer is not 2:4, or is no nn.Linear (experts of a fused matrix).
    """
    for name, linear in list(iter_linears(model)):
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name} is multiplied by a kernel of its own, not by PyTorch's 2:4 product.")
        try:
            model.set_submodule(name, SparseLinear(linear))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def climb(model: nn.Module, rung: Rung) -> None:
    """Let a model of `make_sparse` multiply in this rung's ways."""
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLinear):
            layer.way = rung.attention if name.endswith(("q_proj", "k_proj", "v_proj")) else rung.others
            layer.search = rung.search


def keep_first_two(weight: Tensor) -> None:
    """Zero the last two of every four consecutive inputs, in place: 2:4 where only the time matters."""
    weight.unflatten(1, (-1, 4))[..., 2:].zero_()


def product_times(weight: Tensor, tokens: int) -> dict[str, float]:
    """Seconds of a product of `tokens` rows with a 2:4 weight [out, in]: dense, as it comes, at its best.

    From memory, not from the GPU's cache, and without Python in between (`per_product`).
    """
    x = torch.randn(-(-tokens // TOKENS) * TOKENS, weight.shape[1], device=weight.device, dtype=weight.dtype)
    packed = compress_2_4(weight)
    algorithm = fastest(packed, x, transposed)
    return {
        "dense": per_product(lambda w: F.linear(x[:tokens], w), torch.randn_like(weight)),
        "as it comes": per_product(lambda w: as_it_comes(w, x), packed),
        "searched, transposed by the kernel": per_product(lambda w: transposed(w, x, algorithm), packed),
    }
