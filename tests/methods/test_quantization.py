"""Quantization: the grid, RTN, and GPTQ against a slow and obvious NumPy version of the same algorithm."""

import dataclasses
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from inputs import correlated_inputs, layer
from torch import nn

from common.methods import compensation, quantization
from common.methods.blocks import collect, iter_linears
from common.methods.compensation import Hessian, output_error
from common.methods.quantization import QuantizeConfig, find_grid, gptq, gptq_model, gptq_once, rtn, rtn_model

PLAIN = QuantizeConfig(bits=4, group_size=16, sym=False, desc_act=False, mse=False)


# --- GPTQ against brute force --------------------------------------------------------------------------------------


def brute_force_obq(weight, hessian, scale, zero, config: QuantizeConfig) -> np.ndarray:
    """Optimal Brain Quantization in a fixed column order, float64, a linear system solved anew for every column.

    Column c is rounded, which changes it by d_c. Changing the columns F not yet rounded by d_F gives the output error
    d H dᵀ, which is least for d_F = -d_c · H_cF · H_FF⁻¹.
    """
    w, h = weight.double().numpy().copy(), hessian.double().numpy()
    h = h + config.damp_percent * np.diag(h).mean() * np.eye(len(h))
    scale, zero = scale.double().numpy(), zero.double().numpy()
    order = np.argsort(-np.diag(hessian.numpy()), kind="stable") if config.desc_act else np.arange(len(h))
    codes = np.zeros(w.shape, dtype=np.int64)
    for position, c in enumerate(order):
        group = c // config.group_size
        codes[:, c] = np.clip(np.round(w[:, c] / scale[:, group] + zero[:, group]), 0, 2**config.bits - 1)
        change = (codes[:, c] - zero[:, group]) * scale[:, group] - w[:, c]
        free = order[position + 1 :]
        if len(free):
            w[:, free] -= np.outer(change, np.linalg.solve(h[np.ix_(free, free)], h[free, c]))
    return codes


