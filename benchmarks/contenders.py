"""The implementations that `make bench` compares: each compresses the same model with the same calibration tokens.

A contender gets a `Task` and a `Clock`, compresses the model inside `with clock:` (loading, saving and evaluating are
not timed, calibration is), and returns a model to evaluate with the bytes of its weights on disk. Libraries are given
the settings that their documentation recommends for quality, at the bit width and grid of the row.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.course.memory import host_peak
from common.formats.gptq import load_dequantized, save_gptq
from common.formats.sparse import packed_bytes
from common.methods.awq import awq_model
from common.methods.blocks import iter_linears
from common.methods.pruning import PruneConfig, prune_model
from common.methods.quantization import QuantizeConfig, QuantizedWeight, gptq_model, rtn_model
from common.methods.smoothquant import smoothquant_model


@dataclass(frozen=True)
class Task:
    """What a contender works on."""

    folder: Path  # the original model, in Hugging Face's format
    model: nn.Module  # the same, loaded; may be changed in place
    tokenizer: object
    windows: Tensor  # calibration tokens [nsamples, seqlen]
    batch_size: int  # windows per forward pass, where an implementation lets one choose
    out: Path  # an empty folder to save into

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device


@dataclass
class Clock:
    """Seconds spent inside `with clock:`, and the process's peak memory when it was left, in bytes."""

    seconds: float = 0.0
    peak: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __enter__(self) -> "Clock":
        self._wait()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self._wait()
        self.seconds += time.perf_counter() - self._start
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self.peak = host_peak()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# The model to evaluate, and what saves it afterwards and returns the bytes of its weights on disk (None: nothing does).
Compressed = tuple[nn.Module, Callable[[], int] | None]
Contender = Callable[[Task, Clock], Compressed]


