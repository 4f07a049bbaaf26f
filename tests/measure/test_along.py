"""How two models differ along a text."""

import pytest
import torch

from common.measure.along import along
from common.measure.evaluation import Baseline, evaluate
from common.methods.proofs import logits_of
from common.methods.streaming import Streamed


def test_against_torch_distributions(make_llama, windows):
    teacher, student = make_llama(), make_llama(1)
    found = along(teacher, student, windows)
    p, q = (torch.distributions.Categorical(logits=logits_of(m, windows)[:, :-1]) for m in (teacher, student))
    torch.testing.assert_close(found.forward, torch.distributions.kl_divergence(p, q), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.reverse, torch.distributions.kl_divergence(q, p), rtol=1e-4, atol=1e-5)
    variation = (p.probs - q.probs).abs().sum(-1) / 2
    torch.testing.assert_close(found.overlap, 1 - variation, rtol=1e-4, atol=1e-5)


def test_the_forward_divergence_is_that_of_evaluate(make_llama, windows):
    teacher, student, baseline = make_llama(), make_llama(1), Baseline(len(windows))
    evaluate(teacher, windows, keep=baseline)
    expected = evaluate(student, windows, against=baseline).divergences
    found = along(Streamed(teacher, "cpu"), Streamed(student, "cpu"), windows)  # as a model beyond the card is read
    torch.testing.assert_close(found.per_window("forward"), expected, rtol=1e-4, atol=1e-5)
    assert found.mean("forward").value == pytest.approx(expected.mean().item(), rel=1e-4)


def test_positions_and_starts(make_llama, windows):
    found = along(make_llama(), make_llama(1), windows)
    later = found.mean("overlap", start=6)
    assert later.value == pytest.approx(found.overlap[:, 6:].mean().item(), rel=1e-5)
    parts = found.by_position("forward", 3)
    assert list(parts) == [2.5, 7.5, 12.5]
    assert sum(parts.values()) / 3 == pytest.approx(found.forward.mean().item(), rel=1e-5)


def test_vocabularies_that_are_padded_differently(make_llama, windows):
    found = along(make_llama(), make_llama(1, vocab_size=250), windows % 250)
    assert found.overlap.max() <= 1.0001
    assert found.forward.min() > -1e-5