@pytest.mark.parametrize("features", [32, 128, 160], ids=lambda n: f"{n}columns")  # BLOCK_COLUMNS is 128
@pytest.mark.parametrize("desc_act", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize(("sym", "mse"), [(False, False), (True, False), (False, True)])
def test_gptq_is_optimal_brain_quantization(features, desc_act, sym, mse):
    assert compensation.BLOCK_COLUMNS == 128, "choose the sizes anew: one must cross a block boundary"
    config = QuantizeConfig(bits=3, group_size=16, sym=sym, desc_act=desc_act, mse=mse)
    weight, hessian = layer(rows=12, features=features)
    result = gptq(weight, hessian, config)
    expected = brute_force_obq(weight, hessian, result.scale, result.zero, config)
    # float32 against float64: a value halfway between two codes may fall either way, and takes its row with it
    same = (result.codes.numpy() == expected).mean()
    assert same > 0.99
    # ... which is a statement only because the codes are not simply the nearest ones
    assert (rtn(weight, config).codes.numpy() == expected).mean() < 0.9


def test_block_size_does_not_change_the_result(monkeypatch):
    weight, hessian = layer(rows=12, features=96)
    work, sizes, results = compensation._compensate_block, [], []

    def counted(replace, columns, *others):
        sizes.append(len(columns))
        return work(replace, columns, *others)

    monkeypatch.setattr(compensation, "_compensate_block", counted)
    for columns in (1, 7, 32, 96, 128):
        monkeypatch.setattr(quantization, "compensate", partial(compensation.compensate, block_columns=columns))
        results.append(gptq(weight, hessian, PLAIN).codes)
        assert max(sizes) == min(columns, 96)
        assert sum(sizes) == 96
        sizes.clear()
    assert all((codes == results[0]).float().mean() > 0.99 for codes in results)


def test_the_grid_is_static_and_is_the_stored_one():
    """Scales are those of the original weights (not of weights already updated), in float16."""
    weight, hessian = layer(rows=8, features=64)
    for config in (PLAIN, QuantizeConfig(group_size=16)):
        result = gptq(weight, hessian, config)
        grid = find_grid(weight, config, importance=hessian.diagonal())
        assert result.scale.dtype == torch.float16
        assert torch.equal(result.scale.float(), grid.scale)  # rounded to float16 before it is used
        assert torch.equal(result.zero.float(), grid.zero)


def test_identity_hessian_gives_rtn():
    """Independent inputs of equal size: there is nothing to compensate."""
    weight, _ = layer(rows=16, features=160)
    for sym, mse, desc_act in itertools.product([True, False], repeat=3):
        config = QuantizeConfig(bits=4, group_size=32, sym=sym, mse=mse, desc_act=desc_act)
        ours, nearest = gptq(weight, torch.eye(160), config), rtn(weight, config)
        assert torch.equal(ours.codes, nearest.codes)
        assert torch.equal(ours.scale, nearest.scale)
        assert torch.equal(ours.zero, nearest.zero)


def test_rows_do_not_influence_each_other():
    """Layers that read the same input may be stacked."""
    weight, hessian = layer(rows=24, features=64)
    config = QuantizeConfig(bits=4, group_size=16)
    together = gptq(weight, hessian, config).codes
    apart = torch.cat([gptq(part, hessian, config).codes for part in weight.split([4, 12, 8])])
    assert (together == apart).float().mean() > 0.99


def test_a_channel_that_is_always_zero_is_survived():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    inputs = correlated_inputs(32, 128, seed=0)
    inputs[:, 5] = 0
    statistic = Hessian(32, weight)
    statistic.add(inputs)
    result = gptq(weight, statistic.matrix, QuantizeConfig(group_size=16)).dequantize()
    assert result.isfinite().all()
    assert output_error(weight, result, statistic.matrix) < 0.01


# --- GPTQ against RTN ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 64])
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("mse", [False, True], ids=["minmax", "mse"])
def test_gptq_beats_rtn_at_the_output(bits, group_size, sym, mse):
    weight, hessian = layer(rows=32, features=64)
    for desc_act in (False, True):
        config = QuantizeConfig(bits=bits, group_size=group_size, sym=sym, mse=mse, desc_act=desc_act)
        nearest, ours = rtn(weight, config), gptq(weight, hessian, config)
        if not mse:  # else GPTQ's grid weights the inputs by their importance, which RTN cannot know
            assert torch.equal(ours.scale, nearest.scale)
        error = output_error(weight, ours.dequantize(), hessian)
        assert 0 < error < output_error(weight, nearest.dequantize(), hessian)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_helps_is_the_right_hessian(seed):
    """The same computation with the input channels shuffled helps as little as rounding to nearest."""
    weight, hessian = layer(rows=32, features=96, seed=seed)
    shuffled = torch.randperm(96, generator=torch.Generator().manual_seed(seed))
    right = output_error(weight, gptq(weight, hessian, PLAIN).dequantize(), hessian)
    wrong = output_error(weight, gptq(weight, hessian[shuffled][:, shuffled], PLAIN).dequantize(), hessian)
    nearest = output_error(weight, rtn(weight, PLAIN).dequantize(), hessian)
    assert right < 0.3 * nearest
    assert wrong > 1.5 * right
    assert wrong > 0.9 * nearest


def test_output_error_is_that_of_the_outputs():
    weight, inputs = torch.randn(8, 32), correlated_inputs(32, 100, seed=3)
    statistic = Hessian(32, weight)
    statistic.add(inputs)
    other = weight + 0.1 * torch.randn_like(weight)
    expected = ((inputs @ (weight - other).T).norm() / (inputs @ weight.T).norm()).square().item()
    assert output_error(weight, other, statistic.matrix) == pytest.approx(expected, rel=1e-3)
    assert output_error(weight, weight, statistic.matrix) == 0


# --- the grid ------------------------------------------------------------------------------------------------------

# Ordinary weights, and zeros: float16 scales are then exact to 2⁻¹¹.
magnitudes = st.floats(2**-6, 8, width=32)
weights = arrays(np.float32, (2, 16), elements=st.one_of(st.just(0.0), magnitudes, magnitudes.map(lambda x: -x)))
positive = arrays(np.float32, (2, 16), elements=magnitudes)
constant = st.one_of(st.just(0.0), magnitudes, magnitudes.map(lambda x: -x)).map(
    lambda x: np.full((2, 16), x, np.float32)
)
any_weights = st.one_of(weights, positive, positive.map(lambda w: -w), constant)
tiny_or_large = arrays(np.float32, (2, 16), elements=st.floats(-1000, 1000, width=32))  # subnormal numbers included
configs = st.builds(
    QuantizeConfig, bits=st.sampled_from([2, 3, 4, 8]), group_size=st.sampled_from([4, 8, 16]),
    sym=st.booleans(), mse=st.booleans(),
)  # fmt: skip


def by_column(values: torch.Tensor, config: QuantizeConfig) -> torch.Tensor:
    return values.float().repeat_interleave(config.group_size, dim=1)


@given(st.one_of(any_weights, tiny_or_large), configs)
def test_rtn_takes_the_nearest_point_of_the_grid(weight, config):
    weight = torch.from_numpy(weight)
    result = rtn(weight, config)
    scale, zero = by_column(result.scale, config), by_column(result.zero, config)
    lowest, highest = -zero * scale, (2**config.bits - 1 - zero) * scale
    error, inside = (result.dequantize() - weight).abs(), (lowest <= weight) & (weight <= highest)
    assert (scale > 0).all()
    assert (error <= scale * (0.5 + 1e-4))[inside].all()
    assert (result.dequantize() == lowest)[weight < lowest].all()
    assert (result.dequantize() == highest)[weight > highest].all()


@given(any_weights, configs)
def test_without_clipping_the_grid_spans_the_group(weight, config):
    """To half a step at either end: a symmetric grid has one code less above zero, an asymmetric zero is rounded."""
    config = QuantizeConfig(bits=config.bits, group_size=config.group_size, sym=config.sym, mse=False)
    weight = torch.from_numpy(weight)
    result = rtn(weight, config)
    scale = by_column(result.scale, config)
    float16_rounding = 2**-11 * (2**config.bits) * scale
    assert ((result.dequantize() - weight).abs() <= 0.5 * scale * (1 + 1e-4) + float16_rounding).all()


@given(st.one_of(any_weights, tiny_or_large), configs)
def test_codes_and_zeros_fit_their_bits(weight, config):
    result = rtn(torch.from_numpy(weight), config)
    top = 2**config.bits - 1
    assert result.codes.dtype == result.zero.dtype == torch.uint8
    assert result.codes.max() <= top
    assert result.dequantize().isfinite().all()
    if config.sym:
        assert (result.zero == 2 ** (config.bits - 1)).all()
    else:  # the v1 format stores zero - 1
        assert result.zero.min() >= 1
        assert result.zero.max() <= top


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("mse", [False, True], ids=["minmax", "mse"])
def test_groups_on_one_side_of_zero(bits, sym, mse):
    config = QuantizeConfig(bits=bits, group_size=8, sym=sym, mse=mse)
    up = torch.linspace(0.5, 1, 8)[None]
    groups = {"zero": 0 * up, "constant": 0 * up + 0.7, "negative constant": 0 * up - 0.7, "up": up, "down": -up}
    result = rtn(torch.cat(list(groups.values()), dim=1), config)
    value = dict(zip(groups, result.dequantize().split(8, dim=1), strict=True))
    assert torch.equal(value["zero"], 0 * up)
    step = dict(zip(groups, result.scale.float()[0].tolist(), strict=True))
    for name, group in groups.items():
        assert (value[name] - group).abs().max() <= (0.5 if not mse else 1) * step[name] * 1.01 + 1e-3, name
    if not sym:  # the zero point stands at an end of the grid, which costs nothing: zero itself is a code
        assert result.zero[0].tolist()[-2:] == [1, 2**bits - 1]
        assert value["constant"].allclose(groups["constant"], rtol=1e-3 if not mse else 0.1)


def grid_error(weight, config, importance):
    grid = find_grid(weight, config, importance)
    group = torch.arange(weight.shape[1]) // config.group_size
    difference = grid.decode(grid.encode(weight, group), group) - weight
    return (difference.square() * importance).view(*grid.scale.shape, -1).sum(-1).sqrt()


@given(any_weights, configs, arrays(np.float32, 16, elements=st.floats(2**-6, 8, width=32)))
def test_clipping_never_costs(weight, config, importance):
    """The range that the search takes is at least as good, in every group, as the full range."""
    weight, importance = torch.from_numpy(weight), torch.from_numpy(importance)
    kwargs = {"bits": config.bits, "group_size": config.group_size, "sym": config.sym}
    full = grid_error(weight, QuantizeConfig(**kwargs, mse=False), importance)
    clipped = grid_error(weight, QuantizeConfig(**kwargs, mse=True), importance)
    norm = (weight.square() * importance).view(*full.shape, -1).sum(-1).sqrt()
    assert (clipped <= full + 2 * 2**-11 * (norm + full) + 1e-6).all()  # scales are rounded to float16 afterwards


def test_clipping_pays_and_minds_the_importance():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    plain = QuantizeConfig(bits=3, group_size=64, mse=False)
    clip = QuantizeConfig(bits=3, group_size=64, mse=True)
    everywhere = torch.ones(64)
    error = {config: grid_error(weight, config, everywhere).square().sum() for config in (plain, clip)}
    assert error[clip] < 0.9 * error[plain]
    assert torch.equal(find_grid(weight, clip).scale, find_grid(weight, clip, everywhere).scale)
    # where only the extreme inputs matter, they are not clipped
    weight[:, 0], weight[:, 1] = 4, -4
    extremes = torch.full((64,), 1e-3)
    extremes[:2] = 1
    grids = find_grid(weight, plain), find_grid(weight, clip), find_grid(weight, clip, extremes)
    full, even, kept = (grid.scale.mean() for grid in grids)
    assert even < 0.9 * full
    assert kept > 0.95 * full


def test_the_grid_by_hand():
    weight = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])
    asym = find_grid(weight, QuantizeConfig(bits=2, group_size=4, sym=False, mse=False))
    assert (asym.scale.item(), asym.zero.item(), asym.max_code) == (1.0, 1.0, 3)  # codes stand for -1, 0, 1, 2
    sym = find_grid(weight, QuantizeConfig(bits=2, group_size=4, sym=True, mse=False))
    assert sym.scale.item() == pytest.approx(4 / 3, rel=2**-11)  # codes stand for -8/3, -4/3, 0, 4/3
    assert sym.zero.item() == 2


