"""The walker: what each linear layer is shown is what it receives in the network as changed so far."""

import pytest
import torch
from families import build
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from common.methods.blocks import block_linears, decoder_blocks, first_blocks, iter_linears, walk

LLAMA_STAGES = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]


class Gram:
    """XᵀX of a layer's inputs, and the number of tokens."""

    def __init__(self, in_features: int, inputs: torch.Tensor):
        assert inputs.shape[-1] == in_features
        self.matrix, self.tokens = torch.zeros(in_features, in_features, dtype=torch.float64), 0

    def add(self, inputs: torch.Tensor) -> None:
        assert inputs.dim() == 2
        self.matrix += inputs.double().T @ inputs.double()
        self.tokens += len(inputs)


def walked(model, windows, change=lambda stage, statistic: None, **options) -> dict:
    """Walk; returns {(block, name in the block): Gram} of what each linear layer was shown."""
    seen = {}

    def record(stage, statistic):
        for name in stage.linears:
            assert (stage.block_index, name) not in seen, "a layer was visited twice"
            seen[stage.block_index, name] = statistic
        change(stage, statistic)

    walk(model, windows, Gram, record, **options)
    return seen


@torch.no_grad()
def forward_inputs(model, windows) -> dict:
    """The same from hooks and one ordinary forward pass of the whole model."""
    seen, handles = {}, []
    for index, block in enumerate(decoder_blocks(model)):
        for name, linear in block_linears(block).items():
            seen[index, name] = Gram(linear.in_features, linear.weight)

            def hook(_, args, gram=seen[index, name]):
                gram.add(args[0].flatten(end_dim=-2))

            handles.append(linear.register_forward_pre_hook(hook))
    model(input_ids=windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def assert_same(seen: dict, expected: dict) -> None:
    assert seen.keys() == expected.keys()
    for key, gram in expected.items():
        assert seen[key].tokens == gram.tokens, key
        difference = (seen[key].matrix - gram.matrix).norm() / gram.matrix.norm().clamp(min=1e-9)
        assert difference < 1e-4, f"{key}: inputs differ by {difference:.2g}"


def shrink(stage, statistic) -> None:
    """A change that depends smoothly on what was seen, and is large enough to matter downstream."""
    size = statistic.matrix.diagonal() / statistic.tokens
    for linear in stage.linears.values():
        linear.weight *= (size.mean() / (size.mean() + size)).float()


# --- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 2])
def test_stages_of_llama(llama, windows, batch_size):
    visited = []
    walk(llama, windows, Gram, lambda stage, _: visited.append(stage), batch_size=batch_size)
    assert [(stage.block_index, list(stage.linears)) for stage in visited] == [
        (block, names) for block in range(3) for names in LLAMA_STAGES
    ]
    assert [stage.in_features for stage in visited[:4]] == [64, 64, 64, 128]
    for stage in visited:
        for name, linear in stage.linears.items():
            assert linear is llama.model.layers[stage.block_index].get_submodule(name)


def test_observe_makes_one_statistic_per_stage(llama, windows):
    made = []

    def observe(in_features, inputs):
        made.append((in_features, inputs.shape[-1], inputs.dtype))
        return Gram(in_features, inputs)

    walk(llama, windows, observe, lambda stage, statistic: None, batch_size=2)
    assert made == 3 * (3 * [(64, 64, torch.float32)] + [(128, 128, torch.float32)])


def test_all_at_once_costs_one_pass(llama, windows):
    """As the docstring says: one pass through a block instead of five.

    Before it a short sequence goes through three times: in the model, block by block as the proof, to find the stages.
    """
    sequences = []
    llama.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, args: sequences.append(len(args[0])))
    walk(llama, windows, Gram, lambda stage, statistic: None)
    assert sequences == [1, 1, 1, 5]
    sequences.clear()
    walk(llama, windows, Gram, lambda stage, statistic: None, batch_size=2)
    assert sequences == 3 * [1] + 5 * [2, 2, 1]
    sequences.clear()
    walk(llama, windows, Gram, lambda stage, statistic: None, batch_size=2, at_once=True)
    assert sequences == 3 * [1] + 2 * [2, 2, 1]


