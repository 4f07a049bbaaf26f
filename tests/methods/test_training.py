"""The Trainer: its loss, resuming after a kill, stopping at NaN, errors a student can meet."""

import copy
import json
import multiprocessing
import os
import signal

import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager
from test_families_distillation import SIZES
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from common.measure.evaluation import Baseline, evaluate
from common.methods.distillation import (
    kd_loss,
    last_relations,
    minilm_loss,
    narrow_student,
    student_from_teacher,
    top_k_kd_loss,
)
from common.methods.head_loss import DIVERGENCES
from common.methods.soft_labels import make_soft_labels
from common.methods.training import (
    DistillationTrainer,
    Objective,
    WindowDataset,
    history,
    make_optimizer,
    save_student,
    training_arguments,
)

STEPS = 8


@pytest.fixture
def text():
    return torch.randint(256, (12, 16), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def labels(tmp_path, llama, tokenizer, text):
    return make_soft_labels(tmp_path / "soft", llama, tokenizer, text, k=16, temperature=1.0, batch_size=4)


def arguments(folder, **changes):
    values = {"name": "test", "steps": STEPS, "batch_size": 4, "learning_rate": 1e-2, "seed": 0, "evaluations": 0}
    made = training_arguments(folder, **values | {"checkpoints": 4, "on_cpu": True} | changes)
    made.logging_steps = 1
    return made


def trainer(folder, llama, data, objective=None, **changes):
    options = {name: changes.pop(name) for name in ("teacher", "valid", "against") if name in changes}
    student = student_from_teacher(llama, [0, 2])
    return DistillationTrainer(
        student, arguments(folder, **changes), data, objective or Objective(alpha=0.5), **options
    )


def test_loss_is_the_objective_on_the_batch(tmp_path, llama, text, labels):
    data = WindowDataset(text, labels)
    batch = data.collate([2, 7])
    for objective, teacher, dataset in (
        (Objective(alpha=1.0), None, data),
        (Objective(alpha=0.3), None, data),
        (Objective(alpha=0.3, temperature=2.0), llama, WindowDataset(text)),
        (Objective(alpha=0.0, minilm=0.7), llama, WindowDataset(text)),
    ):
        it = trainer(tmp_path, llama, dataset, objective, teacher=teacher)
        got = it.compute_loss(it.model, batch if dataset is data else {"input_ids": text[[2, 7]]}).item()
        ids = text[[2, 7]]
        ours, theirs = (m(input_ids=ids, output_hidden_states=True) for m in (it.model, llama))
        q, p = (out.logits[:, :-1].flatten(0, 1) for out in (ours, theirs))
        hard = F.cross_entropy(q, ids[:, 1:].flatten())
        soft = kd_loss(q, p, objective.temperature) / len(q)
        if dataset is data:
            stored = (batch[name].flatten(0, 1) for name in ("top_ids", "log_probs"))
            soft = top_k_kd_loss(q, *stored, objective.temperature) / len(q)
        relations = (last_relations(m, o.hidden_states[-2]) for m, o in ((it.model, ours), (llama, theirs)))
        expected = objective.alpha * hard + (1 - objective.alpha) * soft + objective.minilm * minilm_loss(*relations)
        assert got == pytest.approx(expected.item(), rel=1e-5)


def test_training_lowers_divergence_from_the_teacher(tmp_path, llama, text, labels):
    against = Baseline(12)
    evaluate(llama, text, keep=against)
    options = {"steps": 40, "evaluations": 2, "valid": text, "against": against}
    it = trainer(tmp_path, llama, WindowDataset(text, labels), Objective(alpha=0.0), **options)
    before = it.evaluate()
    it.train()
    after = it.evaluate()
    assert after["eval_kl"] < 0.7 * before["eval_kl"]
    assert list(history(it, "eval_kl")) == [20, 40]


def test_shuffled_teacher_hands_out_the_labels_of_another_window(text, labels):
    straight, shuffled = WindowDataset(text, labels), WindowDataset(text, labels, shift=3)
    assert torch.equal(shuffled.collate([2, 11])["top_ids"], straight.collate([5, 2])["top_ids"])
    assert torch.equal(shuffled.collate([2, 11])["input_ids"], text[[2, 11]])


class Spoil(TrainerCallback):
    """From some step on, training goes wrong: the weights grow before each evaluation."""

    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step > self.after:
            with torch.no_grad():
                model.model.norm.weight.mul_(3.0)


class InterruptAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_student_ends_with_the_weights_that_did_best_in_validation(tmp_path, llama, text, labels, interrupted):
    options = {"evaluations": 4, "valid": text, "checkpoints": 4}
    it = trainer(tmp_path / "run", llama, WindowDataset(text, labels), **options)
    it.add_callback(Spoil(4))
    if interrupted:  # after the checkpoint of step 6: what did best lies before it
        it.add_callback(InterruptAt(7))
        with pytest.raises(KeyboardInterrupt):
            it.train()
        it = trainer(tmp_path / "run", llama, WindowDataset(text, labels), **options)
        it.add_callback(Spoil(4))
    it.train(resume_from_checkpoint=interrupted)
    seen = history(it, "eval_perplexity")
    assert list(seen) == [2, 4, 6, 8]
    assert min(seen, key=seen.get) == 4
    assert it.evaluate()["eval_perplexity"] == pytest.approx(seen[4], rel=1e-6)
    assert not list((tmp_path / "run").glob("best*"))


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(folder, llama, data, step):
    torch.set_num_threads(1)  # as the fixture `one_thread` does where the other runs train
    it = trainer(folder, llama, data)
    it.add_callback(KillAt(step))
    it.train()


@pytest.mark.slow
def test_training_resumes_bit_for_bit_after_a_kill(tmp_path, llama, text, labels):
    """A process is killed at step 5 of 8; another goes on from the checkpoint of step 4."""
    data = WindowDataset(text, labels)
    whole = trainer(tmp_path / "whole", llama, data)
    whole.train()

    # "spawn": a fork of a process that has run threads (torch's own, a server's) can wait for ever for their locks.
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=train_until_killed, args=(tmp_path / "part", llama, data, 5))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    resumed = trainer(tmp_path / "part", llama, data)
    resumed.train(resume_from_checkpoint=True)
    assert list(history(resumed, "loss")) == list(range(1, STEPS + 1))
    assert history(resumed, "loss") == history(whole, "loss")  # equal, not close
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


