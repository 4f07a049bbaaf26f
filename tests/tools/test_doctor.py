"""The doctor: planted faults are found by name, healthy checkpoints have none, predictions are what engines do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from common.course.checkpoint import INDEX
from common.engines import llamacpp, vllm_server
from common.formats.awq import repack_as_awq
from common.formats.gguf import export_gguf
from common.formats.gptq import save_gptq
from common.formats.packing import pack_outputs, pack_rows, unpack_outputs
from common.formats.sparse import save_sparse
from common.methods.quantization import QuantizeConfig, rtn_model
from tools.doctor.__main__ import main
from tools.doctor.examine import examine

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="session")
def merging() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 256 tokens with a merge, as llama.cpp wants."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [c for c in alphabet if c not in "^~"] + ["th", "</s>"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


@pytest.fixture
def dense(make_llama, merging, tmp_path):
    """dense(name="dense", **config) → folder of a tiny model with its tokenizer"""

    def make(name="dense", shards=False, **config):
        model = make_llama(eos_token_id=255, **config)
        model.save_pretrained(tmp_path / name, **({"max_shard_size": "200KB"} if shards else {}))
        merging.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def gptq(make_llama, merging, tmp_path):
    """gptq(**QuantizeConfig) → a GPTQ artifact as the course saves it"""

    def make(model=None, **changes):
        model = model or make_llama()
        quantized = rtn_model(model, QuantizeConfig(**{"bits": 4, "group_size": 32} | changes))
        return save_gptq(tmp_path / "gptq", model, merging, quantized, method="rtn", parent="dense")

    return make


def rewrite(folder, change, file="model.safetensors"):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


def configure(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def quantization(folder, **changes):
    own = json.loads((folder / "config.json").read_text())["quantization_config"]
    return configure(folder, quantization_config=own | changes)


def names(path) -> list[str]:
    return [finding.name for finding in examine(path)[1].findings]


# --- healthy -------------------------------------------------------------------------------------------------------


def test_silent_on_dense_models(dense):
    assert names(dense("tied")) == []
    assert names(dense("untied", tie_word_embeddings=False)) == []
    assert names(dense("sharded", shards=True)) == []
    assert names(dense("padded", vocab_size=320)) == []


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_silent_on_our_gptq(gptq, bits, sym):
    assert names(gptq(bits=bits, sym=sym).folder) == []


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_silent_on_our_awq(gptq, tmp_path, sym):
    assert names(repack_as_awq(gptq(sym=sym), tmp_path / "awq").folder) == []


def test_silent_on_our_gguf_and_sparse(dense, make_llama, merging, tmp_path):
    assert names(export_gguf(dense(), tmp_path / "model.gguf")) == []
    artifact = save_sparse(tmp_path / "sparse", make_llama(), merging, method="m", settings={}, parent="x")
    assert names(artifact.folder) == []


# --- planted faults ------------------------------------------------------------------------------------------------


def shift_zeros(tensors):
    """AWQ's zero points all one too large."""
    for name in [name for name in tensors if name.endswith("qzeros")]:
        tensors[name] = pack_outputs((unpack_outputs(tensors[name]) + 1).clamp(max=15))


def test_off_by_one_zeros(gptq, tmp_path):
    folder = repack_as_awq(gptq(sym=True), tmp_path / "awq").folder
    assert names(rewrite(folder, shift_zeros)) == ["off-by-one zeros"]


def test_v2_labelled_as_v1_and_the_reverse(make_llama, merging, tmp_path):
    model = make_llama()
    quantized = rtn_model(model, QuantizeConfig(bits=4, group_size=32))
    folder = save_gptq(tmp_path / "m", model, merging, quantized, method="rtn", parent="x").folder

    def v2(tensors):
        for name, weight in quantized.items():
            tensors[f"{name}.qzeros"] = pack_rows(weight.zero, 4).T.contiguous()

    assert names(quantization(folder, checkpoint_format="gptq_v2")) == ["off-by-one zeros: v1 labelled as v2"]
    assert names(rewrite(folder, v2)) == []
    assert names(quantization(folder, checkpoint_format="gptq")) == ["off-by-one zeros: v2 labelled as v1"]


def test_missing_shard(dense):
    folder = dense(shards=True)
    sorted(folder.glob("*.safetensors"))[1].unlink()
    assert names(folder) == ["missing shard"]


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_nan_and_zero_scales(gptq, tmp_path, layout):
    artifact = gptq()
    folder = artifact.folder if layout == "gptq" else repack_as_awq(artifact, tmp_path / "awq").folder

    def plant(value):
        def change(tensors):
            tensors[f"{UP}.scales"][1, 5] = value

        return change

    assert names(rewrite(folder, plant(float("nan")))) == ["NaN scale"]
    assert names(rewrite(folder, plant(0.0))) == ["zero scale"]


