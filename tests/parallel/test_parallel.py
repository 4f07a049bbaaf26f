"""Two processes (gloo) give what one gives: codes, masks, students; one that dies ends all with a message."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.parallel.launch import launch

pytestmark = pytest.mark.slow  # seven starts of two processes
DISTIL = "common.parallel.distil"
CONFIGS = {
    "gptq": {"bits": 4, "group_size": 32},
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "sparsegpt": {"method": "sparsegpt", "sparsity": 0.5},
}
STEPS = {"keep": [0], "steps": 8, "batch_size": 4, "dtype": "float64", "teacher_dtype": "float64", "save_student": True}
ALONE = {"alone": {}, "accumulate": {"accumulate": 2}}
TOGETHER = {"ddp": {}, "fsdp2": {"strategy": "fsdp2", "shard_teacher": True}, "both": {"accumulate": 2}}


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    patch = pytest.MonkeyPatch()
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """place(name) → a folder with the windows that every job reads; the model lies beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    base = tmp_path_factory.mktemp("parallel")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(base / "model")
    tokenizer.save_pretrained(base / "model")
    windows = torch.randint(256, (12, 16), generator=torch.Generator().manual_seed(3))

    def make(*names):
        folder = base.joinpath(*names)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"windows": windows}, folder / "windows.safetensors")
        return folder

    make.model = str(base / "model")
    return make


@pytest.fixture(scope="module")
def done(place):
    """Folder of each job's results: by number of processes, then by name."""

    def run(count, ways):
        jobs = {name: {"teacher": place.model} | STEPS | way for name, way in ways.items()}
        fixed = {"model": place.model, "dtype": "float32", "on_device": True, "batch_size": 4}
        jobs |= {name: fixed | {"config": config} for name, config in CONFIGS.items()}
        folders = {name: place(str(count), name) for name in jobs}
        (place(str(count)) / "result.json").write_text("{}")
        launch_many(count, jobs, place(str(count)))
        return folders

    return {1: run(1, ALONE), 2: run(2, TOGETHER)}


def launch_many(count, jobs, folder):
    with pytest.raises(FileNotFoundError, match=r"result\.json"):  # each job has its own
        launch("many", count, jobs, folder, timeout=240)


@pytest.mark.parametrize("name", CONFIGS)
def test_codes_and_masks_of_two_processes_are_those_of_one(done, name):
    """Sums of another order differ in their last bits, and a weight half-way between two points may go either way."""
    one, two = (load_file(done[count][name] / "found.safetensors") for count in (1, 2))
    assert one.keys() == two.keys()
    same = torch.cat([(one[key] == two[key]).flatten() for key in one]).float().mean()
    assert same > 0.999


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("name", ["accumulate", *TOGETHER])
def test_every_way_of_sharing_trains_the_same_student(done, name):
    """In float64 nothing but rounding could differ."""
    alone, folder = done[1]["alone"], (done[1] | done[2])[name]
    losses = result(alone)["losses"]
    assert losses[-1] < 0.95 * losses[0]
    assert result(folder)["losses"] == pytest.approx(losses, rel=1e-6)
    expected, student = (load_file(each / "student.safetensors") for each in (alone, folder))
    assert student.keys() == expected.keys()
    for key, weight in student.items():
        torch.testing.assert_close(weight, expected[key], rtol=0, atol=1e-8)


def test_a_process_that_dies_ends_all_with_one_message_and_the_next_run_goes_on(done, place):
    folder, job = place("broken"), {"teacher": place.model} | STEPS | {"save_every": 2}
    with pytest.raises(RuntimeError, match=r"Process 1 was ended by SIGKILL\. Run it again"):
        launch("dying", 2, job, folder, timeout=240)  # when step 6 begins
    again = launch(DISTIL, 1, job, folder, timeout=240)  # one card is left
    assert again["resumed_at"] == 6
    assert again["losses"] == pytest.approx(result(done[1]["alone"])["losses"], rel=1e-6)


def test_a_failing_process_is_told_in_its_own_words(place):
    job = {"teacher": place.model} | STEPS | {"batch_size": 3}
    with pytest.raises(RuntimeError, match="A batch of 3 windows cannot be shared out evenly among 2 processes"):
        launch(DISTIL, 2, job, place("uneven"), timeout=240)
