"""A student that writes: its text is its own, the loss is GKD's, and the clock is kept."""

import itertools

import pytest
import torch
from test_speculative import SMALLEST, fits, probabilities
from torch.nn import functional as F

from common.methods.distillation import student_from_teacher
from common.methods.head_loss import (
    DIVERGENCES,
    jensen_shannon_and_gradient,
    kd_and_gradient,
    reverse_kd_and_gradient,
)
from common.methods.on_policy import Writer, _schedule, copy_for_writing, learn, write_on
from common.methods.soft_labels import WindowDataset
from common.methods.training import DistillationTrainer, Objective, training_arguments


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(5, 23, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.fixture
def text():
    return torch.randint(256, (12, 16), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_generalized_jensen_shannon_and_its_gradient(logits, beta):
    """Against torch.distributions, autograd and finite differences."""
    z, t = logits
    z.requires_grad_()
    q, p = (torch.distributions.Categorical(logits=x) for x in (z, t))
    m = torch.distributions.Categorical(probs=beta * p.probs + (1 - beta) * q.probs)
    kl = torch.distributions.kl_divergence
    expected = (beta * kl(p, m) + (1 - beta) * kl(q, m)).sum()
    loss, gradient = jensen_shannon_and_gradient(z.detach(), t, 1.0, beta)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0])
    push = torch.zeros_like(t)
    push[2, 7] = 1e-5
    up, down = (jensen_shannon_and_gradient(z.detach() + s * push, t, 1.0, beta)[0] for s in (1, -1))
    assert ((up - down) / 2e-5).item() == pytest.approx(gradient[2, 7].item(), rel=1e-6)


@pytest.mark.parametrize(("side", "limit"), [("teacher", kd_and_gradient), ("student", reverse_kd_and_gradient)])
def test_limits_of_the_generalized_divergence(logits, side, limit):
    """β → 0 divided by β: the forward KL; β → 1 divided by 1 - β: the reverse. The gradients, too; error of order β."""
    expected, to_logits = limit(*logits, 1.0)
    before = torch.inf
    for small in (1e-2, 1e-3, 1e-4):
        loss, gradient = jensen_shannon_and_gradient(*logits, 1.0, small if side == "teacher" else 1 - small)
        error = (gradient / small - to_logits).norm() / to_logits.norm()
        assert error < 0.2 * before
        before = error
    assert error < 1e-2
    assert (loss / small).item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 0.9, 1])
def test_trl_computes_the_same(logits, beta):
    """Where TRL is installed (1.16.0 was, in a throw-away environment, on 2026-11-30)."""
    trl = pytest.importorskip("trl.experimental.gkd")
    z, t = logits
    theirs = trl.GKDTrainer.generalized_jsd_loss(z[None], t[None], beta=beta, reduction="sum")
    ours = {0: kd_and_gradient, 1: reverse_kd_and_gradient}.get(beta, jensen_shannon_and_gradient)
    loss, _ = ours(z, t, 1.0, *([beta] if 0 < beta < 1 else []))
    torch.testing.assert_close(loss, theirs)


@pytest.mark.parametrize(("divergence", "beta"), [("forward", 0), ("jensen-shannon", 0.5), ("reverse", 1)])
def test_the_first_loss_is_trls(tmp_path, llama, text, divergence, beta):
    """The same batch, teacher and student: what the trainer computes, chunked and in closed form."""
    trl = pytest.importorskip("trl.experimental.gkd")
    it = trainer(tmp_path, llama, text, divergence=divergence)
    ids = text[:4]
    ours = it.compute_loss(it.model, {"input_ids": ids})
    z, t = (model(input_ids=ids).logits[:, :-1] for model in (it.model, llama))
    theirs = trl.GKDTrainer.generalized_jsd_loss(z, t, labels=ids[:, 1:], beta=beta)  # batchmean: by labels
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_a_writer_writes_what_its_model_would(make_llama):
    """6,000 texts of three tokens out of three at once, against all 27 probabilities."""
    model, prompt = make_llama(1, **SMALLEST), torch.tensor([[1, 2]])
    torch.manual_seed(0)
    windows = write_on(model, prompt.expand(6000, -1), 5, batch_size=2500)  # the last batch is smaller
    assert windows.shape == (6000, 5)
    assert (windows[:, :2] == prompt).all()
    counts = (windows[:, 2:] * torch.tensor([9, 3, 1])).sum(1).bincount(minlength=27)
    assert fits(counts, probabilities(model, prompt, 3))


