"""Distillation: losses against independent references, soft labels on disk, the student, the teacher's text."""

import copy
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from common.methods import head_loss as head_loss_module
from common.methods import soft_labels
from common.methods.distillation import (
    check_tokenizers,
    contiguous,
    distillation_loss,
    evenly_spaced,
    kd_loss,
    last_relations,
    minilm_loss,
    most_influential,
    narrow_student,
    student_from_teacher,
    top_k_kd_loss,
)
from common.methods.head_loss import cross_entropy_and_gradient, head_loss, kd_and_gradient, top_k_kd_and_gradient
from common.methods.output_head import OutputHead
from common.methods.soft_labels import fingerprint, load_soft_labels, make_soft_labels, top_k_and_tail
from common.methods.writing import chat_windows, continuations

shapes = st.tuples(st.integers(1, 5), st.integers(3, 40))
temperatures = st.floats(0.5, 8)
seeds = st.integers(0, 10_000)


def random_logits(shape, seed, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(shape, generator=generator) for _ in range(2))


def softmax64(logits, temperature):
    z = logits.double().numpy() / temperature
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference(student, teacher, labels, alpha, temperature):
    """Value and gradient of α·CE + (1-α)·T²·KL in float64 NumPy, summed over tokens, from the textbook formulas."""
    q1, q, p = softmax64(student, 1.0), softmax64(student, temperature), softmax64(teacher, temperature)
    hot = np.eye(student.shape[-1])[labels.numpy()]
    value = -alpha * np.log((q1 * hot).sum(-1)).sum() + (1 - alpha) * temperature**2 * (p * np.log(p / q)).sum()
    return value, alpha * (q1 - hot) + (1 - alpha) * temperature * (q - p)


@given(shape=shapes, temperature=temperatures, alpha=st.floats(0, 1), seed=seeds)
def test_loss_and_gradient_equal_an_independent_float64_implementation(shape, temperature, alpha, seed):
    student, teacher = (logits.double() for logits in random_logits(shape, seed))
    labels = torch.randint(shape[1], shape[:1], generator=torch.Generator().manual_seed(seed))
    student.requires_grad_()
    hard = F.cross_entropy(student, labels, reduction="sum")
    loss = distillation_loss(hard, kd_loss(student, teacher, temperature), alpha)
    loss.backward()
    value, gradient = reference(student.detach(), teacher, labels, alpha, temperature)
    np.testing.assert_allclose(loss.item(), value, rtol=1e-5)
    np.testing.assert_allclose(student.grad.numpy(), gradient, rtol=1e-5, atol=1e-12)


@given(shape=shapes, temperature=temperatures, seed=seeds)
def test_float32_loss_is_the_same_up_to_its_precision(shape, temperature, seed):
    student, teacher = random_logits(shape, seed)
    value, _ = reference(student, teacher, torch.zeros(len(student)).long(), 0.0, temperature)
    assert kd_loss(student, teacher, temperature).item() == pytest.approx(value, rel=1e-5, abs=1e-4)
    half = kd_loss(student.bfloat16(), teacher.bfloat16(), temperature)
    assert half.dtype == torch.float32  # sums over a vocabulary need it


@given(shape=shapes, temperature=temperatures, seed=seeds)
def test_top_k_and_tail_is_a_lower_bound_that_tightens_with_k(shape, temperature, seed):
    """Data-processing inequality: merging outcomes cannot add divergence, merging fewer cannot lower it."""
    student, teacher = random_logits(shape, seed)
    full = kd_loss(student, teacher, temperature).item()
    bounds = [
        top_k_kd_loss(student, *top_k_and_tail(teacher, k, temperature), temperature).item() for k in range(1, shape[1])
    ]
    slack = 1e-4 + 1e-4 * abs(full)
    assert all(a <= b + slack for a, b in zip([0.0, *bounds], [*bounds, full], strict=True))
    assert bounds[-1] == pytest.approx(full, rel=1e-3, abs=1e-3)  # only one token is left in the tail


