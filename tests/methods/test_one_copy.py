"""Whole-model work holds the model once: what else is alive at the same time is a block, not another copy."""

import copy

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.course.checkpoint import checksums
from common.measure.evaluation import evaluate
from common.methods.allocation import one_threshold, outlier_ratios
from common.methods.blocks import collect
from common.methods.importance import InputNorms
from common.methods.pruning import PruneConfig, prune_linears, prune_model
from common.methods.quantization import QuantizeConfig, gptq_model
from common.methods.streaming import Streamed, offloaded
from common.methods.structured import block_influence, drop_blocks, narrow_ffn, only_blocks
from common.methods.variants import evaluate_edited

pytestmark = pytest.mark.slow  # every operation is seen by a Python function
BLOCKS = 12


class Alive(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at one time."""

    def __init__(self):
        super().__init__()
        self.made, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in (t for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and not tensor.is_meta:  # no view, nothing changed in place
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.made = {key: pair for key, pair in self.made.items() if not pair[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.made.values()))
        return out


@pytest.fixture
def model(make_llama):
    return make_llama(hidden_size=128, intermediate_size=256, num_hidden_layers=BLOCKS, num_attention_heads=4)


def extra(model, work) -> float:
    """Peak of what `work()` makes, in copies of the model."""
    with Alive() as alive:
        work()
    return alive.most / sum(p.nbytes for p in model.parameters())


WANDA, GPTQ = PruneConfig("wanda", 0.5), QuantizeConfig(bits=4, group_size=32)


def three_versions(model, windows):
    edits = {
        sparsity: lambda linears, statistic, sparsity=sparsity: prune_linears(
            linears, statistic, PruneConfig("wanda", sparsity)
        )
        for sparsity in (0.3, 0.5, 0.7)
    }
    evaluate_edited(model, windows, windows, edits, observe=InputNorms, device="cpu")


def influence(model, windows):
    with offloaded(model, "cpu:0"):  # the CPU under another name: what is moved there is copied
        block_influence(model, windows)


def with_half(model, windows):
    with only_blocks(model, list(range(0, BLOCKS, 2))):
        evaluate(model, windows)


def shares(model, windows):
    norms = collect(model, windows, InputNorms)
    outlier_ratios(model, norms)
    one_threshold(model, 0.5, norms)


# What stays at the end, in copies of a float32 model: masks and codes take a byte a weight.
WORK = {
    "evaluation": (lambda model, windows: evaluate(Streamed(model, "cpu:0"), windows), 0.0),
    "three versions": (three_versions, 0.0),
    "block influence": (influence, 0.0),
    "some blocks": (with_half, 0.0),
    "allocations": (shares, 0.0),
    "checksums": (lambda model, windows: checksums(model), 0.0),
    "Wanda": (lambda model, windows: prune_model(model, windows, WANDA), 0.25),
    "magnitude": (lambda model, windows: prune_model(model, None, PruneConfig("magnitude")), 0.25),
    "GPTQ": (lambda model, windows: gptq_model(model, windows, GPTQ), 0.3),
    "depth": (lambda model, windows: drop_blocks(model, [0, 1, 2]), 9 / BLOCKS),
    "width": (lambda model, windows: narrow_ffn(model, 128, windows), 0.75),
}


@pytest.mark.parametrize("name", WORK)
def test_no_second_copy_of_the_weights(name, model, windows):
    work, stays = WORK[name]
    assert extra(model, lambda: work(model, windows[:2])) < stays + 4 / BLOCKS


def test_a_copy_would_be_seen(model, windows):
    assert extra(model, lambda: copy.deepcopy(model)) > 0.95
    assert extra(model, lambda: evaluate(copy.deepcopy(model), windows[:1])) > 0.95
