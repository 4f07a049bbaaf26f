"""The Trainer: its loss, resuming after a kill, stopping at NaN, errors a student can meet."""

import copy
import multiprocessing
import os
import signal

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from common.measure.evaluation import Baseline, evaluate
from common.methods.distillation import kd_loss, last_relations, minilm_loss, student_from_teacher, top_k_kd_loss
from common.methods.soft_labels import make_soft_labels
from common.methods.training import (
    DistillationTrainer,
    Objective,
    WindowDataset,
    history,
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
    with pytest.raises(ValueError, match="MiniLM compares attention"):
        trainer(tmp_path, llama, WindowDataset(text, labels), Objective(alpha=0.5, minilm=1.0))


def test_teacher_is_not_trained(tmp_path, llama, text):
    before = copy.deepcopy(llama.state_dict())
    it = trainer(tmp_path, llama, WindowDataset(text), Objective(alpha=0.0, minilm=1.0), teacher=llama)
    it.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
    assert all(p.grad is None for p in llama.parameters())


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