@given(shape=shapes, temperature=temperatures, seed=seeds)
def test_gradient_of_the_top_k_loss_is_autograds(shape, temperature, seed):
    student, teacher = (logits.double().requires_grad_() for logits in random_logits(shape, seed))
    ids, log_probs = top_k_and_tail(teacher.detach(), 2, temperature)
    log_probs = log_probs.double().log_softmax(-1)
    (ours,) = torch.autograd.grad(top_k_kd_loss(student, ids, log_probs, temperature), student)
    q, p = (student / temperature).softmax(-1), log_probs.exp()
    top = q.gather(-1, ids)
    merged = torch.cat((top, q.scatter(-1, ids, 0).sum(-1, keepdim=True)), dim=-1)
    (expected,) = torch.autograd.grad(temperature**2 * (p * (p / merged).log()).sum(), student)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-9)


def test_top_k_loss_by_hand():
    """Four tokens, k = 1: outcomes are "the first" and "any other"."""
    teacher, student = torch.tensor([[math.log(5.0), 0.0, 0.0, 0.0]]), torch.zeros(1, 4)
    loss = top_k_kd_loss(student, *top_k_and_tail(teacher, 1, 1.0), 1.0)
    assert loss.item() == pytest.approx(5 / 8 * math.log(5 / 8 / (1 / 4)) + 3 / 8 * math.log(3 / 8 / (3 / 4)), rel=1e-5)


def test_top_k_loss_survives_a_student_that_is_almost_certain():
    """The tail's probability underflows as 1 - Σ, not as its own log-sum."""
    student = torch.tensor([[40.0, 0.0, 0.0, -5.0]], requires_grad=True)
    loss = top_k_kd_loss(student, torch.tensor([[0]]), torch.tensor([[0.25, 0.75]]).log(), 1.0)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
    log_tail = math.log(2 + math.exp(-5)) - 40
    assert loss.item() == pytest.approx(0.25 * math.log(0.25) + 0.75 * (math.log(0.75) - log_tail), rel=1e-5)


def test_alpha_1_is_cross_entropy_and_identical_models_have_no_divergence():
    student, teacher = random_logits((6, 11), 0)
    labels = torch.arange(6)
    hard = F.cross_entropy(student, labels, reduction="sum")
    torch.testing.assert_close(distillation_loss(hard, kd_loss(student, teacher, 1.0), 1.0), hard)
    assert kd_loss(teacher, teacher, 2.0).item() == pytest.approx(0, abs=1e-5)


def test_one_hot_teacher_at_temperature_1_is_cross_entropy():
    student, _ = random_logits((6, 11), 1)
    labels = torch.arange(6)
    certain = torch.full((6, 11), -1e4)
    certain[torch.arange(6), labels] = 1e4
    torch.testing.assert_close(kd_loss(student, certain, 1.0), F.cross_entropy(student, labels, reduction="sum"))


@pytest.mark.parametrize("temperature", [10.0, 30.0])
def test_temperature_squared_keeps_gradients_at_one_scale(temperature):
    """Hinton's argument: at high T the gradient tends to (z - v)/V, centered, whatever T."""
    student, teacher = random_logits((1, 20), 3, scale=1.0)
    student.requires_grad_()
    kd_loss(student, teacher, temperature).backward()
    center = lambda z: z - z.mean(-1, keepdim=True)  # noqa: E731
    expected = (center(student.detach()) - center(teacher)) / 20
    assert (student.grad - expected).norm() < 0.35 * expected.norm()
    without = student.grad / temperature**2
    assert without.norm() < 0.02 * expected.norm()


def gradients_by_autograd(student, teacher, labels, temperature):
    """name → (loss and gradient as the trainer computes them, the loss as it is defined, further arguments)."""
    ids, log_probs = top_k_and_tail(teacher, 2, temperature)
    log_probs = log_probs.to(torch.promote_types(student.dtype, torch.float32)).log_softmax(-1)
    return {
        "ce": (cross_entropy_and_gradient, lambda z, y: F.cross_entropy(z, y, reduction="sum"), (labels,)),
        "kd": (kd_and_gradient, kd_loss, (teacher, temperature)),
        "top-k": (top_k_kd_and_gradient, top_k_kd_loss, (ids, log_probs, temperature)),
    }


