"""Folders that others wrote: every one gives its model, or one sentence that says what is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from common.course import checkpoint
from common.course.assets import load_model
from common.formats.awq import repack_as_awq
from common.formats.gptq import (
    load_dequantized,
    pack_linear,
    save_dense,
    save_gptq,
    unpack_linear,
)
from common.formats.packing import pack_rows
from common.formats.sparse import load_sparse, save_sparse
from common.methods.quantization import QuantizeConfig, QuantizedWeight, rtn_model

CONFIG = QuantizeConfig(bits=4, group_size=32)


def logits(model, windows):
    with torch.no_grad():
        return model(input_ids=windows).logits.float()


def rewrite(folder, change, file="model.safetensors"):
    """Let `change(tensors)` return what shall be in the file."""
    save_file(change(load_file(folder / file)), folder / file, metadata={"format": "pt"})


def settings(folder, **changes):
    """Change quantization_config; None removes a key."""
    content = json.loads((folder / "config.json").read_text())
    own = content["quantization_config"] | changes
    content["quantization_config"] = {name: value for name, value in own.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))


def without(*words):
    return lambda tensors: {name: value for name, value in tensors.items() if not any(w in name for w in words)}


def shard(folder):
    """Cut model.safetensors in two, with an index as transformers writes it."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    where = {name: files[i % 2] for i, name in enumerate(names)}
    (folder / checkpoint.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "model.safetensors").unlink()
    return files


@pytest.fixture(params=[False, True], ids=["asym", "sym"])
def saved(request, make_llama, tokenizer, tmp_path, windows):
    """(artifact, quantized weights, the logits it must give)"""
    model = make_llama()
    quantized = rtn_model(model, QuantizeConfig(bits=4, group_size=32, sym=request.param))
    artifact = save_gptq(tmp_path / "gptq", model, tokenizer, quantized, method="rtn", parent="tiny")
    return artifact, quantized, logits(model, windows)


def as_v2(folder, quantized, **changes):
    zeros = {f"{name}.qzeros": pack_rows(w.zero, w.config.bits).T.contiguous() for name, w in quantized.items()}
    rewrite(folder, lambda tensors: tensors | zeros)
    settings(folder, **changes)


def test_format_v2_stores_zero_points_as_they_are(saved, windows):
    artifact, quantized, expected = saved
    as_v2(artifact.folder, quantized, checkpoint_format="gptq_v2")
    assert torch.equal(logits(load_dequantized(artifact.folder, torch.float32), windows), expected)
    shard(artifact.folder)
    assert torch.equal(logits(load_dequantized(artifact.folder, torch.float32), windows), expected)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_file_that_does_not_say_its_version_is_read_by_its_zero_points(saved, windows, version):
    artifact, quantized, expected = saved
    if version == "v2":
        as_v2(artifact.folder, quantized)
    settings(artifact.folder, checkpoint_format=None)
    assert torch.equal(logits(load_dequantized(artifact.folder, torch.float32), windows), expected)


def test_a_wrong_label_is_believed_and_told(saved):
    artifact, quantized, _ = saved
    as_v2(artifact.folder, quantized)  # still says "gptq"
    with pytest.warns(UserWarning, match=r"lie -[01]\.\d steps from .* mislabelled"):
        load_dequantized(artifact.folder, torch.float32)


def test_a_layout_that_is_not_read(saved):
    settings(saved[0].folder, checkpoint_format="marlin")
    with pytest.raises(ValueError, match=r"layout 'marlin'.*reads gptq and gptq_v2"):
        load_dequantized(saved[0].folder, torch.float32)


def test_settings_where_autogptq_put_them(saved, windows):
    artifact, _, expected = saved
    content = json.loads((artifact.folder / "config.json").read_text())
    del content["quantization_config"]
    (artifact.folder / "config.json").write_text(json.dumps(content))
    (artifact.folder / "model.safetensors").rename(artifact.folder / "gptq_model-4bit-32g.safetensors")
    assert torch.equal(logits(load_dequantized(artifact.folder, torch.float32), windows), expected)


def test_a_missing_shard_is_named(saved):
    first, _ = shard(saved[0].folder)
    (saved[0].folder / first).unlink()
    with pytest.raises(ValueError, match=f"lacks {first}, of the 2 files"):
        load_dequantized(saved[0].folder, torch.float32)


def test_awq_and_dense_folders_give_their_models(saved, windows, tmp_path, make_llama, tokenizer):
    artifact, _, expected = saved
    awq = repack_as_awq(artifact, tmp_path / "awq")
    assert torch.equal(logits(load_dequantized(awq.folder, torch.float32), windows), expected)
    dense = make_llama()
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(load_dequantized(tmp_path / "dense", torch.float32), windows), logits(dense, windows))


def test_repacking_reads_shards(saved, windows, tmp_path):
    artifact, _, expected = saved
    shard(artifact.folder)
    awq = repack_as_awq(artifact, tmp_path / "awq")
    assert torch.equal(logits(load_dequantized(awq.folder, torch.float32), windows), expected)


@pytest.mark.parametrize("method", ["bitsandbytes", "compressed-tensors", "torchao", "fp8"])
def test_other_formats_are_refused_by_name(saved, method):
    settings(saved[0].folder, quant_method=method)
    with pytest.raises(ValueError, match=f"format '{method}'.*from_pretrained"):
        load_dequantized(saved[0].folder, torch.float32)


def test_damaged_layers_are_named(saved):
    folder = saved[0].folder
    name = "model.layers.1.mlp.up_proj"
    rewrite(folder, lambda tensors: tensors | {f"{name}.g_idx": tensors[f"{name}.g_idx"] + 1})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj cannot be unpacked: g_idx names the groups 1 to 2"):
        load_dequantized(folder, torch.float32)
    rewrite(folder, without(f"{name}.scales"))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj cannot be unpacked.*scales"):
        load_dequantized(folder, torch.float32)