@pytest.mark.parametrize("batch_size", [None, 2])
def test_at_once_a_block_is_seen_as_the_blocks_before_it_became(llama, make_llama, windows, batch_size):
    """Every statistic is what one forward pass shows when the blocks before are changed and this one is not yet."""
    seen = walked(llama, windows, shrink, batch_size=batch_size, at_once=True)
    growing = make_llama()  # takes over the changed blocks one by one
    for index, block in enumerate(decoder_blocks(growing)):
        expected = {key: gram for key, gram in forward_inputs(growing, windows).items() if key[0] == index}
        assert_same({key: gram for key, gram in seen.items() if key[0] == index}, expected)
        block.load_state_dict(decoder_blocks(llama)[index].state_dict())


def test_iter_linears(llama):
    found = dict(iter_linears(llama))
    assert len(found) == 3 * 7
    assert all(llama.get_submodule(name) is linear for name, linear in found.items())
    assert "lm_head" not in found


# --- what is seen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 1, 2, 5, 100])
def test_nothing_changed_nothing_different(llama, windows, batch_size):
    expected = forward_inputs(llama, windows)
    with torch.no_grad():
        before = llama(windows).logits
    assert_same(walked(llama, windows, batch_size=batch_size), expected)
    with torch.no_grad():
        assert torch.equal(llama(windows).logits, before)


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_later_stages_see_the_change(make_llama, windows, batch_size):
    """Zeroed v: the o projection of the same block must see zeros, and everything after it the changed network."""
    model, original = make_llama(), make_llama()

    def zero(stage, _):
        if "self_attn.v_proj" in stage.linears and stage.block_index == 0:
            stage.linears["self_attn.v_proj"].weight.zero_()

    seen = walked(model, windows, zero, batch_size=batch_size)
    before = forward_inputs(original, windows)
    assert_same(seen, forward_inputs(model, windows))
    assert seen[0, "self_attn.o_proj"].matrix.abs().max() == 0
    assert (seen[0, "self_attn.q_proj"].matrix - before[0, "self_attn.q_proj"].matrix).abs().max() < 1e-3
    for key in [(0, "mlp.up_proj"), (0, "mlp.down_proj"), (1, "self_attn.q_proj"), (2, "mlp.down_proj")]:
        assert (seen[key].matrix - before[key].matrix).norm() > 0.01 * before[key].matrix.norm(), key


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_every_layer_is_changed_on_what_it_then_receives(llama, windows, batch_size):
    """All layers change. What was shown to each is nevertheless its input in the finished network."""
    seen = walked(llama, windows, shrink, batch_size=batch_size)
    assert_same(seen, forward_inputs(llama, windows))


def test_batch_size_changes_neither_statistics_nor_weights(make_llama, windows):
    models = {batch_size: make_llama() for batch_size in (None, 1, 2)}
    seen = {size: walked(model, windows, shrink, batch_size=size) for size, model in models.items()}
    for size in (1, 2):
        assert_same(seen[size], seen[None])
        for (name, ours), theirs in zip(models[size].named_parameters(), models[None].parameters(), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6), name
    changed, original = (m.model.layers[2].mlp.down_proj.weight for m in (models[None], make_llama()))
    assert not torch.allclose(changed, original)


