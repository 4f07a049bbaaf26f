"""Error compensation: change a weight matrix column by column, and let the columns still to come make up for it.

This is the Optimal Brain Surgeon (Hassibi & Stork, 1993) as GPTQ and SparseGPT use it. Both run the loop below;
they differ only in what a column is replaced by: GPTQ rounds it to a grid, SparseGPT sets some of it to zero.
(Frantar et al., arXiv:2210.17323; Frantar & Alistarh, arXiv:2301.00774.)
"""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
from torch import Tensor

from common.measure.cuda_graph import graphed

BLOCK_COLUMNS = 128  # columns per lazy update of the columns to their right
Replace = Callable[..., Tensor]  # see `compensate`


class Unusable(ValueError):
    """What was gathered of a layer's inputs does not allow what is asked of it; `naming` adds the layer's name."""


@contextmanager
def naming(names: Iterable[str]):
    """Say which layer (the first of those that share an input) an `Unusable` statistic belongs to."""
    try:
        yield
    except Unusable as error:
        raise ValueError(f"{next(iter(names))}: {error}") from None


def finite(values: Tensor) -> Tensor:
    """`values`, gathered of a layer's inputs; raises Unusable where they are not numbers."""
    if not values.isfinite().all():
        bad = (~values.isfinite()).sum().item()
        raise Unusable(f"{bad} of its {len(values)} inputs were NaN or inf (or too large for float32) in calibration.")
    return values


