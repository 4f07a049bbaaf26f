"""The checkpoint format: every bit where the format puts it, and nothing lost between the model and the disk."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

from benchmarks.compatibility import for_transformers_4
from common.formats.gptq import (
    check_packable,
    load_dequantized,
    pack_linear,
    pack_rows,
    save_dense,
    save_gptq,
    unpack_linear,
    unpack_rows,
)
from common.methods.blocks import iter_linears
from common.methods.quantization import QuantizeConfig, QuantizedWeight, gptq_model, rtn, rtn_model
from tests.methods.families import build


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


# --- packing -------------------------------------------------------------------------------------------------------


def test_packing_by_hand_4_bits():
    """Eight codes a word, the first in the lowest four bits."""
    codes = torch.zeros(32, 2, dtype=torch.uint8)
    codes[:8, 0] = torch.arange(1, 9)
    codes[24:, 1] = torch.tensor([0, 0, 0, 0, 0, 0, 0, 15])
    packed = pack_rows(codes, 4)
    assert packed.dtype == torch.int32
    assert packed[:, 0].tolist() == [signed(0x87654321), 0, 0, 0]
    assert packed[:, 1].tolist() == [0, 0, 0, signed(0xF0000000)]


def test_packing_by_hand_2_and_8_bits():
    column = torch.zeros(32, 1, dtype=torch.uint8)
    column[:4, 0] = torch.tensor([0b01, 0b10, 0b11, 0b00])
    column[16, 0] = 0b10
    assert pack_rows(column, 2)[:, 0].tolist() == [0b00_11_10_01, 0b10]
    column[:4, 0] = torch.tensor([0x11, 0x22, 0x33, 0xFE])
    assert pack_rows(column, 8)[0, 0].item() == signed(0xFE332211)
    assert pack_rows(column, 8).shape == (8, 1)


def test_packing_by_hand_3_bits():
    """32 codes fill three words; code 10 has its two low bits in one word and its high bit in the next."""
    column = torch.zeros(32, 1, dtype=torch.uint8)
    column[0] = 0b011  # bits 0, 1, 2
    column[10] = 0b101  # bits 30, 31 | 32
    column[21] = 0b110  # bits 63 | 64, 65
    column[31] = 0b111  # bits 93, 94, 95
    words = [
        0b01_000_000_000_000_000_000_000_000_000_011,
        0b0_000_000_000_000_000_000_000_000_000_000_1,
        0b111_000_000_000_000_000_000_000_000_000_11,
    ]
    assert pack_rows(column, 3)[:, 0].tolist() == [signed(word) for word in words]


layers = st.tuples(st.sampled_from([2, 3, 4, 8]), st.sampled_from([32, 64, 96]), st.integers(1, 3)).flatmap(
    lambda t: st.tuples(
        st.just(t[0]),
        st.lists(st.lists(st.integers(0, 2 ** t[0] - 1), min_size=t[1], max_size=t[1]), min_size=t[2], max_size=t[2]),
    )
)


@given(layers)
def test_packing_is_one_stream_of_bits_and_can_be_undone(layer):
    bits, columns = layer
    codes = torch.tensor(columns, dtype=torch.uint8).T
    packed = pack_rows(codes, bits)
    assert packed.shape == (codes.shape[0] * bits // 32, codes.shape[1])
    for column, words in zip(columns, packed.T.tolist(), strict=True):
        stream = sum(code << (i * bits) for i, code in enumerate(column))  # as one long Python integer
        assert words == [signed(stream >> (32 * i) & 0xFFFFFFFF) for i in range(len(words))]
    assert torch.equal(unpack_rows(packed, bits), codes)


def test_sizes_that_cannot_be_packed():
    with pytest.raises(ValueError, match="multiples of 32, got 48"):
        pack_rows(torch.zeros(48, 3, dtype=torch.uint8), 4)


def test_bits_that_no_reader_knows_are_quantized_but_not_stored():
    weight = rtn(torch.randn(32, 32), QuantizeConfig(bits=5, group_size=32))
    assert weight.codes.max() > 15
    with pytest.raises(ValueError, match="holds 2, 3, 4 or 8 bits, got 5"):
        pack_linear(weight)


# --- one layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
def test_a_layer_unpacks_to_exactly_its_dequantized_weight(bits, sym):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(bits))
    quantized = rtn(weight, QuantizeConfig(bits=bits, group_size=32, sym=sym))
    tensors = pack_linear(quantized)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == {
        "qweight": ((96 * bits // 32, 64), torch.int32),
        "qzeros": ((3, 64 * bits // 32), torch.int32),
        "scales": ((3, 64), torch.float16),
        "g_idx": ((96,), torch.int32),
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert tensors["g_idx"].tolist() == 32 * [0] + 32 * [1] + 32 * [2]
    assert torch.equal(unpack_linear(tensors, bits), quantized.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_at_the_ends_survive(bits):
    """All-positive and all-negative groups have zero points 1 and 2**bits - 1, stored as 0 and 2**bits - 2."""
    top = 2**bits - 1
    up = torch.linspace(0.5, 1, 32).repeat(32, 1)
    quantized = rtn(torch.cat([up, -up], dim=1), QuantizeConfig(bits=bits, group_size=32, mse=False))
    assert torch.equal(quantized.zero, torch.tensor([[1, top]], dtype=torch.uint8).expand(32, 2))
    tensors = pack_linear(quantized)
    stored = unpack_rows(tensors["qzeros"].T.contiguous(), bits)  # [out, groups]
    assert torch.equal(stored, torch.tensor([[0, top - 1]], dtype=torch.uint8).expand(32, 2))
    assert torch.equal(unpack_linear(tensors, bits), quantized.dequantize())


def test_every_zero_point_and_code_survives():
    config = QuantizeConfig(bits=4, group_size=32)
    zero = (torch.arange(32 * 2).view(32, 2) % 15 + 1).to(torch.uint8)
    codes = (torch.arange(32 * 64).view(32, 64) % 16).to(torch.uint8)
    quantized = QuantizedWeight(codes, torch.full((32, 2), 0.5, dtype=torch.float16), zero, config)
    expected = (codes.float() - zero.float().repeat_interleave(32, dim=1)) * 0.5
    assert torch.equal(quantized.dequantize(), expected)
    assert torch.equal(unpack_linear(pack_linear(quantized), 4), expected)


# --- a whole checkpoint --------------------------------------------------------------------------------------------

SMALL = QuantizeConfig(bits=4, group_size=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [3, 4])
def test_load_dequantized_is_the_model_that_was_saved(make_llama, windows, tokenizer, tmp_path, dtype, bits):
    model = make_llama()
    for parameter in model.parameters():  # not model.to(dtype), which would round the rotary frequencies as well
        parameter.data = parameter.data.to(dtype)
    quantized = gptq_model(model, windows, QuantizeConfig(bits=bits, group_size=32))
    save_gptq(tmp_path / "model", model, tokenizer, quantized, method="gptq", parent="tiny")
    loaded = load_dequantized(tmp_path / "model", dtype)
    assert not loaded.training
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name
    with torch.no_grad():
        assert torch.equal(loaded(windows).logits, model(windows).logits)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_is_in_the_file(make_llama, tokenizer, tmp_path, tied):
    model = make_llama(tie_word_embeddings=tied)
    artifact = save_gptq(tmp_path / "m", model, tokenizer, rtn_model(model, SMALL), method="rtn", parent="tiny")
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert ("lm_head.weight" in names) is not tied  # a tied head is the embedding, written once
    assert "model.embed_tokens.weight" in names
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            assert f"{name}.weight" not in names
            assert {f"{name}.{key}" for key in ("qweight", "qzeros", "scales", "g_idx")} <= names
    assert artifact.method == "rtn"
    assert artifact.parent == "tiny"
    assert artifact.settings == SMALL.as_dict()
    assert artifact.weight_bytes == (tmp_path / "m" / "model.safetensors").stat().st_size
    loaded = load_dequantized(tmp_path / "m", torch.float32)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
def test_config_json(make_llama, tokenizer, tmp_path, sym):
    config = QuantizeConfig(bits=3, group_size=16, sym=sym, damp_percent=0.05, desc_act=True)
    model = make_llama()
    save_gptq(tmp_path / "m", model, tokenizer, rtn_model(model, config), method="gptq", parent="tiny")
    content = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    quantization = content["quantization_config"]
    assert quantization.pop("meta")["quantizer"] == ["03-model-compression-gptq:0.1.0", "gptqmodel:0.9.0"]
    assert quantization == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",  # v1
        "bits": 3,
        "group_size": 16,
        "sym": sym,
        "desc_act": False,  # static groups: g_idx is in order, whatever the order of work was
        "damp_percent": 0.05,
        "lm_head": False,
    }
    assert content["hidden_size"] == 64
    assert not hasattr(model.config, "quantization_config"), "the model in memory is an ordinary one"
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("abc").input_ids == tokenizer("abc").input_ids


def test_biases_are_kept(make_llama, tokenizer, tmp_path):
    model = make_llama(attention_bias=True)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    save_gptq(tmp_path / "m", model, tokenizer, rtn_model(model, SMALL), method="rtn", parent="tiny")
    loaded = load_dequantized(tmp_path / "m", torch.float32)
    saved = model.model.layers[1].self_attn.q_proj.bias.bfloat16().float()
    assert torch.equal(loaded.model.layers[1].self_attn.q_proj.bias, saved)


# --- as others read it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
def test_gptqmodel_packs_the_same_bits(bits, sym):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig as TheirConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    config = QuantizeConfig(bits=bits, group_size=32, sym=sym)
    quantized = rtn(torch.randn(64, 96, generator=torch.Generator().manual_seed(bits)), config)
    linear = nn.Linear(96, 64, bias=False)
    linear.weight.data = quantized.dequantize()
    shape = {"in_features": 96, "out_features": 64, "bias": False}
    theirs = TorchLinear(bits=bits, group_size=32, sym=sym, desc_act=False, **shape)
    group = torch.arange(96, dtype=torch.int32) // 32
    theirs.pack_original(linear, quantized.scale.float(), quantized.zero.int(), group)  # v2: zeros as they are
    convert_gptq_v2_to_v1_format_module(theirs, TheirConfig(bits=bits, group_size=32, sym=sym))
    for name, tensor in pack_linear(quantized).items():
        assert torch.equal(getattr(theirs, name), tensor), name


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(("bits", "sym"), [(4, False), (4, True), (3, False), (2, False), (8, False)])
def test_transformers_loads_it_and_computes_the_same(make_llama, tokenizer, tmp_path, bits, sym):
    """Every layer, on random inputs, against the file's numbers in float64. Their kernel multiplies in float16.

    Scale, zero point, weight and output: four roundings of at most 2**-11 each, whatever the width, since the errors of
    random inputs add up as the products do. A zero point read off by one moves a layer of 8 bits by a percent.
    """
    model = make_llama()
    config = QuantizeConfig(bits=bits, group_size=32, sym=sym)
    save_gptq(tmp_path / "m", model, tokenizer, rtn_model(model, config), method="rtn", parent="tiny")
    kernel = GPTQConfig(bits=bits, backend="torch")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32, quantization_config=kernel)
    ours = load_dequantized(tmp_path / "m", torch.float32)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    layers = {name: layer for name, layer in theirs.named_modules() if hasattr(layer, "qweight")}
    assert len(layers) == 21, "the kernel, not a dense layer"
    for name, layer in layers.items():
        weight = ours.get_submodule(name).weight.double()
        x = torch.randn(32, weight.shape[1], generator=torch.Generator().manual_seed(0))
        expected = x.double() @ weight.T
        off_by_one = x.double() @ stored[f"{name}.scales"].double().repeat_interleave(32, dim=0)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling takes a minute, and is PyTorch's
            error = (layer(x) - expected).norm() / expected.norm()
        assert error < 4 * 2**-11 < off_by_one.norm() / expected.norm(), name


def test_readers_built_on_transformers_4_find_the_rotary_base(make_llama, tokenizer, tmp_path):
    """They know no `rope_parameters` and would silently take 10,000: the perplexity rises by a tenth."""
    model = make_llama(rope_parameters={"rope_type": "default", "rope_theta": 100_000.0})
    quantized = rtn_model(model, QuantizeConfig(bits=4, group_size=32))
    folder = save_gptq(tmp_path / "gptq", model, tokenizer, quantized, method="rtn", parent="original").folder
    assert "rope_theta" not in json.loads((folder / "config.json").read_text())
    for_transformers_4(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == 100_000.0
    assert load_dequantized(folder, torch.float32).config.rope_parameters["rope_theta"] == 100_000.0
    # auto-gptq reads the quantization settings from a file of their own.
    assert json.loads((folder / "quantize_config.json").read_text()) == config["quantization_config"]


@pytest.mark.parametrize("group_size", [16, 48])
def test_groups_of_other_sizes(group_size):
    quantized = rtn(torch.randn(32, 96, generator=torch.Generator().manual_seed(0)), QuantizeConfig(4, group_size))
    tensors = pack_linear(quantized)
    assert tensors["g_idx"].bincount().tolist() == [group_size] * (96 // group_size)
    assert torch.equal(unpack_linear(tensors, 4), quantized.dequantize())


def test_generation_settings_are_kept_even_those_that_transformers_refuses_to_save(make_llama, tokenizer, tmp_path):
    """The embedded model's tokenizer names another eos than its generation config: without the latter it talks on."""
    model = make_llama()
    model.generation_config.eos_token_id = [7, 9]
    model.generation_config.temperature = 0.9  # without do_sample, as Llama-2-chat was published
    saved = save_gptq(tmp_path / "m", model, tokenizer, rtn_model(model, SMALL), method="rtn", parent="tiny")
    dense = save_dense(saved, tmp_path / "dense", torch.float32)
    for folder in (saved.folder, dense.folder):
        content = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        assert (content["eos_token_id"], content["temperature"]) == ([7, 9], 0.9)
        assert load_dequantized(folder, torch.float32).generation_config.eos_token_id == [7, 9]


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("mixtral", {}, r"MixtralForCausalLM .* \(layer files\): .*experts\.0\.gate_up_proj is no nn\.Linear"),
        (
            "llama",
            {"head_dim": 20, "num_key_value_heads": 1},
            r"layers\.0\.self_attn\.q_proj \[80, 64\].* and \d+ more",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_the_work_and_by_save(kind, changes, said, tokenizer, tmp_path):
    model = build(kind, **changes)
    with pytest.raises(ValueError, match=said):
        check_packable(model)
    quantized = rtn_model(model, replace(SMALL, group_size=-1))
    with pytest.raises(ValueError, match=said):
        save_gptq(tmp_path / "m", model, tokenizer, quantized, method="rtn", parent="tiny")
    assert list(tmp_path.iterdir()) == []


def test_layers_that_do_not_pack_may_be_left_out(tokenizer, tmp_path, windows):
    model = build("mixtral")
    attention = {name: linear for name, linear in iter_linears(model) if "self_attn" in name}
    quantized = {name: rtn(linear.weight.detach(), SMALL) for name, linear in attention.items()}
    for name, linear in attention.items():
        linear.weight.data = quantized[name].dequantize()
    save_gptq(tmp_path / "m", model, tokenizer, quantized, method="rtn", parent="tiny")
    assert torch.equal(load_dequantized(tmp_path / "m", torch.float32)(windows).logits, model(windows).logits)


def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_written(make_llama, tokenizer, tmp_path, monkeypatch):
    model = make_llama()
    quantized = rtn_model(model, SMALL)
    size = save_gptq(tmp_path / "m", model, tokenizer, quantized, method="rtn", parent="tiny").weight_bytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    save_gptq(tmp_path / "n", model, tokenizer, quantized, method="rtn", parent="tiny")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 20_000))  # tensors and a header
    with pytest.raises(OSError, match="the disk has"):
        save_gptq(tmp_path / "o", model, tokenizer, quantized, method="rtn", parent="tiny")
    assert not (tmp_path / "o").exists()


def test_a_dense_copy_names_what_it_was_made_from(make_llama, tokenizer, tmp_path):
    model = make_llama()
    source = save_gptq(tmp_path / "gptq", model, tokenizer, rtn_model(model, SMALL), method="rtn", parent="tiny")
    assert save_dense(source, tmp_path / "dense", torch.float32).parent == "gptq"


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_may_be_packed_with_bits_of_its_own(make_llama, windows, tokenizer, tmp_path, tied):
    """Read back as it was rounded, and with it the head where both are one."""
    model = make_llama(tie_word_embeddings=tied)
    quantized = rtn_model(model, QuantizeConfig(bits=3, group_size=64))
    embedding = model.get_input_embeddings().weight
    quantized["model.embed_tokens"] = rtn(embedding, QuantizeConfig(bits=8, group_size=64))
    with torch.no_grad():
        embedding.copy_(quantized["model.embed_tokens"].dequantize())
    saved = save_gptq(tmp_path / "small", model, tokenizer, quantized, method="rtn", parent="original")
    loaded = load_dequantized(saved.folder, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(windows).logits, model(windows).logits, rtol=1e-4, atol=1e-4)