@given(shape=shapes, temperature=temperatures, seed=seeds)
def test_closed_gradients_are_those_of_the_definitions(shape, temperature, seed):
    student, teacher = (logits.double() for logits in random_logits(shape, seed))
    labels = torch.randint(shape[1], shape[:1], generator=torch.Generator().manual_seed(seed))
    for fast, definition, others in gradients_by_autograd(student, teacher, labels, temperature).values():
        loss, gradient = fast(student.clone(), *others)
        z = student.clone().requires_grad_()
        expected = definition(z, *others)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["ce", "kd", "top-k"])
def test_closed_gradients_leave_their_inputs_alone_and_take_16_bits(name):
    student, teacher = (logits.bfloat16() for logits in random_logits((5, 40), 2))
    before = student.clone()
    # 3: bfloat16 holds a half of any of its numbers exactly, a third of hardly one
    fast, definition, others = gradients_by_autograd(student, teacher, torch.arange(5), 3.0)[name]
    loss, gradient = fast(student, *others)
    assert torch.equal(student, before)
    assert gradient.dtype == loss.dtype == torch.float32
    exact = [other.float() if other is teacher else other for other in others]
    torch.testing.assert_close(loss, definition(student.float(), *exact), rtol=1e-5, atol=1e-5)


def test_closed_top_k_gradient_survives_a_student_that_is_almost_certain():
    labels = torch.tensor([[0]]), torch.tensor([[0.25, 0.75]]).log()
    for certainty in (40.0, 1e4):  # the tail's probability is tiny, then zero
        loss, gradient = top_k_kd_and_gradient(torch.tensor([[certainty, 0.0, 0.0, -5.0]]), *labels, 1.0)
        assert loss.isfinite() and gradient.isfinite().all()
        assert gradient[0, 0] == pytest.approx(0.75)