def weight_bytes(folder: Path) -> int:
    """Bytes of a saved model's weight files."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _dense_bytes(model: nn.Module) -> int:
    return 2 * sum(parameter.numel() for parameter in model.parameters())


def _save(model: nn.Module, folder: Path) -> int:
    model.save_pretrained(folder)
    return weight_bytes(folder)


def _packed_bytes(model: nn.Module) -> int:
    """Bytes of the bit mask and 16-bit values that `common.formats.sparse` writes, and of everything else."""
    weights = [linear.weight.bfloat16() for _, linear in iter_linears(model)]
    return _dense_bytes(model) + sum(packed_bytes(weight) - weight.nbytes for weight in weights)


# --- quantization ----------------------------------------------------------------------------------------------------


def original(task: Task, clock: Clock) -> Compressed:
    return task.model, lambda: _dense_bytes(task.model)


def _save_ours(task: Task, weights: dict[str, QuantizedWeight], method: str) -> int:
    return save_gptq(
        task.out / method, task.model, task.tokenizer, weights, method=method, parent="original"
    ).weight_bytes


def ours_rtn(task: Task, clock: Clock, config: QuantizeConfig) -> Compressed:
    plain = QuantizeConfig(config.bits, config.group_size, config.sym, mse=False)
    with clock:
        weights = rtn_model(task.model, plain)
    return task.model, partial(_save_ours, task, weights, "rtn")


def ours_gptq(task: Task, clock: Clock, config: QuantizeConfig) -> Compressed:
    with clock:
        weights = gptq_model(task.model, task.windows, config)
    return task.model, partial(_save_ours, task, weights, "gptq")


def gptqmodel_gptq(task: Task, clock: Clock, config: QuantizeConfig) -> Compressed:
    from gptqmodel import GPTQModel
    from gptqmodel import QuantizeConfig as LibraryConfig

    # mse: the norm of the clipping search, 2.4 in the library's own examples of quality.
    settings = LibraryConfig(
        bits=config.bits, group_size=config.group_size, sym=config.sym, desc_act=config.desc_act, mse=2.4
    )
    library = GPTQModel.load(str(task.folder), settings)
    with clock:
        library.quantize(_examples(task.windows), batch_size=task.batch_size)
    library.save(str(task.out))
    return load_dequantized(task.out, task.dtype).to(task.device), partial(weight_bytes, task.out)


def optimum_gptq(task: Task, clock: Clock, config: QuantizeConfig) -> Compressed:
    """What `AutoModelForCausalLM.from_pretrained(..., quantization_config=GPTQConfig(...))` runs."""
    from optimum.gptq import GPTQQuantizer

    quantizer = GPTQQuantizer(
        bits=config.bits,
        group_size=config.group_size,
        sym=config.sym,
        desc_act=config.desc_act,
        act_group_aware=not config.desc_act,
        dataset=_tensor_examples(task.windows),
        batch_size=1,
        model_seqlen=task.windows.shape[1],
    )
    with clock:
        quantizer.quantize_model(task.model, task.tokenizer)
    quantizer.dataset = task.model.config.quantization_config["dataset"] = None  # else written into the configuration
    quantizer.save(task.model, str(task.out))
    return load_dequantized(task.out, task.dtype).to(task.device), partial(weight_bytes, task.out)


def llmcompressor_gptq(task: Task, clock: Clock, config: QuantizeConfig) -> Compressed:
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = _compressed_tensors_weights(config)
    recipe = GPTQModifier(
        config_groups={"all": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        actorder="static" if config.desc_act else None,
    )
    return _oneshot(task, clock, recipe)


def ours_awq(task: Task, clock: Clock, config: QuantizeConfig) -> Compressed:
    with clock:
        awq_model(task.model, task.windows, config)
    return task.model, None  # the course saves no AWQ checkpoint of its own


def llmcompressor_awq(task: Task, clock: Clock, config: QuantizeConfig) -> Compressed:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    groups = {"all": {"targets": ["Linear"], "weights": _compressed_tensors_weights(config)}}
    recipe = [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
    return _oneshot(task, clock, recipe)


def bitsandbytes(task: Task, clock: Clock, **options) -> Compressed:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with clock:
        model = AutoModelForCausalLM.from_pretrained(
            task.folder,
            quantization_config=BitsAndBytesConfig(**options),
            device_map=str(task.device),
            dtype=task.dtype,
        )
    return model, partial(_save, model, task.out)


def ours_smoothquant(task: Task, clock: Clock, alpha: float) -> Compressed:
    with clock:
        smoothquant_model(task.model, task.windows, alpha)
    return task.model, None  # rounding is simulated: there is no int8 file


def llmcompressor_smoothquant(task: Task, clock: Clock, alpha: float) -> Compressed:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    recipe = [
        SmoothQuantModifier(smoothing_strength=alpha),
        QuantizationModifier(scheme="W8A8", targets="Linear", ignore=["lm_head"]),
    ]
    return _oneshot(task, clock, recipe)


# --- pruning ---------------------------------------------------------------------------------------------------------


def ours_prune(task: Task, clock: Clock, config: PruneConfig, **walk_options) -> Compressed:
    with clock:
        prune_model(task.model, task.windows, config, **walk_options)
    return task.model, partial(_packed_bytes, task.model)


def llmcompressor_prune(task: Task, clock: Clock, config: PruneConfig) -> Compressed:
    from llmcompressor.modifiers.pruning import WandaPruningModifier
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier

    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[config.method]
    structure = config.pattern if config.group else "0:0"
    # A plain "lm_head" does not match (it is compared with "lm_head."), and the tied embedding would be pruned.
    recipe = modifier(sparsity=config.sparsity, mask_structure=structure, targets=["Linear"], ignore=["re:.*lm_head"])
    return _oneshot(task, clock, recipe)


# --- how libraries want their data -----------------------------------------------------------------------------------


def _tensor_examples(windows: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in windows]


def _examples(windows: Tensor) -> list[dict[str, list[int]]]:
    return [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in windows]


def _compressed_tensors_weights(config: QuantizeConfig) -> dict:
    return {
        "num_bits": config.bits,
        "type": "int",
        "symmetric": config.sym,
        "strategy": "group",
        "group_size": config.group_size,
        "observer": "mse" if config.mse else "minmax",
    }


def _oneshot(task: Task, clock: Clock, recipe) -> Compressed:
    """llm-compressor's one call. The model is evaluated as it leaves it: weights rounded, activations as it runs."""
    from llmcompressor import oneshot

    loader = DataLoader(
        _tensor_examples(task.windows),
        batch_size=task.batch_size,
        collate_fn=lambda items: {key: torch.cat([item[key] for item in items]) for key in items[0]},
    )
    embedding = task.model.get_input_embeddings().weight.clone()
    with clock:
        oneshot(model=task.model, dataset=loader, recipe=recipe, num_calibration_samples=len(task.windows))
    if not torch.equal(embedding, task.model.get_input_embeddings().weight):
        raise AssertionError("The embedding was changed: the comparison is about the decoder blocks' linear layers.")
    return task.model, lambda: _save(task.model.to(torch.bfloat16), task.out)
