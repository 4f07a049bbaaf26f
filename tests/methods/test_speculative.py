"""Speculative decoding: what comes out is distributed as the model alone would write it, and costs what theory says."""

import itertools

import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.utils import import_utils

from common.methods import speculative
from common.methods.proofs import logits_of
from common.methods.speculative import Speculation, accept, draw, expected_speedup, expected_tokens
from common.methods.static_cache import require_static_cache

SMALLEST = {  # a model of which every text of a few tokens can be looked at
    "vocab_size": 3,
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 1.0,
}
UNLIKELY = 1e-4  # probability of a false alarm; seeds are fixed, so it never rings twice


def fits(counts: torch.Tensor, expected: torch.Tensor) -> bool:
    """Chi-square: whether counts are those of the probabilities `expected`; rare outcomes are counted together."""
    n, rare = counts.sum().item(), expected * counts.sum() < 10
    observed, wanted = counts[~rare].double(), expected[~rare].double() * n
    if rare.any():
        observed = torch.cat((observed, counts[rare].sum()[None]))
        wanted = torch.cat((wanted, n * expected[rare].sum()[None]))
    return stats.chisquare(observed.numpy(), (wanted / wanted.sum() * n).numpy()).pvalue > UNLIKELY


@pytest.fixture
def tables():
    """p and q of a text in which only the position matters: [4, 6] and [3, 6]."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(4, 6, generator=generator).softmax(-1), (3 * torch.rand(3, 6, generator=generator)).softmax(-1)


def test_draw_draws_in_proportion():
    torch.manual_seed(0)
    weights = torch.tensor([0.0, 1.0, 3.0, 4.0])
    counts = draw(weights.expand(40_000, 4)).bincount(minlength=4)
    assert counts[0] == 0
    assert fits(counts[1:], weights[1:] / 8)


def test_what_is_kept_and_what_replaces_it_add_up_to_the_model(tables):
    """min(p, q) + (1 - α) · rest = p: the identity that makes it exact."""
    p, q = tables[0][0].double(), tables[1][0].double()
    kept, rest = torch.minimum(p, q), (p - q).clamp_min(0)
    torch.testing.assert_close(kept + (1 - kept.sum()) * rest / rest.sum(), p, rtol=1e-6, atol=0)


def test_tokens_of_a_round_are_the_models(tables):
    """Of 200,000 rounds at once: the first two tokens, where a round gave them, and how many were kept."""
    p, q = tables
    torch.manual_seed(1)
    rows = 200_000
    drafted = draw(q.expand(rows, 3, 6))
    kept, following = accept(drafted, p.expand(rows, 4, 6), q.expand(rows, 3, 6))
    first = torch.where(kept > 0, drafted[:, 0], following)
    assert fits(first.bincount(minlength=6), p[0])
    second = torch.where(kept > 1, drafted[:, 1], following)[kept > 0]
    assert fits(second.bincount(minlength=6), p[1])
    assert fits(following[kept == 3].bincount(minlength=6), p[3])
    alpha = torch.minimum(p[:3], q).sum(-1)
    expected = torch.tensor([1 - alpha[0], alpha[0] * (1 - alpha[1]), alpha[0] * alpha[1] * (1 - alpha[2])])
    assert fits(kept.bincount(minlength=4), torch.cat((expected, alpha.prod()[None])))


def probabilities(model, prompt, length):
    """p(y | prompt) of every continuation y of `length` tokens, in lexical order."""
    size = model.config.vocab_size
    every = torch.tensor(list(itertools.product(range(size), repeat=length)))
    ids = torch.cat((prompt.expand(len(every), -1), every), 1)
    log_p = logits_of(model, ids)[:, prompt.shape[1] - 1 : -1].log_softmax(-1)
    return log_p.gather(-1, every[..., None]).sum((1, 2)).exp()


@pytest.mark.parametrize("drafted", [1, 2])
def test_whole_texts_are_distributed_as_the_models(make_llama, drafted):
    """400 texts of two tokens out of three, written by the class, against all nine probabilities."""
    model, draft, prompt = make_llama(1, **SMALLEST), make_llama(2, **SMALLEST), torch.tensor([[1, 2]])
    run = Speculation(model, draft, drafted, length=4)
    torch.manual_seed(0)
    counts = torch.zeros(9, dtype=torch.long)
    for _ in range(400):
        run.prepare(prompt)
        counts[(run.write().tokens[2:] * torch.tensor([3, 1])).sum()] += 1
    expected = probabilities(model, prompt, 2)
    assert expected.sum().item() == pytest.approx(1, abs=1e-5)
    assert fits(counts, expected)
    assert not fits(counts, probabilities(draft, prompt, 2))


@pytest.mark.parametrize("drafted", [1, 3])
def test_greedy_text_is_that_of_plain_decoding_and_of_transformers(make_llama, windows, drafted):
    model, draft = make_llama().double(), make_llama(5).double()
    with torch.no_grad():  # a draft that is right now and then
        for mine, theirs in zip(draft.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 0.9)
    prompt = windows[:1, :6]
    run = Speculation(model, draft, drafted, length=40, temperature=0)
    run.prepare(prompt)
    found = run.write()
    options = {"max_length": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(prompt, **options)[0]
    assisted = model.generate(prompt, assistant_model=draft, **options)[0]
    assert torch.equal(found.tokens, plain)
    assert torch.equal(found.tokens, assisted)
    assert 0 < found.kept < found.tested  # both branches were taken
    assert found.rounds < 34


def test_a_draft_that_is_the_model_is_always_right(make_llama, windows):
    model = make_llama()
    run = Speculation(model, model, 3, length=30)
    run.prepare(windows[:1, :6])
    found = run.write()
    assert found.acceptance == 1
    assert found.rounds == 6


def test_sliding_windows_keep_all_tokens_and_see_few(windows):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 256, "num_attention_heads": 2}
    size |= {"num_hidden_layers": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    config = MistralConfig(**size, sliding_window=8)
    model = MistralForCausalLM(config).double().eval()
    plain = model.generate(windows[:1, :6], max_length=30, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    run = Speculation(model, model, 2, length=30, temperature=0)
    run.prepare(windows[:1, :6])
    assert torch.equal(run.write().tokens, plain)


def test_a_draft_may_pad_its_vocabulary_otherwise(make_llama, windows):
    torch.manual_seed(0)
    for rows in (250, 260):
        run = Speculation(make_llama(), make_llama(1, vocab_size=rows), 2, length=20)
        run.prepare(windows[:1, :6] % 250)
        assert run.write().tokens.max() < 256


def test_refuses_what_has_no_such_cache():
    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32)).eval()
    with pytest.raises(ValueError, match="MambaForCausalLM cannot be read into a static KV cache"):
        require_static_cache(model)


@pytest.mark.parametrize("length", [1, 12])
def test_refuses_a_prompt_that_does_not_fit(make_llama, windows, length):
    run = Speculation(make_llama(), None, 0, length=12)
    with pytest.raises(ValueError, match="2 to 11 tokens, this one has"):
        run.prepare(windows[:1, :length])


class NoQuestions(TorchDispatchMode):
    """Raises where the host waits for a number: a CUDA graph cannot be recorded over that."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("drafted", [0, 2])