@pytest.mark.parametrize("chunk", [3, 10, 64])
def test_head_loss_is_the_loss_of_the_logits_whatever_the_chunk(monkeypatch, chunk):
    hidden, weight = torch.randn(10, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    labels = torch.randint(7, (10,))
    expected = F.cross_entropy(hidden @ weight.T, labels)
    monkeypatch.setattr(head_loss_module, "CHUNK", chunk)
    loss = head_loss(hidden, OutputHead(weight), cross_entropy_and_gradient, labels) / 10
    torch.testing.assert_close(loss, expected)
    for a, b in zip(*(torch.autograd.grad(one, (hidden, weight)) for one in (loss, expected)), strict=True):
        torch.testing.assert_close(a, b)


# MiniLM


def test_minilm_is_zero_for_equals_works_across_widths_and_wants_equal_heads(make_llama, windows):
    def relations(model):
        return last_relations(model, model(input_ids=windows, output_hidden_states=True).hidden_states[-2])

    teacher = make_llama()
    assert minilm_loss(relations(teacher), relations(teacher)).item() == pytest.approx(0, abs=1e-6)
    narrow = make_llama(hidden_size=32, num_hidden_layers=2)
    loss = minilm_loss(relations(narrow), tuple(r.detach() for r in relations(teacher)))
    loss.backward()
    assert loss.item() > 0
    assert decoder_gradients_finite(narrow)
    with pytest.raises(ValueError, match="heads one to one: the student has 2, the teacher 4"):
        minilm_loss(relations(make_llama(num_attention_heads=2)), relations(teacher))


def decoder_gradients_finite(model):
    return all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# The student


def test_the_most_influential_blocks_stay_in_order():
    assert most_influential([0.5, 0.2, 0.0, 0.9], 3) == [0, 1, 3]


@given(blocks=st.integers(1, 60), data=st.data())
def test_evenly_spaced_blocks_are_distinct_and_keep_both_ends(blocks, data):
    keep = data.draw(st.integers(1, blocks))
    chosen = evenly_spaced(blocks, keep)
    assert len(set(chosen)) == keep and chosen == sorted(chosen)
    assert chosen[0] == 0 and (keep == 1 or chosen[-1] == blocks - 1)
    gaps = [after - before for before, after in pairwise(chosen)]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_a_contiguous_cut_leaves_the_first_blocks_and_the_last():
    assert contiguous(8, 4) == [0, 1, 2, 7]
    assert contiguous(8, 1) == [7]


def test_a_narrow_student_is_its_teacher_on_some_channels(make_llama, windows):
    """Whole, it computes the same; narrower, its attention still has the teacher's heads and can be compared."""
    llama = make_llama(tie_word_embeddings=False)
    same, narrow = narrow_student(llama, 64), narrow_student(llama, 40)
    with torch.no_grad():
        torch.testing.assert_close(same(input_ids=windows).logits, llama(input_ids=windows).logits)
        states = narrow(input_ids=windows, output_hidden_states=True).hidden_states
    assert states[-1].shape[-1] == 40
    kept = llama.get_input_embeddings().weight.var(0).topk(40).indices.sort().values
    for name in ("self_attn.o_proj", "mlp.down_proj"):  # what writes to the hidden states lost rows
        ours, theirs = (m.get_submodule(f"model.layers.1.{name}").weight for m in (narrow, llama))
        assert torch.equal(ours, theirs[kept]), name
    for name in ("self_attn.q_proj", "mlp.up_proj"):  # and what reads them columns
        ours, theirs = (m.get_submodule(f"model.layers.1.{name}").weight for m in (narrow, llama))
        assert torch.equal(ours, theirs[:, kept]), name
    assert minilm_loss(last_relations(narrow, states[-2]), last_relations(narrow, states[-2])).item() == 0
    with pytest.raises(ValueError, match="between 1 and the teacher's 64, got 65"):
        narrow_student(llama, 65)


def test_student_computes_what_the_teacher_without_those_blocks_computes(llama, windows):
    student = student_from_teacher(llama, [0, 2])
    expected = copy.deepcopy(llama)
    del expected.model.layers[1]
    expected.config.num_hidden_layers = 2
    ours, theirs = (model(input_ids=windows, use_cache=False).logits for model in (student, expected))
    torch.testing.assert_close(ours, theirs)
    assert student.config.num_hidden_layers == 2 and llama.config.num_hidden_layers == 3
    student.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert llama.model.layers[0].mlp.up_proj.weight.abs().sum() > 0  # a copy, not a view


def test_student_of_no_or_unknown_blocks_is_refused(llama):
    for keep in ([], [0, 3]):
        with pytest.raises(ValueError, match="blocks from 0 to 2"):
            student_from_teacher(llama, keep)


def test_other_tokenizer_is_refused(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["compression"])
    check_tokenizers(tokenizer, copy.deepcopy(tokenizer))
    with pytest.raises(ValueError, match=r"different tokenizers \(1 tokens differ"):
        check_tokenizers(tokenizer, other)


def test_continuations_keep_their_prompts_fill_windows_and_repeat(llama, windows):
    written = continuations(llama, windows[:, :4], 12, batch_size=2, seed=3)
    assert written.shape == (5, 12)
    assert torch.equal(written[:, :4], windows[:, :4])
    assert torch.equal(written, continuations(llama, windows[:, :4], 12, batch_size=2, seed=3))
    assert not torch.equal(written, continuations(llama, windows[:, :4], 12, batch_size=2, seed=4))


# Soft labels on disk


def make(folder, llama, tokenizer, windows, **changes):
    return make_soft_labels(
        folder, llama, tokenizer, windows, **{"k": 8, "temperature": 1.0, "batch_size": 2} | changes
    )


def test_soft_labels_are_the_teachers_distributions(tmp_path, llama, tokenizer, windows):
    made = make(tmp_path, llama, tokenizer, windows, temperature=2.0)
    ids, log_probs = made.batch([3, 1])
    logits = llama(input_ids=windows[[3, 1]]).logits[:, :-1]
    expected_ids, expected = top_k_and_tail(logits, 8, 2.0)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(log_probs, expected, rtol=2e-3, atol=2e-3)  # float16
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 15))
    assert made.bytes_per_token == 2 * 8 + 2 * 9
    assert isinstance(made.ids, np.memmap)


