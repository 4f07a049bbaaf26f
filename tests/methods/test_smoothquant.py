"""SmoothQuant: its formula, what smoothing leaves alone, and what it is good for."""

import copy

import numpy as np
import pytest
import torch

from common.methods.blocks import collect, iter_linears
from common.methods.smoothquant import (
    ChannelMaxima,
    round_int8,
    round_model,
    smooth_model,
    smoothing_scale,
    smoothquant_model,
)


@pytest.fixture
def outliers(llama):
    """A Llama whose normalizations blow up three channels, as those of large models do."""
    with torch.no_grad():
        for block in llama.model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[[3, 17, 40]] *= 60
            for linear in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                linear.weight[:, [3, 17, 40]] /= 60
            for linear in (block.mlp.gate_proj, block.mlp.up_proj):
                linear.weight[:, [3, 17, 40]] /= 60
    return llama


def logits(model, windows):
    with torch.no_grad():
        return model(input_ids=windows).logits


def test_scale_is_equation_4():
    activation, weight = np.array([2.0, 50.0, 0.5]), np.array([1.0, 0.2, 4.0])
    got = smoothing_scale(torch.tensor(activation), torch.tensor(weight), alpha=0.25)
    np.testing.assert_allclose(got.numpy(), activation**0.25 / weight**0.75)


def test_maxima_are_those_of_all_batches():
    maxima = ChannelMaxima(3, torch.empty(0))
    maxima.add(torch.tensor([[1.0, -5.0, 0.0], [2.0, 1.0, 0.5]]))
    maxima.add(torch.tensor([[-3.0, 0.0, 0.1]]))
    assert maxima.maxima.tolist() == [3.0, 5.0, 0.5]


def test_rounding_by_hand():
    values = torch.tensor([[127.0, -63.6, 0.4], [0.0, 0.0, 0.0]])
    assert round_int8(values).tolist() == [[127.0, -64.0, 0.0], [0.0, 0.0, 0.0]]


def test_smoothing_changes_no_logits_but_evens_out_the_inputs(outliers, windows):
    before, spread = logits(outliers, windows), {}
    for label in ("before", "after"):
        found = collect(outliers, windows, ChannelMaxima)
        name = next(name for name, _ in iter_linears(outliers) if name.endswith("q_proj"))
        spread[label] = (found[name].maxima.max() / found[name].maxima.median()).item()
        if label == "before":
            smooth_model(outliers, windows)
    torch.testing.assert_close(logits(outliers, windows), before, rtol=1e-4, atol=1e-4)
    assert spread["after"] < spread["before"] / 3


def test_smoothed_layers_round_better(outliers, windows):
    before = logits(outliers, windows)
    plain, smoothed = copy.deepcopy(outliers), copy.deepcopy(outliers)
    round_model(plain)
    smoothquant_model(smoothed, windows)
    error = [(logits(model, windows) - before).square().mean().item() for model in (plain, smoothed)]
    assert error[1] < error[0] / 3


def test_every_weight_lies_on_its_rows_grid(llama, windows):
    smoothquant_model(llama, windows)
    for name, linear in iter_linears(llama):
        codes = linear.weight / (linear.weight.abs().amax(-1, keepdim=True) / 127)
        torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0, msg=name)


def test_layers_after_a_normalization_share_one_scale_from_the_largest_of_their_weights(outliers, windows):
    before, alpha = copy.deepcopy(outliers), 0.25
    found = collect(before, windows, ChannelMaxima)["model.layers.1.self_attn.q_proj"].maxima
    smooth_model(outliers, windows, alpha)
    attention, smoothed = (model.model.layers[1].self_attn for model in (before, outliers))
    # the scale of block 1 is taken of the model as it came: smoothing block 0 changes nothing that it computes
    weights = torch.stack([m.weight.abs().amax(0) for m in (attention.q_proj, attention.k_proj, attention.v_proj)])
    scale = smoothing_scale(found, weights.amax(0), alpha)
    for name in ("q_proj", "k_proj", "v_proj"):
        torch.testing.assert_close(smoothed.get_submodule(name).weight, attention.get_submodule(name).weight * scale)
    assert torch.equal(smoothed.o_proj.weight, attention.o_proj.weight)
    mlp = [model.model.layers[1].mlp for model in (before, outliers)]
    assert not torch.equal(mlp[0].up_proj.weight, mlp[1].up_proj.weight)


def test_activations_are_rounded_whenever_the_model_runs(llama, windows):
    seen = {}
    round_model(llama)
    for name, linear in iter_linears(llama):
        linear.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    logits(llama, windows)
    for name, values in seen.items():
        codes = values / (values.abs().amax(-1, keepdim=True) / 127)
        torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0, msg=name)
    assert len(seen) == 3 * 7


def test_a_silent_channel_leaves_the_model_finite(llama, windows):
    with torch.no_grad():
        llama.model.layers[0].input_layernorm.weight[5] = 0
        llama.model.layers[0].mlp.gate_proj.weight[:, 7] = 0
        llama.model.layers[0].mlp.up_proj.weight[:, 7] = 0
    before = logits(llama, windows)
    smooth_model(llama, windows)
    torch.testing.assert_close(logits(llama, windows), before, rtol=1e-4, atol=1e-4)


def test_smoothquant_is_smoothing_at_that_alpha_then_rounding(outliers, windows):
    apart = copy.deepcopy(outliers)
    smoothquant_model(outliers, windows, alpha=0.8)
    smooth_model(apart, windows, alpha=0.8)
    round_model(apart)
    assert torch.equal(logits(outliers, windows), logits(apart, windows))
