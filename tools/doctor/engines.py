"""What transformers, vLLM and llama.cpp on this machine can load: predicted from their stated rules.

Each rule names the file of its engine that states it (transformers 5.17, vLLM 0.32, llama.cpp of llama-cpp-python
0.3.36); `tests/tools/test_doctor.py` holds rules against the real engines.
"""

import importlib.util
import re

import gguf
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from common.engines import llamacpp, vllm_server
from common.formats.gguf import ARCHITECTURES
from common.formats.packing import WORD
from tools.doctor.findings import Finding, Prediction
from tools.doctor.reading import Checkpoint

# transformers/quantizers/quantizer_*.py: what each format's loader imports.
NEEDS = {
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel", "accelerate"),
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "torchao": ("torchao",),
    "compressed-tensors": ("compressed_tensors",),
}
VLLM_CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # vllm/v1/attention/backends/cpu_attn.py
VLLM_GROUPS = (-1, 32, 64, 128)  # vllm/.../quantization/utils/marlin_utils.py, MARLIN_SUPPORTED_GROUP_SIZES
# No engine can load a checkpoint with one of these.
CORRUPT = ("missing shard", "truncated file", "no weights", "missing tensors", "lost tied head", "wrong shapes")
REPACK = "common.formats.awq.repack_as_awq saves the same numbers in a form that vLLM reads"


def predict(found: Checkpoint, findings: list[Finding]) -> list[Prediction]:
    """One prediction for each engine."""
    broken = [finding.name for finding in findings if finding.name in CORRUPT]
    if broken:
        why = f"{', '.join(broken)}: see the findings"
        return [Prediction(engine, False, why) for engine in ("transformers", "vLLM", "llama.cpp")]
    return [_transformers(found), _vllm(found, findings), _llamacpp(found)]


def _transformers(found: Checkpoint) -> Prediction:
    name = "transformers"
    if found.kind == "sparse":
        return Prediction(name, False, "the course's own sparse format", "Load it with formats.sparse.load_sparse.")
    if found.kind == "gguf":
        from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

        architecture = found.config.get("general.architecture")
        loads = architecture in GGUF_SUPPORTED_ARCHITECTURES
        return Prediction(name, loads, f"GGUF of {architecture}, de-quantized (modeling_gguf_pytorch_utils.py)")
    if found.config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return Prediction(name, False, f"no causal LM of type {found.config.get('model_type')!r} (modeling_auto.py)")
    missing = [package for package in NEEDS.get(found.kind, ()) if importlib.util.find_spec(package) is None]
    if missing:
        why = f"{found.kind} needs {' and '.join(missing)} (quantizers/)"
        return Prediction(name, False, why, f"pip install {' '.join(missing)}")
    if found.kind in ("gptq", "awq") and _odd(found):
        return Prediction(name, False, f"GPTQModel's kernels want multiples of {WORD}, {_odd(found)} is none")
    return Prediction(name, True, "dense" if found.kind == "dense" else f"{found.kind} (quantizers/)")


