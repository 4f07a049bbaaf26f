"""The student that is trained overnight: it goes on where it stopped, and becomes what notebook 04 reads."""

import copy

import pytest
from transformers import TrainerCallback

from benchmarks import overnight
from common.course import artifacts
from common.course.settings import load_settings
from common.methods.callbacks import FiniteGradients
from common.methods.distillation import student_from_teacher
from common.methods.training import save_student

SMALL = {"train_seqlen": 32, "train_windows": 12, "batch_size": 2, "valid_windows": 2, "eval_windows": 2, "seqlen": 32}
SMALL |= {"top_k": 16, "label_batch": 4, "learning_rate": 1e-2}


@pytest.fixture
def home(tmp_path, monkeypatch, llama, tokenizer):
    """The artifacts of a finished notebook 01 with the tiny model as its teacher."""
    monkeypatch.setenv("COURSE_WORK", str(tmp_path))
    real = overnight.load_model
    teacher = lambda spec, *where: copy.deepcopy(llama) if spec == "embedded" else real(spec, *where)  # noqa: E731
    monkeypatch.setattr(overnight, "load_model", teacher)
    monkeypatch.setattr(overnight, "load_tokenizer", lambda _: tokenizer)
    folder = load_settings("distillation", "cpu").artifacts
    student = student_from_teacher(llama, [0, 2])
    save_student(
        folder / "student-untrained", student, tokenizer, method="layers", settings={"blocks": [0, 2]}, parent="tiny"
    )
    return folder


class Stop(TrainerCallback):
    at = 0

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.at:
            raise KeyboardInterrupt


def test_a_night_that_was_interrupted_goes_on_and_leaves_a_student(home, monkeypatch, capsys):
    monkeypatch.setattr(FiniteGradients, "on_step_end", Stop.on_step_end, raising=False)
    monkeypatch.setattr(FiniteGradients, "at", 7, raising=False)
    with pytest.raises(KeyboardInterrupt):
        overnight.main(["--steps", "10"], **SMALL)
    assert sorted(p.name for p in (home / "overnight" / "run").glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    monkeypatch.setattr(FiniteGradients, "at", 3)  # it would stop a run that began anew
    overnight.main(["--steps", "10"], **SMALL)
    assert artifacts.load(home / "student", "overnight").settings["steps"] == 10
    assert not (home / "overnight" / "run").exists()
    monkeypatch.setattr(FiniteGradients, "at", 0)
    assert "10:" in capsys.readouterr().out


def test_the_numbers_are_the_gpu_profiles():
    assert set(overnight.GPU_NUMBERS) <= set(overnight.profile_values("distillation", "gpu"))
