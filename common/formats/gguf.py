"""From a Hugging Face folder to one GGUF file in float16: what llama.cpp runs and quantizes.

A GGUF file holds everything: hyperparameters, tokenizer, chat template and tensors. The names and layouts follow
llama.cpp's own `convert_hf_to_gguf.py`; the file is written by the official `gguf` package, one tensor at a time.
"""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from common.course import checkpoint
from common.course.assets import local_folder
from common.course.files import whole_file
from common.formats.gguf_tokenizer import LLAMA_3_SPLIT, QWEN_2_SPLIT, UnknownFamily, add_tokenizer

__all__ = ["LLAMA_3_SPLIT", "QWEN_2_SPLIT", "StoredTensor", "UnknownFamily", "export_gguf", "stored_tensors"]

LLAMA, QWEN2, QWEN3 = gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.QWEN2, gguf.MODEL_ARCH.QWEN3
# transformers' class → llama.cpp's graph that computes the same. Llama's turns neighbouring rows of q and k together,
# Qwen's the halves of a head, as transformers does.
ARCHITECTURES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
}
# Biases that a graph of llama.cpp does not have; it has those that it is given otherwise.
NO_BIAS = {
    LLAMA: (),
    QWEN2: ("o_proj", "gate_proj", "up_proj", "down_proj"),
    QWEN3: ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
# Rotary embeddings that a graph can be told of: those that do not depend on the length of the text.
QWEN_ROPE = ("default", "linear", "yarn")
ROPE = {LLAMA: ("default", "linear", "llama3"), QWEN2: QWEN_ROPE, QWEN3: QWEN_ROPE}
YARN = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
COMPUTED = ".rotary_emb.inv_freq"  # buffers that old checkpoints hold and every reader computes anew


def export_gguf(source: Path | str, target: Path) -> Path:
    """Write the model `source` (folder of config, tokenizer and *.safetensors, or Hub id) as the GGUF file `target`.

    Matrices become float16, vectors stay float32. An interruption leaves no half file.
    Raises UnknownFamily where llama.cpp has no graph for it here, ValueError where the folder is no complete dense
    model that GGUF can hold unchanged.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        source = local_folder(source.as_posix())
    config = AutoConfig.from_pretrained(source)
    architecture = _check(config, source)
    with whole_file(target) as new, closing(gguf.GGUFWriter(new, gguf.MODEL_ARCH_NAMES[architecture])) as writer:
        _add_hyperparameters(writer, config)
        add_tokenizer(writer, source, config)
        _write(writer, _tensors(source, config, architecture), config, architecture)
    return target


def _check(config, source: Path) -> gguf.MODEL_ARCH:
    """llama.cpp's graph for the model; errors where there is none or it would compute something else."""
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        raise ValueError(
            f"{source.name} is already quantized ({quantization['quant_method']}). GGUF rounds to grids of its own, so "
            "its codes cannot be carried over; rounding a second time adds error. Export the original model instead."
        )
    architecture = (config.architectures or ["none"])[0]
    if architecture not in ARCHITECTURES:
        *others, last = ARCHITECTURES
        raise UnknownFamily(
            f"export_gguf writes {', '.join(others)} and {last}, not {architecture}. "
            "Use llama.cpp's convert_hf_to_gguf.py for other architectures."
        )
    if config.hidden_act != "silu":
        raise UnknownFamily(f"llama.cpp's Llama and Qwen compute with silu, this model with {config.hidden_act}.")
    partial = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise UnknownFamily(f"export_gguf writes heads that turn whole, this model turns {partial:g} of each.")
    kind, known = config.rope_parameters["rope_type"], ROPE[ARCHITECTURES[architecture]]
    if kind not in known:
        raise UnknownFamily(f"export_gguf writes {architecture} with the rope types {', '.join(known)}, not {kind}.")
    special = sorted(name for name in set(config.rope_parameters) - YARN if config.rope_parameters[name] is not None)
    if kind == "yarn" and special:
        raise UnknownFamily(f"export_gguf writes yarn with its usual settings, this model sets {', '.join(special)}.")
    return ARCHITECTURES[architecture]


def _add_hyperparameters(writer: gguf.GGUFWriter, config) -> None:
    # These graphs have no sliding window; within one window, attention is the same with and without.
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
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# --- tensors -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """One tensor to be written: where it lies and what it is called on both sides."""

    file: Path
    name: str
    target: str
    shape: tuple[int, ...]


def _tensors(source: Path, config, architecture: gguf.MODEL_ARCH) -> list[_Source]:
    """What will be written. ValueError where a tensor is missing, is of no use, or has another shape than it must."""
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    found = {name: file for name, file in checkpoint.stored(source).items() if not name.endswith(COMPUTED)}
    expected = checkpoint.expected(config)
    if not _has_own_head(found, config):
        found.pop("lm_head.weight", None)  # llama.cpp uses the embedding where a file has no output head
        if config.tie_word_embeddings:
            expected.pop("lm_head.weight", None)
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{source} lacks {checkpoint.some(missing)}: it is no complete model.")
    wanted = []
    for name, file in found.items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        layer, kind = name.split(".")[-2:]
        if name not in expected or target is None or (kind == "bias" and layer in NO_BIAS[architecture]):
            graph = gguf.MODEL_ARCH_NAMES[architecture]
            raise ValueError(f"{file.name} holds {name}, which llama.cpp's {graph} does not have.")
        with safe_open(file, framework="pt") as tensors:
            shape = tuple(tensors.get_slice(name).get_shape())
        if shape != tuple(expected[name]):
            raise ValueError(f"{name} has the shape {list(shape)}, by config.json it must have {list(expected[name])}.")
        wanted.append(_Source(file, name, target, shape))
    return wanted


def _has_own_head(found: dict[str, Path], config) -> bool:
    """Whether the file's output head is another matrix than the embedding, whatever the configuration says."""
    if "lm_head.weight" not in found or not config.tie_word_embeddings:
        return "lm_head.weight" in found
    head, embedding = (checkpoint.read_tensor(found, name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    return not torch.equal(head, embedding)


def _write(writer: gguf.GGUFWriter, tensors: list[_Source], config, architecture: gguf.MODEL_ARCH) -> None:
    """All of the file: first what every tensor will be, then one tensor after the other."""
    for tensor in tensors:
        dtype = np.dtype(np.float32 if len(tensor.shape) == 1 else np.float16)
        size = dtype.itemsize * int(np.prod(tensor.shape))
        writer.add_tensor_info(tensor.target, tensor.shape, dtype, size)
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", tuple(factors.shape), np.dtype(np.float32), factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for tensor in tensors:
        with safe_open(tensor.file, framework="pt") as file:
            value = file.get_tensor(tensor.name)
        layer = tensor.name.split(".")[-2]
        if architecture is LLAMA and layer in heads:
            value = neighbouring_pairs(value, heads[layer])
        writer.write_tensor_data(_as_numpy(value, tensor.name))
    if factors is not None:
        writer.write_tensor_data(factors.numpy())


def neighbouring_pairs(weight: Tensor, heads: int) -> Tensor:
    """Reorder the output rows of q or k [heads · head_dim, ...] for llama.cpp's rotary embedding.

    transformers turns row i together with row i + head_dim/2 of a head, llama.cpp row 2i with row 2i + 1. Queries
    and keys are reordered alike, so their products stay the same.
    """
    half = weight.shape[0] // heads // 2
    return weight.view(heads, 2, half, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _as_numpy(value: Tensor, name: str):
    if value.dim() == 1:
        return value.float().numpy()
    half = value.half()
    if not half.isfinite().all():
        raise ValueError(f"{name} holds {value.abs().max():.3g}, which float16 cannot (it ends at 65,504).")
    return half.numpy()


def _rope_factors(config) -> Tensor | None:
    """Llama 3's scaling: what llama.cpp divides each rotary frequency by [head_dim / 2]; None for other rope types."""
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    exponents = torch.arange(0, _head_dim(config), 2, dtype=torch.float32) / _head_dim(config)
    return config.rope_parameters["rope_theta"] ** -exponents / LlamaRotaryEmbedding(config).inv_freq


# --- reading back --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a GGUF file."""

    name: str
    row: int  # inputs: what a block of quantized weights has to divide
    type: str
    weights: int
    bytes: int

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer of a decoder block: what GPTQ applies to as well."""
        return self.name.startswith("blk.") and self.weights > self.row


def stored_tensors(file: Path) -> list[StoredTensor]:
    """What a GGUF file's tensors are stored as."""
    tensors = gguf.GGUFReader(file).tensors
    return [
        StoredTensor(t.name, int(t.shape[0]), t.tensor_type.name, int(t.n_elements), int(t.n_bytes)) for t in tensors
    ]