def test_interrupted_labelling_goes_on_where_it_stopped(tmp_path, llama, tokenizer, windows, monkeypatch):
    whole = make(tmp_path / "whole", llama, tokenizer, windows)
    seen, forward = [], llama.forward

    def interrupted(input_ids, **kwargs):
        seen.append(len(input_ids))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(llama, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "part", llama, tokenizer, windows)
    with pytest.raises(ValueError, match="Only 2 of 5 windows have soft labels"):
        load_soft_labels(tmp_path / "part", fingerprint(llama, tokenizer, windows))
    resumed = make(tmp_path / "part", llama, tokenizer, windows)
    assert seen == [2, 2, 2, 1]  # the first two windows were not done again
    assert np.array_equal(resumed.ids, whole.ids) and np.array_equal(resumed.log_probs, whole.log_probs)


def test_labels_of_another_teacher_tokenizer_or_text_are_refused(tmp_path, llama, make_llama, tokenizer, windows):
    make(tmp_path, llama, tokenizer, windows)
    load_soft_labels(tmp_path, fingerprint(llama, tokenizer, windows))
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["x1"])
    for expected, word in (
        (fingerprint(make_llama(seed=1), tokenizer, windows), "teacher"),
        (fingerprint(llama, longer, windows), "tokenizer"),
        (fingerprint(llama, tokenizer, windows.flip(0)), "windows"),
    ):
        with pytest.raises(ValueError, match=f"made from another {word}. Run notebook 02-Prepare_Data again"):
            load_soft_labels(tmp_path, expected, made_by="02-Prepare_Data")


def test_labels_are_made_anew_when_the_teacher_changed(tmp_path, llama, make_llama, tokenizer, windows):
    make(tmp_path, llama, tokenizer, windows)
    other = make_llama(seed=1)
    remade = make(tmp_path, other, tokenizer, windows)
    expected, _ = top_k_and_tail(other(input_ids=windows[:1]).logits[:, :-1], 8, 1.0)
    assert torch.equal(remade.batch([0])[0], expected)


def test_missing_labels_name_the_notebook(tmp_path):
    with pytest.raises(FileNotFoundError, match="Run notebook 02-Prepare_Data again"):
        load_soft_labels(tmp_path / "none", {}, made_by="02-Prepare_Data")


def test_empty_dataset_and_impossible_k_are_refused(tmp_path, llama, tokenizer, windows):
    with pytest.raises(ValueError, match="the dataset is empty"):
        make(tmp_path, llama, tokenizer, windows[:0])
    with pytest.raises(ValueError, match="top_k must lie between 1 and 255, got 256"):
        make(tmp_path, llama, tokenizer, windows, k=256)


def test_full_disk_is_said_before_the_work(tmp_path, llama, tokenizer, windows, monkeypatch):
    usage = soft_labels.shutil._ntuple_diskusage(10, 10, 0)
    monkeypatch.setattr(soft_labels.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="lower top_k"):
        make(tmp_path, llama, tokenizer, windows)


def test_relations_are_the_models_own_attention_and_that_of_its_values(make_llama, windows):
    model = make_llama()
    model.set_attn_implementation("eager")
    out = model(input_ids=windows, output_hidden_states=True, output_attentions=True)
    attention, values = last_relations(model, out.hidden_states[-2])
    torch.testing.assert_close(attention.exp(), out.attentions[-1], rtol=1e-4, atol=1e-5)
    block = model.model.layers[-1]
    v = block.self_attn.v_proj(block.input_layernorm(out.hidden_states[-2]))
    v = v.view(5, 16, 2, 16).transpose(1, 2).repeat_interleave(2, dim=1)  # two heads of values for four of queries
    scores = (v @ v.transpose(-1, -2) / 4).masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(values.exp(), scores.softmax(-1), rtol=1e-4, atol=1e-5)


def test_minilm_loss_is_both_divergences_per_head_and_token():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        tuple(torch.randn(2, 3, 5, 5, generator=generator).log_softmax(-1) for _ in range(2)) for _ in range(2)
    )
    expected = sum((p.exp() * (p - q)).sum(-1).mean() for q, p in zip(student, teacher, strict=True))
    torch.testing.assert_close(minilm_loss(student, teacher), expected)


