"""The embedded model, whole: the figures that the course promises. Minutes on two cores."""

import time

import pytest
import torch

from common.assets import load_model, load_tokenizer
from common.blocks import collect, iter_linears
from common.compensation import Hessian, output_error
from common.environment import prepare
from common.evaluation import evaluate
from common.gptq_format import load_dequantized, save_gptq
from common.pruning import METHODS, PruneConfig, model_sparsity, prune, prune_model, prune_once, sparsegpt
from common.quantization import QuantizeConfig, gptq_model, rtn_model
from common.text import calibration_windows, load_corpus
from common.text import test_windows as first_test_windows  # pytest would take the name for a test

pytestmark = pytest.mark.slow
CONFIG = QuantizeConfig(bits=4, group_size=64, sym=False, desc_act=True, mse=True)


@pytest.fixture(scope="module")
def settings():
    torch.set_num_threads(2)
    return prepare("quantization", "cpu")


@pytest.fixture(scope="module")
def tests(settings):
    tokenizer = load_tokenizer("embedded")
    return first_test_windows(tokenizer, load_corpus(settings.corpus), settings.seqlen, settings.eval_windows)


@pytest.fixture(scope="module")
def calibration(settings):
    tokenizer = load_tokenizer("embedded")
    return calibration_windows(tokenizer, load_corpus(settings.corpus), 64, settings.seqlen, settings.seed)


@pytest.fixture(scope="module")
def quantized(settings, calibration, tmp_path_factory):
    """(model in place, folder of its checkpoint, seconds as multiples of a bare forward pass), 64 × 512 tokens."""
    model = load_model("embedded", settings.dtype)
    start = time.perf_counter()
    evaluate(model, calibration[:8])
    forward = (time.perf_counter() - start) * len(calibration) / 8
    start = time.perf_counter()
    weights = gptq_model(model, calibration, CONFIG)
    seconds = (time.perf_counter() - start) / forward
    assert len(weights) == 210
    folder = tmp_path_factory.mktemp("gptq") / "gptq"
    save_gptq(folder, model, load_tokenizer("embedded"), weights, method="gptq", parent="original")
    return model, folder, seconds


def test_baseline_perplexity(settings, tests):
    assert evaluate(load_model("embedded", settings.dtype), tests).perplexity == pytest.approx(12.66, abs=0.05)


def test_gptq_perplexity_and_time(quantized, tests):
    model, _, seconds = quantized
    assert evaluate(model, tests).perplexity <= 14.7
    # Machines differ by a factor of four; a pass over the data takes one forward, Hessians and columns as much again.
    assert seconds < 6


def test_checkpoint_is_small_and_exact(settings, quantized):
    model, folder, _ = quantized
    assert (folder / "model.safetensors").stat().st_size < 115_000_000
    reloaded = load_dequantized(folder, settings.dtype)
    for (name, mine), theirs in zip(model.state_dict().items(), reloaded.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("reader", ["GPTQModel", "AutoModelForCausalLM"])
def test_libraries_read_our_checkpoint(reader, settings, quantized, tests):
    model, folder, _ = quantized
    few = tests[:8]
    if reader == "GPTQModel":
        from gptqmodel import GPTQModel

        theirs = GPTQModel.load(str(folder), device="cpu", dtype=settings.dtype).model
    else:
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=settings.dtype)
    assert any(hasattr(module, "qweight") for module in theirs.modules())  # it computes on packed weights
    assert evaluate(theirs, few).perplexity == pytest.approx(evaluate(model, few).perplexity, rel=0.005)


def test_shuffled_calibration_hurts(settings, calibration, tests):
    """Sabotage on the real model: random tokens as calibration text lose to real text."""
    few = tests[:4]

    def perplexity(windows):
        model = load_model("embedded", settings.dtype)
        gptq_model(model, windows, CONFIG)
        return evaluate(model, few).perplexity

    noise = torch.randint(0, 49152, (8, settings.seqlen), generator=torch.Generator().manual_seed(0))
    assert perplexity(noise) > perplexity(calibration[:8])


def test_rtn_is_worse_than_gptq(settings, quantized, tests):
    few = tests[:8]
    model = load_model("embedded", settings.dtype)
    rtn_model(model, CONFIG)
    assert evaluate(model, few).perplexity > evaluate(quantized[0], few).perplexity


# --- pruning --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hessians(settings, calibration):
    """Statistics of the dense model's inputs, 16 × 512 tokens, by layer name."""
    return collect(load_model("embedded", settings.dtype), calibration[:16], Hessian)


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.5, "unstructured"), (0.5, "2:4")])
def test_sparsegpt_beats_wanda_beats_magnitude(settings, hessians, tests, sparsity, pattern):
    perplexity = {}
    for method in METHODS:
        model = load_model("embedded", settings.dtype)
        prune_once(model, hessians, PruneConfig(method, sparsity, pattern))
        assert model_sparsity(model) == pytest.approx(sparsity, abs=0.001)
        perplexity[method] = evaluate(model, tests[:4]).perplexity
    assert perplexity["sparsegpt"] < perplexity["wanda"] < perplexity["magnitude"] / 3


def test_compensation_lowers_the_error_of_wandas_mask_on_every_layer(settings, hessians):
    config = PruneConfig("wanda")
    for name, linear in iter_linears(load_model("embedded", settings.dtype)):
        weight, hessian = linear.weight.detach().float(), hessians[name].matrix
        removed, keep = prune(weight, hessians[name], config)
        updated, _ = sparsegpt(weight, hessian, choose=lambda _, columns, keep=keep: keep[:, columns])
        assert output_error(weight, updated, hessian) < output_error(weight, removed, hessian), name


def test_pruning_on_what_pruned_blocks_hand_on_beats_pruning_once(settings, hessians, calibration, tests):
    sequential, once = load_model("embedded", settings.dtype), load_model("embedded", settings.dtype)
    prune_model(sequential, calibration[:16], PruneConfig("wanda"))
    prune_once(once, hessians, PruneConfig("wanda"))
    assert evaluate(sequential, tests[:4]).perplexity < evaluate(once, tests[:4]).perplexity


def test_shuffled_norms_lose(settings, hessians, tests):
    """Sabotage: Wanda with another channel's norms is worse than Wanda."""
    generator = torch.Generator().manual_seed(0)

    class Shuffled:
        def __init__(self, statistic):
            self.norms = statistic.norms[torch.randperm(len(statistic.norms), generator=generator)]

    shuffled = {key: Shuffled(statistic) for key, statistic in {id(s): s for s in hessians.values()}.items()}
    perplexity = {}
    for label, statistics in {
        "right": hessians,
        "shuffled": {name: shuffled[id(statistic)] for name, statistic in hessians.items()},
    }.items():
        model = load_model("embedded", settings.dtype)
        prune_once(model, statistics, PruneConfig("wanda"))
        perplexity[label] = evaluate(model, tests[:4]).perplexity
    assert perplexity["right"] < perplexity["shuffled"]
