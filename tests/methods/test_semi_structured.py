"""The ladder of 2:4: every rung computes the same, and differs in what it promises to differ in.

On a CPU cuSPARSELt is played by a stand-in that keeps its habits: the sparse matrix comes first, the result lies in
rows of what was asked for, and sides that are no multiple of eight are refused.
"""

import copy

import pytest
import torch
from torch import nn

from common.methods import semi_structured
from common.methods.blocks import iter_linears
from common.methods.pruning import PruneConfig, prune_model
from common.methods.semi_structured import LADDER, SparseLinear, climb, keep_first_two, make_sparse


@pytest.fixture
def calls(monkeypatch):
    """Lets a CPU have cuSPARSELt; the calls of its product as (algorithm, transposed)."""
    made = []

    def product(packed, columns, algorithm=0, transpose_result=False):
        assert columns.shape[1] % semi_structured.TOKENS == 0
        assert columns.is_contiguous() or columns.T.is_contiguous()
        made.append((algorithm, transpose_result))
        out = packed @ columns
        return out.T.contiguous() if transpose_result else out

    monkeypatch.setattr(semi_structured, "compress_2_4", torch.clone)
    monkeypatch.setattr(semi_structured, "product_2_4", product)
    monkeypatch.setattr(semi_structured, "fastest_2_4", lambda packed, columns, transpose_result: 7)
    monkeypatch.setattr(semi_structured, "_found", {})
    return made


@pytest.fixture
def pair(make_llama, calls):
    """A 2:4 model and the same for the ladder."""
    model = make_llama()
    prune_model(model, None, PruneConfig("magnitude", 0.5, "2:4"))
    sparse = copy.deepcopy(model)
    make_sparse(sparse)
    return model, sparse


@pytest.mark.parametrize("tokens", [16, 5])
@pytest.mark.parametrize("name", LADDER)
@torch.no_grad()
def test_every_rung_computes_what_the_dense_layers_do(pair, name, tokens):
    model, sparse = pair
    climb(sparse, LADDER[name])
    ids = torch.arange(tokens)[None]
    torch.testing.assert_close(sparse(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "attention", "others"),
    [
        ("as it comes", False, False),
        ("copied", True, True),
        ("copied for attention", True, False),
        ("+ searched", True, False),
        ("+ transposed by the kernel", True, True),
    ],
)
@torch.no_grad()
def test_what_lies_in_rows(pair, calls, name, attention, others):
    _, sparse = pair
    climb(sparse, LADDER[name])
    in_rows = {}
    for layer, module in sparse.named_modules():
        if isinstance(module, SparseLinear):
            module.register_forward_hook(lambda m, _, y, layer=layer: in_rows.update({layer: y.is_contiguous()}))
    sparse(input_ids=torch.arange(16)[None])
    for layer, rows in in_rows.items():
        assert rows == (attention if layer.endswith(("q_proj", "k_proj", "v_proj")) else others), layer
    searched = LADDER[name].search
    assert set(calls) == {(7 if searched else 0, name == "+ transposed by the kernel")}


def test_the_search_is_done_once_per_shape(pair, monkeypatch):
    _, sparse = pair
    searches = []
    monkeypatch.setattr(semi_structured, "fastest_2_4", lambda packed, columns, **_: searches.append(packed.shape))
    monkeypatch.setattr(semi_structured, "product_2_4", lambda p, c, algorithm, transpose_result: (p @ c).T)
    climb(sparse, LADDER["+ transposed by the kernel"])
    for _ in range(2):
        sparse(input_ids=torch.arange(16)[None])
    assert len(searches) == len({tuple(m.packed.shape) for m in sparse.modules() if isinstance(m, SparseLinear)})


@torch.no_grad()
def test_inputs_in_neither_layout_are_copied(calls):
    linear = nn.Linear(16, 8)
    keep_first_two(linear.weight.detach())
    x = torch.randn(8, 32)[:, ::2]
    torch.testing.assert_close(SparseLinear(linear)(x), linear(x))


@torch.no_grad()
def test_a_bias_is_added(calls):
    linear = nn.Linear(16, 8)
    keep_first_two(linear.weight.detach())
    x = torch.randn(2, 4, 16)
    torch.testing.assert_close(SparseLinear(linear)(x), linear(x))


def test_what_is_not_2_4_is_refused_by_name(make_llama, calls):
    model = make_llama()
    for _, linear in iter_linears(model):
        keep_first_two(linear.weight.detach())
    model.model.layers[1].mlp.up_proj.weight.data[3, :4] = 1
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj: More than two of four"):
        make_sparse(model)


def test_times_of_a_product_are_of_these_three(calls):
    weight = torch.randn(16, 32)
    keep_first_two(weight)
    times = semi_structured.product_times(weight, tokens=3)
    assert list(times) == ["dense", "as it comes", "searched, transposed by the kernel"] and min(times.values()) > 0
    assert set(calls) == {(0, False), (7, True)}