def tiny(family: str) -> nn.Module:
    size = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 256,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    wide = size | {"intermediate_size": 64}
    grouped = wide | {"num_key_value_heads": 2}
    torch.manual_seed(0)
    match family:
        case "opt":
            model = OPTForCausalLM(OPTConfig(**size, ffn_dim=64, word_embed_proj_dim=32, init_std=0.2))
        case "bloom":  # its position bias is a tensor of [batch · heads, 1, seqlen]
            config = BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=256, initializer_range=0.2)
            model = BloomForCausalLM(config)
        case "gpt-neox":  # attention and MLP side by side, a single linear for q, k and v
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**wide))
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**grouped))
        case "mistral, sliding window":
            model = MistralForCausalLM(MistralConfig(**grouped, sliding_window=4))
        case "qwen2, sliding window in some blocks":
            config = Qwen2Config(**grouped, use_sliding_window=True, sliding_window=4, max_window_layers=1)
            assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
            model = Qwen2ForCausalLM(config)
        case "gemma3, sliding window in some blocks":  # and another rotary embedding in those
            kinds = ["sliding_attention", "sliding_attention", "full_attention"]
            config = Gemma3TextConfig(**grouped, head_dim=8, sliding_window=4, layer_types=kinds)
            model = Gemma3ForCausalLM(config)
    return model.float().eval()


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize(
    "family",
    [
        "opt",
        "bloom",
        "gpt-neox",
        "qwen2",
        "mistral, sliding window",
        "qwen2, sliding window in some blocks",
        "gemma3, sliding window in some blocks",
    ],
)
def test_other_families(family, batch_size, windows):
    model = tiny(family)
    assert_same(walked(model, windows, batch_size=batch_size), forward_inputs(model, windows))
    seen = walked(model, windows, shrink, batch_size=batch_size)
    assert_same(seen, forward_inputs(model, windows))


# --- traces left ---------------------------------------------------------------------------------------------------


def hooks_of(model) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("batch_size", [None, 2])
def test_no_hook_stays(llama, windows, batch_size):
    assert hooks_of(llama) == 0
    walk(llama, windows, Gram, lambda stage, statistic: None, batch_size=batch_size)
    assert hooks_of(llama) == 0

    def fail(stage, statistic):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walk(llama, windows, Gram, fail, batch_size=batch_size)
    assert hooks_of(llama) == 0


def test_blocks_go_to_the_device_one_at_a_time_and_come_back(llama, windows, monkeypatch):
    """`cpu:0` is the CPU under another name: it shows what is moved where on a machine without a GPU."""
    moves, names = [], {block: index for index, block in enumerate(llama.model.layers)}
    monkeypatch.setattr(LlamaDecoderLayer, "to", lambda self, device: moves.append((names[self], str(device))))
    walk(llama, windows, Gram, lambda stage, statistic: None, device="cpu:0")
    assert moves == [(0, "cpu:0"), (0, "cpu"), (1, "cpu:0"), (1, "cpu"), (2, "cpu:0"), (2, "cpu")]


@pytest.mark.gpu
@pytest.mark.parametrize("store", [None, "cpu"])
def test_home_is_restored_on_a_gpu(make_llama, windows, store):
    model, devices = make_llama(), set()

    def where(stage, statistic):
        devices.update(linear.weight.device.type for linear in stage.linears.values())

    class Seen(Gram):
        def add(self, inputs):
            assert inputs.is_cuda
            super().add(inputs.cpu())

    walk(model, windows, Seen, where, device="cuda", store=store, batch_size=2)
    assert devices == {"cuda"}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_gradients_are_not_kept(llama, windows):
    def check(stage, statistic):
        assert not torch.is_grad_enabled()

    walk(llama, windows, Gram, check)
    assert torch.is_grad_enabled()


# --- refusals ------------------------------------------------------------------------------------------------------


def test_a_model_without_linear_layers(windows):
    model = tiny("opt")
    for block in decoder_blocks(model):
        for name in block_linears(block):
            owner, _, attribute = name.rpartition(".")
            setattr(block.get_submodule(owner), attribute, nn.Identity())
    with pytest.raises(ValueError, match=r"no torch\.nn\.Linear"):
        walk(model, windows, Gram, lambda stage, statistic: None)
    with pytest.raises(ValueError, match=r"no torch\.nn\.Linear"):
        list(iter_linears(model))


def test_a_model_without_blocks(llama, windows):
    llama.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="LlamaForCausalLM has no list of 7 decoder blocks"):
        walk(llama, windows, Gram, lambda stage, statistic: None)


@pytest.mark.parametrize("shape", [(0, 16), (16,), (1, 2, 16)])
def test_windows_of_no_use(llama, shape):
    with pytest.raises(ValueError, match="Calibration windows"):
        walk(llama, torch.zeros(shape, dtype=torch.long), Gram, lambda stage, statistic: None)


