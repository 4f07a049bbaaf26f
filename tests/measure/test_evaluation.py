"""Quality measures against independent computations."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from common.measure.evaluation import Baseline, better, compare, evaluate, generate, quality_table


@torch.no_grad()
def logits64(model, windows) -> np.ndarray:
    """[windows, seqlen - 1, vocabulary] in float64: the predictions that have a target."""
    return model(windows).logits[:, :-1].double().numpy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def nll(model, windows) -> np.ndarray:
    """Mean negative log-likelihood of every window."""
    log_probs = log_softmax(logits64(model, windows))
    targets = windows[:, 1:].numpy()[..., None]
    return -np.take_along_axis(log_probs, targets, axis=-1)[..., 0].mean(-1)


# --- perplexity ----------------------------------------------------------------------------------------------------


def test_perplexity_is_transformers_loss(llama, windows):
    with torch.no_grad():
        loss = torch.stack([llama(input_ids=ids[None], labels=ids[None]).loss for ids in windows]).mean()
    quality = evaluate(llama, windows)
    assert quality.perplexity == pytest.approx(loss.exp().item(), rel=1e-5)
    assert quality.kl is None
    assert quality.top1 is None


def test_perplexity_and_its_error_in_float64(llama, windows):
    losses = nll(llama, windows)
    quality = evaluate(llama, windows)
    assert quality.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    # d exp(x) = exp(x) dx, with the standard error of the mean of the windows' losses
    expected = math.exp(losses.mean()) * losses.std(ddof=1) / math.sqrt(5)
    assert quality.standard_error == pytest.approx(expected, rel=1e-3)


def test_one_window_has_no_standard_error(llama, windows):
    quality = evaluate(llama, windows[:1])
    assert quality.perplexity == pytest.approx(math.exp(nll(llama, windows[:1])[0]), rel=1e-5)
    assert quality.standard_error == 0


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(llama, windows):
    llama.lm_head.weight.data.zero_()
    assert evaluate(llama, windows).perplexity == pytest.approx(256, rel=1e-6)


def test_windows_do_not_see_each_other(llama, windows):
    apart = [math.log(evaluate(llama, ids[None]).perplexity) for ids in windows]
    assert math.log(evaluate(llama, windows).perplexity) == pytest.approx(np.mean(apart), rel=1e-5)


def test_evaluation_is_without_dropout(make_llama, windows):
    model = make_llama(attention_dropout=0.5).train()
    assert evaluate(model, windows) == evaluate(model, windows)
    assert evaluate(model, windows).perplexity == pytest.approx(math.exp(nll(model, windows).mean()), rel=1e-5)


def test_weights_that_are_not_numbers(llama, windows):
    llama.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"not finite.*NaN or inf"):
        evaluate(llama, windows)


# --- distance from a baseline --------------------------------------------------------------------------------------


def test_a_bfloat16_model_is_at_no_distance_from_itself(llama, windows):
    model = llama.bfloat16()
    baseline = Baseline(windows=5)
    first = evaluate(model, windows, keep=baseline)
    again = evaluate(model, windows, against=baseline)
    assert (again.kl, again.top1) == (0, 1)
    assert (again.perplexity, again.standard_error) == (first.perplexity, first.standard_error)


def test_a_float32_model_is_at_no_distance_from_itself(llama, windows):
    """Models are float32 where the processor has no bfloat16; rounding the baseline alone must not look like a loss."""
    embedding = llama.model.embed_tokens.weight.data
    embedding[1::2] = embedding[::2] * 1.0005  # pairs of tokens nearly as likely, as any large vocabulary has them
    baseline = Baseline(windows=5)
    evaluate(llama, windows, keep=baseline)
    again = evaluate(llama, windows, against=baseline)
    assert again.top1 == 1
    assert again.kl == pytest.approx(0, abs=1e-6)


def test_baseline_is_exact_and_on_the_cpu(llama, windows):
    baseline = Baseline(windows=3)
    evaluate(llama, windows, keep=baseline)
    assert len(baseline.logits) == 3
    for kept, expected in zip(baseline.logits, logits64(llama, windows), strict=False):
        assert kept.shape == (15, 256)
        assert (kept.dtype, kept.device.type) == (llama.dtype, "cpu")
        np.testing.assert_allclose(kept.double().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [5, 2, 100])
def test_kl_and_agreement_in_float64(make_llama, windows, kept):
    original, model = make_llama(seed=0), make_llama(seed=0)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
    model.model.norm.weight.data *= 1.5  # surer of itself, by which the two directions of KL can be told apart
    baseline = Baseline(windows=kept)
    evaluate(original, windows, keep=baseline)
    quality = evaluate(model, windows, against=baseline)

    shared = windows[:kept]
    p, q = log_softmax(logits64(original, shared)), log_softmax(logits64(model, shared))
    expected = (np.exp(p) * (p - q)).sum(-1).mean()  # KL(original ‖ model), nats per token
    reverse = (np.exp(q) * (q - p)).sum(-1).mean()
    assert quality.kl == pytest.approx(expected, rel=1e-3)
    assert abs(expected - reverse) > 0.1 * expected
    agreement = (p.argmax(-1) == q.argmax(-1)).mean()
    assert 0.1 < agreement < 0.9
    assert quality.top1 == pytest.approx(agreement, abs=0.03)
    # perplexity is of all windows, however many of them are compared
    assert quality.perplexity == pytest.approx(math.exp(nll(model, windows).mean()), rel=1e-5)


# --- generation ----------------------------------------------------------------------------------------------------


def test_generation_is_greedy_and_without_the_prompt(llama, tokenizer):
    ids = tokenizer("Once upon", return_tensors="pt").input_ids
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, llama(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    expected = tokenizer.decode(ids[0, len("Once upon") :], skip_special_tokens=True).strip()
    llama.generation_config.eos_token_id = None
    assert generate(llama, tokenizer, "Once upon", max_new_tokens=6) == expected


def test_generation_uses_the_chat_template(llama, tokenizer, monkeypatch):
    llama.generation_config.eos_token_id = None
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    plain = generate(llama, tokenizer, "<user>Hello<bot>", max_new_tokens=6)
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert generate(llama, tokenizer, "Hello", max_new_tokens=6) == plain


def test_a_token_that_the_model_holds_for_impossible(llama, windows):
    llama.lm_head.register_forward_hook(lambda _, args, out: out.index_fill(-1, windows[2, 5:6], -torch.inf))
    with pytest.raises(ValueError, match=r"not finite.*NaN or inf"):
        evaluate(llama, windows)


# --- paired comparison ---------------------------------------------------------------------------------------------


@pytest.fixture
def noisy(make_llama):
    """noisy(scale) → a model whose weights are off by some noise."""

    def make(scale: float):
        model, generator = make_llama(), torch.Generator().manual_seed(7)
        for parameter in model.parameters():
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
        return model

    return make


def test_the_paired_difference_against_numpy_and_scipy(llama, noisy, windows):
    model = noisy(0.02)
    found = compare(evaluate(model, windows), evaluate(llama, windows))
    differences = nll(model, windows) - nll(llama, windows)
    expected = stats.ttest_rel(nll(model, windows), nll(llama, windows)).confidence_interval(0.95)
    assert found.log_perplexity.value == pytest.approx(differences.mean(), rel=1e-3)
    assert found.log_perplexity.standard_error == pytest.approx(differences.std(ddof=1) / math.sqrt(5), rel=1e-3)
    assert (found.log_perplexity.low, found.log_perplexity.high) == pytest.approx(expected, rel=1e-3)
    ratio = math.exp(nll(model, windows).mean()) / math.exp(nll(llama, windows).mean())
    assert found.ratio.value == pytest.approx(ratio, rel=1e-5)
    assert math.log(found.ratio.low) == pytest.approx(expected.low, rel=1e-3)
    assert math.log(found.ratio.high) == pytest.approx(expected.high, rel=1e-3)


def test_flips_are_counted_token_by_token(llama, noisy):
    """On text that the original writes itself, greedily: it is right everywhere, and the model can only lose."""
    model, windows = noisy(0.02), torch.arange(5)[:, None]
    for _ in range(15):
        with torch.no_grad():
            windows = torch.cat([windows, llama(windows).logits[:, -1:].argmax(-1)], 1)
    found = compare(evaluate(model, windows), evaluate(llama, windows))
    before, after = (logits64(m, windows).argmax(-1) for m in (llama, model))
    truth = windows[:, 1:].numpy()
    assert found.flips == pytest.approx((before != after).mean())
    assert found.right_before == pytest.approx(((before == truth) & (after != truth)).mean())
    assert found.right_after == pytest.approx(((after == truth) & (before != truth)).mean())
    assert 0 < found.flips < 1
    assert (found.right_before, found.right_after) == (found.flips, 0)
    back = compare(evaluate(llama, windows), evaluate(model, windows))
    assert (back.right_before, back.right_after) == (0, found.flips)


def test_pairing_tells_apart_what_standard_errors_cannot(llama, noisy, windows):
    """Every window gets worse by about as much; windows differ among themselves by far more."""
    good, bad = evaluate(llama, windows), evaluate(llama, windows)
    good.losses = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    bad.losses = good.losses + torch.tensor([0.010, 0.012, 0.009, 0.011, 0.010])
    assert better(good, bad)
    assert not better(bad, good)
    bad.losses = good.losses + torch.tensor([0.2, -0.1, 0.1, -0.15, 0.05])  # as large, but not in one direction
    assert not better(good, bad)
    assert not better(bad, good)
    assert not better(good, good)


def test_what_cannot_be_compared(llama, windows):
    some, all_of_them = evaluate(llama, windows[:3]), evaluate(llama, windows)
    with pytest.raises(ValueError, match="both models on the same windows"):
        compare(some, all_of_them)
    with pytest.raises(ValueError, match="at least 2 windows"):
        compare(evaluate(llama, windows[:1]), evaluate(llama, windows[:1]))


def test_figures_of_a_quality_stay_four(llama, windows):
    """Notebooks show vars(quality) as a row of a table."""
    assert list(vars(evaluate(llama, windows))) == ["perplexity", "standard_error", "kl", "top1"]


def test_a_model_that_streams(llama, windows):
    """What does not fit the card yields each window's logits [seqlen, vocabulary]; everything else is the same."""

    class Streamed:
        def stream(self, windows):
            with torch.no_grad():
                for ids in windows:
                    yield llama(ids[None]).logits[0]

    baseline = Baseline(windows=2)
    plain, streamed = evaluate(llama, windows, keep=baseline), evaluate(Streamed(), windows, against=baseline)
    assert streamed.perplexity == pytest.approx(plain.perplexity, rel=1e-6)
    assert streamed.top1 == 1
    assert torch.equal(streamed.choices, plain.choices)


def test_the_first_windows_alone(llama, windows):
    """What a sweep compares with, without reading the windows again."""
    whole, part = evaluate(llama, windows), evaluate(llama, windows[:2])
    assert whole.first(2).perplexity == pytest.approx(part.perplexity, rel=1e-9)
    assert compare(part, whole.first(2)).flips == 0


def test_a_table_compares_all_but_the_reference(llama, windows):
    original = evaluate(llama, windows)
    llama.model.norm.weight.data *= 1.1
    other = evaluate(llama, windows)
    shown = quality_table({"original": original, "other": other}, original)
    ratio = compare(other, original).ratio
    assert shown.loc["other", "× reference [95 %]"] == f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
    assert shown.loc["original", "× reference [95 %]"] == ""
    assert shown.loc["original", "perplexity"] == f"{original.perplexity:.2f}"
