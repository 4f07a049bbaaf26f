"""The tiny model as the service's tests need it."""

import copy

import pytest
import torch
from serving_tools import TEMPLATE
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(autouse=True)
def one_thread_in_services(monkeypatch):
    """The model is tiny: on a busy machine a service's threads would wait for one another far longer than they work."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def chatty(tokenizer):
    """The tiny tokenizer with a chat template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    """The tiny model on disk, for services in a process of their own."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=256, max_position_embeddings=4096, eos_token_id=255)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