# --- the Hessian ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [10, Hessian.PANEL, Hessian.PANEL + 1, 2 * Hessian.PANEL + 16])
@pytest.mark.parametrize("tokens", [3, 4096, 4100])  # chunks are of 4096
def test_hessian(features, tokens):
    inputs = torch.randn(tokens, features, generator=torch.Generator().manual_seed(0)) + 0.5
    statistic = Hessian(features, inputs)
    statistic.add(inputs)
    x = inputs.double().numpy()
    np.testing.assert_allclose(statistic.matrix.numpy(), 2 * x.T @ x / tokens, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(statistic.mean_absolute.numpy(), np.abs(x).mean(0), rtol=1e-4)


def test_hessian_in_pieces():
    inputs = torch.randn(300, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    once, pieces = Hessian(50, inputs), Hessian(50, inputs)
    once.add(inputs)
    for piece in inputs.split([1, 199, 64, 36]):
        pieces.add(piece)
    assert once.matrix.dtype == torch.float32
    assert torch.allclose(once.matrix, pieces.matrix, rtol=1e-4, atol=1e-5)
    assert torch.allclose(once.matrix, 2 * inputs.float().T @ inputs.float() / 300, rtol=1e-4, atol=1e-4)


# --- whole models --------------------------------------------------------------------------------------------------


def test_rtn_model_changes_exactly_the_linears_of_the_blocks(make_llama):
    config = QuantizeConfig(group_size=16, bits=4)
    model, original = make_llama(), dict(make_llama().named_parameters())
    quantized = rtn_model(model, config)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert set(quantized) == linears
    for name, parameter in model.named_parameters():
        layer_name = name.removesuffix(".weight")
        if layer_name in quantized:
            assert torch.equal(parameter, rtn(original[name], config).dequantize())
        else:
            assert torch.equal(parameter, original[name])


def test_gptq_model_calibrates_each_layer_on_the_compressed_network(make_llama, windows):
    """Every layer's result is that of `gptq` with the inputs that the finished model gives to this layer."""
    config = QuantizeConfig(group_size=16, bits=4)
    model, original = make_llama(), make_llama()
    quantized = gptq_model(model, windows, config, batch_size=2)
    linears = {name: module for name, module in model.named_modules() if name in quantized}
    assert len(linears) == len(quantized) == 3 * 7
    inputs = {}
    for name, module in linears.items():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].flatten(end_dim=-2)}))
    with torch.no_grad():
        model(windows)
    for name, linear in linears.items():
        assert torch.equal(linear.weight, quantized[name].dequantize())
        statistic = Hessian(linear.in_features, inputs[name])
        statistic.add(inputs[name])
        expected = gptq(original.get_submodule(name).weight.detach(), statistic.matrix, config)
        assert (quantized[name].codes == expected.codes).float().mean() > 0.98, name
        assert torch.equal(quantized[name].zero, expected.zero)