def test_a_writer_follows_its_student(make_llama, text):
    student = make_llama()
    writer = Writer(copy_for_writing(student, torch.float32), 4, 12)
    assert writer(text[:4, :5]).shape == (4, 12)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.5)
    writer.follow(student)
    assert all(map(torch.equal, writer.model.parameters(), student.parameters()))


def trainer(folder, teacher, text, divergence="forward", alpha=0.0):
    made = training_arguments(
        folder, name="test", steps=1, batch_size=4, learning_rate=3e-3, seed=0, evaluations=0, on_cpu=True
    )
    student = student_from_teacher(teacher, [0, 2])
    objective = Objective(alpha, divergence=divergence)
    return DistillationTrainer(student, made, WindowDataset(text), objective, teacher=teacher.requires_grad_(False))


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_lessons(tmp_path, llama, text, share):
    it = trainer(tmp_path, llama, text)
    first = it.compute_loss(it.model, {"input_ids": text[:4]}).item()
    writer = Writer(copy_for_writing(it.model, torch.float32), 8, 16)
    lesson = learn(it, writer, text, share, seconds=1.5, prompt_tokens=4, seed=0)
    assert len(lesson.losses) == len(lesson.own) > 8
    assert abs(sum(lesson.own) / len(lesson.own) - share) < 0.3
    assert (lesson.writing_seconds > 0) == (share > 0)
    assert lesson.writing_seconds <= lesson.seconds
    assert 1.5 <= lesson.seconds < 6  # it ends with the step that is under way
    if share == 0:
        assert lesson.losses[0] == pytest.approx(first, rel=0.3)
        assert sum(lesson.losses[-3:]) < 0.8 * sum(lesson.losses[:3])


def test_learning_rate_over_time():
    shares = [_schedule(i / 100) for i in range(100)]
    assert shares[0] == pytest.approx(0.01)
    assert max(shares) > 0.95
    assert shares[-1] < 0.001


def test_the_loss_is_written_once():
    """GKD's three are those of `head_loss`; nothing here computes a divergence of its own."""
    assert list(DIVERGENCES) == ["forward", "reverse", "jensen-shannon"]
    assert DIVERGENCES["jensen-shannon"] is jensen_shannon_and_gradient


def test_the_divergence_between_sequences_is_the_sum_along_the_students_text(make_llama):
    """KL(q(y) ‖ p(y)) = Σ over prefixes that the student writes of its reverse KL: exposure bias is part of it."""
    p, q, prompt = make_llama(1, **SMALLEST), make_llama(2, **SMALLEST), torch.tensor([[1, 2]])
    log_p, log_q = (probabilities(model, prompt, 3).log() for model in (p, q))
    whole = F.kl_div(log_p, log_q, log_target=True, reduction="sum")
    along_it = 0.0
    for n in range(3):
        weights = probabilities(q, prompt, n) if n else torch.ones(1)
        prefixes = torch.tensor(list(itertools.product(range(3), repeat=n))).view(len(weights), n).long()
        ids = torch.cat((prompt.expand(len(prefixes), -1), prefixes), 1)
        log_q, log_p = (m(input_ids=ids).logits[:, -1].log_softmax(-1) for m in (q, p))
        along_it += (weights * (log_q.exp() * (log_q - log_p)).sum(-1)).sum()
    assert along_it.item() == pytest.approx(whole.item(), rel=1e-4)
