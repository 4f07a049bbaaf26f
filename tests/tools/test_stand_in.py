"""A stand-in is an ordinary folder of the published shape, and says that its weights are random."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from common.course import assets, claims
from common.formats.gptq import unpack_rows
from tools import stand_in


@pytest.fixture
def make(tmp_path, monkeypatch, tokenizer):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 99}
    monkeypatch.setitem(assets.SHAPES, "small", LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    monkeypatch.setattr(stand_in, "load_tokenizer", lambda _: tokenizer)
    return lambda bits=16: stand_in.make_stand_in("small", tmp_path / str(bits), bits)


def test_it_loads_like_any_folder_with_the_tokenizers_vocabulary(make, tokenizer):
    made = make()
    model, report = AutoModelForCausalLM.from_pretrained(made.folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.vocab_size == len(tokenizer)
    assert model.model.layers[1].mlp.up_proj.weight.float().std().item() == pytest.approx(0.02, rel=0.05)
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    assert claims.is_stand_in(str(made.folder))
    assert assets.locate(str(made.folder)) == str(made.folder)


def test_four_bits_are_packed_as_awq_packs_them(make):
    from safetensors.torch import load_file

    tensors = load_file(make(4).folder / "model-001.safetensors")
    packed = tensors["model.layers.1.mlp.up_proj.qweight"]
    assert packed.shape == (128, 256 // 8)
    zeros = unpack_rows(tensors["model.layers.1.mlp.up_proj.qzeros"].T.contiguous(), bits=4)
    assert (zeros == 8).all()
    codes = unpack_rows(packed.T.contiguous(), bits=4).float()
    spread = ((codes - 8) * tensors["model.layers.1.mlp.up_proj.scales"][0, 0].float()).std()
    assert spread.item() == pytest.approx(0.02, rel=0.1)


def test_unknown_shapes_and_bits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="4 or 16 bits and one of the shapes llama-2-7b"):
        stand_in.make_stand_in("llama-3", tmp_path)


def test_the_small_ones_have_the_ratios_of_the_published_ones():
    small = {shape: stand_in.shrunk(assets.SHAPES[shape]) for shape in ("llama-2-7b", "tinyllama-1.1b")}
    assert len({config.num_attention_heads for config in small.values()}) == 1, "MiniLM compares heads one to one"
    for shape, config in small.items():
        published = assets.SHAPES[shape]
        assert config.head_dim * config.num_attention_heads == config.hidden_size == published.hidden_size // 16
        ratio = published.intermediate_size / published.hidden_size
        assert config.intermediate_size / config.hidden_size == pytest.approx(ratio, rel=0.1)
        assert config.intermediate_size % 64 == 0 and config.num_attention_heads % config.num_key_value_heads == 0