def test_first_blocks_are_a_model_that_ends_there(llama, windows):
    study = first_blocks(llama, 2)
    with torch.no_grad():
        states = llama(windows, output_hidden_states=True).hidden_states
        torch.testing.assert_close(study(windows).logits, llama.lm_head(llama.model.norm(states[2])))
    assert study.config.num_hidden_layers == len(decoder_blocks(study)) == 2
    assert llama.config.num_hidden_layers == len(decoder_blocks(llama)) == 3
    decoder_blocks(study)[0].mlp.up_proj.weight.data.zero_()
    assert llama.model.layers[0].mlp.up_proj.weight.any()  # a copy


@pytest.mark.parametrize("kind", ["qwen3", "smollm3", "llama4_text", "deepseek_v3", "gpt_neo"])
def test_first_blocks_can_be_saved_where_the_config_lists_every_block(kind, tmp_path):
    """Kinds of attention, layers without rotary positions, layers with experts, a count of dense ones, periods."""
    model, ids = build(kind), torch.arange(3, 23)[None]
    study = first_blocks(model, 3)
    study.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert len(decoder_blocks(again)) == 3 and len(decoder_blocks(model)) == model.config.num_hidden_layers == 4
    assert torch.equal(again(ids, use_cache=False).logits, study(ids, use_cache=False).logits)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_calibration_is_without_dropout(make_llama, windows, batch_size):
    model = make_llama(attention_dropout=0.5).train()
    seen = walked(model, windows, batch_size=batch_size)
    assert_same(seen, forward_inputs(model.eval(), windows))


def test_a_model_that_fails_before_its_blocks_is_left_as_it_was(llama, windows):
    def fail(*_):
        raise MemoryError

    handle = llama.model.embed_tokens.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        walk(llama, windows, Gram, lambda stage, statistic: None)
    handle.remove()
    assert not [block for block in llama.model.layers if "forward" in vars(block)]


# --- what blocks are called with -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("kind", ["xglm", "bamba", "gptj", "gemma3n_text", "rwkv"])
def test_positional_arguments_and_tuples(kind, batch_size, windows):
    """A mask by position (XGLM, Gemma 3n), a tuple returned (Bamba, GPT-J, RWKV)."""
    model = build(kind)
    shown = walked(model, windows, batch_size=batch_size)
    expected = forward_inputs(model, windows)
    assert_same({key: shown[key] for key in expected}, expected)


def test_a_later_token_does_not_reach_an_earlier_one(windows):
    """XGLM's causal mask arrives by position: without it, calibration would look ahead."""
    other, seen = windows.clone(), []
    other[:, -1] = (other[:, -1] + 1) % 250
    for each in (windows, other):
        inputs = {}

        class Keep(Gram):
            def add(self, x):
                self.x = x.clone()

        walk(build("xglm"), each, Keep, lambda stage, kept, inputs=inputs: inputs.update({str(stage.linears): kept.x}))
        seen.append(list(inputs.values()))
    for one, two in zip(*seen, strict=True):
        before_last = [x.view(5, 16, -1)[:, :-1] for x in (one, two)]
        torch.testing.assert_close(*before_last, rtol=1e-4, atol=1e-4)


def test_blocks_that_hand_on_more_than_hidden_states_are_refused_before_the_first_change(windows):
    model = build("zaya")
    with pytest.raises(ValueError, match="ZayaForCausalLM cannot be walked: block 1"):
        walk(model, windows, Gram, lambda stage, statistic: pytest.fail("changed something"))


def test_a_block_that_computes_something_else_on_its_own_is_refused(llama, windows):
    counted = []

    def drift(*_):
        counted.append(1)
        return torch.ones(()) * len(counted)

    llama.model.layers[1].mlp.register_forward_hook(lambda _, __, out: out * drift())
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be walked: block 1"):
        walk(llama, windows, Gram, lambda stage, statistic: pytest.fail("changed something"))
