"""Versions of a model measured side by side: the same figures as one after the other, and the model is left alone."""

import copy
from functools import partial

import torch

from common.measure.evaluation import Baseline, evaluate
from common.methods.allocation import kth_smallest
from common.methods.blocks import collect
from common.methods.compensation import Hessian
from common.methods.pruning import PruneConfig, prune_linears, prune_once
from common.methods.variants import evaluate_edited


def test_each_version_is_what_it_is_alone(llama, windows):
    tests = windows.flip(0)[:3]
    baseline = Baseline(2)
    dense = evaluate(llama, tests, keep=baseline)
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    configs = {c.label: c for c in (PruneConfig("wanda", 0.5), PruneConfig("sparsegpt", 0.5), PruneConfig("magnitude"))}
    edits = {label: partial(prune_linears, config=config) for label, config in configs.items()}
    edits["nothing"] = lambda linears, statistic: None
    found = evaluate_edited(llama, windows, tests, edits, device="cpu", batch_size=3, against=baseline)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    torch.testing.assert_close(found["nothing"].losses, dense.losses, rtol=1e-5, atol=1e-6)
    statistics = collect(llama, windows, Hessian, batch_size=3)
    for label, config in configs.items():
        model = copy.deepcopy(llama)
        prune_once(model, statistics, config)
        alone = evaluate(model, tests, against=baseline)
        torch.testing.assert_close(found[label].losses, alone.losses, rtol=1e-5, atol=1e-6)
        assert abs(found[label].kl - alone.kl) < 1e-5
        assert len(found[label].divergences) == 2


def test_the_kth_smallest_of_parts():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(50, 7, generator=generator).abs(), torch.zeros(3, 3), torch.rand(40, generator=generator)]
    everything = torch.cat([part.flatten() for part in parts]).sort().values
    for k in (1, 9, 10, 200, len(everything)):
        assert kth_smallest(lambda: iter(parts), k) == everything[k - 1].item()
