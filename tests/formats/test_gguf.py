"""GGUF: what is written, and that the real llama.cpp computes, tokenizes and answers from it as transformers does."""

import importlib.util
import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from common.engines import llamacpp
from common.engines.llamacpp import LlamaCpp, quantize_gguf
from common.formats import gguf as gguf_export
from common.formats.gguf import UnknownFamily, export_gguf, neighbouring_pairs, stored_tensors
from common.formats.gguf_tokenizer import LLAMA_3_SPLIT, QWEN_2_SPLIT, tokenizer_kind
from common.formats.gptq import save_gptq
from common.measure.evaluation import evaluate, generate
from common.methods.quantization import QuantizeConfig, rtn_model

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama.cpp is not installed: make engines"
)

TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1998 and 2024 there were 12 345 of them,\n\nwe've counted!  "
    "  Two spaces, a\ttab, naïve café, 東京, emoji 🦙 and CamelCaseWords; it's what they'll say: 3.14 or 1e-5?\n"
) * 4
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
CHAT = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(LLAMA_3_SPLIT + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), behavior="isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(QWEN_2_SPLIT + r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), behavior="isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def byte_level(splitting: str) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of fewer than 400 tokens: real merges, two control tokens and an added token."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=splitting == "llama-bpe"))
    tokenizer.pre_tokenizer = SPLITS[splitting]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=399, initial_alphabet=ALPHABET, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens(["<code>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=CHAT
    )


def sentencepiece() -> PreTrainedTokenizerFast:
    """What Llama 2's tokenizer.json holds: BPE on text with ▁ for spaces, unknown characters as bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    prepare = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(prepare)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, limit_alphabet=60, show_progress=False)
    tokenizer.train_from_iterator([TEXT[:200]], trainer)
    vocabulary = tokenizer.get_vocab()
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(prepare)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", add_bos_token=False
    )


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return byte_level("gpt-2")


@pytest.fixture
def save(make_llama, bpe, tmp_path):
    """save(model=None, tokenizer=None) → folder of a tiny Llama whose weights float16 holds exactly."""

    def write(model=None, tokenizer=bpe, **changes):
        model = model or make_llama(**{"vocab_size": 400, "eos_token_id": 1, "bos_token_id": 0} | changes)
        model.half().float().save_pretrained(tmp_path / "hf")
        tokenizer.save_pretrained(tmp_path / "hf")
        return tmp_path / "hf"

    return write


def fields(file) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def tokens(tokenizer, count=48) -> torch.Tensor:
    return torch.tensor([tokenizer(TEXT).input_ids[:count]])


def distance(folder, file, ids) -> float:
    """KL(transformers ‖ llama.cpp), nats per token."""
    model = AutoModelForCausalLM.from_pretrained(folder).float()
    with torch.no_grad():
        theirs = F.log_softmax(model(ids).logits[0].float(), dim=-1)
    engine = LlamaCpp(file, context=256)
    mine = F.log_softmax(engine(ids).logits[0], dim=-1)
    engine.close()
    return F.kl_div(mine, theirs, log_target=True, reduction="batchmean").item()


# --- the file ------------------------------------------------------------------------------------------------------


def test_rotary_pairs_become_neighbours():
    """Two heads of four rows: rows 0 and 2 turn together, and rows 1 and 3."""
    weight = torch.arange(8.0)[:, None].expand(8, 3)
    assert neighbouring_pairs(weight, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_hyperparameters_tokenizer_and_template_stand_in_the_file(save, bpe, tmp_path):
    model = export_gguf(save(), tmp_path / "model.gguf")
    found = fields(model)
    assert found["general.architecture"] == "llama"
    assert found["llama.block_count"] == 3
    assert found["llama.attention.head_count"] == 4
    assert found["llama.attention.head_count_kv"] == 2
    assert found["llama.embedding_length"] == 64
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.bos_token_id"] == 0
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == CHAT
    types = found["tokenizer.ggml.token_type"]
    names = found["tokenizer.ggml.tokens"]
    assert len(names) == 400
    assert types[names.index("<s>")] == gguf.TokenType.CONTROL
    assert types[names.index("<code>")] == gguf.TokenType.USER_DEFINED
    assert types[5] == gguf.TokenType.NORMAL


def test_a_tied_output_head_is_not_written_twice(save, tmp_path):
    """Also where the checkpoint holds it twice, as other writers' do; `save_pretrained` does not."""
    folder = save()
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tied = {t.name for t in gguf.GGUFReader(export_gguf(folder, tmp_path / "a.gguf")).tensors}
    untied = {
        t.name for t in gguf.GGUFReader(export_gguf(save(tie_word_embeddings=False), tmp_path / "b.gguf")).tensors
    }
    assert untied - tied == {"output.weight"}


def test_the_end_of_an_answer_is_what_generate_stops_at(save, make_llama, tmp_path):
    """The embedded model's tokenizer names another eos than its generation config, as the Hub's models often do."""
    model = make_llama(vocab_size=400)
    model.generation_config.eos_token_id = [7, 9]
    found = fields(export_gguf(save(model), tmp_path / "model.gguf"))
    assert found["tokenizer.ggml.eos_token_id"] == 7
    assert found["tokenizer.ggml.eot_token_id"] == 9


def test_names_for_embeddings_beyond_the_vocabulary(save, make_llama, tmp_path):
    found = fields(export_gguf(save(vocab_size=416), tmp_path / "model.gguf"))
    assert found["tokenizer.ggml.tokens"][-1] == "[PAD415]"
    assert found["tokenizer.ggml.token_type"][-1] == gguf.TokenType.UNUSED


def test_an_interrupted_export_leaves_the_previous_file(save, tmp_path, monkeypatch):
    folder = save()
    target = export_gguf(folder, tmp_path / "model.gguf")
    before = target.read_bytes()

    def interrupted(writer, tensor):  # the header is on the disk by now, the tensors are not
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_gguf(folder, target)
    assert target.read_bytes() == before
    assert [file.name for file in tmp_path.glob("model*")] == ["model.gguf"], "nothing of the failed export stays"


# --- what cannot be exported ---------------------------------------------------------------------------------------


def test_a_gptq_model_is_refused_with_the_reason(llama, bpe, make_llama, tmp_path):
    model = make_llama(vocab_size=400)
    quantized = rtn_model(model, QuantizeConfig(bits=4, group_size=32))
    save_gptq(tmp_path / "gptq", model, bpe, quantized, method="gptq", parent="original")
    with pytest.raises(ValueError, match=r"already quantized \(gptq\).*Export the original"):
        export_gguf(tmp_path / "gptq", tmp_path / "model.gguf")


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "not GemmaForCausalLM.*convert_hf_to_gguf"),
        ({"hidden_act": "gelu"}, "compute with silu, this model with gelu"),
        ({"vocab_size": 300}, r"ids up to \d+, the model 300 embeddings"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "not dynamic"),
    ],
)
def test_models_that_gguf_cannot_hold_unchanged(save, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        export_gguf(change_config(save(), **changes), tmp_path / "model.gguf")


def test_an_unknown_pre_tokenizer_is_named(save, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="does not know this tokenizer's pre-tokenizer"):
        export_gguf(save(tokenizer=tokenizer), tmp_path / "model.gguf")


def test_a_folder_without_safetensors(save, tmp_path):
    folder = save()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        export_gguf(folder, tmp_path / "model.gguf")


def test_weights_too_large_for_float16(make_llama, bpe, tmp_path):
    model = make_llama(vocab_size=400)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    model.save_pretrained(tmp_path / "hf")
    bpe.save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match="which float16 cannot"):
        export_gguf(tmp_path / "hf", tmp_path / "model.gguf")