def test_gptq_model_beats_rtn_model(make_llama, windows):
    config = QuantizeConfig(group_size=16, bits=3)
    original, nearest, ours = make_llama(), make_llama(), make_llama()
    rtn_model(nearest, config)
    calibration = torch.randint(256, (32, 32), generator=torch.Generator().manual_seed(7))
    gptq_model(ours, calibration, config)
    with torch.no_grad():
        error = [(m.model(windows)[0] - original.model(windows)[0]).norm().item() for m in (nearest, ours)]
    assert error[1] < error[0]


# --- refusals and names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"bits": 1}, "bits must be 2 to 8.*1"),
        ({"bits": 9}, "bits must be 2 to 8.*9"),
        ({"damp_percent": 0}, "damp_percent.*between 0 and 1"),
        ({"damp_percent": 1.0}, "damp_percent.*between 0 and 1"),
        ({"group_size": 0}, "group_size must be a positive"),
        ({"group_size": -2}, "group_size must be a positive"),
    ],
)
def test_settings_that_make_no_sense(setting, words):
    with pytest.raises(ValueError, match=words):
        QuantizeConfig(**setting)


@pytest.mark.parametrize(("features", "group_size", "advice"), [(576, 128, 64), (96, 64, 32), (100, 64, 4), (7, 2, 1)])
def test_group_size_that_does_not_divide(features, group_size, advice):
    words = f"group_size {group_size} does not divide the {features} inputs.*such as {advice}\\."
    with pytest.raises(ValueError, match=words):
        rtn(torch.randn(2, features), QuantizeConfig(group_size=group_size))
    with pytest.raises(ValueError, match=words):
        gptq(torch.randn(2, features), torch.eye(features), QuantizeConfig(group_size=group_size))


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_group_size_is_refused_before_any_work(make_llama, windows, method):
    """A model changed halfway would be of no use, and would not show it."""
    model = make_llama(intermediate_size=96)  # 64 divides every layer but the last of the block
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    config = QuantizeConfig(group_size=64)
    with pytest.raises(ValueError, match="64 does not divide the 96"):
        rtn_model(model, config) if method == "rtn" else gptq_model(model, windows, config)
    assert [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])] == []


