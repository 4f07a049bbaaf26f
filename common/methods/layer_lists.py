"""What a configuration says of each layer, cut to the layers that stay.

Families say it in four ways: a list with an entry per layer, a list of layer numbers, a count of first layers, a
period with an offset. Whether the result describes the smaller model, `common.methods.proofs` tells.
"""

# Lists that may happen to be as long as the model is deep, but say nothing of its layers.
NOT_OF_LAYERS = ("token", "limit", "multiplier", "factor", "architectures")
LAYER_NUMBERS = {"moe_layers", "mlp_only_layers", "attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids"}
FIRST_LAYERS = {"first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index"}


def keep_layers(config, kept: list[int]) -> None:
    """Change a text model's configuration so that it describes the layers `kept` only, which are numbered anew."""
    layers, place = config.num_hidden_layers, {old: new for new, old in enumerate(kept)}
    changes = {}
    for name, value in vars(config).items():
        if name in LAYER_NUMBERS and value is not None:
            changes[name] = [place[index] for index in value if index in place]
        elif name in FIRST_LAYERS and value is not None:
            changes[name] = sum(index < value for index in kept)
        elif name == "moe_layer_end_index" and value >= 0:  # Ernie: the last one with experts; -1 is the last of all
            changes[name] = sum(index <= value for index in kept) - 1
        elif any(word in name for word in NOT_OF_LAYERS):
            continue
        elif isinstance(value, list | tuple) and len(value) == layers:
            changes[name] = type(value)(value[index] for index in kept)
        elif name.endswith("_layer_period"):
            offset = name.replace("_period", "_offset")
            changes[name], changes[offset] = _period([i % value == getattr(config, offset) for i in kept])
    if getattr(config, "decoder_sparse_step", 1) > 1:  # Qwen's experts: in every so many layers, but for some
        dense = [i in config.mlp_only_layers or (i + 1) % config.decoder_sparse_step for i in kept]
        changes["decoder_sparse_step"] = 1
        changes["mlp_only_layers"] = [new for new, is_dense in enumerate(dense) if is_dense]
    if "attention_layers" in changes:  # GPT-Neo writes kinds and how often they are repeated
        changes["attention_types"] = [[[kind], 1] for kind in changes["attention_layers"]]
    config.num_hidden_layers = len(kept)
    for name, value in changes.items():
        setattr(config, name, value)


def _period(pattern: list[bool]) -> tuple[int, int]:
    """The smallest period and its offset that give this pattern; the closest thing (none) where no period does."""
    for period in range(1, len(pattern) + 1):
        for offset in range(period):
            if [i % period == offset for i in range(len(pattern))] == pattern:
                return period, offset
    return len(pattern) + 1, len(pattern)
