"""Shared by all unit tests: a tiny random Llama and a byte-level tokenizer. No network, no downloads."""

import os
import shutil

# Before torch, triton, transformers and huggingface_hub are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("TQDM_DISABLE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; so do the kernels that they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # where Triton is installed without a GPU, its kernels run in Python

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# The same examples on every machine and in every run.
settings.register_profile("course", derandomize=True, database=None, deadline=None, max_examples=60)
settings.load_profile("course")

VOCABULARY = 256


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config, items):
    """Mark what llama.cpp is needed for as `engines`; skip `gpu` without one, and `nightly` unless asked for.

    Notebooks first: with two workers, the longest files must not be what the last one is left with.
    """
    items.sort(key=lambda item: item.get_closest_marker("notebooks") is None)
    for item in items:
        if item.get_closest_marker("nightly") and "nightly" not in config.getoption("markexpr"):
            item.add_marker(pytest.mark.skip(reason="runs nightly: pytest -m nightly"))
        if any("llama.cpp" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif")):
            item.add_marker("engines")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors only: more threads would cost time, and their sums would depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_llama():
    """make_llama(seed=0, **config) → a tiny random Llama: float32, tied embeddings, evaluation mode."""

    def make(seed: int = 0, **changes) -> LlamaForCausalLM:
        config = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,  # ten times the usual: attention and logits then have something to say
        }
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**config | changes)).float().eval()
        for parameter in model.parameters():  # 16-bit numbers, as the weights of published models are
            parameter.data = parameter.data.bfloat16().float()
        return model

    return make


@pytest.fixture
def llama(make_llama) -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture
def windows() -> torch.Tensor:
    """Five windows of 16 random tokens: an odd number, so that batches come out uneven."""
    return torch.randint(VOCABULARY, (5, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: ids 0 to 255. Text in ASCII has as many tokens as characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[-1], pad_token=alphabet[-1])