def test_labels():
    assert QuantizeConfig().label("gptq") == "gptq-w4-g64-asym-mse-act"
    assert QuantizeConfig().label("rtn") == "rtn-w4-g64-asym-mse"  # RTN has no order of columns
    assert PLAIN.label("gptq") == "gptq-w4-g16-asym"
    assert QuantizeConfig(bits=3, group_size=32, sym=True, mse=False).label("gptq") == "gptq-w3-g32-sym-act"


# --- pruned weights -------------------------------------------------------------------------------------------------


def test_masked_weights_stay_exactly_zero_and_are_compensated():
    weight, hessian = layer(rows=12, features=160)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    pruned = weight * keep
    for desc_act in (False, True):
        config = dataclasses.replace(PLAIN, desc_act=desc_act)
        masked = gptq(pruned, hessian, config, keep).dequantize()
        assert not masked[~keep].any()
        assert gptq(pruned, hessian, config).dequantize()[~keep].any()  # without the mask some are refilled
        assert output_error(pruned, masked, hessian) < output_error(pruned, rtn(pruned, config).dequantize(), hessian)
        everything = torch.ones_like(keep)
        assert torch.equal(gptq(weight, hessian, config, everything).codes, gptq(weight, hessian, config).codes)


def test_gptq_once_is_gptq_model_without_the_pass(make_llama, windows):
    """The same where nothing before has been quantized: the first layers of the first block."""
    walked, once = make_llama(), make_llama()
    statistics = collect(once, windows, Hessian)
    expected, found = gptq_model(walked, windows, PLAIN), gptq_once(once, statistics, PLAIN)
    assert set(expected) == set(found)
    for name in ("q_proj", "k_proj", "v_proj"):
        first = f"model.layers.0.self_attn.{name}"
        assert torch.equal(expected[first].codes, found[first].codes)
        assert torch.equal(once.get_submodule(first).weight, found[first].dequantize())
    last = "model.layers.2.mlp.down_proj"
    assert not torch.equal(expected[last].codes, found[last].codes)


