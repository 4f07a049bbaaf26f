"""The batch against `generate`, family by family: right, or refused by name; no proxy on the way to the loopback."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from common.serving.backend import HttpEngine
from common.serving.batching import Batch, Sequence, require_batchable

SIZES = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "initializer_range": 0.3}
HEADS = {"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
PROMPTS = [[5, 9, 77, 30, 41], [8, 120, 33, 4, 90, 17, 66, 12, 19, 200, 150, 99]]  # one of them beyond the window
ANSWER = 14


def build(kind, config, **options):
    torch.manual_seed(0)
    return kind(config(**SIZES, **options)).float().eval()


@pytest.mark.parametrize(
    ("kind", "config", "options"),
    [
        (MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
        (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
        (Gemma2ForCausalLM, Gemma2Config, {"sliding_window": 8}),  # every second layer looks through a window
        (GptOssForCausalLM, GptOssConfig, {"sliding_window": 8, "num_local_experts": 4}),  # plain attention
    ],
)
def test_answers_are_those_of_generate_also_beyond_a_window(kind, config, options):
    model = build(kind, config, **HEADS, **options)
    require_batchable(model)
    batch, sequences = Batch(model, 2, 64), [Sequence(prompt, ANSWER) for prompt in PROMPTS]
    for sequence in sequences:
        batch.join(sequence)
    for _ in range(ANSWER - 1):
        batch.step()
    for sequence in sequences:
        ids = torch.tensor([sequence.prompt])
        alone = model.generate(ids, max_new_tokens=ANSWER, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert sequence.tokens == alone[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("kind", "config", "options"),
    [(BloomForCausalLM, BloomConfig, {"n_head": 4}), (MambaForCausalLM, MambaConfig, {"state_size": 4})],
)
def test_other_kinds_of_attention_are_refused_by_name(kind, config, options):
    with pytest.raises(ValueError, match=f"{kind.__name__} cannot be served by this engine: its answers in a batch"):
        require_batchable(build(kind, config, **options))


def test_a_model_that_would_answer_wrongly_is_refused(llama, monkeypatch):
    """Planted: every row's token stands one position further."""
    forward = llama.forward

    def shifted(*args, position_ids=None, **kwargs):
        return forward(*args, position_ids=None if position_ids is None else position_ids + 1, **kwargs)

    monkeypatch.setattr(llama, "forward", shifted)
    with pytest.raises(ValueError, match="its answers in a batch are not those it gives alone"):
        require_batchable(llama)


def test_no_proxy_is_asked_on_the_way_to_the_loopback(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:3128")
    monkeypatch.setenv("ALL_PROXY", "http://proxy.invalid:3128")

    def proxies(url):
        client = HttpEngine(url, "m", api_key="secret")._client
        return [type(t).__name__ for t in client._mounts.values() if t is not None]

    assert proxies("http://127.0.0.1:8000") == []
    assert proxies("http://gpu.example:8000") != []  # elsewhere a proxy may be the only way
