"""Mixtures of experts: every matrix is seen with the tokens that were routed to it, and none is left out."""

import warnings

import pytest
import torch
from families import build
from torch import nn

from common.methods.blocks import collect, iter_linears, walk
from common.methods.compensation import Hessian
from common.methods.experts import Matrix, block_linears, one_by_one, unfused
from common.methods.importance import InputNorms
from common.methods.pruning import PruneConfig, model_sparsity, prune_model
from common.methods.quantization import QuantizeConfig, gptq_model, rtn
from common.methods.requirements import require_needs
from common.methods.visits import FEW_TOKENS

CONFIG = QuantizeConfig(bits=4, group_size=32, mse=False)


@pytest.fixture
def long_windows():
    return torch.randint(3, 256, (6, 64), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4_text", "dbrx", "jetmoe", "gpt2"])
def test_the_models_own_code_passes_through_the_matrices(kind, windows):
    """With each matrix doubled by a hook on its `Matrix`, the model computes what it does with doubled weights."""
    model = build(kind)
    pieces = {
        name: linear for name, linear in iter_linears(model) if isinstance(linear, Matrix) and "c_attn" not in name
    }
    handles = [piece.register_forward_hook(lambda _, __, out: 2 * out) for piece in pieces.values()]
    with torch.no_grad(), one_by_one(model), unfused(pieces):
        hooked = model(input_ids=windows, use_cache=False).logits
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        plain = model(input_ids=windows, use_cache=False).logits
        for piece in pieces.values():
            piece.weight.mul_(2)  # a view: it arrives in the model
        doubled = model(input_ids=windows, use_cache=False).logits
    torch.testing.assert_close(hooked, doubled, rtol=1e-4, atol=1e-3)
    assert (doubled - plain).norm() > 0.01 * plain.norm()


@pytest.mark.parametrize(("kind", "first"), [("mixtral", "gate_up_proj"), ("dbrx", "w1"), ("jetmoe", "input_linear")])
@pytest.mark.parametrize("batch_size", [None, 1])
def test_each_token_reaches_as_many_experts_as_the_router_chooses(kind, first, batch_size, long_windows):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens = walk(build(kind), long_windows, InputNorms, lambda stage, statistic: None, batch_size=batch_size)
    of_first_block = [n for name, n in tokens.items() if ".0.mlp." in name or ".0.ffn." in name if first in name]
    assert sum(of_first_block) == 2 * long_windows.numel()


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_statistics_do_not_depend_on_the_batches(batch_size, long_windows):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = collect(build("mixtral"), long_windows, Hessian)
        found = collect(build("mixtral"), long_windows, Hessian, batch_size=batch_size)
    assert found.keys() == expected.keys()
    for name, hessian in expected.items():
        torch.testing.assert_close(found[name].matrix, hessian.matrix, rtol=1e-3, atol=1e-3, msg=name)


def test_half_of_every_expert_is_half_of_the_model(long_windows):
    model = build("mixtral")
    prune_model(model, long_windows, PruneConfig("wanda"))
    assert model_sparsity(model) == pytest.approx(0.5, abs=0.01)
    for block in model.model.layers:
        for fused in (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj):
            assert (fused == 0).float().mean(dim=(1, 2)).tolist() == pytest.approx([0.5] * 4)


# --- experts as modules ----------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Top-1 routing to one linear layer each, as models with code of their own have it."""

    def __init__(self, features: int = 64, experts: int = 8):
        super().__init__()
        self.router = nn.Parameter(torch.randn(experts, features))
        self.experts = nn.ModuleList(nn.Linear(features, features, bias=False) for _ in range(experts))

    def forward(self, x):
        flat = x.flatten(0, -2)
        out, pick = torch.zeros_like(flat), (flat @ self.router.T).argmax(-1)
        for index, expert in enumerate(self.experts):
            if (pick == index).any():
                out[pick == index] = expert(flat[pick == index])
        return out.view_as(x)


@pytest.fixture
def modular(make_llama):
    model = make_llama()
    torch.manual_seed(5)
    for layer in model.model.layers:
        layer.mlp = Experts()
    return model.eval()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("batch_size", [None, 1, 2])
@pytest.mark.parametrize("method", ["gptq", "wanda", "sparsegpt"])
def test_windows_of_one_topic_each_reach_other_experts(modular, method, batch_size):
    """The first window shows one expert; the stages come from all, and no expert is left as it was."""
    windows = torch.stack([torch.full((8,), token) for token in (3, 50, 90, 120, 200, 240)])
    before = {name: linear.weight.clone() for name, linear in iter_linears(modular)}
    with pytest.warns(UserWarning, match="too few calibration tokens"):
        if method == "gptq":
            gptq_model(modular, windows, CONFIG, batch_size=batch_size)
        else:
            prune_model(modular, windows, PruneConfig(method), batch_size=batch_size)
    for name, linear in iter_linears(modular):
        assert linear.weight.isfinite().all()
        assert not torch.equal(linear.weight, before[name]), f"{name} was left as it was"


def test_an_expert_without_a_token_is_rounded_to_nearest(modular):
    windows = torch.full((2, 32), 7)
    before = {name: linear.weight.detach().clone() for name, linear in iter_linears(modular)}
    with pytest.warns(UserWarning, match="too few"):
        quantized = gptq_model(modular, windows, CONFIG)
        tokens = walk(modular, windows, InputNorms, lambda stage, statistic: None)
    unseen = [name for name, count in tokens.items() if count == 0]
    assert len(unseen) >= 10
    for name in unseen:
        assert torch.equal(quantized[name].codes, rtn(before[name], CONFIG).codes), name


def test_few_tokens_tell_the_sizes_of_inputs_but_not_how_they_go_together(modular, windows):
    seen = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens = walk(modular, windows, Hessian, lambda stage, h: seen.update(dict.fromkeys(stage.named, h)))
    few = [name for name, count in tokens.items() if FEW_TOKENS <= count < 2 * 64 and "expert" in name]
    assert few
    for name in few:
        matrix = seen[name].matrix
        assert torch.equal(matrix, matrix.diagonal().diag()) and matrix.diagonal().std() > 0
    assert all(seen[name].matrix.count_nonzero() > 64 for name, count in tokens.items() if count == windows.numel())


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_format_that_stores_layers_refuses_fused_experts_by_name():
    with pytest.raises(ValueError, match=r"MixtralForCausalLM.*layer files.*experts\.0\.gate_up_proj is no nn.Linear"):
        require_needs(build("mixtral"), "layer files")
    require_needs(build("llama"), "layer files")


@pytest.mark.parametrize("step", ["weights", "calibration", "rounded activations"])
def test_a_matrix_that_two_blocks_share_is_refused_by_name(step, llama):
    """As in Zamba 2: it would be changed twice, each time for the inputs of one place."""
    require_needs(llama, step)
    llama.model.layers[2].mlp.up_proj = llama.model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj is the same matrix as model\.layers\.0\.mlp\.up_pr"):
        require_needs(llama, step)


def test_a_layer_that_is_quantized_already_is_refused_by_name(llama):
    weight = llama.model.layers[1].mlp.up_proj.weight
    llama.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight.to(torch.uint8), requires_grad=False)
    for step in ("weights", "calibration"):
        with pytest.raises(ValueError, match=r"mlp\.up_proj is quantized already \(Linear\)"):
            require_needs(llama, step)