@pytest.mark.parametrize("once", [False, True])
def test_keep_zeros_keeps_a_pruned_model_pruned(llama, windows, once):
    with torch.no_grad():
        for _, linear in iter_linears(llama):
            linear.weight[:, ::2] = 0
    if once:
        gptq_once(llama, collect(llama, windows, Hessian), PLAIN, keep_zeros=True)
    else:
        gptq_model(llama, windows, PLAIN, keep_zeros=True)
    for _, linear in iter_linears(llama):
        assert not linear.weight[:, ::2].any()
        assert linear.weight[:, 1::2].any()


@pytest.mark.gpu
@pytest.mark.parametrize("in_features", [128, 320, 512])  # one block, a smaller one at the end, several
def test_replayed_blocks_give_what_unrecorded_blocks_give(in_features):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, in_features, generator=generator)
    statistic = Hessian(in_features, weight)
    statistic.add(correlated_inputs(in_features, 2048, seed=1))
    for config in (QuantizeConfig(group_size=32), QuantizeConfig(group_size=64, desc_act=False, sym=True)):
        on_cpu = gptq(weight, statistic.matrix, config)
        on_gpu = gptq(weight.cuda(), statistic.matrix.cuda(), config)
        same = (on_cpu.codes == on_gpu.codes.cpu()).float().mean()
        assert same > 0.99  # float32 sums in another order may tip a code that lies between two points


def test_gptq_gives_the_threads_back():
    """It works with one; what comes after it in a notebook must not."""
    weight, hessian = layer(rows=4, features=32)
    torch.set_num_threads(2)
    try:
        gptq(weight, hessian, PLAIN)
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            compensation.compensate(weight.T.clone(), hessian, lambda column: 1 / 0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_group_size_minus_one_is_one_group_a_row(method, make_llama, windows):
    """As everywhere: -1 gives each row one scale, the same as a group as wide as the layer."""
    model, row = make_llama(), QuantizeConfig(group_size=-1)
    quantized = rtn_model(model, row) if method == "rtn" else gptq_model(model, windows, row)
    assert row.label("gptq") == "gptq-w4-row-asym-mse-act"
    for name, weight in quantized.items():
        assert weight.scale.shape == (len(weight.codes), 1)
        torch.testing.assert_close(model.get_submodule(name).weight, weight.dequantize())
    q_proj = "model.layers.0.self_attn.q_proj"
    if method == "rtn":
        expected = rtn(make_llama().get_submodule(q_proj).weight.detach(), QuantizeConfig(group_size=64))
        assert torch.equal(quantized[q_proj].codes, expected.codes)
