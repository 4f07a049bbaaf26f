"""Codebooks: k-means finds what is there, the column loop stores what it says, and it beats the scalar grid."""

import copy

import pytest
import torch
from inputs import layer

from common.methods.blocks import iter_linears
from common.methods.codebook import POINTS, WIDTH, vector_gptq, vector_gptq_model, weighted_kmeans
from common.methods.compensation import output_error
from common.methods.quantization import QuantizeConfig, gptq


def test_kmeans_finds_the_clusters():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(16, WIDTH, generator=generator)
    vectors = centres.repeat(40, 1) + 0.01 * torch.randn(640, WIDTH, generator=generator)
    found = weighted_kmeans(vectors, torch.ones_like(vectors), 64, 20, generator)  # more points than clusters
    assert (torch.cdist(centres, found).amin(1) < 0.05).all()


def test_kmeans_obeys_its_weights():
    """One point for two values, one of which counts three times as much."""
    vectors, weights = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [3.0]])
    found = weighted_kmeans(vectors, weights, 1, 3, torch.Generator().manual_seed(0))
    assert found.item() == pytest.approx(0.75)


def test_every_kmeans_step_lowers_the_error():
    generator = torch.Generator().manual_seed(1)
    vectors, weights = torch.randn(2000, WIDTH, generator=generator), torch.rand(2000, WIDTH, generator=generator)

    def error(steps):
        centres = weighted_kmeans(vectors, weights, 32, steps, torch.Generator().manual_seed(2))
        difference = vectors[:, None] - centres
        return (weights[:, None] * difference.square()).sum(-1).amin(1).sum().item()

    errors = [error(steps) for steps in (0, 1, 2, 5, 10)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_more_books_come_nearer_and_the_error_is_compensated():
    weight, hessian = layer(96, 64)
    errors = [output_error(weight, vector_gptq(weight, hessian, books).dequantize(), hessian) for books in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)
    alone = vector_gptq(weight, hessian.diagonal().diag(), 2).dequantize()  # nothing to compensate with
    assert errors[1] < 0.7 * output_error(weight, alone, hessian)


def test_two_bits_beat_the_scalar_grid_of_more_bits():
    weight, hessian = layer(rows=2048, features=256)
    vectors = vector_gptq(weight, hessian, 2)
    grid = QuantizeConfig(bits=2, group_size=64)
    scalar = gptq(weight, hessian, grid)
    assert scalar.size_bits / weight.numel() == 2 + 18 / 64  # codes, scales and zero points
    assert vectors.size_bits < scalar.size_bits  # codes, codebooks and a scale per row
    errors = [output_error(weight, found.dequantize(), hessian) for found in (vectors, scalar)]
    assert errors[0] < errors[1]


def test_what_is_stored_is_what_the_model_computes_with(llama):
    text = torch.randint(256, (4, 24), generator=torch.Generator().manual_seed(3))
    model = copy.deepcopy(llama)
    quantized = vector_gptq_model(model, text, books=1)
    linears = dict(iter_linears(model))
    assert sorted(name for names in quantized for name in names.split(" + ")) == sorted(linears)
    for names, stored in quantized.items():
        weights = torch.cat([linears[name].weight for name in names.split(" + ")])
        assert torch.equal(weights, stored.dequantize())
        assert stored.codes.dtype == torch.uint8
        assert stored.books.shape == (1, POINTS, WIDTH)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="inputs in eights"):
        vector_gptq(torch.randn(512, 12), torch.eye(12))
    with pytest.raises(ValueError, match="256 vectors"):
        vector_gptq(torch.randn(8, 64), torch.eye(64))