class Poison(TrainerCallback):
    """Makes one weight's gradient NaN at a step, as an overflow would."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step + 1 == self.step:
            model.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))


def test_nan_stops_training_and_keeps_the_last_good_checkpoint(tmp_path, llama, text, labels):
    it = trainer(tmp_path, llama, WindowDataset(text, labels))
    it.add_callback(Poison(step=6))
    with pytest.raises(
        FloatingPointError, match=r"NaN or infinite at step 6. The last good checkpoint is checkpoint-4"
    ):
        it.train()
    again = trainer(tmp_path, llama, WindowDataset(text, labels))
    again.train(resume_from_checkpoint=True)
    assert all(p.isfinite().all() for p in again.model.parameters())


def test_nan_loss_before_any_checkpoint(tmp_path, llama, text, labels):
    it = trainer(tmp_path / "none", llama, WindowDataset(text, labels))
    it.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"at step 1. There is no checkpoint yet. Lower the learning rate"):
        it.train()


def test_errors_are_said_before_training(tmp_path, llama, text, labels):
    with pytest.raises(ValueError, match="the dataset is empty"):
        WindowDataset(text[:0])
    with pytest.raises(ValueError, match=r"made at temperature 1\.0, training asks for 2\.0"):
        trainer(tmp_path, llama, WindowDataset(text, labels), Objective(alpha=0.5, temperature=2.0))
    with pytest.raises(ValueError, match="give the dataset some, or the trainer a teacher"):
        trainer(tmp_path, llama, WindowDataset(text))
    with pytest.raises(ValueError, match="not in stored soft labels: give the trainer a teacher"):
        trainer(tmp_path, llama, WindowDataset(text, labels), Objective(alpha=0.5, minilm=1.0))


def test_teacher_is_not_trained(tmp_path, llama, text):
    before = copy.deepcopy(llama.state_dict())
    it = trainer(tmp_path, llama, WindowDataset(text), Objective(alpha=0.0, minilm=1.0), teacher=llama)
    it.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
    assert all(p.grad is None for p in llama.parameters())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["reverse", "jensen-shannon"])
def test_other_divergences_and_their_gradients(kind, temperature):
    """Against torch.distributions; the student has three rows that the teacher lacks."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(5, 23, generator=generator, dtype=torch.float64).requires_grad_()
    t = torch.randn(5, 20, generator=generator, dtype=torch.float64)
    q, p = (torch.distributions.Categorical(logits=logits / temperature) for logits in (z[:, :20], t))
    kl = torch.distributions.kl_divergence
    expected = kl(q, p)
    if kind == "jensen-shannon":
        middle = torch.distributions.Categorical(probs=(p.probs + q.probs) / 2)
        expected = (kl(p, middle) + kl(q, middle)) / 2
    expected = temperature**2 * expected.sum()
    loss, gradient = DIVERGENCES[kind](z.detach(), t, temperature)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0])