def test_lost_tied_head(dense):
    """A tied model whose flag was lost: the file has no head, and nothing says that it is the embedding."""
    assert names(configure(dense(), tie_word_embeddings=False)) == ["lost tied head"]


def test_own_head_beside_a_tied_flag(dense):
    folder = configure(dense(tie_word_embeddings=False), tie_word_embeddings=True)
    assert names(folder) == ["own head beside a tied flag"]


@pytest.mark.parametrize("said", [64, 16, -1])
def test_wrong_group_size(gptq, said):
    found = examine(quantization(gptq().folder, group_size=said))[1].findings
    assert [finding.name for finding in found] == ["wrong group_size"]
    assert "Set group_size to 32" in found[0].do


def test_wrong_bits(gptq):
    assert names(quantization(gptq(bits=4).folder, bits=8)) == ["wrong bits"]


def test_vocabulary_smaller_than_the_tokenizer(dense, merging, tmp_path):
    folder = dense(vocab_size=256)
    grown = PreTrainedTokenizerFast.from_pretrained(folder)
    grown.add_tokens(["<more>", "<and more>"])
    grown.save_pretrained(folder)
    found = examine(folder)[1].findings
    assert [finding.name for finding in found] == ["vocabulary smaller than the tokenizer"]
    assert "ids up to 257, the embedding 256 rows" in found[0].seen


@pytest.mark.parametrize("cut", [10, 5000, -4])
def test_truncated_file(dense, cut):
    """Within the tensors' last bytes, well within them, and within the header."""
    file = dense() / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-cut] if cut > 0 else data[: cut * -2])
    assert names(file.parent) == ["truncated file"]


def test_truncated_gguf(dense, tmp_path):
    file = export_gguf(dense(), tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[:-5000])
    assert names(file) == ["truncated file"]


def test_unexpected_and_missing_tensors(dense):
    folder = dense()
    rewrite(folder, lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.ones(3, 3)}))
    assert names(folder) == ["unexpected tensors"]
    rewrite(folder, lambda tensors: tensors.pop("model.layers.9.mlp.up_proj.weight"))
    rewrite(folder, lambda tensors: tensors.pop(f"{UP}.weight"))
    assert names(folder) == ["missing tensors"]


def test_missing_part_of_a_packed_layer(gptq):
    assert names(rewrite(gptq().folder, lambda tensors: tensors.pop(f"{UP}.qzeros"))) == ["missing tensors"]


def test_dead_rows(dense, gptq, make_llama, tmp_path):
    def kill(tensors):
        tensors[f"{UP}.weight"][3:5] = 0

    folder = rewrite(dense(), kill)
    found = examine(folder)[1].findings
    assert [finding.name for finding in found] == ["dead rows"]
    assert f"{UP}.weight (2 of 128)" in found[0].seen
    assert names(export_gguf(folder, tmp_path / "dead.gguf")) == ["dead rows"]
    model = make_llama()
    model.get_submodule(UP).weight.data[3] = 0
    assert "dead rows" in names(gptq(model).folder)


def test_g_idx_out_of_range(gptq):
    def plant(tensors):
        tensors[f"{UP}.g_idx"][-1] = 2

    assert names(rewrite(gptq().folder, plant)) == ["g_idx out of range"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(dense, value):
    def plant(tensors):
        tensors[f"{UP}.weight"][0, 0] = value

    assert names(rewrite(dense(), plant)) == ["NaN or inf"]


def test_wrong_shapes(dense):
    assert names(configure(dense(), intermediate_size=96)) == ["wrong shapes"]


def test_packed_layers_without_settings(gptq):
    folder = gptq().folder
    content = json.loads((folder / "config.json").read_text())
    del content["quantization_config"]
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "quantize_config.json").unlink()
    assert names(folder) == ["no quantization_config"]


def test_no_tokenizer_and_no_weights(make_llama, tmp_path, dense):
    """Also where transformers would make an empty tokenizer, as it does for Qwen3."""
    make_llama().save_pretrained(tmp_path / "bare")
    assert names(tmp_path / "bare") == ["no tokenizer"]
    config = Qwen3Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    assert names(tmp_path / "qwen") == ["no tokenizer"]
    folder = dense()
    (folder / "model.safetensors").unlink()
    assert names(folder) == ["no weights"]


# --- the page ------------------------------------------------------------------------------------------------------