# --- the real llama.cpp --------------------------------------------------------------------------------------------

VARIANTS = {
    "tied, grouped queries": {},
    "own output head": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one key head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 32},
    "rope linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "rope llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@needs_llama_cpp
@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_the_same_logits(save, bpe, tmp_path, variant):
    folder = save(**VARIANTS[variant])
    if variant == "biases":  # they begin at zero, which would prove nothing
        model = AutoModelForCausalLM.from_pretrained(folder)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(0, 0.2)
        folder = save(model)
    assert distance(folder, export_gguf(folder, tmp_path / "model.gguf"), tokens(bpe)) < 1e-4


def mistral(**changes) -> MistralForCausalLM:
    """A tiny random Mistral with a window of 128 tokens."""
    torch.manual_seed(0)
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 400,
        "sliding_window": 128,
        "initializer_range": 0.2,
    }
    return MistralForCausalLM(MistralConfig(**config | changes)).eval()


@needs_llama_cpp
def test_mistral_is_a_llama_within_its_window(save, bpe, tmp_path):
    folder = save(mistral())
    file = export_gguf(folder, tmp_path / "model.gguf")
    assert fields(file)["llama.context_length"] == 128
    assert distance(folder, file, tokens(bpe)) < 1e-4


def qwen(cls, config_class, **changes):
    """A tiny random Qwen whose norms and biases say something."""
    torch.manual_seed(0)
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 400,
        "initializer_range": 0.2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    model = cls(config_class(**config | changes)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * (0.3 if name.endswith("bias") else 0.1)
    return model


QWENS = {
    "qwen2, untied": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2, tied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3, untied": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "qwen3, tied, wide heads": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3, rope linear": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"head_dim": 16, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}},
    ),
    "qwen2, rope yarn": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e6,
                "original_max_position_embeddings": 64,
            }
        },
    ),
}


