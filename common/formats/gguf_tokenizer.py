"""A Hugging Face tokenizer as GGUF's metadata: its algorithm, how it splits text, its tokens and special tokens."""

import json
from pathlib import Path

import gguf
from transformers import AutoTokenizer, GenerationConfig

# How the regular expressions of two families begin that differ further on.
LLAMA_3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
QWEN_2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "


class UnknownFamily(ValueError):
    """A model or tokenizer of a kind that `export_gguf` does not write: callers may skip it and say so."""


def add_tokenizer(writer: gguf.GGUFWriter, source: Path, config) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in definition["model"].get("merges", [])]
    kind, splitting = tokenizer_kind(definition)
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
    _add_special_tokens(writer, tokenizer, source, config)
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name; llama.cpp answers with the one called "default"
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def tokenizer_kind(definition: dict) -> tuple[str, str]:
    """llama.cpp's names for a tokenizer's algorithm and for how it splits text before merging."""
    step, normalizer = definition["pre_tokenizer"], definition.get("normalizer")
    if normalizer == {"type": "Sequence", "normalizers": []}:  # as a tokenizer saved anew may say that it has none
        normalizer = None
    steps = step["pretokenizers"] if step and step["type"] == "Sequence" else [step] if step else []
    byte_level = next((s for s in steps if s["type"] == "ByteLevel"), None)
    if byte_level and (byte_level["add_prefix_space"] or (normalizer or {"type": "NFC"})["type"] != "NFC"):
        raise UnknownFamily(
            "llama.cpp's byte-level tokenizers neither put a space before the text nor normalize it, this one does "
            f"(add_prefix_space: {byte_level['add_prefix_space']}, normalizer: {normalizer}): it would split text "
            "differently."
        )
    match [s["type"] for s in steps]:
        case ["ByteLevel"] if steps[0]["use_regex"]:
            return "gpt2", "gpt-2"
        case ["Digits", "ByteLevel"] if steps[0]["individual_digits"] and steps[1]["use_regex"]:
            return "gpt2", "smollm"
        case ["Split", "ByteLevel"] if steps[0]["pattern"].get("Regex", "").startswith(LLAMA_3_SPLIT):
            return "gpt2", "llama-bpe"
        case ["Split", "ByteLevel"] if steps[0]["pattern"].get("Regex", "").startswith(QWEN_2_SPLIT):
            return "gpt2", "qwen2"
        case [] | ["Metaspace"] if "<0x0A>" in definition["model"]["vocab"]:
            return "llama", "default"  # SentencePiece: Llama 2, TinyLlama, Mistral
    raise UnknownFamily(
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


def _add_special_tokens(writer: gguf.GGUFWriter, tokenizer, source: Path, config) -> None:
    # What ends an answer is what `generate` stops at; the tokenizer's own eos can differ from it.
    generation = source / "generation_config.json"
    ends = GenerationConfig.from_pretrained(source).eos_token_id if generation.exists() else None
    ends = ends if isinstance(ends, list) else [tokenizer.eos_token_id if ends is None else ends]
    if ends == [None]:
        ends = [_never(tokenizer, source, config)]
    adders = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token in zip(adders, ends, strict=False):  # llama.cpp has room for three
        add(token)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)


def _never(tokenizer, source: Path, config) -> int:
    """For a model without an end: a token that no answer holds. Left out, llama.cpp would end answers at token 11."""
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    if len(tokenizer) < config.vocab_size:
        return config.vocab_size - 1
    raise ValueError(
        f"{source} names no token that ends an answer, which GGUF needs: set eos_token_id in generation_config.json."
    )
