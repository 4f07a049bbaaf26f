"""Vector quantization: eight weights at once, each eight the sum of entries of learned codebooks.

One codebook of 256 points in 8 dimensions costs 8 bits for 8 weights, two of them (the second holds what the first
leaves over, as in AQLM, arXiv:2401.06118) 2 bits a weight. The points are found by k-means, each weight counting as
the Hessian's diagonal says; then the matrix goes through GPTQ's column loop eight columns at a time (GPTVQ,
arXiv:2402.15319), so that later columns absorb what the choice has left.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.methods.blocks import walk
from common.methods.compensation import Hessian, compensate, inverse_cholesky, naming
from common.methods.stages import Stage

WIDTH, POINTS = 8, 256  # weights of a vector; points of a codebook, whose index is a byte
TRAINED_ON = 8192  # vectors that k-means looks at


@dataclass(frozen=True)
class VectorQuantized:
    """A matrix [out, in]: codes uint8 [books, out, in / 8], books float16 [books, 256, 8], a scale [out, 1] per row."""

    codes: Tensor
    books: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """The float32 matrix [out, in] that the codes stand for."""
        vectors = sum(book[codes.long()] for book, codes in zip(self.books.float(), self.codes, strict=True))
        return vectors.flatten(1) * self.scale.float()

    @property
    def size_bits(self) -> int:
        """What it takes to store: codes, codebooks and scales."""
        return 8 * (self.codes.nbytes + self.books.nbytes + self.scale.nbytes)


def weighted_kmeans(vectors: Tensor, weights: Tensor, points: int, steps: int, generator: torch.Generator) -> Tensor:
    """`points` centres [points, width] that minimize Σ weights · (vectors - nearest centre)²; both [n, width]."""
    centres = vectors[torch.randperm(len(vectors), generator=generator)[:points].to(vectors.device)].clone()
    for _ in range(steps):
        nearest = _cheapest(vectors, weights, centres)
        mass, moment = torch.zeros_like(centres), torch.zeros_like(centres)
        mass.index_add_(0, nearest, weights)
        moment.index_add_(0, nearest, weights * vectors)
        centres = torch.where(mass > 0, moment / mass.clamp(min=1e-20), centres)  # one that nobody chose stays
    return centres


def _cheapest(vectors: Tensor, weights: Tensor, centres: Tensor) -> Tensor:
    """Of each vector, the centre with the least Σ weights · (vector - centre)²: the term without a centre left out."""
    cost = weights @ centres.square().T - 2 * (weights * vectors) @ centres.T
    return cost.argmin(1)


def vector_gptq(
    weight: Tensor, hessian: Tensor, books: int = 2, *, steps: int = 6, damp_percent: float = 0.01, seed: int = 0
) -> VectorQuantized:
    """Quantize `weight` [out, in] with `books` codebooks of its own; hessian [in, in] as for `quantization.gptq`.

    Raises ValueError where the inputs are no multiple of 8, or the matrix has fewer than 256 vectors.
    """
    (rows, columns), generator = weight.shape, torch.Generator().manual_seed(seed)
    if columns % WIDTH or rows * columns < POINTS * WIDTH:
        raise ValueError(f"Codebooks need inputs in eights and {POINTS} vectors, got a matrix of {rows} × {columns}.")
    scale = weight.float().square().mean(1, keepdim=True).sqrt().clamp(min=1e-7).half()
    unit = weight.float() / scale.float()
    rest = unit.reshape(-1, WIDTH)
    cost = (hessian.diagonal() / hessian.diagonal().mean()).clamp(min=1e-6).reshape(-1, WIDTH).repeat(rows, 1)
    chosen = torch.randperm(len(rest), generator=generator)[:TRAINED_ON].to(weight.device)
    rest, cost, found = rest[chosen], cost[chosen], []
    for _ in range(books):
        found.append(weighted_kmeans(rest, cost, POINTS, steps, generator).half())
        rest = rest - found[-1].float()[_cheapest(rest, cost, found[-1].float())]

    factor = inverse_cholesky(hessian, damp_percent)
    moved, target = unit.T.clone(), torch.zeros_like(unit.T)  # [in, out], as the column loop wants it
    codes = torch.zeros(books, rows, columns // WIDTH, dtype=torch.uint8, device=weight.device)

    def begin(block: slice) -> None:
        """Choose for eight columns as they stand: the loop will have to absorb (w - c) U⁻¹, so that is made small."""
        inverse = torch.linalg.inv(factor[block, block])
        left = moved[block].T.clone()
        for number, book in enumerate(found):
            nearest = torch.cdist(left @ inverse, book.float() @ inverse).argmin(1)
            codes[number, :, block.start // WIDTH] = nearest.to(torch.uint8)
            left -= book.float()[nearest]
        target[block] = (moved[block].T - left).T

    compensate(moved, factor, _take, target, begin=begin, block_columns=WIDTH)
    return VectorQuantized(codes, torch.stack(found), scale)


def _take(column: Tensor, target: Tensor) -> Tensor:
    """What the column loop replaces a column by: what has been chosen for its eight."""
    return target.clone()


def vector_gptq_model(model: nn.Module, windows: Tensor, books: int = 2, **walk_options) -> dict[str, VectorQuantized]:
    """`vector_gptq` for every linear layer of the decoder blocks, in place; layers of one input share codebooks.

    windows: calibration tokens [nsamples, seqlen]. Returns the quantized matrices, by the names that share them.
    """
    quantized = {}

    def change(stage: Stage, statistic: Hessian) -> None:
        linears = list(stage.linears.values())
        with naming(stage.named):
            result = vector_gptq(torch.cat([linear.weight for linear in linears]), statistic.matrix, books)
        parts = result.dequantize().split([linear.out_features for linear in linears])
        for linear, part in zip(linears, parts, strict=True):
            linear.weight.copy_(part)
        quantized[" + ".join(stage.named)] = result

    walk(model, windows, Hessian, change, **{"description": f"codebooks x{books}"} | walk_options)
    return quantized
