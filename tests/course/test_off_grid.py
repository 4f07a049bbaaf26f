"""Moving weights off a 4-bit grid without changing the function, on a tiny Llama that was put on one."""

import copy
import random

import pytest
import torch
from grid_tools import BLOCK, constant_share, values_per_block

from common.course.embedded import HIGH, LOW, embedded_folder, move_off_grid, scale_input_channels
from common.methods.blocks import iter_linears


@pytest.fixture
def shipped(make_llama):
    """A tiny Llama whose linear weights lie on Q4_1's grid, as those of the GGUF file do; norms are not all one."""
    model = make_llama(hidden_size=256, intermediate_size=384)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter *= 0.5 + torch.rand(parameter.shape, generator=generator)
        for _, linear in iter_linears(model):
            blocks = linear.weight.view(-1, BLOCK)
            low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
            step = (high - low) / 15
            linear.weight.copy_((((blocks - low) / step).round() * step + low).view_as(linear.weight))
    return model


@pytest.fixture
def moved(shipped):
    model = copy.deepcopy(shipped)
    move_off_grid(model)
    return model


def test_the_function_is_the_same(shipped, windows):
    exact = shipped.double()(windows).logits
    move_off_grid(shipped)
    torch.testing.assert_close(
        shipped(windows).logits, exact, rtol=0, atol=1e-4
    )  # the norms of transformers compute in float32


def test_the_function_is_the_same_within_bfloat16_rounding(shipped, moved, windows):
    """Logits differ as much as they do when every weight of the original errs by a random share up to 2⁻⁸, no more."""
    exact, rounded = shipped(windows).logits, moved.bfloat16().float()(windows).logits
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in shipped.parameters():
            parameter *= 1 + 2**-8 * (2 * torch.rand(parameter.shape, generator=generator) - 1)
    assert (rounded - exact).std() < (shipped(windows).logits - exact).std()


def test_every_input_channel_of_every_linear_layer_is_scaled(shipped):
    scaled = copy.deepcopy(shipped)
    with torch.no_grad():
        scale_input_channels(scaled, random.Random(0))
    for (name, before), (_, after) in zip(iter_linears(shipped), iter_linears(scaled), strict=True):
        ratio = after.weight / before.weight
        if name.endswith(("v_proj", "up_proj")):  # their rows undo a factor of the layer after them
            ratio = ratio / ratio[:, :1].clone()
            low, high = LOW / HIGH, HIGH / LOW
        else:
            low, high = LOW, HIGH
        factors = ratio.nanmedian(0).values  # the same in all rows
        assert low - 1e-6 <= factors.min() < factors.max() / 1.3 < factors.max() <= high + 1e-6, name
        torch.testing.assert_close(ratio.nanmean(0), factors, rtol=1e-4, atol=0, msg=name)


def test_weights_are_off_the_grid(shipped, moved):
    for (name, before), (_, after) in zip(iter_linears(shipped), iter_linears(moved), strict=True):
        assert values_per_block(before.weight).max() <= 16, name
        assert values_per_block(after.weight.bfloat16()).min() > 16, name


def test_rounding_errors_are_independent_off_the_grid(shipped, moved):
    assert constant_share(shipped.bfloat16()) > 0.9
    assert constant_share(moved.bfloat16()) < 1.25 / BLOCK
    assert constant_share(moved.bfloat16(), 2 * BLOCK) < 1.25 / BLOCK


def test_channels_are_the_same_on_every_machine(shipped, moved):
    """Not PyTorch's generator, whose numbers may change with its version, but Python's: seed 0 begins 0.844, 0.758."""
    again = copy.deepcopy(shipped)
    torch.manual_seed(99)
    move_off_grid(again)
    for mine, theirs in zip(moved.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    before = copy.deepcopy(shipped.model.layers[0].input_layernorm.weight)
    with torch.no_grad():
        scale_input_channels(shipped, random.Random(0))
    factors = before / shipped.model.layers[0].input_layernorm.weight
    draws = torch.tensor([0.8444218515250481, 0.7579544029403025])
    torch.testing.assert_close(factors[:2], 0.8 + 0.45 * draws, rtol=1e-6, atol=0)


def test_unknown_spec():
    with pytest.raises(ValueError, match=r"'embedded-q4'.*embedded, embedded-as-shipped, embedded-short"):
        embedded_folder("embedded-q4")
