"""Tiny random causal LMs of the families that transformers knows, for the tests that send each through every step."""

import copy

import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCABULARY, LARGEST = 256, 4_000_000  # parameters: beyond, the generic configuration does not fit the family

# Families call the same thing by many names; of these, a family is given those that its configuration has.
GENERIC = (
    dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"), 64)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 128)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
    | dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "experts_per_token"), 2)
    | dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 64
    )
    | dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim", "state_size"), 16)
    | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "query_pre_attn_scalar", "laurel_rank"), 16)
    | dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim", "hidden_size_per_layer_input"), 32)
    | dict.fromkeys(("num_hidden_layers", "num_attention_heads", "linear_num_value_heads"), 4)
    | dict.fromkeys(("num_key_value_heads", "linear_num_key_heads"), 2)
    | dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1)
    | dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY)
    | dict.fromkeys(("initializer_range", "init_std"), 0.2)  # ten times the usual: attention has something to say
    | {"sliding_window": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
)
EVEN_IF_NONE = ("pad_token_id", "bos_token_id", "eos_token_id", "sliding_window", "num_key_value_heads")
EVEN_IF_NONE += ("head_dim", "n_inner")

LATENT = {"head_dim": ..., "num_key_value_heads": 4, "qk_head_dim": ...}  # multi-head latent attention; ...: leave out
INDEXED = LATENT | {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 32}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
SLIDING = ["sliding_attention", "full_attention"] * 2
OWN = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu", "kimi_linear"), LATENT),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), INDEXED),
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": LATENT
    | {
        **{"topk_method": "greedy", "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        "n_routed_experts": 4,
    },
    "falcon": {"head_dim": ...},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 128},
    "gemma3n_text": {
        **{"num_kv_shared_layers": 0, "layer_types": SLIDING, "activation_sparsity_pattern": [0.0] * 4},
        **{"intermediate_size": [128] * 4, "altup_num_inputs": 2},
    },
    "gemma4_text": {"num_kv_shared_layers": 0, "layer_types": SLIDING, "head_dim": ..., "global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8, "num_layers": 4, "num_heads": 4},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 64},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {
        **{"no_rope_layers": [1, 0, 1, 0], "moe_layers": [1, 3], "interleave_moe_layer_step": 2},
        **{"intermediate_size_mlp": 128, "attention_chunk_size": 8},
    },
    "longcat_flash": LATENT | {"num_layers": 2, "expert_ffn_hidden_size": 64, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "n_groups": 2, "chunk_size": 16},
    "mpt": {"n_heads": 4, "n_layers": 4},
    "nemotron_h": {
        **{"ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 16},
    },
    "rwkv": {"attention_hidden_size": 64},
    "smollm3": {"no_rope_layer_interval": 2},
    "stablelm": {"use_qkv_bias": False},
    "xlstm": {"v_head_dim": ..., "qk_head_dim": ..., "head_dim": ..., "num_heads": 4, "num_blocks": 4},
    "zamba": {
        **{"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1, "attention_hidden_size": 128},
        **{"attention_head_dim": 32, "num_key_value_heads": 4, "n_mamba_heads": 2, "mamba_d_state": 16},
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "chunk_size": 16},  # 256 tokens take seconds on a CPU
    "zaya": {"num_experts_per_tok": 1},
}


def build(kind: str, **changes) -> nn.Module:
    """A model of the family `kind` (a model_type), float32, evaluation mode, its norms and biases not trivial.

    Raises whatever its configuration raises, and MemoryError where the generic one leaves it too large.
    """
    config_class = CONFIG_MAPPING[kind]
    default, wanted = config_class(), {}
    for key, value in GENERIC.items():
        try:
            given = getattr(default, key)
        except AttributeError:  # not this family's; or, in Gemma 4, one for each layer
            continue
        if given is not None or key in EVEN_IF_NONE:
            wanted[key] = value
    wanted |= OWN.get(kind, {}) | changes
    config = config_class(**{key: value for key, value in wanted.items() if value is not ...})
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise MemoryError(f"{kind}: {size:,} parameters with the generic configuration")
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            last = name.rpartition(".")[2]
            if p.dim() >= 2 and p.std() < 0.05 and "A_log" not in name:  # families that begin small or at zero
                p.normal_(0, 0.2 if p.shape[-1] <= 64 else 0.15, generator=generator)
            if p.dim() == 1 and p.numel() > 1 and "A_log" not in name and "dt" not in name and last != "D":
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
            p.data = p.data.bfloat16().float()  # 16-bit numbers, as the weights of published models are
    return model