def test_hidden_states_are_compared_through_a_projection_that_learns_too(tmp_path, llama, text):
    student = narrow_student(llama, 40)
    objective = Objective(alpha=0.5, hidden=1.0)
    it = DistillationTrainer(
        student, arguments(tmp_path, checkpoints=0), WindowDataset(text), objective, teacher=llama
    )  # fmt: skip
    first, ids = it.projection.weight.clone(), text[[2, 7]]
    alone = DistillationTrainer(
        student, arguments(tmp_path, checkpoints=0), WindowDataset(text), Objective(alpha=0.5), teacher=llama
    )  # fmt: skip
    ours, theirs = (m(input_ids=ids, output_hidden_states=True).hidden_states[-1][:, :-1] for m in (student, llama))
    projected = F.linear(ours, first)
    expected = (projected - theirs).square().mean() / theirs.square().mean()
    got = it.compute_loss(student, {"input_ids": ids}) - alone.compute_loss(student, {"input_ids": ids})
    assert got.item() == pytest.approx(expected.item(), rel=1e-4)
    it.train()
    assert not torch.equal(it.projection.weight, first)
    with pytest.raises(ValueError, match="Checkpoints do not hold the projection"):
        DistillationTrainer(student, arguments(tmp_path), WindowDataset(text), objective, teacher=llama)


@pytest.mark.parametrize("stored", [True, False])
def test_gradients_are_those_of_the_objective(tmp_path, llama, text, labels, stored):
    """The loss computes them itself: what is logged could be right and what is learnt wrong."""
    data = WindowDataset(text, labels if stored else None)
    it = trainer(tmp_path, llama, data, Objective(alpha=0.3), teacher=None if stored else llama)
    batch = data.collate([2, 7])
    it.compute_loss(it.model, batch).backward()
    found = {name: p.grad.clone() for name, p in it.model.named_parameters()}
    it.model.zero_grad()
    q, p = (m(input_ids=text[[2, 7]]).logits[:, :-1].flatten(0, 1) for m in (it.model, llama))
    soft = kd_loss(q, p.detach(), 1.0)
    if stored:
        soft = top_k_kd_loss(q, *(batch[name].flatten(0, 1) for name in ("top_ids", "log_probs")), 1.0)
    hard = F.cross_entropy(q, text[[2, 7], 1:].flatten(), reduction="sum")
    ((0.3 * hard + 0.7 * soft) / len(q)).backward()
    for name, parameter in it.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_saved_student_is_in_16_bits_and_the_one_in_memory_is_not_touched(tmp_path, llama, tokenizer):
    artifact = save_student(tmp_path / "m", llama, tokenizer, method="kd", settings={}, parent="original")
    assert {p.dtype for p in llama.parameters()} == {torch.float32}
    reloaded = type(llama).from_pretrained(artifact.folder)
    for mine, theirs in zip(llama.parameters(), reloaded.parameters(), strict=True):
        assert torch.equal(mine.bfloat16(), theirs) and theirs.dtype == torch.bfloat16


