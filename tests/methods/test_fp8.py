"""FP8 products: what is simulated is what PyTorch's own product computes."""

import pytest
import torch

from common.methods.fp8 import Fp8Linear, fp8_cores, to_fp8
from common.methods.number_formats import FP8


@pytest.mark.parametrize("tokens", [1, 5, 48])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_layer_is_the_product_of_the_rounded_matrices(device, tokens):
    """Unlike rows, in bfloat16, whose products round to 8 bits."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator) * torch.logspace(-2, 1, 32)[:, None]
    x = torch.randn(tokens, 64, generator=generator) * torch.logspace(1, -2, tokens)[:, None]
    weight, x = weight.bfloat16().to(device), x.bfloat16().to(device)
    if device == "cuda" and not fp8_cores(x.device):
        pytest.skip("this GPU has no FP8 tensor cores")
    found = Fp8Linear(weight)(x)
    expected = FP8.round(x.double()) @ FP8.round(weight.double()).T
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=2**-12 * expected.abs().max().item())
    assert (found.double() - x.double() @ weight.double().T).norm() > 4 * (found.double() - expected).norm()


def test_transformers_rounds_rows_alike():
    """Its FP8 layers of compressed-tensors checkpoints."""
    from transformers.integrations.compressed_tensors import quantize_fp8_per_row

    values = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    (codes, scale), (theirs, their_scale) = to_fp8(values), quantize_fp8_per_row(values)
    assert torch.equal(codes.float(), theirs.float()) and torch.equal(scale.flatten(), their_scale.flatten())


def test_codes_and_scales_are_those_of_the_format():
    values = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    values[2] = 0
    codes, scale = to_fp8(values)
    torch.testing.assert_close(codes.float() * scale, FP8.round(values), rtol=1e-6, atol=0)
    assert codes.float().abs().amax(1).tolist() == [448, 448, 0, 448, 448, 448]