def test_a_round_asks_the_host_for_nothing(make_llama, windows, monkeypatch, drafted):
    model = make_llama()
    run = Speculation(model, model if drafted else None, drafted, length=30)
    run.prepare(windows[:1, :6])
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)  # as transformers sees it then
    with torch.inference_mode(), NoQuestions():
        run._round()


def test_expected_speed():
    assert expected_tokens(0.5, 2) == 1.75
    for acceptance, drafted in ((0.3, 1), (0.7, 4)):
        closed = (1 - acceptance ** (drafted + 1)) / ((1 - acceptance) * (drafted * 0.25 + 1))
        assert expected_speedup(acceptance, drafted, 0.25) == pytest.approx(closed)
    assert expected_speedup(1.0, 4, 0.25) == 2.5


@pytest.mark.parametrize("cost", [0.1, 0.5, 0.9])
def test_one_token_pays_exactly_where_acceptance_exceeds_cost(cost):
    assert expected_speedup(cost, 1, cost) == pytest.approx(1)
    assert expected_speedup(cost + 0.01, 1, cost) > 1 > expected_speedup(cost - 0.01, 1, cost)
    best = max(expected_speedup(cost - 0.01, drafted, cost) for drafted in range(1, 20))
    assert best < 1  # and where one does not pay, more do not either


def test_replaced_by_a_draw_from_all_of_p_would_be_noticed(tables, monkeypatch):
    """The classic mistake: after a rejection, drawing from p and not from what q left of it."""
    p, q = tables
    torch.manual_seed(1)
    drafted = draw(q.expand(100_000, 3, 6))
    kept, _ = accept(drafted, p.expand(100_000, 4, 6), q.expand(100_000, 3, 6))
    wrong = torch.where(kept > 0, drafted[:, 0], speculative.draw(p[0].expand(100_000, 6)))
    assert not fits(wrong.bincount(minlength=6), p[0])
