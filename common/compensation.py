"""Error compensation: change a weight matrix column by column, and let the columns still to come make up for it.

This is the Optimal Brain Surgeon (Hassibi & Stork, 1993) as GPTQ and SparseGPT use it. Both run the loop below;
they differ only in what a column is replaced by: GPTQ rounds it to a grid, SparseGPT sets some of it to zero.
(Frantar et al., arXiv:2210.17323; Frantar & Alistarh, arXiv:2301.00774.)
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

BLOCK_COLUMNS = 128  # columns per lazy update of the columns to their right


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
        return (self.upper.triu() + self.upper.triu(1).T) * (2 / self.tokens)

    @property
    def norms(self) -> Tensor:
        """‖x_j‖₂ over all tokens, per input channel [in_features]: the diagonal alone, all that Wanda looks at."""
        return self.upper.diagonal().sqrt()

    @property
    def mean_absolute(self) -> Tensor:
        """mean |x| per input channel [in_features]."""
        return self.absolute / self.tokens


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
    """
    damped = hessian.clone()
    damped.diagonal().add_(damp_percent * damped.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


@one_thread()
def compensate(columns: Tensor, factor: Tensor, replace: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Replace the columns of a weight matrix one after the other, each one's error absorbed by those after it.

    columns: [in_features, out_features], the matrix transposed, so that a column is contiguous; overwritten.
    factor: upper Cholesky factor of the inverse Hessian (`inverse_cholesky`), in the same order of columns.
    replace(i, pending) returns what column i becomes [out_features]; pending holds column i and, after it, the
    columns up to the next multiple of 128, all as they stand now.
    """
    for start in range(0, len(columns), BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, len(columns))
        errors = torch.empty_like(columns[start:stop])
        for i in range(start, stop):
            replaced = replace(i, columns[i:stop])
            errors[i - start] = (columns[i] - replaced) / factor[i, i]
            columns[i + 1 : stop].addr_(factor[i, i + 1 : stop], errors[i - start], alpha=-1)
            columns[i] = replaced
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return columns


def output_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """Relative squared error ‖(W - Ŵ)X‖² / ‖WX‖² that an approximation makes at the layer's output."""
    difference, weight = weight.float() - approximation.float(), weight.float()
    return (((difference @ hessian) * difference).sum() / ((weight @ hessian) * weight).sum()).item()