def _odd(found: Checkpoint) -> str:
    """The first packed layer whose size is no multiple of 32; "" where there is none."""
    for layer, parts in found.layers().items():
        rows, columns = found.tensors[parts["qweight"]].shape
        bits = found.settings.get("bits", 4)
        inputs, outputs = (rows, columns * WORD // bits) if found.kind == "awq" else (rows * WORD // bits, columns)
        if inputs % WORD or outputs % WORD:
            return f"{layer} [{outputs}, {inputs}]"
    return ""


def _vllm(found: Checkpoint, findings: list[Finding]) -> Prediction:
    name = "vLLM"
    if vllm_server.missing():
        return Prediction(name, False, "not installed here", "make serve-env")
    if found.kind == "sparse":
        do = "Load it with load_sparse, save it with save_pretrained."
        return Prediction(name, False, "the course's own sparse format", do)
    if found.kind == "gguf":
        return Prediction(name, False, "no GGUF (quantization/__init__.py)", "Serve the original, or use llama.cpp.")
    architecture = (found.config.get("architectures") or ["none"])[0]
    if not _in_registry(architecture):
        return Prediction(name, False, f"{architecture} is not in its registry (models/registry.py)")
    unexpected = [finding for finding in findings if finding.name == "unexpected tensors"]
    if unexpected:
        return Prediction(name, False, "tensors without a place are a KeyError (models/*.py, load_weights)")
    return _vllm_format(found)


def _in_registry(architecture: str) -> bool:
    registry = next(vllm_server.ENVIRONMENT.glob("lib/python*/site-packages/vllm/model_executor/models/registry.py"))
    return re.search(rf'"{re.escape(architecture)}": ', registry.read_text(encoding="utf-8")) is not None


def _vllm_format(found: Checkpoint) -> Prediction:
    name, kind, settings = "vLLM", found.kind, found.settings
    gpu = torch.cuda.is_available()
    width = _head_dim(found.config)
    if not gpu and width and width not in VLLM_CPU_HEADS:
        why = f"heads of {width}, on a CPU it has {', '.join(map(str, VLLM_CPU_HEADS))} (cpu_attn.py)"
        return Prediction(name, False, why)
    if kind == "dense":
        return Prediction(name, True, "dense")
    if kind not in ("gptq", "awq"):
        return Prediction(name, gpu, f"{kind}: on GPUs where its package is in .venv-serve; no rule was tested here")
    if not vllm_server.has_four_bit_kernel():
        do = "common.formats.gptq.save_dense saves it unpacked."
        return Prediction(name, False, "packed weights need a GPU or AVX-512 (mixed_precision/cpu.py)", do)
    bits = settings.get("bits", settings.get("w_bit"))
    group_size = settings.get("group_size", settings.get("q_group_size"))
    if kind == "gptq" and not settings.get("sym"):
        return Prediction(name, False, "asymmetric GPTQ (auto_gptq.py, TYPE_MAP)", REPACK if bits == 4 else "")
    allowed = (4, 8) if kind == "gptq" and gpu else (4,)
    if bits not in allowed:
        return Prediction(name, False, f"{kind} with {bits} bits (auto_{kind}.py, TYPE_MAP; marlin_utils.py)")
    if group_size not in VLLM_GROUPS:
        why = f"group_size {group_size}, it has kernels for {', '.join(map(str, VLLM_GROUPS))} (marlin_utils.py)"
        return Prediction(name, False, why, "Quantize with one of these.")
    if _odd(found):
        why = f"its kernels want multiples of {WORD}, {_odd(found)} is none (mixed_precision/cpu.py)"
        return Prediction(name, False, why)
    return Prediction(name, True, f"{kind}, {bits} bits, groups of {group_size} (auto_{kind}.py)")


def _head_dim(config: dict) -> int:
    """Width of an attention head; 0 where the configuration does not say."""
    if config.get("head_dim"):
        return config["head_dim"]
    return config.get("hidden_size", 0) // (config.get("num_attention_heads") or 1)


def _llamacpp(found: Checkpoint) -> Prediction:
    name = "llama.cpp"
    if llamacpp.missing():
        return Prediction(name, False, "not installed here", "make engines")
    if found.kind == "gguf":
        architecture = found.config.get("general.architecture", "none")
        loads = architecture in gguf.MODEL_ARCH_NAMES.values()
        return Prediction(name, loads, f"GGUF of {architecture} (gguf/constants.py, MODEL_ARCH_NAMES)")
    if found.kind != "dense":
        return Prediction(
            name, False, f"reads GGUF only, and {found.kind} has grids of its own", "Export the original."
        )
    known = (found.config.get("architectures") or ["none"])[0] in ARCHITECTURES
    do = "common.formats.gguf.export_gguf writes it." if known else "Try llama.cpp's convert_hf_to_gguf.py."
    return Prediction(name, False, "reads GGUF only", do)
