"""From a Llama-family Hugging Face folder to one GGUF file in float16: what llama.cpp runs and quantizes.

A GGUF file holds everything: hyperparameters, tokenizer, chat template and tensors. The names and layouts follow
llama.cpp's own `convert_hf_to_gguf.py`; the file is written by the official `gguf` package.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
LLAMA_3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"  # its regex begins so


def export_gguf(source: Path, target: Path) -> Path:
    """Write the model folder `source` (config, tokenizer, *.safetensors) as the GGUF file `target`.

    Matrices become float16, vectors stay float32. The file is written aside and renamed when complete.
    Raises ValueError where the folder is no dense Llama-family model that GGUF can hold unchanged.
    """
    source, target = Path(source), Path(target)
    config = AutoConfig.from_pretrained(source)
    _check(config, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(".new")
    writer = gguf.GGUFWriter(aside, "llama", use_temp_file=True)  # tensors wait on the disk, not in memory
    _add_hyperparameters(writer, config)
    _add_tokenizer(writer, source, config)
    _add_tensors(writer, source, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return aside.replace(target)


def _check(config, source: Path) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        raise ValueError(
            f"{source.name} is already quantized ({quantization['quant_method']}). GGUF rounds to grids of its own, so "
            "its codes cannot be carried over; rounding a second time adds error. Export the original model instead."
        )
    architecture = (config.architectures or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"export_gguf writes {' and '.join(ARCHITECTURES)}, not {architecture}. "
            "Use llama.cpp's convert_hf_to_gguf.py for other architectures."
        )
    if config.hidden_act != "silu":
        raise ValueError(f"llama.cpp's Llama computes with silu, this model with {config.hidden_act}.")
    if not any(source.glob("*.safetensors")):
        raise ValueError(f"{source} has no .safetensors file. Save the model with save_pretrained first.")


def _add_hyperparameters(writer: gguf.GGUFWriter, config) -> None:
    # llama.cpp's Llama has no sliding window; within one window, attention is the same with and without.
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(min(window, config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# --- tokenizer -----------------------------------------------------------------------------------------------------


def _add_tokenizer(writer: gguf.GGUFWriter, source: Path, config) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in definition["model"].get("merges", [])]
    kind, splitting = _tokenizer_kind(definition)
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    if max(names) >= config.vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {max(names)}, the model {config.vocab_size} embeddings: they do not belong "
            "together."
        )
    # Embeddings beyond the vocabulary (models pad it to a round number) need a name too.
    tokens = [names.get(i, f"[PAD{i}]") for i in range(config.vocab_size)]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(tokens)
    writer.add_token_types([_token_type(tokenizer, kind, names, i) for i in range(config.vocab_size)])
    if kind == "gpt2":
        writer.add_token_merges([" ".join(pair) for pair in merges])
    else:
        # SentencePiece joins the pair with the highest score first: the earlier a merge, the higher its result.
        ranks = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, rank)
        writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("▁"))
    _add_special_tokens(writer, tokenizer, source)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _tokenizer_kind(definition: dict) -> tuple[str, str]:
    """llama.cpp's names for a tokenizer's algorithm and for how it splits text before merging."""
    step = definition["pre_tokenizer"]
    steps = step["pretokenizers"] if step and step["type"] == "Sequence" else [step] if step else []
    match [s["type"] for s in steps]:
        case ["ByteLevel"] if steps[0]["use_regex"]:
            return "gpt2", "gpt-2"
        case ["Digits", "ByteLevel"] if steps[0]["individual_digits"] and steps[1]["use_regex"]:
            return "gpt2", "smollm"
        case ["Split", "ByteLevel"] if steps[0]["pattern"].get("Regex", "").startswith(LLAMA_3_SPLIT):
            return "gpt2", "llama-bpe"
        case [] | ["Metaspace"] if "<0x0A>" in definition["model"]["vocab"]:
            return "llama", "default"  # SentencePiece: Llama 2, TinyLlama, Mistral
    raise ValueError(
        f"export_gguf does not know this tokenizer's pre-tokenizer {step}. Use llama.cpp's convert_hf_to_gguf.py."
    )


def _token_type(tokenizer, kind: str, names: dict[int, str], i: int) -> gguf.TokenType:
    if i not in names:
        return gguf.TokenType.UNUSED
    if kind == "llama" and i == tokenizer.unk_token_id:
        return gguf.TokenType.UNKNOWN
    added = tokenizer.added_tokens_decoder.get(i)
    if added is not None:
        return gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
    if kind == "llama" and names[i].startswith("<0x") and len(names[i]) == 6:
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def _add_special_tokens(writer: gguf.GGUFWriter, tokenizer, source: Path) -> None:
    # What ends an answer is what `generate` stops at; the tokenizer's own eos can differ from it.
    generation = source / "generation_config.json"
    ends = GenerationConfig.from_pretrained(source).eos_token_id if generation.exists() else None
    ends = ends if isinstance(ends, list) else [tokenizer.eos_token_id if ends is None else ends]
    writer.add_eos_token_id(ends[0])
    if len(ends) > 1:
        writer.add_eot_token_id(ends[1])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)


# --- tensors -------------------------------------------------------------------------------------------------------


def _add_tensors(writer: gguf.GGUFWriter, source: Path, config) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open has no iterator
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue  # llama.cpp uses the embedding where a file has no output head
                target = names.get_name(name, try_suffixes=(".weight", ".bias"))
                if target is None:
                    raise ValueError(f"{file.name} holds {name}, which llama.cpp's Llama does not have.")
                value = tensors.get_tensor(name).float()
                layer = name.split(".")[-2]
                if layer in heads:
                    value = neighbouring_pairs(value, heads[layer])
                writer.add_tensor(target, _as_numpy(value, name))
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())


def neighbouring_pairs(weight: Tensor, heads: int) -> Tensor:
    """Reorder the output rows of q or k [heads · head_dim, ...] for llama.cpp's rotary embedding.

    transformers turns row i together with row i + head_dim/2 of a head, llama.cpp row 2i with row 2i + 1. Queries
    and keys are reordered alike, so their products stay the same.
    """
    half = weight.shape[0] // heads // 2
    return weight.view(heads, 2, half, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _as_numpy(value: Tensor, name: str):
    if value.dim() == 1:
        return value.numpy()
    half = value.half()
    if not half.isfinite().all():
        raise ValueError(f"{name} holds {value.abs().max():.3g}, too large for float16 (65,504).")
    return half.numpy()


def _rope_factors(config) -> Tensor | None:
    """What llama.cpp divides each rotary frequency by [head_dim / 2]; None for the plain embedding.

    Raises ValueError for scalings that depend on the length of the text.
    """
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"export_gguf writes the rope types default, linear and llama3, not {kind}.")
    exponents = torch.arange(0, _head_dim(config), 2, dtype=torch.float32) / _head_dim(config)
    return config.rope_parameters["rope_theta"] ** -exponents / LlamaRotaryEmbedding(config).inv_freq


# --- reading back --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a GGUF file."""

    name: str
    row: int  # inputs: what a block of quantized weights has to divide
    type: str
    bytes: int


def stored_tensors(file: Path) -> list[StoredTensor]:
    """What a GGUF file's tensors are stored as."""
    tensors = gguf.GGUFReader(file).tensors
    return [StoredTensor(t.name, int(t.shape[0]), t.tensor_type.name, int(t.n_bytes)) for t in tensors]