class Hessian:
    """H = 2·XᵀX / n of a layer's inputs X [n, in_features]: the curvature of its squared output error, float32.

    Also keeps the mean absolute activation per input channel, which AWQ wants.
    """

    PANEL = 384  # H is symmetric: only panels on and above the diagonal are computed

    def __init__(self, in_features: int, like: Tensor):
        self.upper = torch.zeros(in_features, in_features, device=like.device)
        self.absolute = torch.zeros(in_features, device=like.device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        self.tokens += len(inputs)
        for chunk in inputs.split(4096):  # small enough to stay in a CPU's cache
            chunk = chunk.float()
            self.absolute += chunk.abs().sum(0)
            for start in range(0, chunk.shape[1], self.PANEL):
                stop = min(start + self.PANEL, chunk.shape[1])
                self.upper[:stop, start:stop].addmm_(chunk[:, :stop].T, chunk[:, start:stop])

    @property
    def matrix(self) -> Tensor:
        """H [in_features, in_features]."""
        finite(self.upper.diagonal())  # ‖x_j‖², and NaN or inf wherever an input was
        return (self.upper.triu() + self.upper.triu(1).T) * (2 / self.tokens)

    @property
    def norms(self) -> Tensor:
        """‖x_j‖₂ over all tokens, per input channel [in_features]: the diagonal alone, all that Wanda looks at."""
        return finite(self.upper.diagonal()).sqrt()

    @property
    def mean_absolute(self) -> Tensor:
        """mean |x| per input channel [in_features]."""
        return finite(self.absolute) / self.tokens


@contextmanager
def one_thread():
    """On a CPU, work on one column at a time is too small to share: threads would mostly wait for one another,
    and on a busy machine they wait a hundred times longer than the work takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def inverse_cholesky(hessian: Tensor, damp_percent: float) -> Tensor:
    """Upper Cholesky factor U of the damped inverse Hessian, H⁻¹ = UᵀU.

    Row i of U is what eliminating columns 0…i-1 leaves of row i of H⁻¹, divided by the root of its diagonal entry:
    all the inverses that GPTQ's column loop would need, from one factorization (GPTQ paper, section 3.3).
    Raises Unusable where the damped Hessian, or its inverse, is not positive definite.
    """
    damped = hessian.clone()
    damped.diagonal().add_(damp_percent * damped.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        dead = (hessian.diagonal() == 0).float().mean().item()
        todo = f"Raise damp_percent (try {min(10 * damp_percent, 0.5):g} for {damp_percent:g}) or take more text."
        if dead == 1:
            todo = "Is what feeds it pruned away? RTN and magnitude pruning need no calibration."
        raise Unusable(f"its Hessian has no inverse; {dead:.0%} of its inputs were always zero in calibration. {todo}")
    return upper


@one_thread()
def compensate(
    columns: Tensor,
    factor: Tensor,
    replace: Replace,
    *along: Tensor,
    begin: Callable[[slice], None] | None = None,
    block_columns: int = BLOCK_COLUMNS,
    drift: Tensor | None = None,
) -> Tensor:
    """Replace the columns of a weight matrix one after the other, each one's error absorbed by those after it.

    columns: [in_features, out_features], the matrix transposed, so that a column is contiguous; overwritten.
    factor: upper Cholesky factor of the inverse Hessian (`inverse_cholesky`), in the same order of columns.
    replace(column, *rows) returns what a column becomes [out_features]; rows are this column's rows of `along`, each
    [in_features, ...]. It must depend on nothing else: on a GPU the work on a block is recorded once and replayed.
    begin(block): called before a block of columns is worked on, which all blocks before it have compensated already.
    block_columns: columns per lazy update of those to their right; changes speed, not the result.
    drift: strictly upper triangular [in_features, in_features], in the same order of columns: every column, as it
    stands when its turn comes, also adds `drift[i, j]` of itself to each later column j (`common.methods.gptaq`).
    """
    work = _replay_block if columns.is_cuda else _compensate_block
    if drift is not None:  # of a column w = replaced + error · U_ii: the part of the error goes with the other error
        factor = factor - factor.diagonal()[:, None] * drift
    for start in range(0, len(columns), block_columns):
        block, rest = slice(start, min(start + block_columns, len(columns))), slice(start + block_columns, None)
        if begin:
            begin(block)
        within = None if drift is None else drift[block, block]
        errors = work(replace, columns[block], factor[block, block], within, *(tensor[block] for tensor in along))
        columns[rest].addmm_(factor[block, rest].T, errors, alpha=-1)
        if drift is not None:
            columns[rest].addmm_(drift[block, rest].T, columns[block])
    return columns


def _compensate_block(
    replace: Replace, columns: Tensor, factor: Tensor, drift: Tensor | None, *along: Tensor
) -> Tensor:
    """The loop over the columns of one block, in place; returns their errors, for the columns after the block."""
    errors = torch.empty_like(columns)
    for i, column in enumerate(columns):
        replaced = replace(column, *(tensor[i] for tensor in along))
        errors[i] = (column - replaced) / factor[i, i]
        columns[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        if drift is not None:
            columns[i + 1 :].addr_(drift[i, i + 1 :], replaced)
        column.copy_(replaced)
    return errors


def _replay_block(replace: Replace, columns: Tensor, *others: Tensor | None) -> Tensor:
    """`_compensate_block` from a recording.

    A block takes a thousand kernels of microseconds each; to start them one by one from Python takes ten times as long.
    """
    given = (columns, *others)
    shapes = tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in given)
    own, run = _recorded(replace, columns.device, shapes)
    for mine, tensor in zip(own, given, strict=True):
        if tensor is not None:
            mine.copy_(tensor)
    errors = run()
    columns.copy_(own[0])
    return errors


@lru_cache(maxsize=32)
def _recorded(
    replace: Replace, device: torch.device, shapes: tuple
) -> tuple[list[Tensor | None], Callable[[], Tensor]]:
    """Tensors of these shapes, and a function that does the work of `_compensate_block` on them."""
    own = [None if kind is None else torch.ones(kind[0], dtype=kind[1], device=device) for kind in shapes]
    return own, graphed(partial(_compensate_block, replace, *own), device)


def squared_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """tr(ΔW·H·ΔWᵀ) = 2/n · ‖ΔW·X‖²: what a change ΔW [out, in] of the weights does at the layer's output."""
    difference = difference.float()
    return ((difference @ hessian) * difference).sum()


def output_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """Relative squared error ‖(W - Ŵ)X‖² / ‖WX‖² that an approximation makes at the layer's output."""
    return (squared_error(weight.float() - approximation.float(), hessian) / squared_error(weight, hessian)).item()
