"""The speed-run's verifier: measures what is submitted, and refuses by name what breaks a rule."""

import json
from dataclasses import replace

import pytest
import torch
from model_tools import write_tiny
from safetensors.torch import load_file, save_file

from tools.speedrun import board
from tools.speedrun.entries import ENTRIES, make
from tools.speedrun.measure import KNOWN, distances, honest, measured, windows_for
from tools.speedrun.rules import BYTES, CALIBRATION, Refused, Statement, examine, fingerprint

SAID = {"name": "mine", "author": "me", "method": "rounded", "calibration_tokens": 0}
FOUND = {"kl": 0.1, "standard_error": 0.01, "drawn": 0.1}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_tiny("qwen3", tmp_path_factory.mktemp("original"))


def state(folder):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "submission.json").write_text(json.dumps(SAID))
    save_file({"w": torch.ones(4)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def folder(tmp_path):
    return state(tmp_path / "mine")


def test_a_right_folder_is_examined(folder):
    statement, size = examine(folder)
    assert statement == Statement(**SAID)
    assert size == (folder / "model.safetensors").stat().st_size


def link(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere")


def appended(folder):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"the test windows")


def said(**changes):
    return lambda folder: (folder / "submission.json").write_text(json.dumps(SAID | changes))


@pytest.mark.parametrize(
    ("cheat", "told"),
    [
        (lambda folder: (folder / "more.safetensors").write_bytes(b""), "more.safetensors does not belong there"),
        (lambda folder: (folder / "model.bin").write_bytes(b""), "model.bin does not belong there"),
        (lambda folder: (folder / "model.py").write_text(""), "model.py does not belong there"),
        (lambda folder: (folder / "deep").mkdir(), "deep does not belong there"),
        (link, "is a link"),
        (appended, "no whole safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "config.json").write_text('{"auto_map": {}}'), "code of its own"),
        (lambda folder: (folder / "submission.json").unlink(), "submission.json cannot be read"),
        (said(calibration_tokens=CALIBRATION + 1), "calibration tokens; 65,536 are allowed"),
        (said(calibration_tokens="few"), "calibration_tokens (int)"),
        (said(name="a | b"), "a table cannot show"),
    ],
)
def test_refused_by_name(folder, cheat, told):
    cheat(folder)
    with pytest.raises(Refused) as raised:
        examine(folder)
    assert told in str(raised.value)


def test_too_many_bytes_are_refused(folder):
    size = (folder / "model.safetensors").stat().st_size
    assert examine(folder, most=size)[1] == size < BYTES
    with pytest.raises(Refused, match="are allowed"):
        examine(folder, most=size - 1)


def changed(original, folder, change):
    """The original with its tensors changed, as a submission."""
    folder.mkdir()
    tensors = load_file(original / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((original / "config.json").read_bytes())
    return folder


def rounded(tensors):
    for name, value in tensors.items():
        tensors[name] = (value * 16).round() / 16


@pytest.mark.slow
def test_the_original_is_at_no_distance_and_a_rounded_one_at_some(original, tmp_path):
    same = distances(changed(original, tmp_path / "same", lambda tensors: None), str(original))
    assert abs(same["kl"]) < 1e-5 > abs(same["drawn"])
    found = measured(changed(original, tmp_path / "rounded", rounded), str(original))  # in a process of its own
    assert found["kl"] > 1e-2 < found["drawn"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.update(codes=torch.arange(2048)), "tensors that are ignored: codes"),
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight"),
    ],
)
def test_tensors_that_are_no_weights_and_missing_ones_are_refused(original, tmp_path, change, told):
    with pytest.raises((ValueError, UserWarning)) as raised:
        distances(changed(original, tmp_path / "mine", change), str(original))
    assert told in str(raised.value)


@pytest.mark.slow
def test_what_the_process_says_is_the_refusal(original, tmp_path):
    with pytest.raises(Refused, match=r"cannot be measured: .*lacks 1 tensors"):
        measured(changed(original, tmp_path / "mine", lambda tensors: tensors.pop("model.norm.weight")), str(original))


def test_who_knows_the_test_windows_is_refused():
    assert honest(FOUND) == FOUND
    with pytest.raises(Refused, match="knows the test windows"):
        honest(FOUND | {"drawn": 0.2})
    with pytest.raises(Refused, match="not finite"):
        honest(FOUND | {"kl": float("nan")})


def test_other_bytes_draw_other_windows_and_all_are_held_out(original, folder):
    first = windows_for(folder, str(original))
    save_file({"w": torch.zeros(4)}, folder / "model.safetensors")
    second = windows_for(folder, str(original))
    assert torch.equal(first[:8], second[:8])
    assert not torch.equal(first[8:], second[8:])
    assert len(set(map(tuple, first.tolist()))) == 16, "a drawn window is a known one"


def test_the_table_ranks_replaces_and_refuses_copies(folder, tmp_path):
    file = tmp_path / "table.json"
    board.add(Statement(**SAID), 1000, fingerprint(folder), FOUND, file)
    board.add(Statement(**SAID | {"name": "better"}), 1000, "other", FOUND | {"kl": 0.05}, file)
    board.add(Statement(**SAID), 900, fingerprint(folder), FOUND | {"kl": 0.2}, file)
    assert [(entry["name"], entry["bytes"]) for entry in board.read(file)] == [("better", 1000), ("mine", 900)]
    with pytest.raises(Refused, match="the bytes of 'mine'"):
        board.add(Statement(**SAID | {"author": "you"}), 900, fingerprint(folder), FOUND, file)
    assert "| 1 | better | me | rounded | 0.00 | 0 | 0.0500 ± 0.0100 |" in board.table(file)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rtn", "gptq-short"])
def test_our_own_entries_are_submissions(name, original, tmp_path):
    entry = replace(ENTRIES[name], windows=min(ENTRIES[name].windows, 2), seqlen=32)
    make(entry, tmp_path / name, str(original))
    statement, _ = examine(tmp_path / name)
    assert statement.calibration_tokens == entry.windows * 32


def test_honest_entries_stay_two_standard_errors_above_the_limit():
    entries = board.read()
    assert len([entry for entry in entries if entry["author"] == "課程"]) >= 4
    for entry in entries:
        assert entry["kl"] - 2 * entry["standard_error"] > KNOWN * entry["drawn"], entry["name"]