@needs_llama_cpp
@pytest.mark.parametrize("variant", QWENS)
def test_llama_cpp_computes_the_same_logits_of_qwen(save, bpe, tmp_path, variant):
    cls, config_class, changes = QWENS[variant]
    folder = save(qwen(cls, config_class, **changes))
    file = export_gguf(folder, tmp_path / "model.gguf")
    assert fields(file)["general.architecture"] == variant[:5]
    assert ("output.weight" in {t.name for t in stored_tensors(file)}) is ("untied" in variant or "rope" in variant)
    assert distance(folder, file, tokens(bpe)) < 1e-4


def test_biases_that_llama_cpp_does_not_have_are_refused(save, tmp_path):
    folder = save(qwen(Qwen3ForCausalLM, Qwen3Config, head_dim=16, attention_bias=True))
    with pytest.raises(ValueError, match=r"[qkv]_proj\.bias, which llama\.cpp's qwen3 does not have"):
        export_gguf(folder, tmp_path / "model.gguf")


# --- folders as they lie on the Hub --------------------------------------------------------------------------------


def add_tensors(folder, tensors, file="model.safetensors", drop=()):
    held = load_file(folder / file) if (folder / file).exists() else {}
    held = {name: value for name, value in held.items() if name not in drop} | tensors
    save_file(held, folder / file, metadata={"format": "pt"})


def test_what_lies_beside_the_model_is_left_alone(save, tmp_path):
    folder = save()
    plain = export_gguf(folder, tmp_path / "plain.gguf").read_bytes()
    add_tensors(folder, {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(8) for i in range(3)})
    add_tensors(folder, {"layers.0.attention.wq.weight": torch.rand(64, 64)}, "consolidated.safetensors")
    add_tensors(folder, {"base_model.q_proj.lora_A.weight": torch.rand(4, 64)}, "adapter_model.safetensors")
    add_tensors(folder, {"model.norm.weight": torch.rand(64)}, "model-00001-of-00001.safetensors")
    assert export_gguf(folder, tmp_path / "model.gguf").read_bytes() == plain


def test_shards_give_the_same_file_and_a_missing_one_is_named(save, make_llama, bpe, tmp_path):
    folder = save()
    one = {t.name: t.data.tobytes() for t in gguf.GGUFReader(export_gguf(folder, tmp_path / "one.gguf")).tensors}
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    bpe.save_pretrained(tmp_path / "shards")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    many = gguf.GGUFReader(export_gguf(tmp_path / "shards", tmp_path / "many.gguf")).tensors
    assert {t.name: t.data.tobytes() for t in many} == one
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"lacks {shards[1].name}, of the {len(shards)} files"):
        export_gguf(tmp_path / "shards", tmp_path / "many.gguf")


