"""Models that students bring, through the notebooks that say they take them: a cached Hub id, folders of two families.

The table in the chapter's README says which notebooks take what.
"""

import os
import subprocess
import sys

import pytest

from common.course.settings import ROOT
from tools import run

MADE = ROOT / ".work" / "tests" / "models"  # the embedded model, unpacked once for all tests
pytestmark = [pytest.mark.notebooks, pytest.mark.slow, pytest.mark.timeout(4600)]


@pytest.fixture
def notebooks(tmp_path):
    """notebooks(kind, *options) → what `tools.run` said at smoke, with a cache and a work folder of its own."""
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    tiny = [sys.executable, str(ROOT / "tests" / "model_tools.py")]

    def execute(kind, *options, repo=""):
        target = tmp_path / ("hub" if repo else kind)
        if not target.exists():
            work = environment | {"COURSE_WORK": str(MADE.parent)}
            subprocess.run([*tiny, kind, str(target), *([repo] if repo else [])], env=work, check=True)
            (tmp_path / "work").mkdir()
            (tmp_path / "work" / "models").symlink_to(MADE)
        command = [sys.executable, "-m", "tools.run", "--profile", "smoke", "--model", repo or str(target), *options]
        work = environment | {"COURSE_WORK": str(tmp_path / "work")}
        return subprocess.run(command, cwd=ROOT, env=work, capture_output=True, text=True, timeout=4500)

    return execute


def assert_done(done, *labs):
    expected = [run.title(file) for lab in labs for file in run.find_notebooks(lab)]
    assert done.returncode == 0, done.stdout[-4000:]
    assert expected and all(f"✅ {title}" in done.stdout for title in expected)


@pytest.mark.parametrize("lab", ["3.1", "3.2", "3.3"])
def test_a_hub_id_in_the_cache_through_all_twelve(notebooks, lab):
    assert_done(notebooks("qwen3", "--lab", lab, repo="tiny/qwen3-like"), lab)


@pytest.mark.nightly
@pytest.mark.parametrize("lab", ["3.1", "3.2", "3.3"])
def test_a_folder_of_gemma_through_all_twelve(notebooks, lab):
    assert_done(notebooks("gemma2", "--lab", lab), lab)


@pytest.mark.nightly
@pytest.mark.parametrize("lab", ["3.2", "3.3"])
def test_a_folder_of_fused_experts_through_the_notebooks_that_take_it(notebooks, lab):
    assert_done(notebooks("mixtral", "--lab", lab), lab)


@pytest.mark.nightly
def test_fused_experts_are_refused_where_the_file_format_has_no_place_for_them(notebooks):
    done = notebooks("mixtral", "--lab", "3.1")
    assert done.returncode == 1
    assert "MixtralForCausalLM does not have what this step needs (layer files)" in done.stdout
    assert "✅ Lab-3.1-Quantization/01-Setup" in done.stdout
    assert "❌ Lab-3.1-Quantization/02-Quantize" in done.stdout