def test_the_page_says_what_it_is(gptq):
    page = examine(gptq().folder)[1].render()
    assert "GPTQ v1, 4 bits, asymmetric" in page
    assert "stored minus 1 (gptq)" in page
    assert "tied by config, not stored" in page
    assert "findings: none" in page
    rows = {row.role: row for row in examine(gptq().folder)[1].table}
    # 4 bits, and for each group of 32 a scale of 16 bits and a zero point of 4, and 32 bits of g_idx for each input
    mlp = 3 * 64 * 128
    assert rows["MLP"].weights == 3 * mlp
    assert rows["MLP"].bytes == 3 * (mlp * 4 + mlp // 32 * 20 + (64 + 64 + 128) * 32) // 8
    assert rows["embedding"].bits == 16


def test_every_finding_says_what_to_do(gptq):
    found = examine(quantization(gptq().folder, group_size=64))[1]
    assert all(finding.do for finding in found.findings)
    assert found.findings[0].do in found.render()


def test_formats_of_others_are_told_apart(dense, tmp_path):
    """As bitsandbytes, compressed-tensors and torchao name the parts of a weight."""
    parts = {
        "bitsandbytes": ["weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"],
        "compressed-tensors": ["weight_packed", "weight_scale", "weight_shape"],
        "torchao": ["_weight_qdata", "_weight_scale", "_weight_zero_point"],
    }
    for method, own in parts.items():
        folder = configure(dense(method), quantization_config={"quant_method": method})

        def change(tensors, own=own):
            del tensors[f"{UP}.weight"]
            tensors |= {f"{UP}.{part}": torch.ones(8, 1, dtype=torch.uint8) for part in own}

        report = examine(rewrite(folder, change))[1]
        assert report.findings == []
        assert report.facts["format"] == method
        assert (
            sum(row.weights for row in report.table)
            == 256 * 64 + 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + 7 * 64
        )


def test_the_program(dense, gptq, capsys, tmp_path):
    dense()
    assert main([str(gptq().folder)]) == 0
    page = capsys.readouterr().out
    assert "parent         dense, perplexity" in page
    assert "KL " in page
    assert "'The capital of France is' → " in page
    folder = quantization(gptq().folder, group_size=64)
    assert main([str(folder)]) == 1
    assert "wrong group_size" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    assert "is no model" in capsys.readouterr().err


# --- predictions and what engines do -------------------------------------------------------------------------------


WIDE = {"head_dim": 32}  # vLLM's attention on the CPU has no heads of 16


def prediction(path, engine):
    return next(p for p in examine(path)[1].engines if p.engine == engine)


@pytest.mark.skipif(bool(vllm_server.missing()), reason="vLLM is not installed: make serve-env")
def test_what_vllm_is_predicted_to_refuse(dense, gptq, make_llama, tmp_path):
    if vllm_server.has_four_bit_kernel():
        model = make_llama(**WIDE)
        assert prediction(gptq(model, sym=True).folder, "vLLM").loads
        asymmetric = prediction(gptq(model).folder, "vLLM")
        assert not asymmetric.loads
        assert "repack_as_awq" in asymmetric.do
        assert prediction(repack_as_awq(gptq(model), tmp_path / "awq").folder, "vLLM").loads
        assert "group_size 16" in prediction(gptq(model, sym=True, group_size=16).folder, "vLLM").why
    assert prediction(dense(**WIDE), "vLLM").loads
    assert not prediction(configure(dense(), architectures=["NoSuchModel"]), "vLLM").loads


@pytest.mark.skipif(bool(llamacpp.missing()), reason="llama.cpp is not installed: make engines")
def test_llama_cpp_loads_what_is_predicted(dense, tmp_path):
    file = export_gguf(dense(), tmp_path / "model.gguf")
    program = "import sys, llama_cpp; llama_cpp.Llama(sys.argv[1], n_ctx=32, verbose=False)"
    assert prediction(file, "llama.cpp").loads
    assert subprocess.run([sys.executable, "-c", program, file], capture_output=True).returncode == 0
    file.write_bytes(file.read_bytes()[:-5000])
    assert not prediction(file, "llama.cpp").loads
    assert subprocess.run([sys.executable, "-c", program, file], capture_output=True).returncode != 0


VLLM_CASES = {
    "gptq sym": ({"sym": True}, False),
    "gptq asym": ({}, False),
    "gptq sym, groups of 16": ({"sym": True, "group_size": 16}, False),
    "awq asym": ({}, True),
}


@pytest.mark.slow
@pytest.mark.skipif(bool(vllm_server.missing()), reason="vLLM is not installed: make serve-env")
@pytest.mark.parametrize("case", VLLM_CASES)
def test_vllm_does_what_is_predicted(gptq, make_llama, tmp_path, case):
    settings, repack = VLLM_CASES[case]
    artifact = gptq(make_llama(**WIDE), **settings)
    folder = repack_as_awq(artifact, tmp_path / "awq").folder if repack else artifact.folder
    options = {"dtype": "bfloat16", "context": 64, "sequences": 1}
    try:
        with vllm_server.serve_vllm(folder, tmp_path / "log", tokenizer=folder, **options):
            loads = True
    except RuntimeError:
        loads = False
    assert loads == prediction(folder, "vLLM").loads, (tmp_path / "log").read_text()[-2000:]


def test_an_index_names_the_shards(dense):
    folder = dense(shards=True)
    assert (folder / INDEX).exists()
    assert len(examine(Path(folder))[0].files) > 1