def test_missing_tensors_are_named(save, tmp_path):
    folder = save()
    add_tensors(folder, {}, drop=["model.layers.1.mlp.up_proj.weight"])
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        export_gguf(folder, tmp_path / "model.gguf")


def test_a_truncated_file_is_one_clear_error(save, tmp_path):
    file = save() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"damaged or incomplete"):
        export_gguf(file.parent, tmp_path / "model.gguf")


@needs_llama_cpp
def test_a_head_of_its_own_is_kept_where_the_config_says_tied(save, bpe, tmp_path):
    """Merged fine-tunes: transformers computes with the head in the file, so must llama.cpp."""
    folder = change_config(save(tie_word_embeddings=False), tie_word_embeddings=True)
    assert distance(folder, export_gguf(folder, tmp_path / "model.gguf"), tokens(bpe)) < 1e-4


def test_several_chat_templates(save, tmp_path):
    tokenizer = byte_level("gpt-2")
    tokenizer.chat_template = {"default": CHAT, "tool_use": "{{ tools }}"}
    found = fields(export_gguf(save(tokenizer=tokenizer), tmp_path / "model.gguf"))
    assert found["tokenizer.chat_template"] == CHAT
    assert found["tokenizer.chat_template.tool_use"] == "{{ tools }}"


@needs_llama_cpp
def test_a_model_without_an_end_does_not_end_at_llama_cpps_default(save, make_llama, tmp_path):
    tokenizer = byte_level("gpt-2")
    tokenizer.eos_token = tokenizer.pad_token = None
    folder = save(make_llama(vocab_size=400, eos_token_id=None, bos_token_id=0), tokenizer)
    file = export_gguf(folder, tmp_path / "model.gguf")
    assert fields(file)["tokenizer.ggml.eos_token_id"] == 0  # bos: no answer holds it


def test_a_tokenizer_that_llama_cpp_cannot_imitate_is_refused(save, tmp_path):
    tokenizer = byte_level("gpt-2")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(UnknownFamily, match="add_prefix_space: True"):
        export_gguf(save(tokenizer=tokenizer), tmp_path / "model.gguf")


def test_an_unknown_family_can_be_caught(save, tmp_path):
    folder = change_config(save(), architectures=["GemmaForCausalLM"])
    with pytest.raises(UnknownFamily, match="Qwen2ForCausalLM and Qwen3ForCausalLM, not GemmaForCausalLM"):
        export_gguf(folder, tmp_path / "model.gguf")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub cache of one repository, `someone/tiny`; returns its snapshot folder."""
    root = tmp_path / "hub" / "models--someone--tiny"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return root / "snapshots" / ("0" * 40)


def test_a_hub_id_is_exported_from_the_cache(save, hub, tmp_path):
    save().rename(hub.parent.parent / "hf")
    hub.parent.mkdir()
    (hub.parent.parent / "hf").rename(hub)
    expected = export_gguf(hub, tmp_path / "folder.gguf").read_bytes()
    assert export_gguf(Path("someone/tiny"), tmp_path / "id.gguf").read_bytes() == expected


def test_memory_holds_one_tensor_at_a_time(save, tmp_path, monkeypatch):
    """Every tensor is written before the next is read."""
    events = []
    read, write = gguf_export._as_numpy, gguf.GGUFWriter.write_tensor_data

    def reading(value, name):
        events.append("read")
        return read(value, name)

    def writing(writer, tensor):
        events.append("write")
        write(writer, tensor)

    monkeypatch.setattr(gguf_export, "_as_numpy", reading)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", writing)
    export_gguf(save(), tmp_path / "model.gguf")
    assert len(events) > 20
    assert events == ["read", "write"] * (len(events) // 2)


@needs_llama_cpp
def test_llama_cpp_waits_with_its_own_threads():
    """With OpenMP's, asleep while they wait (OMP_WAIT_POLICY in the Makefile), decoding took 3 to 5 times as long."""
    folder = Path(importlib.util.find_spec("llama_cpp").origin).parent
    libraries = [file for file in folder.rglob("*ggml*") if file.suffix in (".so", ".dylib", ".dll")]
    assert libraries
    assert not [file.name for file in libraries if b"GOMP_parallel" in file.read_bytes()]


