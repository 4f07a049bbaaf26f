"""Is everything there, in the right shape, and do tokenizer, configuration and weights belong together?"""

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.course.checkpoint import some
from tools.doctor.findings import Finding
from tools.doctor.reading import Checkpoint

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
COMPUTED = (".inv_freq", ".masked_bias")  # buffers of old checkpoints that every reader computes anew


@dataclass
class Plan:
    """What the configuration says that the weights must be."""

    shapes: dict[str, torch.Size]
    head: str  # names; "" where the model has none
    embedding: str
    tied: bool
    fused: bool  # experts in 3-D parameters, which files hold one by one under other names


def plan(found: Checkpoint) -> Plan | None:
    """The plan of a folder; None where transformers cannot build its model, or for a GGUF file."""
    if found.kind == "gguf":
        return None
    try:
        config = AutoConfig.from_pretrained(found.path)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, OSError) as error:
        found.findings.append(
            Finding("unknown model", f"transformers cannot build it: {error}", "Update it, or mend config.json.")
        )
        return None
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    return Plan(
        shapes,
        _name(model, head) if head is not None else "",
        _name(model, embedding),
        bool(config.tie_word_embeddings),
        any(len(shape) == 3 and "expert" in name for name, shape in shapes.items()),
    )


def _name(model, module) -> str:
    return next(name for name, m in model.named_modules() if m is module) + ".weight"


def check_tensors(found: Checkpoint, plan: Plan) -> list[Finding]:
    """Missing, unexpected and misshapen tensors, and the output head."""
    if any(f.name in ("missing shard", "truncated file", "no weights") for f in found.findings):
        return []  # which explains all of it
    findings = []
    weights = {t.weight for t in found.tensors.values() if not t.name.endswith(COMPUTED)}
    if not plan.fused:
        missing = sorted(plan.shapes.keys() - weights - {plan.head})
        unexpected = sorted(weights - plan.shapes.keys())
        if missing:
            findings.append(
                Finding(
                    "missing tensors",
                    f"{some(missing)}: transformers would fill them with random numbers",
                    "Make or fetch the checkpoint again; if all names lack a prefix such as `model.`, save it anew.",
                )
            )
        if unexpected:
            findings.append(
                Finding(
                    "unexpected tensors",
                    f"{some(unexpected)} are no part of the model that config.json describes; vLLM refuses them",
                    "Check num_hidden_layers and architectures in config.json, or save the model anew without them.",
                )
            )
    wrong = [
        f"{t.name} {list(t.shape)} instead of {list(plan.shapes[t.name])}"
        for t in found.tensors.values()
        if t.name in plan.shapes and found.kind in ("dense", "gptq", "awq") and t.shape != tuple(plan.shapes[t.name])
    ]
    if wrong:
        findings.append(Finding("wrong shapes", some(wrong), "config.json is another model's: take the original's."))
    return findings + _check_head(found, plan)


def _check_head(found: Checkpoint, plan: Plan) -> list[Finding]:
    stored = any(t.weight == plan.head for t in found.tensors.values())
    if plan.head and not stored and not plan.tied:
        return [
            Finding(
                "lost tied head",
                f"no {plan.head}, and tie_word_embeddings is false: transformers would make a random output head",
                "If the original is tied, set tie_word_embeddings to true in config.json; else save it with its head.",
            )
        ]
    if plan.tied and plan.head in found.tensors and plan.embedding in found.tensors:
        head, embedding = found.read(plan.head), found.read(plan.embedding)
        if head.shape != embedding.shape or not torch.equal(head, embedding):
            return [
                Finding(
                    "own head beside a tied flag",
                    f"tie_word_embeddings is true, but {plan.head} differs from the embedding: vLLM drops it",
                    "Set tie_word_embeddings to false in config.json.",
                )
            ]
    return []


def tokenizer_ids(found: Checkpoint) -> int | None:
    """One more than the tokenizer's largest id; None where it cannot be loaded."""
    if found.kind == "gguf":
        return len(found.config.get("tokenizer.ggml.tokens", []))
    if not any((found.path / name).exists() for name in TOKENIZERS):
        return None  # for some families transformers would make an empty one
    try:
        return max(AutoTokenizer.from_pretrained(found.path).get_vocab().values()) + 1
    except Exception:  # tokenizers fail in as many ways as there are files
        return None


def check_tokenizer(found: Checkpoint, plan: Plan | None) -> list[Finding]:
    """Every id of the tokenizer must have a row in the embedding."""
    ids = tokenizer_ids(found)
    if ids is None:
        do = "Save the original's tokenizer into the folder (save_pretrained)."
        return [Finding("no tokenizer", "there is none that can be loaded", do)]
    name = "token_embd.weight" if found.kind == "gguf" else plan.embedding if plan else ""
    rows = found.tensors[name].shape[0] if name in found.tensors else found.config.get("vocab_size")
    if rows is None or ids <= rows:
        return []
    return [
        Finding(
            "vocabulary smaller than the tokenizer",
            f"the tokenizer has ids up to {ids - 1}, the embedding {rows} rows: text with such tokens crashes",
            "Take the tokenizer that belongs to the model, or resize the embeddings (model.resize_token_embeddings).",
        )
    ]
