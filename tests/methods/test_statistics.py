"""Numbers that are not numbers are named with their layer, before they become a mask or a code."""

import pytest
import torch

from common.methods.awq import awq_model
from common.methods.compensation import Hessian, Unusable, inverse_cholesky
from common.methods.importance import InputNorms
from common.methods.pruning import PruneConfig, prune_model
from common.methods.quantization import QuantizeConfig, gptq_model, gptq_once, rtn_model
from common.methods.smoothquant import ChannelMaxima, smooth_model

CONFIG = QuantizeConfig(group_size=32)
STEPS = {
    "rtn": lambda model, windows: rtn_model(model, CONFIG),
    "gptq": lambda model, windows: gptq_model(model, windows, CONFIG),
    "awq": lambda model, windows: awq_model(model, windows, CONFIG),
    "magnitude": lambda model, windows: prune_model(model, None, PruneConfig("magnitude")),
    "wanda": lambda model, windows: prune_model(model, windows, PruneConfig("wanda")),
    "sparsegpt": lambda model, windows: prune_model(model, windows, PruneConfig("sparsegpt")),
    "smoothquant": smooth_model,
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_weight_that_is_no_number_is_named_before_the_first_change(step, value, llama, windows):
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight[3, 5] = value
    before = {name: parameter.clone() for name, parameter in llama.named_parameters()}
    with pytest.raises(ValueError, match=r"model\.layers\.1|Block 1"):
        STEPS[step](llama, windows)
    for name, parameter in llama.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num()), name


@pytest.mark.parametrize("step", [step for step in STEPS if step not in ("rtn", "magnitude")])
def test_an_activation_that_is_no_number_in_a_later_window_names_the_layer(step, llama, windows):
    """One row of the embedding is infinite, and its token comes late: no weight of a block and no proof shows it."""
    windows[windows == 7] = 8
    windows[3, 5] = 7
    with torch.no_grad():
        llama.model.embed_tokens.weight[7] = float("inf")
    before = {name: parameter.clone() for name, parameter in llama.named_parameters()}
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: 64 of its 64 inputs were NaN or inf"):
        STEPS[step](llama, windows)
    assert all(torch.equal(parameter, before[name]) for name, parameter in llama.named_parameters())


@pytest.mark.parametrize("make", [Hessian, InputNorms, ChannelMaxima])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_statistics_are_checked_when_they_are_read(make, value):
    statistic = make(4, torch.zeros(1))
    inputs = torch.ones(8, 4)
    inputs[2, 1] = value
    statistic.add(inputs)
    for name in ("matrix", "norms", "mean_absolute", "maxima"):
        if hasattr(type(statistic), name):
            with pytest.raises(Unusable, match="1 of its 4 inputs were NaN or inf"):
                getattr(statistic, name)


@pytest.mark.parametrize("step", ["gptq", "sparsegpt"])
def test_a_zero_hessian_names_the_layer(step, llama, windows):
    """A v_proj that was pruned away leaves o_proj nothing but zeros."""
    with torch.no_grad():
        llama.model.layers[1].self_attn.v_proj.weight.zero_()
    words = r"model\.layers\.1\.self_attn\.o_proj: its Hessian has no inverse; 100% of its inputs were always zero.*RTN"
    with pytest.warns(UserWarning) if step == "sparsegpt" else _nothing(), pytest.raises(ValueError, match=words):
        STEPS[step](llama, windows)


class _nothing:
    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


def test_a_damping_too_small_says_what_to_set():
    rank_one = torch.ones(64, 64) * 1e4
    with pytest.raises(Unusable, match=r"0% of its inputs were always zero.*damp_percent \(try 1e-09 for 1e-10\)"):
        inverse_cholesky(rank_one, 1e-10)
    assert inverse_cholesky(rank_one, 0.01).isfinite().all()


def test_statistics_collected_beforehand_name_the_layer_too(llama, windows):
    from common.methods.blocks import collect

    statistics = collect(llama, windows, Hessian)
    statistics["model.layers.2.mlp.down_proj"].upper[7, 7] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.down_proj: 1 of its 128 inputs"):
        gptq_once(llama, statistics, CONFIG)