@needs_llama_cpp
def test_without_the_reordering_the_model_is_another_one(save, bpe, tmp_path, monkeypatch):
    """The ablation: what `neighbouring_pairs` is for."""
    folder = save()
    monkeypatch.setattr(gguf_export, "neighbouring_pairs", lambda weight, heads: weight)
    assert distance(folder, export_gguf(folder, tmp_path / "model.gguf"), tokens(bpe)) > 0.01


@needs_llama_cpp
@pytest.mark.parametrize("splitting", SPLITS)
def test_llama_cpp_splits_text_as_the_tokenizer_does(save, tmp_path, splitting):
    tokenizer = byte_level(splitting)
    file = export_gguf(save(tokenizer=tokenizer), tmp_path / "model.gguf")
    assert fields(file)["tokenizer.ggml.pre"] == splitting
    engine = LlamaCpp(file, context=32)
    for text in (TEXT, "1998 20245", "x<code>y</s>", "'Tis  we'VE\n\n\n done", " 東京🦙", "a"):
        assert engine.tokenize(text) == tokenizer(text).input_ids, text
    engine.close()


@needs_llama_cpp
def test_llama_cpp_splits_text_as_a_sentencepiece_tokenizer_does(save, tmp_path):
    tokenizer = sentencepiece()
    file = export_gguf(save(tokenizer=tokenizer, vocab_size=512), tmp_path / "model.gguf")
    assert fields(file)["tokenizer.ggml.model"] == "llama"
    engine = LlamaCpp(file, context=32)
    for text in ("The quick brown fox", "In 1998 and 2024 there were 12 345", "naïve 東京 🦙", "jumps  over   the dog"):
        assert engine.tokenize(text) == tokenizer(text).input_ids, text
    engine.close()


@needs_llama_cpp
def test_same_perplexity_and_same_greedy_answer(save, make_llama, bpe, tmp_path):
    model = make_llama(vocab_size=400, tie_word_embeddings=False, eos_token_id=1)
    # A random model would write halves of characters, which the two libraries show differently: keep it to ASCII.
    model.lm_head.weight.data[[not bpe.decode([i]).isascii() for i in range(400)]] = 0
    folder = save(model)
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    engine = LlamaCpp(export_gguf(folder, tmp_path / "model.gguf"), context=128)
    windows = torch.tensor(bpe(TEXT).input_ids[:96]).view(3, 32)
    ours, theirs = evaluate(engine, windows), evaluate(model, windows)
    assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-3)
    for prompt in ("The quick", "What is 1998?"):
        answer = generate(model, bpe, prompt, 12)
        assert len(answer) > 12
        assert engine.generate(prompt, 12) == answer
    engine.close()


@needs_llama_cpp
def test_a_window_does_not_remember_the_one_before(save, bpe, tmp_path):
    engine = LlamaCpp(export_gguf(save(), tmp_path / "model.gguf"), context=128)
    ids = tokens(bpe)
    before = engine(ids).logits
    engine(ids.flip(1))
    engine.latency(context=16, runs=2)
    torch.testing.assert_close(engine(ids).logits, before)
    engine.close()


@needs_llama_cpp
def test_rows_that_256_does_not_divide_fall_back_to_other_types(save, make_llama, tmp_path):
    """K-quants work on blocks of 256 inputs; other rows get a type of 32-blocks with more bits."""
    model = make_llama(vocab_size=400, hidden_size=192, intermediate_size=512)
    f16 = export_gguf(save(model), tmp_path / "f16.gguf")
    file = quantize_gguf(f16, tmp_path / "q4.gguf", "Q4_K_M")
    types = {t.name: t.type for t in stored_tensors(file)}
    assert types["blk.1.ffn_down.weight"] in ("Q4_K", "Q6_K")  # 512 inputs
    assert types["blk.1.attn_q.weight"] == "Q5_0"  # 192 inputs
    assert types["token_embd.weight"] == "Q8_0"
    assert types["blk.1.attn_norm.weight"] == "F32"
    assert file.stat().st_size < f16.stat().st_size / 2


