"""The nightly's comparison: what rounding does passes, what a bug does is named."""

import json

import pytest

from tools import drift, tables

LABS = {"quantization", "pruning", "distillation"}


def record(key="perplexity", value=14.11, unit="ppl", **changes):
    return {
        "lab": "quantization",
        "notebook": "02-Quantize",
        "key": key,
        "artifact": "gptq",
        "value": value,
        "unit": unit,
        "protocol": {"windows": 48},
        "model": "embedded",
        "profile": "gpu",
        "device": "NVIDIA H100",
    } | changes


@pytest.mark.parametrize(
    ("key", "unit", "committed", "same", "different"),
    [
        ("perplexity", "ppl", 14.11, 14.5, 15.0),
        ("perplexity", "ppl", 14.11, 13.9, float("nan")),
        ("kl", "nats/token", 0.1354, 0.1483, 0.16),
        ("top1", "share", 0.832, 0.82, 0.79),
        ("bytes", "bytes", 114_620_808, 114_620_900, 118_000_000),
        ("weights-memory", "MB", 269.0, 270.0, 538.0),
        ("notebook-memory", "GiB", 3.9, 4.5, 6.0),
        ("notebook-seconds", "s", 92.0, 150.0, 300.0),
    ],
)
def test_rounding_passes_and_a_bug_does_not(key, unit, committed, same, different):
    old = [record(key, committed, unit)]
    assert drift.compare(old, [record(key, same, unit)]) == []
    (line,) = drift.compare(old, [record(key, different, unit)])
    assert line.startswith(f"❌ quantization 02-Quantize: gptq {key} is ")
    assert "committed" in line


def test_speeds_are_not_compared_and_memory_only_on_the_same_device():
    old = [record("tpot-p50", 3.3, "ms"), record("service-overhead", 0.05, "share"), record("peak-memory", 300, "MB")]
    elsewhere = {"device": "NVIDIA A10"}
    new = [record("tpot-p50", 9.9, "ms"), record("service-overhead", 0.4, "share")]
    assert drift.compare(old, [*new, record("peak-memory", 900, "MB", **elsewhere)]) == []
    assert len(drift.compare(old, [*new, record("peak-memory", 900, "MB")])) == 1


def test_what_was_not_measured_or_under_another_protocol_is_missing():
    (line,) = drift.compare([record()], [record(protocol={"windows": 12})])
    assert line == "❌ quantization 02-Quantize: gptq perplexity is committed, and this run did not measure it"


def test_the_run_s_own_device_is_compared_first():
    here, elsewhere = record(value=20.0), record(value=14.0, device="NVIDIA A10")
    for committed in ([here, elsewhere], [elsewhere, here]):
        assert drift.compare(committed, [record(value=20.1)]) == []
        assert drift.compare(committed, [record(value=14.1, device="NVIDIA A10")]) == []
        assert len(drift.compare(committed, [record(value=14.1)])) == 1


def test_every_committed_unit_has_a_tolerance():
    with pytest.raises(ValueError, match="no tolerance"):
        drift.compare([record(unit="furlongs")], [record(unit="furlongs")])
    committed = [r for r in tables.committed() if r["lab"] in LABS]
    assert committed
    for one in committed:
        assert drift.moved(one, one) == ""


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COURSE_WORK", str(tmp_path))
    monkeypatch.setattr(tables, "committed", lambda: [record(), record(lab="shape"), record(profile="cpu")])
    assert drift.main([]) == 1
    assert "❌ Nothing to compare" in capsys.readouterr().out
    file = tmp_path / "results" / "nvidia-h100" / "gpu" / "quantization.json"
    file.parent.mkdir(parents=True)
    for value, status in ((14.2, 0), (141.1, 1)):
        file.write_text(json.dumps([record(value=value), record(value=1.0, model="another")]))
        assert drift.main([]) == status
    assert "141.1 ppl, 14.11 committed" in capsys.readouterr().out