def test_groups_without_g_idx_follow_group_size(saved, windows):
    artifact, _, expected = saved
    rewrite(artifact.folder, without("g_idx"))
    assert torch.equal(logits(load_dequantized(artifact.folder, torch.float32), windows), expected)


def test_one_group_a_row():
    """group_size -1, as everywhere: one scale for all inputs."""
    codes = torch.randint(16, (32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one = torch.full((32, 1), 8, dtype=torch.uint8)
    weight = QuantizedWeight(codes, torch.full((32, 1), 0.5, dtype=torch.float16), one, CONFIG)
    tensors = pack_linear(weight)
    assert tensors["g_idx"].tolist() == [0] * 64
    expected = (codes.float() - 8) * 0.5
    assert torch.equal(unpack_linear(tensors, 4), expected)
    del tensors["g_idx"]
    assert torch.equal(unpack_linear(tensors, 4, group_size=-1), expected)


# --- a head of its own beside a configuration that says tied -------------------------------------------------------


@pytest.fixture
def merged(make_llama, tokenizer, tmp_path):
    """A folder whose config says tied and whose file holds another head, as merged fine-tunes do."""
    make_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    content = json.loads((tmp_path / "merged" / "config.json").read_text())
    (tmp_path / "merged" / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": True}))
    return tmp_path / "merged"


def check_head(folder, expected, windows, read):
    """The head is in the file, and readers that trust the flag are told of it."""
    assert torch.equal(logits(read(folder, torch.float32), windows), expected)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("loaded_by", ["course", "transformers"])
def test_a_separate_head_survives_every_save(merged, windows, tokenizer, tmp_path, loaded_by):
    load = load_model if loaded_by == "course" else AutoModelForCausalLM.from_pretrained
    model = load(str(merged), dtype=torch.float32)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    expected = logits(model, windows)
    sparse = save_sparse(tmp_path / "sparse", model, tokenizer, method="m", settings={}, parent="x")
    check_head(sparse.folder, expected, windows, load_sparse)
    for parameter in (model.lm_head.weight, model.model.embed_tokens.weight):
        parameter.data = parameter.data.bfloat16().float()
    gptq = save_gptq(tmp_path / "g", model, tokenizer, rtn_model(model, CONFIG), method="rtn", parent="x")
    expected = logits(model, windows)
    check_head(gptq.folder, expected, windows, load_dequantized)
    check_head(repack_as_awq(gptq, tmp_path / "awq").folder, expected, windows, load_dequantized)
    dense = save_dense(gptq, tmp_path / "dense", torch.float32)
    check_head(dense.folder, expected, windows, load_dequantized)


def test_the_model_in_memory_is_not_changed_by_saving(merged, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    save_sparse(tmp_path / "sparse", model, tokenizer, method="m", settings={}, parent="x")
    assert model.config.tie_word_embeddings is True


# --- tensors that are missing, and those that nobody wants ---------------------------------------------------------


def test_missing_tensors_are_an_error_that_names_them(saved, make_llama, tokenizer, tmp_path):
    rewrite(saved[0].folder, without("layers.1.post_attention_layernorm"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors .*layers\.1\.post_attention_layernorm\.weight"):
        load_dequantized(saved[0].folder, torch.float32)
    artifact = save_sparse(tmp_path / "s", make_llama(), tokenizer, method="m", settings={}, parent="x")
    rewrite(artifact.folder, without("layers.2.mlp.up_proj"), "sparse.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 tensors .*layers\.2\.mlp\.up_proj\.weight"):
        load_sparse(artifact.folder, torch.float32)


def test_an_untied_model_without_a_head_is_not_given_a_random_one(make_llama, tokenizer, tmp_path):
    folder = tmp_path / "m"
    model = make_llama(tie_word_embeddings=False)
    save_gptq(folder, model, tokenizer, rtn_model(model, CONFIG), method="rtn", parent="x")
    rewrite(folder, without("lm_head"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors .*lm_head\.weight"):
        load_dequantized(folder, torch.float32)


def test_unexpected_tensors_are_told(saved):
    rewrite(saved[0].folder, lambda tensors: tensors | {"model.layers.9.mlp.up_proj.weight": torch.ones(3)})
    with pytest.warns(UserWarning, match=r"ignored: model\.layers\.9"):
        load_dequantized(saved[0].folder, torch.float32)


# --- models that are quantized already -----------------------------------------------------------------------------


def torchao_int8(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def packed_bytes(model):
    """As bitsandbytes holds 4-bit weights: two codes a byte, in a layer that is an nn.Linear."""
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            shape = (module.weight.numel() // 2, 1)
            module.weight = nn.Parameter(torch.zeros(shape, dtype=torch.uint8), requires_grad=False)
    return model


@pytest.mark.parametrize("quantize", [torchao_int8, packed_bytes])
def test_a_sparse_checkpoint_of_quantized_weights_is_refused(make_llama, tokenizer, tmp_path, quantize):
    with pytest.raises(ValueError, match=r"q_proj is quantized already.*load the original weights"):
        save_sparse(tmp_path / "s", quantize(make_llama()), tokenizer, method="m", settings={}, parent="x")
    assert not (tmp_path / "s").exists()


def test_a_sparse_folder_is_not_taken_for_others(saved):
    with pytest.raises(FileNotFoundError, match=r"no sparse\.safetensors"):
        load_sparse(saved[0].folder, torch.float32)