@needs_llama_cpp
def test_q8_costs_what_its_blocks_say_and_hardly_any_quality(save, bpe, tmp_path):
    f16 = export_gguf(save(), tmp_path / "f16.gguf")
    q8 = quantize_gguf(f16, tmp_path / "q8.gguf", "Q8_0")
    before, after = (
        sum(t.bytes for t in stored_tensors(file) if t.type == kind) for file, kind in ((f16, "F16"), (q8, "Q8_0"))
    )
    assert after * 32 == before * 34 / 2  # 32 codes of a byte and one float16 scale
    linear = [t for t in stored_tensors(q8) if t.linear]
    assert {t.name.split(".")[2] for t in linear} == {
        *("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    assert 8 * sum(t.bytes for t in linear) == 8.5 * sum(t.weights for t in linear)
    assert distance(tmp_path / "hf", q8, tokens(bpe)) < 0.02


@needs_llama_cpp
def test_unknown_quantization_and_damaged_file(save, tmp_path):
    f16 = export_gguf(save(), tmp_path / "f16.gguf")
    with pytest.raises(ValueError, match="no quantization 'Q4_X'"):
        quantize_gguf(f16, tmp_path / "q.gguf", "Q4_X")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(f16.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match="could not quantize"):
        quantize_gguf(damaged, tmp_path / "q.gguf", "Q8_0")


def test_without_llama_cpp_the_error_says_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="make engines"):
        llamacpp.LlamaCpp(tmp_path / "model.gguf", context=8)


def test_small_numbers_stand_in_the_file(save, tmp_path):
    """Those that hardly move the logits of a tiny model."""
    found = fields(export_gguf(save(rms_norm_eps=3e-4, max_position_embeddings=96), tmp_path / "model.gguf"))
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(3e-4)
    assert found["llama.context_length"] == 96
    assert found["tokenizer.ggml.padding_token_id"] == 1
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16


def test_a_tokenizer_that_begins_with_bos_says_so(save, tmp_path):
    tokenizer = sentencepiece()
    tokenizer.add_bos_token = True
    found = fields(export_gguf(save(tokenizer=tokenizer, vocab_size=512), tmp_path / "model.gguf"))
    assert found["tokenizer.ggml.add_bos_token"] is (tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    assert found["tokenizer.ggml.add_bos_token"] is True


def test_a_window_wider_than_the_positions_does_not_lengthen_the_context(save, tmp_path):
    found = fields(export_gguf(save(mistral(max_position_embeddings=64)), tmp_path / "model.gguf"))
    assert found["llama.context_length"] == 64


@needs_llama_cpp
@pytest.mark.parametrize("prefix", [True, False])
def test_a_space_is_put_before_the_text_where_the_tokenizer_does(save, tmp_path, prefix):
    tokenizer = sentencepiece()
    if not prefix:
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    file = export_gguf(save(tokenizer=tokenizer, vocab_size=512), tmp_path / "model.gguf")
    assert fields(file)["tokenizer.ggml.add_space_prefix"] is prefix
    engine = LlamaCpp(file, context=32)
    assert engine.tokenize("The quick fox") == tokenizer("The quick fox").input_ids
    engine.close()


def test_a_token_that_two_merges_make_has_the_score_of_the_earlier(save, tmp_path):
    names = ["<unk>", "<s>", "</s>", "<0x0A>", "a", "b", "c", "ab", "bc", "abc"]
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    model = models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    found = fields(export_gguf(save(tokenizer=tokenizer, vocab_size=10), tmp_path / "model.gguf"))
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    assert (scores["ab"], scores["bc"], scores["abc"]) == (0, -1, -2)


def test_an_empty_list_of_normalizers_is_none():
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    definition = {"pre_tokenizer": byte_level, "normalizer": {"type": "Sequence", "normalizers": []}}
    assert tokenizer_kind(definition) == tokenizer_kind(definition | {"normalizer": None})
    with pytest.raises(ValueError, match="nor normalize it"):
        tokenizer_kind(definition | {"normalizer": {"type": "Lowercase"}})
