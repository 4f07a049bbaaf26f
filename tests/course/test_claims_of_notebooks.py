"""Claims stop where the course vouches for the model and are told elsewhere; what is broken stops everywhere."""

import json

import nbformat
import pytest

from common.course import claims, environment
from common.course.settings import CHAPTER, load_settings

CLAIM = "Wanda's perplexity 30.9 is below magnitude's 302.9"


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """A test's models do not stay behind."""
    monkeypatch.setattr(claims, "_models", claims._models)


@pytest.fixture
def stand_in(tmp_path):
    (tmp_path / "artifact.json").write_text(json.dumps({"name": "llama-2-7b", "method": "stand-in"}))
    return str(tmp_path)


@pytest.mark.parametrize("models", [("embedded",), ("embedded-as-shipped",), ("embedded", "layers")])
def test_a_false_claim_about_a_vouched_model_stops(models, capsys):
    claims.about(*models)
    claims.check(True, CLAIM)
    assert capsys.readouterr().out == f"✅ {CLAIM}\n"
    with pytest.raises(AssertionError, match=f"should hold and does not: {CLAIM}"):
        claims.check(False, CLAIM)


@pytest.mark.parametrize("models", [("a/b",), ("embedded", "a/b"), ("a/b", "layers")])
def test_a_false_claim_about_ones_own_model_is_told_and_the_notebook_goes_on(models, capsys):
    claims.about(*models)
    claims.check(False, CLAIM)
    claims.check(True, CLAIM)
    told, held = capsys.readouterr().out.splitlines()
    assert told.startswith(f"❌ not so with a/b: {CLAIM}")
    assert held == f"✅ {CLAIM}"


@pytest.mark.parametrize("condition", [True, False])
def test_a_claim_of_quality_does_not_apply_to_random_weights(condition, stand_in, capsys):
    for model in (stand_in, "shape:llama-2-7b"):
        claims.about(model, "layers")
        claims.check(condition, CLAIM)
        assert capsys.readouterr().out == f"➖ does not apply to random weights: {CLAIM}\n"


def test_a_claim_of_speed_applies_to_random_weights(stand_in, capsys):
    claims.about(stand_in)
    claims.check(True, "half the blocks are faster", speed=True)
    claims.check(False, "half the blocks are faster", speed=True)
    assert [line[0] for line in capsys.readouterr().out.splitlines()] == ["✅", "❌"]


def test_another_artifact_is_no_stand_in(tmp_path):
    (tmp_path / "artifact.json").write_text(json.dumps({"name": "mine", "method": "gptq"}))
    assert not claims.is_stand_in(str(tmp_path))
    assert not claims.is_stand_in("embedded")


def test_a_broken_computation_stops_everywhere(stand_in, capsys):
    for model in ("embedded", "a/b", stand_in):
        claims.about(model)
        claims.verify(True, "the file reads back bit for bit")
        assert capsys.readouterr().out == "✅ the file reads back bit for bit\n"
        with pytest.raises(AssertionError, match="Something is broken: not true that the file reads back"):
            claims.verify(False, "the file reads back bit for bit")


def test_prepare_says_whom_the_claims_are_about():
    environment.prepare("distillation", "", "smoke", "a/b", "c/d")
    assert claims._models == ("a/b", "c/d")
    environment.prepare("pruning", "", "smoke")
    assert claims._models == ("embedded", "layers")


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """What `prepare` displays for a notebook of this folder, by MIME type."""

    def show(*cells):
        folder = tmp_path / "Lab-3.2-Pruning"
        folder.mkdir(exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), folder / "02-Prune.ipynb")
        displayed = []
        monkeypatch.setattr(environment, "CHAPTER", tmp_path)
        monkeypatch.setattr(environment, "display", lambda data, raw: displayed.append(data))
        environment.prepare("pruning", "02-Prune", "smoke")
        return displayed[0]

    return show


def test_folded_settings_are_those_that_the_code_names(shown):
    code, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    both = shown(
        text("Try `settings.replace(high_sparsity=0.8)`, or settings.owl_span."),
        code('prepare("pruning", "02-Prune", PROFILE, MODEL)\nx = settings.sparsity', outputs=[]),
        code("settings.device, settings.artifacts, mysettings.bits\nprint(f'{settings.nsamples}')"),
    )
    settings = load_settings("pruning", "smoke")
    plain = both["text/plain"]
    assert [line.split()[0] for line in plain.splitlines()] == ["sparsity", "nsamples"]
    for name in ("sparsity", "nsamples"):
        assert str(getattr(settings, name)) in plain
        assert settings.documentation[name] in plain
    html = both["text/html"]
    assert html.startswith("<details><summary>")
    assert "OWL" not in html
    assert all(line.split()[0] in html for line in plain.splitlines())


def test_values_are_escaped_in_html(shown, monkeypatch):
    monkeypatch.setattr(
        environment, "load_settings", lambda *_: load_settings("pruning", "smoke").replace(corpus="<b>")
    )
    both = shown(nbformat.v4.new_code_cell("settings.corpus"))
    assert "<b>" in both["text/plain"]
    assert "&lt;b&gt;" in both["text/html"]
    assert "<b>" not in both["text/html"]


def test_every_notebook_of_the_labs_is_found():
    """`prepare` shows the settings of the file that it is called from: its arguments name it."""
    notebooks = sorted(CHAPTER.glob("Lab-*/[0-9]*.ipynb"))
    assert notebooks
    for file in notebooks:
        lab = file.parent.name.split("-")[-1].lower()
        code = "\n".join(c.source for c in nbformat.read(file, as_version=4).cells if c.cell_type == "code")
        assert f'prepare("{lab}", "{file.stem}", PROFILE, ' in code
