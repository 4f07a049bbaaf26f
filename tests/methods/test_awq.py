"""AWQ: scaling is an identity before rounding, and helps after it where activations are uneven."""

import pytest
import torch

from common.methods.awq import awq_model, channel_scale, round_scaled, search_scale
from common.methods.blocks import collect
from common.methods.compensation import Hessian, output_error
from common.methods.quantization import QuantizeConfig, rtn

CONFIG = QuantizeConfig(bits=3, group_size=32, mse=False)


def uneven_inputs(features=64, tokens=512):
    inputs = torch.randn(tokens, features)
    inputs[:, ::16] *= 30  # a few outlier channels, as in real activations
    return inputs


def statistic_of(inputs):
    statistic = Hessian(inputs.shape[1], inputs)
    statistic.add(inputs)
    return statistic


def test_alpha_zero_is_plain_rounding():
    weight = torch.randn(16, 64)
    scale = channel_scale(uneven_inputs().abs().mean(0), alpha=0.0)
    torch.testing.assert_close(round_scaled(weight, scale, CONFIG), rtn(weight, CONFIG).dequantize())


def test_search_beats_plain_rounding_when_channels_are_uneven():
    torch.manual_seed(0)
    weight, statistic = torch.randn(32, 64), statistic_of(uneven_inputs())
    scale, alpha = search_scale(weight, statistic, CONFIG)
    plain = output_error(weight, rtn(weight, CONFIG).dequantize(), statistic.matrix)
    assert alpha > 0
    assert output_error(weight, round_scaled(weight, scale, CONFIG), statistic.matrix) < 0.7 * plain


def test_even_channels_gain_nothing():
    torch.manual_seed(0)
    scale = channel_scale(torch.ones(64), alpha=0.5)
    assert torch.equal(scale, torch.ones(64))


def test_whole_model_leaves_o_proj_unscaled_with_grouped_queries(llama):
    windows = torch.randint(0, llama.config.vocab_size, (4, 32))
    alphas = awq_model(llama, windows, CONFIG)
    assert len(alphas) == 3 * llama.config.num_hidden_layers
    assert not [stage for stage in alphas if stage.endswith("o_proj")]  # grouped-query attention: nothing undoes it


def test_the_scales_largest_and_smallest_value_multiply_to_1_and_a_silent_channel_does_no_harm():
    inputs = uneven_inputs()
    inputs[:, 3] = 0
    weight, statistic = torch.randn(8, 64), statistic_of(inputs)
    scale = channel_scale(statistic.mean_absolute, alpha=0.5)
    assert (scale.max() * scale.min()).item() == pytest.approx(1)
    rounded = round_scaled(weight, search_scale(weight, statistic, CONFIG)[0], CONFIG)
    assert rounded.isfinite().all()


def uneven_llama(make_llama, **changes):
    """A Llama whose normalizations blow a few channels up, as those of large models do."""
    model = make_llama(**changes)
    with torch.no_grad():
        for block in model.model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[::16] *= 30
    return model


@pytest.mark.parametrize("sym", [False, True])
def test_every_layer_is_rounded_at_the_scale_that_was_searched_for_its_stage(make_llama, windows, sym):
    """α without clipping, as the authors do; then the clipping, each input weighted by what its error costs."""
    config = QuantizeConfig(bits=3, group_size=32, sym=sym, mse=True)
    model, original = uneven_llama(make_llama), uneven_llama(make_llama)
    alphas = awq_model(model, windows, config)
    first = {
        name: original.get_submodule(f"model.layers.0.self_attn.{name}") for name in ("q_proj", "k_proj", "v_proj")
    }
    statistic = collect(original, windows, Hessian)["model.layers.0.self_attn.q_proj"]
    stacked = torch.cat([linear.weight.detach() for linear in first.values()])
    scale, alpha = search_scale(stacked, statistic, QuantizeConfig(3, 32, sym, mse=False))
    assert alphas["0.self_attn.q_proj+self_attn.k_proj+self_attn.v_proj"] == alpha > 0
    importance = statistic.matrix.diagonal() / scale.square()  # (Δ/s)·H·(Δ/s)
    for name, linear in first.items():
        expected = round_scaled(linear.weight.detach(), scale, config, importance)
        torch.testing.assert_close(model.get_submodule(f"model.layers.0.self_attn.{name}").weight, expected)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_o_proj_is_scaled_only_where_v_proj_has_as_many_heads(make_llama, windows, kv_heads):
    model = uneven_llama(make_llama, num_key_value_heads=kv_heads)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.v_proj.weight[::8] *= 30
    alphas = awq_model(model, windows, CONFIG)
    assert any(alpha > 0 for stage, alpha in alphas.items() if stage.endswith("o_proj")) is (kv_heads == 4)
    assert any(alpha > 0 for stage, alpha in alphas.items() if stage.endswith("v_proj"))