def test_continuations_are_drawn_from_the_whole_vocabulary_at_their_temperature_and_never_end_early(llama, windows):
    prompts = windows[:, :4]
    greedy = llama.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, do_sample=False)
    assert torch.equal(continuations(llama, prompts, 12, batch_size=2, temperature=1e-5), greedy)
    llama.lm_head.weight.data.zero_()  # every token is as likely as any other
    llama.generation_config.eos_token_id = list(range(100))
    llama.generation_config.top_k, llama.generation_config.top_p = 20, 0.5  # as published chat models ask for
    written = continuations(llama, prompts, 68, batch_size=5)[:, 4:]
    assert written.min() >= 100
    assert len(written.unique()) > 100  # of 156, in 320 draws


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


def test_chats_are_what_the_teacher_read_and_wrote_and_end_where_it_ended_them(llama, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT
    questions = ["short?", "a question that is longer?", "and one more?"]
    llama.generation_config.eos_token_id = [7, 9]
    with torch.no_grad():  # both ends are likely: most answers are cut
        llama.get_output_embeddings().weight[7].mul_(3)
    chats = chat_windows(llama, tokenizer, questions, 8, max_new_tokens=40, batch_size=2, seed=1)
    assert chats.shape[1] == 8
    assert torch.equal(chats, chat_windows(llama, tokenizer, questions, 8, max_new_tokens=40, batch_size=2, seed=1))
    stream = chats.flatten().tolist()  # the last few tokens did not fill a window
    prompts = [tokenizer(f"<user>{q}<answer>", add_special_tokens=False).input_ids for q in questions]
    starts = [[i for i in range(len(stream)) if stream[i : i + len(p)] == p] for p in prompts[:2]]
    assert [len(found) for found in starts] == [1, 1]
    assert starts[0] == [0]
    answer = stream[len(prompts[0]) : starts[1][0]]
    assert not {7, 9} & set(answer[:-1])
    assert answer[-1] in {7, 9} or len(answer) == 40
    with pytest.raises(ValueError, match="less than a window of 4096"):
        chat_windows(llama, tokenizer, questions, 4096, max_new_tokens=2, batch_size=2)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        chat_windows(llama, tokenizer, questions, 8, max_new_tokens=2, batch_size=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_student_is_trained_in_float32_also_of_a_frozen_teacher_in_16_bits(llama, dtype):
    student = student_from_teacher(llama.to(dtype).requires_grad_(False), [0, 2])
    assert {(p.dtype, p.requires_grad) for p in student.parameters()} == {(torch.float32, True)}
    assert {(p.dtype, p.requires_grad) for p in llama.parameters()} == {(dtype, False)}


class Swapped:
    """A tokenizer of the same tokens, two of which have each other's ids."""

    def __init__(self, tokenizer):
        self.vocabulary = tokenizer.get_vocab()

    def get_vocab(self):
        a, b = list(self.vocabulary)[:2]
        return self.vocabulary | {a: self.vocabulary[b], b: self.vocabulary[a]}


def test_same_tokens_with_other_ids_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"different tokenizers \(2 tokens differ"):
        check_tokenizers(tokenizer, Swapped(tokenizer))


def test_head_gradients_of_16_bits_are_summed_in_float32(monkeypatch):
    """Over hundreds of chunks a sum in bfloat16 would stop growing."""
    generator = torch.Generator().manual_seed(0)
    hidden = (1 + 0.1 * torch.randn(2000, 4, generator=generator)).bfloat16()
    weight = torch.zeros(7, 4).bfloat16().requires_grad_()
    monkeypatch.setattr(head_loss_module, "CHUNK", 2)
    labels = torch.zeros(2000, dtype=torch.long)
    (gradient,) = torch.autograd.grad(head_loss(hidden, OutputHead(weight), cross_entropy_and_gradient, labels), weight)
    expected = (1 / 7 - torch.eye(7)[labels]).T.bfloat16().float() @ hidden.float()
    torch.testing.assert_close(gradient.float(), expected, rtol=1e-2, atol=0)


def test_a_large_vocabularys_ids_are_kept_whole(tmp_path, make_llama, tokenizer, windows):
    """uint16 ends at 65,535; Llama 3 has twice as many tokens."""
    teacher = make_llama(vocab_size=70_000, num_hidden_layers=1, hidden_size=32)
    large = copy.deepcopy(tokenizer)
    large.add_tokens([f"<{number}>" for number in range(70_000 - 256)])
    made = make(tmp_path, teacher, large, windows[:1])
    expected, _ = top_k_and_tail(teacher(input_ids=windows[:1]).logits[:, :-1], 8, 1.0)
    assert expected.max() > 65_535
    assert torch.equal(made.batch([0])[0], expected)
    assert made.bytes_per_token == 4 * 8 + 2 * 9


@pytest.mark.parametrize("change", [{"k": 4}, {"temperature": 2.0}])
def test_labels_are_made_anew_at_another_k_or_temperature(tmp_path, llama, tokenizer, windows, change):
    make(tmp_path, llama, tokenizer, windows)
    remade = make(tmp_path, llama, tokenizer, windows, **change)
    ids, log_probs = remade.batch([0])
    expected_ids, expected = top_k_and_tail(
        llama(input_ids=windows[:1]).logits[:, :-1], change.get("k", 8), change.get("temperature", 1.0)
    )
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(log_probs, expected, rtol=2e-3, atol=2e-3)
    assert remade.temperature == change.get("temperature", 1.0)


def test_windows_count_as_done_only_when_they_are_written(tmp_path, llama, tokenizer, windows, monkeypatch):
    whole, rows = make(tmp_path / "whole", llama, tokenizer, windows), []

    def interrupted(*args):
        rows.append(1)
        if len(rows) == 4:
            raise KeyboardInterrupt
        return top_k_and_tail(*args)

    monkeypatch.setattr(soft_labels, "top_k_and_tail", interrupted)
    with pytest.raises(KeyboardInterrupt):  # at the second window of the second batch
        make(tmp_path / "part", llama, tokenizer, windows)
    with pytest.raises(ValueError, match="Only 2 of 5 windows"):
        load_soft_labels(tmp_path / "part", {})
    resumed = make(tmp_path / "part", llama, tokenizer, windows)
    assert np.array_equal(resumed.log_probs, whole.log_probs)


def test_killed_while_noting_progress_labelling_can_still_be_resumed(tmp_path, llama, tokenizer, windows, monkeypatch):
    write, calls = Path.write_text, []

    def half(path, text, **options):
        calls.append(path)
        if len(calls) == 2:
            write(path, text[: len(text) // 2], **options)
            raise KeyboardInterrupt
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, llama, tokenizer, windows)
    with pytest.raises(ValueError, match="Only 2 of 5 windows"):
        load_soft_labels(tmp_path, fingerprint(llama, tokenizer, windows))
    assert len(make(tmp_path, llama, tokenizer, windows).ids) == 5


@pytest.mark.parametrize(("missing", "fits"), [(0, True), (1, False)])
def test_the_disk_must_hold_all_labels(tmp_path, llama, tokenizer, windows, monkeypatch, missing, fits):
    needed = 5 * 15 * (2 * 8 + 2 * 9)
    usage = soft_labels.shutil._ntuple_diskusage(10**9, 0, needed - missing)
    monkeypatch.setattr(soft_labels.shutil, "disk_usage", lambda _: usage)
    if fits:
        made = make(tmp_path, llama, tokenizer, windows)
        assert sum(file.stat().st_size for file in tmp_path.glob("*.bin")) == needed == made.bytes_per_token * 75
    else:
        with pytest.raises(OSError, match="lower top_k"):
            make(tmp_path, llama, tokenizer, windows)


def test_labels_that_lack_one_window_are_unfinished(tmp_path, llama, tokenizer, windows, monkeypatch):
    forward = llama.forward

    def interrupted(input_ids, **kwargs):
        if len(input_ids) == 1:  # the last batch
            raise KeyboardInterrupt
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(llama, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, llama, tokenizer, windows)
    with pytest.raises(ValueError, match="Only 4 of 5 windows"):
        load_soft_labels(tmp_path, fingerprint(llama, tokenizer, windows))


def test_a_fingerprint_sees_ids_and_names(llama, tokenizer, windows):
    ours, swapped = fingerprint(llama, tokenizer, windows), fingerprint(llama, Swapped(tokenizer), windows)
    assert [name for name in ours if ours[name] != swapped[name]] == ["tokenizer"]