# What is saved is what a user should load


def test_a_trained_student_generates_with_its_cache_and_keeps_its_settings(tmp_path, tokenizer, text):
    config = AutoConfig.for_model("qwen3", **SIZES | {"head_dim": 16, "tie_word_embeddings": True})
    teacher = AutoModelForCausalLM.from_config(config).eval()
    teacher.generation_config.update(do_sample=True, temperature=0.6, eos_token_id=[254, 255])
    it = trainer(tmp_path / "run", teacher, WindowDataset(text), Objective(alpha=0.5), teacher=teacher, steps=1)
    it.train()
    saved = save_student(tmp_path / "m", it.model, tokenizer, method="kd", settings={}, parent="t").folder
    written = json.loads((saved / "config.json").read_text())
    assert written["use_cache"] is True and written["dtype"] == "bfloat16" and len(written["layer_types"]) == 2
    student = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    assert student.generation_config.temperature == 0.6 and student.generation_config.eos_token_id == [254, 255]
    assert student(input_ids=text[:1]).past_key_values is not None
    texts = [student.generate(text[:1], max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("before", [True, False])
def test_training_leaves_the_cache_setting_as_it_was(tmp_path, llama, text, before):
    llama.config.use_cache = before
    it = trainer(tmp_path, llama, WindowDataset(text), Objective(alpha=1.0), steps=1)
    it.train()
    assert it.model.config.use_cache is before


def test_settings_that_transformers_refuses_to_save_are_saved_as_they_are(tmp_path, llama, tokenizer, text):
    llama.generation_config.temperature = 0.9  # without do_sample, as Llama-2-chat was published
    with pytest.raises(ValueError, match="do_sample"):
        llama.save_pretrained(tmp_path / "refused")
    it = trainer(tmp_path / "run", llama, WindowDataset(text), Objective(alpha=1.0), steps=2, checkpoints=1)
    it.train()
    saved = save_student(tmp_path / "m", it.model, tokenizer, method="kd", settings={}, parent="t").folder
    assert AutoModelForCausalLM.from_pretrained(saved).generation_config.temperature == 0.9
    assert it.model.generation_config.temperature == 0.9


def test_a_student_that_would_load_as_another_model_is_not_saved(tmp_path, llama, tokenizer):
    llama.config.rms_norm_eps = 1.0  # not what its norms compute with
    with pytest.raises(ValueError, match="configuration of LlamaForCausalLM describes another model"):
        save_student(tmp_path / "m", llama, tokenizer, method="kd", settings={}, parent="t")
    assert list(tmp_path.iterdir()) == []


def test_a_head_of_its_own_is_saved_though_the_configuration_says_tied(tmp_path, make_llama, tokenizer, windows):
    """As a merged fine-tune comes; other loaders believe the configuration and throw the head away."""
    student = make_llama(tie_word_embeddings=False)
    student.config.tie_word_embeddings = True
    saved = save_student(tmp_path / "m", student, tokenizer, method="kd", settings={}, parent="t").folder
    assert json.loads((saved / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    torch.testing.assert_close(loaded(windows).logits, student(windows).logits)


# One tokenizer, vocabularies padded differently


@pytest.mark.parametrize(("ours", "theirs"), [(264, 272), (272, 264)])
def test_vocabularies_padded_differently_are_compared_on_their_common_rows(
    tmp_path, make_llama, tokenizer, text, ours, theirs
):
    teacher, student = make_llama(seed=1, vocab_size=theirs), make_llama(vocab_size=ours)
    settings = arguments(tmp_path / "run", checkpoints=0), WindowDataset(text), Objective(alpha=0.3)
    it = DistillationTrainer(student, *settings, teacher=teacher)
    loss = it.compute_loss(student, {"input_ids": text[:2]})
    loss.backward()
    found = student.lm_head.weight.grad.clone()
    student.zero_grad()
    q, p = (model(input_ids=text[:2]).logits[:, :-1].flatten(0, 1) for model in (student, teacher))
    soft = kd_loss(q[:, :264], p[:, :264].detach(), 1.0)
    expected = (0.3 * F.cross_entropy(q, text[:2, 1:].flatten(), reduction="sum") + 0.7 * soft) / len(q)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, student.lm_head.weight.grad, rtol=1e-3, atol=1e-5)


def test_soft_labels_hold_tokens_only_and_baselines_of_another_padding_compare(tmp_path, make_llama, tokenizer, text):
    teacher, student = make_llama(seed=1, vocab_size=272), make_llama(vocab_size=264)
    labels = make_soft_labels(tmp_path / "soft", teacher, tokenizer, text, k=200, temperature=1.0, batch_size=4)
    assert labels.ids.max() < 256
    it = DistillationTrainer(student, arguments(tmp_path / "run"), WindowDataset(text, labels), Objective(alpha=0.0))
    assert it.compute_loss(student, it.train_dataset.collate([0, 1])).isfinite()
    against = Baseline(12)
    evaluate(teacher, text, keep=against)
    q, p = (model(input_ids=text).logits[:, :-1, :264].flatten(0, 1) for model in (student, teacher))
    assert evaluate(student, text, against=against).kl == pytest.approx(kd_loss(q, p, 1.0).item() / len(q), rel=1e-4)


def test_the_ways_to_save_memory_train_the_same(tmp_path, llama, text, labels):
    """8-bit moments and activations that are computed again: the losses of full AdamW, but for rounding."""
    data, losses = WindowDataset(text, labels), {}
    ways = {"full": {}, "recomputed": {"gradient_checkpointing": True}, "8 bits": {"optimizer": "adamw_8bit"}}
    for way, options in ways.items():
        trained = trainer(tmp_path / way.replace(" ", "-"), llama, data, checkpoints=0, **options)
        trained.train()
        losses[way] = torch.tensor(list(history(trained, "loss").values()))
    torch.testing.assert_close(losses["recomputed"], losses["full"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["8 bits"], losses["full"], rtol=0.05, atol=0.05)
    assert losses["full"][-1] < losses["full"][0]


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_8bit"])
def test_an_optimizer_for_a_loop_of_ones_own(name):
    """Also after a Trainer, which has bitsandbytes keep the moments of embeddings in 32 bits."""
    GlobalOptimManager.get_instance().index2config[0, 0] = {"optim_bits": 32}
    weight = torch.nn.Parameter(torch.ones(128, 128))
    optimizer = make_optimizer(name, [weight], 0.1)
    weight.square().sum().backward()
    optimizer.step()
    assert (weight < 1).all()
    moments = [value for value in optimizer.state[weight].values() if getattr(value, "shape", None) == weight.shape]
    assert {moment.element_size() for moment in moments} == {1 if name == "adamw_8bit" else 4}


def test_a_frozen_head_gets_no_gradient_and_the_rest_the_same(llama, text):
    from common.methods.head_loss import cross_entropy_and_gradient, head_loss
    from common.methods.output_head import output_head

    hidden = torch.randn(30, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels, found = text.flatten()[:30], []
    for frozen in (False, True):
        llama.requires_grad_(not frozen)
        llama.zero_grad()
        loss = head_loss(hidden, output_head(llama), cross_entropy_and_gradient, labels)
        found.append(torch.autograd.grad(loss, hidden)[0])
    assert torch.equal(*found)
