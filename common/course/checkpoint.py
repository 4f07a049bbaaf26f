"""The weight files of a model folder: which they are, and whether they hold the model that its config describes."""

import copy
import json
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"
BESIDE = ("consolidated", "adapter", "sparse")  # Meta's and Mistral's originals, LoRA adapters, `formats.sparse`


def weight_files(folder: Path) -> list[Path]:
    """The .safetensors files that make up the model in `folder`; never copies in other layouts that lie beside them.

    Raises ValueError where there are none, or where the index names shards that are not there.
    """
    folder = Path(folder)
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]  # transformers, too, prefers it to shards
    if (folder / INDEX).exists():
        named = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in named if not (folder / name).exists()]
        if missing:
            raise ValueError(
                f"{folder} lacks {some(missing)}, of the {len(named)} files that {INDEX} names. "
                "Copy or download the folder again."
            )
        return [folder / name for name in named]
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith(BESIDE))
    if not files:
        others = ", ".join(sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".safetensors", ".gguf")))
        raise ValueError(
            f"{folder} has no .safetensors file of a whole model{f' (only {others})' if others else ''}. "
            "Save the model with save_pretrained first."
        )
    if len(files) > 1 and not all("-of-" in file.name for file in files):
        raise ValueError(
            f"{folder} holds {some([file.name for file in files])} and no {INDEX}: which of them are the model "
            "cannot be told. Keep one model in a folder."
        )
    return files


def stored(folder: Path) -> dict[str, Path]:
    """Every tensor of the model in `folder` by name, with its file. ValueError where a file cannot be read."""
    found = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        except SafetensorError as error:
            raise ValueError(
                f"{file} is damaged or incomplete ({error}). Copy or download it again, or make it again."
            ) from error
    return found


def read_tensor(found: dict[str, Path], name: str) -> torch.Tensor:
    """One tensor of those that `stored` found."""
    with safe_open(found[name], framework="pt") as file:
        return file.get_tensor(name)


def _separate_head(model: nn.Module) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is not embedding.weight


def _untie(config) -> None:
    config.tie_word_embeddings = False
    if config.get_text_config() is not config:
        config.get_text_config().tie_word_embeddings = False


def tie_as_stored(model: nn.Module) -> nn.Module:
    """Correct a configuration that says the output head is the embedding where the model has a head of its own.

    Merged fine-tunes have such files. transformers 5 loads both tensors, but every reader that trusts the flag, such
    as vLLM, drops the head.
    """
    if model.config.tie_word_embeddings and _separate_head(model):
        _untie(model.config)
    return model


def true_config(model: nn.Module):
    """The configuration to save with `model`: a copy that names its class and knows of a head of its own."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]  # what vLLM asks for; a model that was built has none
    if config.tie_word_embeddings and _separate_head(model):
        _untie(config)
    return config


def save_settings(path: Path, model: nn.Module) -> None:
    """Write `config.json`, and the generation settings as they are.

    Llama 2 was published with settings that transformers loads and refuses to save: it would refuse after the work.
    """
    true_config(model).save_pretrained(path)
    if model.can_generate():
        (path / GENERATION).write_text(model.generation_config.to_json_string(), encoding="utf-8")


@contextmanager
def default_generation(model: nn.Module):
    """Set the generation settings aside while `save_pretrained` runs, which refuses some."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def save_model(path: Path, model: nn.Module) -> None:
    """`save_pretrained`, whatever the generation settings, and `save_settings`."""
    with default_generation(model):
        model.save_pretrained(path)
    save_settings(path, model)


def generate_as_stored(model: nn.Module, folder: Path) -> None:
    """Give a model that was built from tensors the generation settings of its folder, such as what ends an answer."""
    if (Path(folder) / GENERATION).exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def tensors_once(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state, a tied tensor under one name only; tied is what is one tensor, whatever the config says."""
    state = model.state_dict()
    tied = {
        name
        for name, source in model.all_tied_weights_keys.items()
        if name in state and source in state and state[name].data_ptr() == state[source].data_ptr()
    }
    return {name: value for name, value in state.items() if name not in tied}


def whole(model: nn.Module, info: dict, what: str) -> list[str]:
    """Check `output_loading_info` of `from_pretrained`; returns the names of tensors that found no place.

    Raises ValueError that names the tensors which the weights lack: transformers fills those with random numbers.
    """
    if info["missing_keys"]:
        raise ValueError(
            f"{what} lacks {len(info['missing_keys'])} tensors that {type(model).__name__} needs: "
            f"{some(sorted(info['missing_keys']))}. They would be random numbers. Fetch or make the model again."
        )
    return sorted(info["unexpected_keys"])


def expected(config) -> dict[str, torch.Size]:
    """Names and shapes of all tensors of the causal LM that `config` describes, tied ones included; no memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: value.shape for name, value in model.state_dict().items()}


def some(names: list[str], most: int = 4) -> str:
    """The first few of many names, as words."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def checksums(model: nn.Module, device: torch.device | str | None = None) -> dict[str, tuple]:
    """Type, shape and two sums over the bits of every tensor of a model's state, by name: what to know it again by.

    The sums are taken on `device` (default: where the tensor lies): to hash 13 GB on a CPU takes longer than to read
    them.
    """
    state = model.state_dict()
    return {name: (str(t.dtype), tuple(t.shape), *_sums(t.to(device or t.device))) for name, t in state.items()}


def _sums(tensor: torch.Tensor) -> tuple[int, int]:
    """The sum of all numbers (by their bits), and one weighed by row and column, which knows a permutation.

    -0 counts as 0: it is equal, and what stores zeros as such makes no difference between them.
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    rows = (tensor.detach() + 0).contiguous().view(integers).reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    by_row, by_column = (rows.sum(dim, dtype=torch.int64) for dim in (1, 0))
    places = (torch.arange(1, len(sums) + 1, device=sums.device) * 7919 % 104729 for sums in (by_row, by_column))
    weighed = (by_row * next(places)).sum() + (by_column * next(places)).sum()
    return by_row.sum().item(), weighed.item()
