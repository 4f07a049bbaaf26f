"""What the three theory documents have in common; their numbers are recomputed in test_theory_*.py."""

import re
import runpy
from pathlib import Path

import pytest
from theory_tools import THEORY, read, run_blocks

NAMES = ("3.1-Quantization", "3.2-Pruning", "3.3-Knowledge_Distillation")


@pytest.mark.parametrize("name", NAMES)
def test_every_block_prints_what_the_document_says(name):
    printed = run_blocks(name)[1]
    assert len(printed) == read(name).count("```python\n") > 0
    for ours, stated in printed:
        assert ours == stated


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_drawn_and_all_are_shown(name, tmp_path):
    script = THEORY / "figures" / f"draw_{re.split('[-_]', name)[-1].lower()}.py"
    runpy.run_path(str(script))["main"](tmp_path)
    drawn = {file.name for file in tmp_path.iterdir()}
    handout = next(THEORY.parent.glob(f"Lab-{name.split('-')[0]}-*/README.md"))
    pages = read(name) + handout.read_text(encoding="utf-8")
    assert drawn == {Path(link).name for link in re.findall(r"!\[[^\]]+\]\((?:\.\./theory/)?(figures/[^)]+)\)", pages)}
    assert all((script.parent / file).exists() for file in drawn)
