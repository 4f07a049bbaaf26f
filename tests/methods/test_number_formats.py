"""Minifloats: their grids and rounding against torch's own types, their scales, and GPTQ on them."""

import copy

import pytest
import torch
from inputs import layer

from common.methods.compensation import output_error
from common.methods.number_formats import (
    FORMATS,
    FP8,
    INT4,
    INT8,
    MXFP4,
    NVFP4,
    gptq_on,
    gptq_on_model,
    round_inputs,
    rtn_on_model,
)
from common.methods.smoothquant import round_int8


def test_grids():
    assert NVFP4.grid().tolist() == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(FP8.grid(), codes[codes.isfinite()].unique())


def test_one_exponent_bit_is_an_integer():
    """As SmoothQuant's INT8 rounds, to the last bit, and a power of two times -7 … 7 and -127 … 127."""
    assert torch.equal(INT4.grid() * 2, torch.arange(-7.0, 8))
    assert torch.equal(INT8.grid() * 32, torch.arange(-127.0, 128))
    weight, _ = layer(24, 160)
    for values in (weight, weight.bfloat16()):
        assert torch.equal(INT8.round(values), round_int8(values))


def test_e4m3_rounds_as_torch_does():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20000, generator=generator) * torch.exp(3 * torch.randn(20000, generator=generator))
    grid = FP8.grid()
    values = torch.cat((values, grid, (grid[1:] + grid[:-1]) / 2)).clamp(-448, 448)  # halves too
    assert torch.equal(FP8.nearest(values), values.to(torch.float8_e4m3fn).float())


def test_e2m1_takes_the_nearest_and_of_two_the_even_one():
    values = torch.linspace(-8, 8, 4001)
    grid = NVFP4.grid()
    found = NVFP4.nearest(values)
    assert torch.equal((found - values).abs(), (values[:, None] - grid).abs().amin(1))
    assert NVFP4.nearest(torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])).tolist() == [0, 1, 1, 2, 2, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchao_casts_alike(dtype):
    """MXFP4 bit by bit. For NVFP4 it multiplies by the inverse of a scale: a half may go the other way."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    weight = layer(24, 160)[0].to(dtype)
    theirs = MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)
    assert torch.equal(MXFP4.round(weight.float()), theirs)
    whole = per_tensor_amax_to_scale(weight.abs().amax())
    theirs = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=whole).dequantize(torch.float32)
    found = NVFP4.round(weight.float())
    alike = torch.isclose(found, theirs, rtol=1e-5, atol=0)
    assert alike.float().mean() > 0.995
    step = NVFP4.scale(weight).repeat_interleave(16, dim=-1) * 2  # the widest of the grid
    assert ((found - theirs).abs() <= 1.001 * step).all()


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_rounding_twice_changes_nothing_and_the_scale_is_what_the_format_can_store(form):
    weight, _ = layer(24, 160)
    weight[3, :32] = 0
    rounded = form.round(weight)
    assert rounded.isfinite().all() and (rounded[3, :32] == 0).all()
    torch.testing.assert_close(form.round(rounded), rounded, rtol=2e-2 if form is NVFP4 else 0, atol=0)
    scale = form.scale(weight)
    if form is INT4:
        assert torch.equal(scale, scale.half().float().clamp(min=2.0**-100))
    if form is MXFP4:
        assert torch.equal(scale.log2(), scale.log2().round())
        assert (weight.unflatten(1, (-1, 32)).abs().amax(-1) < 8 * scale).all()  # 6 to 8 is clipped
    if form is NVFP4:
        ratio = scale / scale.max() * 448  # the largest block's is 448 in E4M3, by the scale of the tensor
        torch.testing.assert_close(FP8.nearest(ratio), ratio.where(scale > 1e-20, FP8.nearest(ratio)))


def test_bits():
    assert [form.bits for form in FORMATS] == [8, 8, 4.5, 4.25, 4.5]


def test_smaller_blocks_and_finer_scales_err_less():
    weight, _ = layer(24, 160)
    errors = [(form.round(weight) - weight).norm() for form in (FP8, NVFP4, MXFP4)]
    assert errors == sorted(errors)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_gptq_stays_on_the_grid_and_beats_rtn_at_the_output(form):
    weight, hessian = layer(24, 160)
    found = gptq_on(weight, hessian, form)
    scale = form.scale(weight).repeat_interleave(weight.shape[1] // form.scale(weight).shape[1], dim=1)
    torch.testing.assert_close(form.nearest(found / scale) * scale, found)
    assert output_error(weight, found, hessian) < 0.8 * output_error(weight, form.round(weight), hessian)
    independent = torch.eye(weight.shape[1])
    assert torch.equal(gptq_on(weight, independent, form), form.round(weight))  # nothing to compensate with


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="MXFP4 has blocks of 32; they do not divide 48"):
        MXFP4.round(torch.randn(4, 48))


def test_a_model_with_one_such_layer_is_refused_before_the_first_change(make_llama):
    model = make_llama(intermediate_size=72)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="NVFP4 has blocks of 16; they do not divide 72"):
        rtn_on_model(model, NVFP4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_models(llama):
    text = torch.randint(256, (4, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = llama(input_ids=text).logits
        distance = {}
        for name, form in {"FP8": FP8, "NVFP4": NVFP4}.items():
            for method, run in {"rtn": rtn_on_model, "gptq": lambda m, f: gptq_on_model(m, text, f)}.items():
                model = copy.deepcopy(llama)
                run(model, form)
                distance[name, method] = (model(input_ids=text).logits - expected).norm().item()
        round_inputs(model, NVFP4)
        distance["W4A4"] = (model(input_ids=text).logits - expected).norm().item()
    assert distance["FP8", "rtn"] < distance["NVFP4", "gptq"] < distance["NVFP4", "rtn"]
    assert distance["W4A4"] > distance["NVFP4", "gptq"]
