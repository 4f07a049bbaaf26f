"""The packed sparse checkpoint: exact, as small as its formula says, and refused when damaged."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.course import artifacts
from common.formats.sparse import WEIGHTS, csr_bytes, load_sparse, pack, packed_bytes, save_sparse, unpack
from common.methods.blocks import iter_linears
from common.methods.pruning import PruneConfig, prune_model
from tests.methods.families import build

matrices = arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 19)), elements=st.sampled_from([0.0, 0.0, 1.5, -2.0, 1e-30])
)


@given(matrices)
def test_round_trip_is_exact_for_every_shape(matrix):
    weight = torch.from_numpy(matrix)
    for dtype in (torch.float32, torch.bfloat16):
        restored = unpack(pack(weight.to(dtype)))
        assert restored.dtype == dtype
        assert torch.equal(restored, weight.to(dtype))


def test_layout_by_hand():
    weight = torch.tensor([[0.0, 5.0, 0.0, 0.0, 7.0], [0.0, 0.0, 0.0, 9.0, 0.0]])
    packed = pack(weight)
    # weights 1 and 4 of byte 0; weight 8 is bit 0 of byte 1
    assert packed["bitmask"].tolist() == [0b00010010, 0b00000001]
    assert packed["values"].tolist() == [5.0, 7.0, 9.0]
    assert packed["shape"].tolist() == [2, 5]


def test_sizes_at_half_the_weights():
    weight = torch.randn(64, 128).bfloat16()
    weight[:, ::2] = 0
    shape = 2 * 8  # two int64
    assert packed_bytes(weight) - shape == weight.nbytes * 9 / 16
    assert csr_bytes(weight) > weight.nbytes
    # CSR as PyTorch stores it, with 32-bit indices
    csr = weight.to_sparse_csr()
    stored = csr.values().nbytes + 4 * (csr.col_indices().numel() + csr.crow_indices().numel())
    assert csr_bytes(weight) == stored


@pytest.fixture
def saved(llama, windows, tokenizer, tmp_path):
    config = PruneConfig("wanda")
    prune_model(llama, windows, config)
    options = {"method": "wanda", "settings": config.as_dict(), "parent": "original"}
    return llama, save_sparse(tmp_path / "wanda", llama, tokenizer, **options)


def test_model_comes_back_bit_for_bit_and_smaller(saved, windows):
    model, artifact = saved
    reloaded = load_sparse(artifact.folder, torch.float32)
    for (name, mine), theirs in zip(model.state_dict().items(), reloaded.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert torch.equal(model(windows).logits, reloaded(windows).logits)
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight  # tied, and stored once
    linears = sum(packed_bytes(linear.weight) for _, linear in iter_linears(model))
    rest = sum(p.nbytes for p in model.parameters()) - sum(linear.weight.nbytes for _, linear in iter_linears(model))
    header = artifact.weight_bytes - linears - rest
    assert 0 < header < 20_000
    assert artifacts.load(artifact.folder).settings["sparsity"] == 0.5


def test_untied_head_is_stored_too(make_llama, tokenizer, tmp_path, windows):
    model = make_llama(tie_word_embeddings=False)
    artifact = save_sparse(tmp_path / "m", model, tokenizer, method="none", settings={}, parent="original")
    assert torch.equal(load_sparse(artifact.folder, torch.float32)(windows).logits, model(windows).logits)


def test_others_refuse_the_folder_instead_of_loading_it_without_its_layers(saved):
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(saved[1].folder)


def test_damaged_values_are_refused(saved):
    _, artifact = saved
    file = artifact.folder / WEIGHTS
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".values"))
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"Damaged sparse weight: \d+ bits set"):
        load_sparse(artifact.folder, torch.float32)


def test_tokenizer_and_end_of_an_answer_are_kept(llama, tokenizer, tmp_path):
    llama.generation_config.eos_token_id = [7, 9]
    artifact = save_sparse(tmp_path / "m", llama, tokenizer, method="none", settings={}, parent="original")
    content = json.loads((artifact.folder / "generation_config.json").read_text(encoding="utf-8"))
    assert content["eos_token_id"] == [7, 9]
    assert AutoTokenizer.from_pretrained(artifact.folder)("abc").input_ids == tokenizer("abc").input_ids


def test_fused_experts_are_packed_too_and_settings_are_kept(tokenizer, tmp_path, windows):
    model = build("mixtral")
    model.generation_config.temperature = 0.9  # without do_sample: transformers loads it and refuses to save it
    prune_model(model, None, PruneConfig("magnitude"))
    artifact = save_sparse(tmp_path / "m", model, tokenizer, method="magnitude", settings={}, parent="original")
    stored = load_file(artifact.folder / WEIGHTS)
    assert "model.layers.0.mlp.experts.gate_up_proj.bitmask" in stored
    assert "model.layers.0.mlp.experts.gate_up_proj" not in stored
    again = load_sparse(artifact.folder, torch.float32)
    assert torch.equal(again(windows).logits, model(windows).logits)
    assert again.generation_config.temperature == 0.9


def test_a_model_that_does_not_fit_is_refused_before_it_is_written(saved, tokenizer, tmp_path, monkeypatch):
    model, artifact = saved
    usage = shutil.disk_usage(tmp_path)._replace(free=artifact.weight_bytes - 20_000)  # of the tensors; and a header
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="the disk has"):
        save_sparse(tmp_path / "again", model, tokenizer, method="none", settings={}, parent="original")


def test_more_values_than_bits_are_refused():
    packed = pack(torch.tensor([[0.0, 5.0]]))
    for values in ([], [5.0, 6.0]):
        with pytest.raises(ValueError, match="1 bits set"):
            unpack(packed | {"values": torch.tensor(values)})


def test_it_is_loaded_in_the_type_asked_for(saved):
    reloaded = load_sparse(saved[1].folder, torch.bfloat16)
    assert {p.dtype for p in reloaded.parameters()} == {torch.bfloat16}
