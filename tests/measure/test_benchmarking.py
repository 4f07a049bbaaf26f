"""Timing and memory: that the thing timed is the thing meant, and that the figures are arithmetic."""

import time

import pytest
import torch

from common.measure import benchmarking
from common.measure.benchmarking import (
    Decoder,
    Latency,
    copies_beyond_cache,
    in_turns,
    measure_latency,
    peak_memory,
    per_product,
    prefill,
)
from tests.methods.families import build

CPU = torch.device("cpu")


def test_decoder_computes_the_models_next_token(llama):
    llama = llama.double()  # the cache changes the order of sums: in float32 that shows in the fifth digit
    torch.manual_seed(3)
    decoder = Decoder(llama, batch=2, context=12)
    torch.manual_seed(3)
    prompt = torch.randint(0, llama.config.vocab_size, (2, 12))
    with torch.no_grad():  # the step appends the prompt's last token once more
        expected = llama(input_ids=torch.cat([prompt, prompt[:, -1:]], dim=1)).logits[:, -1]
    torch.testing.assert_close(decoder(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])  # Gemma 2: every second layer looks through a window
def test_every_step_does_the_same_work(kind):
    model = build(kind, sliding_window=16).double()
    torch.manual_seed(3)
    decoder = Decoder(model, batch=1, context=12)
    torch.manual_seed(3)
    prompt = torch.randint(0, model.config.vocab_size, (1, 12))
    with torch.no_grad():
        expected = model(input_ids=torch.cat([prompt, prompt[:, -1:]], dim=1)).logits[:, -1]
    for _ in range(5):
        torch.testing.assert_close(decoder(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "gpt_oss"])
def test_a_context_beyond_the_window_is_measured_too(kind):
    """Each step moves the full window on by one token; it computes as much, and is no fault of the recording."""
    decoder = Decoder(build(kind), batch=2, context=12)
    assert all(decoder().isfinite().all() for _ in range(10))


def test_prefill_reads_the_whole_prompt(llama):
    seen = []
    llama.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    prefill(llama, batch=3, context=7)()
    assert seen == [(3, 7)]


def test_percentiles_interpolate():
    latency = Latency([4.0, 1.0, 2.0, 3.0])  # in any order
    assert latency.percentile(0) == 1
    assert latency.percentile(50) == pytest.approx(2.5)  # between the second and the third
    assert latency.percentile(99) == pytest.approx(3.97)
    assert latency.mean == pytest.approx(2.5)


def test_latency_counts_runs_and_leaves_warm_up_out():
    calls = []

    def run():
        calls.append(1)
        time.sleep(0.2 if len(calls) <= 2 else 0.005)

    latency = measure_latency(run, runs=4, device=CPU, warmup=2)
    assert len(calls) == 6
    assert len(latency.seconds) == 4
    assert max(latency.seconds) < 0.15


def test_peak_memory_sees_what_was_freed_again():
    with peak_memory(CPU) as peak:
        block = torch.ones(100_000_000)  # 400 MB
        time.sleep(0.1)
        del block
    assert 350e6 < peak.bytes < 700e6


@pytest.mark.parametrize("replayed", [0.0, 0.8, float("nan")])
def test_a_recording_that_lacks_the_models_work_is_refused(llama, monkeypatch, replayed):
    """What a graph replays whose kernels ran elsewhere: nothing, a part, or memory that nobody wrote."""
    Decoder(llama, batch=1, context=12)  # what is replayed whole is not
    monkeypatch.setattr(benchmarking, "graphed", lambda step, device: lambda: replayed * step())
    with pytest.raises(RuntimeError, match="the CUDA graph lacks it"):
        Decoder(llama, batch=1, context=12)


def test_turns_change_their_order_so_that_a_drift_falls_on_all(monkeypatch):
    """A machine that slows down with every turn: the differences within rounds cancel in the mean."""
    order = []
    monkeypatch.setattr(benchmarking, "measure_latency", lambda run, runs, device: Latency([len(order)] * runs))
    seconds = in_turns(order.append, ["a", "b"], lambda: None, 4, 3, CPU)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert seconds == {"a": [1, 4, 5, 8], "b": [2, 3, 6, 7]}
    assert sum(seconds["a"]) == sum(seconds["b"])


def test_a_product_is_timed_per_product():
    matrix, calls = torch.ones(4, 4), []
    assert copies_beyond_cache(matrix) == [matrix]
    took = per_product(lambda m: time.sleep(1e-3) or calls.append(m), matrix)
    assert len(calls) == 40 * (3 + 20) and 1e-3 <= took < 0.04


@pytest.mark.gpu
def test_copies_exceed_the_cache():
    matrix = torch.ones(2**20, device="cuda")
    cache = torch.cuda.get_device_properties("cuda").L2_cache_size
    assert sum(copy.nbytes for copy in copies_beyond_cache(matrix)[1:]) >= 2 * cache
