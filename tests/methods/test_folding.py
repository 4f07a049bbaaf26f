"""Folds are found by trying: those of the family's own kind, and none where something else reads the norm."""

import pytest
import torch
from families import build
from torch import nn

from common.methods.awq import awq_model
from common.methods.folding import Fold, find_folds
from common.methods.quantization import QuantizeConfig
from common.methods.smoothquant import smooth_model


def folds_of(kind, windows, **changes) -> dict[tuple[str, ...], Fold]:
    return {fold.readers: fold for fold in find_folds(build(kind, **changes), windows)[1]}


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def test_llama(windows):
    found = folds_of("llama", windows)
    assert found[QKV] == Fold("input_layernorm", QKV)
    assert found["mlp.down_proj",] == Fold("mlp.up_proj", ("mlp.down_proj",), is_norm=False)
    assert ("self_attn.o_proj",) not in found  # two key-value heads for four of queries
    many = folds_of("llama", windows, num_key_value_heads=4)
    assert many["self_attn.o_proj",].source == "self_attn.v_proj"


@pytest.mark.parametrize(
    ("kind", "readers", "expected"),
    [
        ("gemma2", QKV, {"source": "input_layernorm", "offset": True}),
        ("stablelm", QKV, {"source": "input_layernorm", "offset": False}),  # its norm has a bias
        ("cohere", (*QKV, "mlp.gate_proj", "mlp.up_proj"), {"source": "input_layernorm"}),  # side by side
        ("phi3", ("mlp.down_proj",), {"source": "mlp.gate_up_proj", "first_row": 128}),
        ("opt", ("fc2",), {"source": "fc1"}),  # ReLU(x / s) = ReLU(x) / s
    ],
)
def test_other_families(kind, readers, expected, windows):
    fold = folds_of(kind, windows)[readers]
    assert {name: getattr(fold, name) for name in expected} == expected


def test_gelu_lets_nothing_through(windows):
    assert ("mlp.fc_out",) not in folds_of("gptj", windows)


def test_a_norm_that_a_router_reads_too_is_left_alone(windows):
    model = build("mixtral")
    assert not [fold for block in find_folds(model, windows) for fold in block if fold.source.startswith("post_att")]
    before = model.model.layers[0].post_attention_layernorm.weight.clone()
    smoothed = smooth_model(model, windows)
    assert torch.equal(model.model.layers[0].post_attention_layernorm.weight, before)
    assert all("self_attn" in name for name in smoothed)


def test_the_trial_leaves_the_model_as_it_was(windows):
    model = build("gemma2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_folds(model, windows)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_norm_before_the_layers_is_refused_before_the_first_change(windows):
    model = build("olmo2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="SmoothQuant cannot smooth Olmo2ForCausalLM"):
        smooth_model(model, windows)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_awq_of_a_model_without_any_fold_is_refused(windows):
    with pytest.raises(ValueError, match="AWQ has nothing to scale in GPT2LMHeadModel"):
        awq_model(build("gpt2"), windows, QuantizeConfig(group_size=32))


def test_awq_checks_widths_before_the_work(llama, windows):
    before = llama.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(ValueError, match="group_size 48 does not divide"):
        awq_model(llama, windows, QuantizeConfig(group_size=48))
    assert torch.equal(llama.model.layers[0].self_attn.q_proj.weight, before)


def test_a_configuration_without_key_value_heads(windows):
    model = build("gptj")
    assert not hasattr(model.config, "num_key_value_heads")
    assert awq_model(model, windows, QuantizeConfig(group_size=32))


def test_a_fold_that_changes_the_model_is_noticed_afterwards(llama, windows, monkeypatch):
    monkeypatch.setattr(Fold, "apply", lambda self, block, scale: block.get_submodule(self.source).weight.data.mul_(2))
    monkeypatch.setattr("common.methods.smoothquant.find_folds", lambda *_: [[Fold("input_layernorm", QKV)]] * 3)
    with pytest.raises(ValueError, match="Smoothing has changed what LlamaForCausalLM computes"):
        smooth_model(llama, windows)


def test_norms_without_weights_do_not_disturb(llama, windows):
    llama.model.layers[0].input_layernorm = nn.RMSNorm(64, elementwise_affine=False)
    assert not [fold for fold in find_folds(llama, windows)[0] if fold.source == "input_layernorm"]
