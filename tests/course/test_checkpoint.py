"""Checksums know a model again: any change of a number or a place, and none that is not one."""

import copy

import torch

from common.course.checkpoint import checksums


def test_checksums_know_a_model_again(llama):
    sums, other = checksums(llama), copy.deepcopy(llama)
    assert checksums(other) == sums and checksums(other.bfloat16()) != sums
    name = "model.layers.1.mlp.up_proj.weight"
    for change in (
        lambda w: w[3].flip(0),  # a row read backwards
        lambda w: torch.nextafter(w[3], w[3] + 1),
        lambda w: w[4],  # two rows exchanged, one of them here
    ):
        changed = copy.deepcopy(llama)
        weight = changed.get_submodule(name.removesuffix(".weight")).weight.data
        before = weight[3].clone()
        weight[3] = change(weight)
        weight[4] = torch.where((weight[3] == weight[4]).all(), before, weight[4])
        assert {n for n, value in checksums(changed).items() if value != sums[n]} == {name}


def test_minus_zero_is_zero():
    linear = torch.nn.Linear(4, 4, bias=False)
    linear.weight.data[0] = 0.0
    sums = checksums(linear)
    linear.weight.data[0] = -0.0
    assert checksums(linear) == sums
