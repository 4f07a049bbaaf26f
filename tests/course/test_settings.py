"""Settings: every number typed and documented, every profile refused where it cannot run."""

import dataclasses
import random
import re
import tomllib

import numpy as np
import pytest
import torch

from common.course import settings
from common.course.settings import (
    LARGE,
    PROFILES,
    labs,
    load_settings,
    resolve_profile,
    seed_everything,
    slug,
    work_folder,
)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """table(name, line): the settings read a copy of profiles.toml in which `line` stands in place of `name = ...`."""
    text = settings._TABLE.read_text(encoding="utf-8")

    def edit(name: str, line: str) -> None:
        changed, count = re.subn(rf"^{name} *=.*$", line, text, flags=re.MULTILINE)
        assert count == 1, f"{name} stands {count} times in profiles.toml"
        (tmp_path / "profiles.toml").write_text(changed, encoding="utf-8")
        monkeypatch.setattr(settings, "_TABLE", tmp_path / "profiles.toml")

    return edit


# --- profiles ------------------------------------------------------------------------------------------------------


def test_auto_goes_by_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_profile("auto") == "gpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_profile("auto") == "cpu"
    assert load_settings("quantization").profile == "cpu"


@pytest.mark.parametrize("profile", ["laptop", "GPU", ""])
def test_unknown_profile(profile):
    with pytest.raises(ValueError, match=f"Unknown profile '{profile}'; choose auto, smoke, cpu, gpu"):
        load_settings("quantization", profile)


def test_gpu_profile_without_a_gpu(no_gpu):
    with pytest.raises(RuntimeError, match=r'needs an NVIDIA GPU.*PROFILE = "cpu"'):
        load_settings("quantization", "gpu")


def test_gpu_profile_with_a_gpu(gpu):
    loaded = load_settings("quantization", "gpu")
    assert loaded.device == torch.device("cuda")
    assert loaded.dtype == torch.bfloat16
    assert load_settings("quantization", LARGE).device == torch.device("cuda")
    assert load_settings("quantization", "cpu").device == torch.device("cpu"), "the CPU profile keeps to the CPU"


def test_dtype_follows_the_processor(no_gpu, monkeypatch):
    loaded = load_settings("quantization", "cpu")
    for avx, amx, expected in [
        (False, False, torch.float32),
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
    ]:
        able = {"avx512_bf16": avx, "amx_bf16": amx}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert loaded.dtype == expected


def test_the_profile_of_large_models_states_only_what_differs(gpu, table):
    usual, large = load_settings("quantization", "gpu").values(), load_settings("quantization", LARGE).values()
    assert usual.keys() == large.keys()
    assert large["study_blocks"] < usual["study_blocks"] and large["seqlen"] == usual["seqlen"]
    table("seqlen", 'seqlen = { all = 512, gpu16 = 256, doc = "changed" }')
    assert [load_settings("quantization", name).seqlen for name in PROFILES] == [512, 512, 512, 256]


# --- the table -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lab", labs())
@pytest.mark.parametrize("profile", PROFILES)
def test_every_value_is_typed_and_documented(lab, profile, gpu):
    loaded = load_settings(lab, profile)
    fields = {field.name: field.type for field in dataclasses.fields(loaded)}
    given = {"lab", "notebook", "profile", "model", "documentation"}
    assert loaded.values().keys() == fields.keys() - given == loaded.documentation.keys()
    for name, value in loaded.values().items():
        assert type(value) is fields[name], name
        assert len(loaded.documentation[name]) > 10, f"{name} has no meaning"
        if isinstance(value, int) and name != "seed":
            assert value > 0, name
        if isinstance(value, list):
            assert value and all(item if type(item) is str else item >= 0 for item in value), name
    assert (loaded.lab, loaded.profile, loaded.model) == (lab, profile, "embedded")


@pytest.mark.parametrize("lab", labs())
def test_rows_have_a_value_for_every_profile_or_one_for_all(lab):
    table = tomllib.loads(settings._TABLE.read_text(encoding="utf-8"))
    assert set(table) == {"shared", *labs()}
    assert not table["shared"].keys() & table[lab].keys(), "a lab must not quietly override a shared value"
    for name, row in (table["shared"] | table[lab]).items():
        assert row.keys() - {LARGE} in ({"all", "doc"}, {*PROFILES, "doc"} - {LARGE}), name


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("seed", 'seed = { all = "4", doc = "" }', r"seed = '4' should be of type int"),
        ("seqlen", 'seqlen = { all = true, doc = "" }', r"seqlen = True should be of type int"),
        (
            "sweep_rows",
            'sweep_rows = { smoke = 4, cpu = 4.0, gpu = 4, doc = "" }',
            r"sweep_rows = 4\.0 should be of type int",
        ),
        ("sweep_rows", 'sweep_rows = { gpu = 4, doc = "" }', r"sweep_rows = None should be of type NoneType"),
        ("sweep_rows", 'sweep_rows = { smoke = 4, gpu = 4, doc = "" }', r"sweep_rows = None should be of type int"),
        ("batch_sizes", 'batch_sizes = { all = 1, doc = "" }', r"batch_sizes = 1 should be of type .*list"),
        ("corpus", 'corpus = { all = 2, doc = "" }', r"corpus = 2 should be of type .*str"),
        ("seqlen", "", "seqlen"),  # no such row
    ],
)
def test_a_slip_in_the_table(table, name, line, words):
    table(name, line)
    with pytest.raises(TypeError, match=words):
        load_settings("quantization", "smoke")


def test_a_changed_value_arrives(table):
    table("sweep_rows", 'sweep_rows = { smoke = 3, cpu = 2, gpu = 8, doc = "changed" }')
    loaded = load_settings("quantization", "smoke")
    assert loaded.sweep_rows == 3
    assert loaded.documentation["sweep_rows"] == "changed"


# --- the object ----------------------------------------------------------------------------------------------------


def test_replace():
    loaded = load_settings("quantization", "smoke")
    changed = loaded.replace(nsamples=16)
    assert changed.nsamples == 16
    assert changed.values() == loaded.values() | {"nsamples": 16}
    assert type(changed) is type(loaded)
    assert loaded.nsamples != 16
    with pytest.raises(TypeError, match="nsample"):
        loaded.replace(nsample=16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.nsamples = 16


def test_artifacts_of_models_and_profiles_are_kept_apart(monkeypatch, tmp_path, no_gpu):
    monkeypatch.setenv("COURSE_WORK", str(tmp_path))
    folders = [
        load_settings("quantization", profile, model).artifacts
        for profile in ("smoke", "cpu")
        for model in ("embedded", "meta-llama/Llama-2-7b-hf", "shape:llama-2-7b")
    ]
    assert len(set(folders)) == 6
    assert all(folder.is_relative_to(tmp_path) for folder in folders)
    assert folders[1] == tmp_path / "artifacts" / "meta-llama-llama-2-7b-hf" / "smoke"


def test_slug():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert slug("TinyLlama/TinyLlama-1.1B-Chat-v1.0") == "tinyllama-tinyllama-1.1b-chat-v1.0"


def test_from_another_working_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("COURSE_WORK", raising=False)
    here = load_settings("quantization", "smoke")
    folder = here.artifacts
    monkeypatch.chdir(tmp_path)
    assert load_settings("quantization", "smoke").values() == here.values()
    assert load_settings("quantization", "smoke").artifacts == folder
    assert work_folder() == settings.ROOT / ".work"
    assert (settings.ROOT / "pyproject.toml").exists()


def test_seed_everything():
    def draw():
        seed_everything(7)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()
    seed_everything(8)
    assert random.random() != draw()[0]
