"""Recovery: the dense model's labels lower the loss of a pruned one, and its zeros are zeros afterwards."""

import copy

import pytest
import torch

from common.methods.blocks import iter_linears
from common.methods.pruning import PruneConfig, model_sparsity, prune_model
from common.methods.recovery import add_lora, merge_lora, retrain, teacher_labels
from common.methods.structured import drop_blocks


@pytest.fixture
def pruned(llama):
    model = copy.deepcopy(llama)
    prune_model(model, None, PruneConfig("magnitude", 0.6))
    return model


@pytest.fixture
def work(tmp_path):
    return {"folder": tmp_path, "device": torch.device("cpu")}


def divergence(model, dense, windows) -> float:
    with torch.no_grad():
        p, q = (m(input_ids=windows).logits.log_softmax(-1) for m in (dense, model))
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item() / windows.numel()


def test_recovery_comes_closer_to_the_dense_model_and_keeps_the_zeros(llama, pruned, windows, work):
    torch.manual_seed(0)
    labels = teacher_labels(llama, windows, 64, torch.device("cpu"))
    before, zeros = divergence(pruned, llama, windows), {n: w.weight == 0 for n, w in iter_linears(pruned)}
    sparsity, names = model_sparsity(pruned), set(pruned.state_dict())
    retrain(pruned, windows, labels, steps=30, batch_size=2, rank=8, learning_rate=1e-2, **work)
    assert divergence(pruned, llama, windows) < 0.8 * before
    assert all(torch.equal(linear.weight == 0, zeros[name]) for name, linear in iter_linears(pruned))
    assert model_sparsity(pruned) == sparsity and set(pruned.state_dict()) == names
    assert not pruned.training and not pruned.is_gradient_checkpointing


def test_a_smaller_dense_model_is_recovered_too(llama, windows, work):
    shallow = drop_blocks(llama, [1])
    labels = teacher_labels(llama, windows, 64, torch.device("cpu"))
    before = divergence(shallow, llama, windows)
    retrain(shallow, windows, labels, steps=30, batch_size=2, rank=8, learning_rate=1e-2, **work)
    assert divergence(shallow, llama, windows) < before


def test_untrained_lora_changes_nothing_and_only_lora_is_trained(pruned, windows):
    with torch.no_grad():
        before = pruned(input_ids=windows).logits
        trained = add_lora(pruned, 4)
        torch.testing.assert_close(pruned(input_ids=windows).logits, before)
        merge_lora(pruned)
        torch.testing.assert_close(pruned(input_ids=windows).logits, before)
    sizes = [4 * (linear.in_features + linear.out_features) for _, linear in iter_linears(pruned)]
    assert sum(parameter.numel() for parameter in trained) == sum(sizes)


def test_labels_are_the_teachers(llama, windows):
    labels = teacher_labels(llama, windows, 16, torch.device("cpu"))
    with torch.no_grad():
        expected = llama(input_ids=windows).logits[:, :-1].log_softmax(-1)
    for number, row in enumerate(expected):
        (ids,), (log_probs,) = labels.batch([number])
        torch.testing.assert_close(row.gather(-1, ids), log_probs[:, :-1], rtol=1e-2, atol=1e-2)  # kept in 16 bits
