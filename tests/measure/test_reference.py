"""The original's results: measured once, found again, and measured anew where anything behind them changed."""

import pytest
import torch

from common.course.settings import load_settings
from common.measure import evaluation, reference
from common.measure.evaluation import Baseline, evaluate


@pytest.fixture
def settings(tmp_path, monkeypatch, llama, tokenizer):
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "work"))
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return load_settings("quantization", "smoke", str(tmp_path / "model"))


@pytest.fixture
def measured(monkeypatch):
    """The window counts of every evaluation, one entry each."""
    counts = []

    def counting(model, windows, **options):
        counts.append(len(windows))
        return evaluate(model, windows, **options)

    monkeypatch.setattr(reference, "evaluate", counting)
    return counts


def test_measured_once_and_the_same_when_found_again(settings, windows, measured, llama):
    expected_baseline = Baseline(3)
    expected = evaluate(llama, windows, keep=expected_baseline)
    for _ in range(2):
        quality, baseline = reference.original(settings, windows, llama, keep=3)
        assert vars(quality) == vars(expected)
        for name in ("losses", "hits", "choices"):
            assert torch.equal(getattr(quality, name), getattr(expected, name))
        for mine, theirs in zip(baseline.logits, expected_baseline.logits, strict=True):
            assert torch.equal(mine, theirs)
    assert len(measured) == 1
    assert evaluate(llama, windows, against=baseline).top1 == 1


def test_what_it_depends_on(settings, windows, measured, llama, tmp_path, monkeypatch):
    reference.original(settings, windows, llama)
    reference.original(settings, windows, llama, keep=2)
    reference.original(settings, windows, llama, keep=1)  # fewer than are kept
    assert len(measured) == 2
    reference.original(settings, windows[:4], llama)
    assert len(measured) == 3
    llama.model.norm.weight.data *= 1.1
    llama.save_pretrained(tmp_path / "model")  # another model under the same name
    quality, _ = reference.original(settings, windows, llama)
    assert len(measured) == 4
    assert quality.perplexity == evaluate(llama, windows).perplexity
    monkeypatch.setattr(evaluation, "_logits", lambda model, windows: None)
    with pytest.raises(TypeError):  # other code: it is measured anew, here with code that cannot
        reference.original(settings, windows, llama)


def test_old_ones_make_room(settings, windows, llama):
    for count in range(2, 8):
        reference.original(settings, windows[:count], llama, keep=1)
    assert len(list((reference.work_folder() / "references").iterdir())) == reference.KEPT
