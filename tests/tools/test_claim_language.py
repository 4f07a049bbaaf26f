"""The language of claims: a false one fails, another device or recording breaks none."""

import json

import pytest

from tools import claims

HEAD = '[[claim]]\ntext = "Wanda is better"\nlab = "pruning"\nnotebook = "02-Prune"\n'
TEXT = HEAD + "figures = { ppl = \"perplexity\" }\nholds = [\"ppl['wanda'] < 0.5 * ppl['magnitude']\"]\n"


def record(artifact, value, device="NVIDIA H100", key="perplexity", notebook="02-Prune", **changes):
    plain = {"lab": "pruning", "notebook": notebook, "key": key, "artifact": artifact, "value": value, "spread": None}
    return plain | {"device": device, "date": "2026-11-27", "protocol": {"cap": 15}} | changes


def both(wanda, magnitude, device="NVIDIA H100", **changes):
    return [record("wanda", wanda, device, **changes), record("magnitude", magnitude, device, **changes)]


def claim(text=TEXT, **changes):
    """A claim with further fields, which are written as TOML, like JSON."""
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in changes.items())
    (found,) = claims.load(text + lines)
    return found


def test_a_true_claim_holds_and_a_false_one_says_what_does_not():
    assert claims.failures(claim(), both(10.0, 30.0)) == []
    (line,) = claims.failures(claim(), both(20.0, 30.0))
    assert line == "NVIDIA H100: ppl['wanda'] < 0.5 * ppl['magnitude'], with ppl['wanda'] = 20, ppl['magnitude'] = 30"


def test_a_second_gpu_and_a_new_recording_are_held_to_it_and_what_they_did_not_run_is_no_matter():
    old = both(10.0, 30.0)
    assert claims.failures(claim(), old + both(9.0, 31.0, "NVIDIA H200", date="2026-12-01")) == []
    assert claims.failures(claim(), old + both(30.0, 31.0, "NVIDIA H200")) != []
    assert claims.failures(claim(), [*old, record("wanda", 30.0, "NVIDIA H200", notebook="01-Setup")]) == []
    assert claims.failures(claim(devices="H100"), old + both(30.0, 31.0, "NVIDIA H200")) == []


def test_a_claim_about_nothing_and_a_missing_figure_are_false():
    assert claims.failures(claim(), []) == ["there is no record that it speaks of"]
    assert claims.failures(claim(devices="CPU"), both(10.0, 30.0)) == ["there is no record that it speaks of"]
    (line,) = claims.failures(claim(), [record("wanda", 10.0)])
    assert "no figure of 'magnitude'" in line


def test_one_device_is_enough_where_the_claim_says_so():
    mixed = both(10.0, 30.0) + both(30.0, 30.0, "NVIDIA H200")
    assert claims.failures(claim(), mixed) != []
    assert claims.failures(claim(some=True), mixed) == []
    assert claims.failures(claim(some=True), both(30.0, 30.0)) != []


def test_an_old_recording_is_not_confused_with_a_new_one():
    new = both(30.0, 30.0, "NVIDIA H200", date="2026-12-01")
    assert claims.failures(claim(until="2026-11-29"), both(10.0, 30.0) + new) == []
    assert claims.about(claim(until="2026-11-29"), new) == {}


def test_protocol_and_rows_that_a_claim_needs():
    text = TEXT + "protocol = { cap = 16 }\n"
    with pytest.raises(ValueError, match="was measured under"):
        claims.failures(claim(text), both(10.0, 30.0))
    assert claims.about(claim(needs="sparsegpt"), both(10.0, 30.0)) == {}


@pytest.mark.parametrize(
    ("holds", "true"),
    [
        ("max(ppl) == 30", True),
        ("min(ppl['wanda'], 11) + abs(1 - 2) == 11", True),
        ("len(ppl) == 3", False),
        ("1 < 2 < 1.5", False),
        ("spread['wanda'] <= 0.25 < other['original'] / 2", True),
        ("len(every) == 3 and 1", None),
        ("__import__('os')", None),
        ("ppl['wanda'].real > 1", None),
    ],
)
def test_the_language_is_arithmetic_and_comparison_only(holds, true):
    figures = '{ ppl = "perplexity", spread = "perplexity:spread", other = "01-Setup/perplexity", every = "*" }'
    found = claim(HEAD + f"figures = {figures}\n", holds=[holds])
    records = [*both(10.0, 30.0, spread=0.2), record("original", 5.0, notebook="01-Setup")]
    if true is None:
        with pytest.raises(SyntaxError):
            claims.failures(found, records)
    else:
        assert (claims.failures(found, records) == []) == true


def test_a_claim_says_something_and_nothing_else():
    with pytest.raises(ValueError, match="needs `holds` or one relation"):
        claims.load(HEAD)
    with pytest.raises(ValueError, match="needs `holds` or one relation"):
        claims.load(HEAD + 'relation = "nothing"\n')
    with pytest.raises(TypeError, match="colour"):
        claims.load(TEXT + 'colour = "red"\n')


def ranked(gpu, cpu, spread=0.1):
    names = [f"m{n}" for n in range(len(gpu))]
    many = [record(name, value, "NVIDIA H100") for name, value in zip(names, gpu, strict=True)]
    return many + [record(n, v, "AMD CPU", spread=spread) for n, v in zip(names, cpu, strict=True)]


def test_another_order_on_the_cpu_is_false_unless_it_is_within_what_the_cpu_can_tell():
    found = claim(HEAD + 'relation = "ranks alike on CPU and GPU"\n', at_least=10)
    same, order = [10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0], [10.0, 11.0, 12.5, 12.4, 14.0, 15.0, 16.0]
    assert claims.failures(found, ranked(same, same)) == []
    assert claims.failures(found, ranked(same, order)) == []  # one pair of 21, by less than its errors
    assert claims.failures(found, ranked(same, order, spread=0.01)) == ["m2, m3"]
    assert "2 of 21 pairs swapped" in claims.failures(found, ranked(same, [10.1, 10.0, *order[2:]]))[-1]
    assert claims.failures(found, ranked(same[:3], same[:3])) == ["3 pairs of methods were compared"]


def test_a_library_that_is_better_or_faster_makes_the_claim_false():
    found = claim(HEAD + 'relation = "no library is better or faster"\n')

    def rows(ours=10.0, library=10.5, rtn=12.0, seconds=1.0, spread=0.05):
        figures = {"ours": ours, "GPTQModel": library, "RTN": rtn}
        found = [record(f"gptq-w4/{name}", value) for name, value in figures.items()]
        found += [record(f"gptq-w4/{name}", s, key="seconds") for name, s in (("ours", seconds), ("GPTQModel", 2.0))]
        return [*found, record("gptq-w4/ours", spread, key="perplexity-spread")]

    assert claims.failures(found, rows()) == []
    assert claims.failures(found, rows(library=9.98)) == []  # within what other calibration data change
    for wrong, said in (({"library": 9.9}, "GPTQModel 9.90"), ({"rtn": 9.9}, "RTN"), ({"seconds": 3.0}, "less time")):
        assert said in claims.failures(found, rows(**wrong))[0]
    assert claims.failures(found, both(10.0, 30.0)) == ["NVIDIA H100: 0 settings were compared"]
