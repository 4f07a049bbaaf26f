"""Families of decoders through every step of distillation: each is right, or refused by name before the work."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from common.methods.blocks import decoder_blocks
from common.methods.distillation import kd_loss, last_relations, require_relations, student_from_teacher
from common.methods.structured import narrow_ffn
from common.methods.training import DistillationTrainer, Objective, WindowDataset, save_student, training_arguments

IDS = torch.randint(3, 256, (3, 20), generator=torch.Generator().manual_seed(1))
RIGHT, REFUSED = "right", "refused"

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": None,
}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
LATENT |= {"num_key_value_heads": 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
GPTJ = {"n_embd": 64, "n_layer": 4, "n_head": 4, "rotary_dim": 8, "n_positions": 128, "vocab_size": 256}

# family → its configuration beside SIZES; the verdict on the loss, MiniLM, a shallower student, a narrower one.
FAMILIES = {
    "llama": ({}, RIGHT, RIGHT, RIGHT, RIGHT),
    "qwen3": ({"head_dim": 16}, RIGHT, RIGHT, RIGHT, RIGHT),
    "smollm3": ({"no_rope_layer_interval": 2}, RIGHT, RIGHT, RIGHT, RIGHT),
    "granite": ({"logits_scaling": 8.0, "attention_multiplier": 1 / 64}, RIGHT, RIGHT, RIGHT, RIGHT),
    "cohere": ({"logit_scale": 1 / 16}, RIGHT, RIGHT, RIGHT, RIGHT),
    "gemma2": (
        {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "sliding_window": 8, "head_dim": 16},
        *(RIGHT, RIGHT, RIGHT, RIGHT),
    ),
    "minicpm3": (
        LATENT | {"dim_model_base": 16},
        RIGHT,
        RIGHT,
        REFUSED,
        REFUSED,
    ),
    "phi": ({}, RIGHT, RIGHT, RIGHT, REFUSED),  # fc1 and fc2
    "nemotron": ({}, RIGHT, RIGHT, RIGHT, RIGHT),
    "diffllama": ({}, RIGHT, RIGHT, REFUSED, RIGHT),  # a number in each attention depends on its depth
    "gpt_oss": (
        EXPERTS | {"num_local_experts": 4, "head_dim": 16, "sliding_window": 8},
        RIGHT,
        REFUSED,
        RIGHT,
        REFUSED,
    ),
    "gptj": (GPTJ, RIGHT, REFUSED, RIGHT, REFUSED),
    "deepseek_v3": (
        LATENT | EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2},
        *(RIGHT, RIGHT, RIGHT, REFUSED),
    ),
    "qwen3_moe": (EXPERTS | {"num_experts": 4, "decoder_sparse_step": 2}, RIGHT, RIGHT, RIGHT, REFUSED),
    "jamba": ({"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1}, RIGHT, RIGHT, RIGHT, REFUSED),
    "mamba": ({"state_size": 16}, RIGHT, REFUSED, RIGHT, REFUSED),
}


def build(kind: str, seed: int = 0):
    """A tiny random model whose norms and biases say something."""
    sizes = {} if kind == "gptj" else SIZES
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | FAMILIES[kind][0])).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "dt" not in name and not name.endswith(".D"):
                parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16())
    return model


def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


def same(found, expected) -> bool:
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


def verdict(model, step) -> str:
    """Whether step() says that all is as it should be, or the model is refused by its name."""
    try:
        return RIGHT if step() else "silently wrong"
    except ValueError as error:
        return REFUSED if type(model).__name__ in str(error) else f"refused without its name: {error}"


def the_loss(student, teacher, folder) -> bool:
    """α · CE + (1 - α) · KL and its gradients are autograd's of the models' own logits."""
    arguments = training_arguments(
        folder, name="t", steps=1, batch_size=3, learning_rate=1e-3, seed=0, evaluations=0, on_cpu=True
    )
    objective = Objective(alpha=0.3, temperature=2.0)
    trainer = DistillationTrainer(student, arguments, WindowDataset(IDS), objective, teacher=teacher)
    loss = trainer.compute_loss(student, {"input_ids": IDS})
    loss.backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    q, p = (logits(model)[:, :-1].flatten(0, 1) for model in (student, teacher))
    hard = F.cross_entropy(q, IDS[:, 1:].flatten())
    expected = 0.3 * hard + 0.7 * kd_loss(q, p.detach(), 2.0) / len(q)
    expected.backward()
    slopes = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    difference = sum((found[name] - slope).square().sum() for name, slope in slopes.items()).sqrt()
    size = sum(slope.square().sum() for slope in slopes.values()).sqrt()
    return found.keys() == slopes.keys() and same(loss, expected) and bool(difference <= 1e-4 * size)


@torch.no_grad()
def minilm(model) -> bool:
    """The relation is the attention that the model itself returns."""
    require_relations(model)
    model.set_attn_implementation("eager")
    out = model(input_ids=IDS, use_cache=False, output_hidden_states=True, output_attentions=True)
    return same(last_relations(model, out.hidden_states[-2])[0].exp(), out.attentions[-1])


@torch.no_grad()
def shallower(model, tokenizer, folder) -> bool:
    """The student is the teacher with all blocks but two skipped, and loads as what it is."""
    student = student_from_teacher(model, [1, 3]).eval()
    mine = logits(student)
    handles = [
        decoder_blocks(model)[index].register_forward_hook(
            lambda _, args, kwargs, out: (
                (args[0] if args else kwargs["hidden_states"], *out[1:])
                if isinstance(out, tuple)
                else (args[0] if args else kwargs["hidden_states"])
            ),
            with_kwargs=True,
        )
        for index in range(len(decoder_blocks(model)))
        if index not in (1, 3)
    ]
    skipped = logits(model)
    for handle in handles:
        handle.remove()
    saved = save_student(folder / "s", student, tokenizer, method="kd", settings={}, parent="t").folder
    loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    for parameter in student.parameters():
        parameter.copy_(parameter.bfloat16())
    return same(mine, skipped) and same(logits(loaded), logits(student))


@torch.no_grad()
def narrower(model, folder) -> bool:
    """Half the hidden units are gone, and the model loads as what it is."""
    narrow = narrow_ffn(model, 64, IDS)
    narrow.save_pretrained(folder / "n")
    loaded = type(model).from_pretrained(folder / "n", dtype=torch.float32).eval()
    fewer = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in narrow.parameters())
    return fewer > 0 and same(logits(loaded), logits(narrow))


def verdicts(model, teacher, tokenizer, folder) -> tuple[str, ...]:
    return (
        verdict(model, lambda: the_loss(copy.deepcopy(model), teacher, folder)),
        verdict(model, lambda: minilm(copy.deepcopy(model))),
        verdict(model, lambda: shallower(model, tokenizer, folder)),
        verdict(model, lambda: narrower(model, folder)),
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_step_is_right_or_refuses_by_name(kind, tokenizer, tmp_path):
    assert verdicts(build(kind), build(kind, seed=9), tokenizer, tmp_path) == FAMILIES[kind][1:]