def test_a_large_parameter_in_an_unknown_layout_is_refused_by_name(llama):
    llama.model.layers[2].mlp.bank = nn.Parameter(torch.randn(8, 64, 64))
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.bank holds weights in a layout not known"):
        require_needs(llama, "weights")


def test_a_linear_layer_that_multiplies_otherwise_is_refused_by_name_and_a_router_is_left_alone(llama):
    """DeepSeek V4's multiplies groups of inputs by parts of one matrix; Llama 4's and PhiMoE's routers are layers."""

    class GroupedLinear(nn.Linear):
        def forward(self, x):
            return super().forward(x.flip(-1))

    for kind in ("llama4_text", "phimoe"):
        require_needs(build(kind), "calibration")
    grouped = GroupedLinear(8, 8)  # small: no large share of the block
    llama.model.layers[1].mlp.grouped = grouped
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.grouped holds weights in a layout not known here"):
        require_needs(llama, "weights")


def test_the_pieces_are_views(llama):
    assert all(isinstance(linear, nn.Linear) for linear in block_linears(llama.model.layers[0]).values())
    block = build("gpt_oss").model.layers[0]
    pieces = {n: m for n, m in block_linears(block).items() if isinstance(m, Matrix)}
    assert set(pieces) == {f"mlp.experts.{e}.{n}" for e in range(4) for n in ("gate_up_proj", "down_proj")}
    with torch.no_grad():
        pieces["mlp.experts.2.down_proj"].weight[5, 3] = 77
    assert block.mlp.experts.down_proj[2, 3, 5] == 77
