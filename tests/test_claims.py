"""What the course promises of its committed figures, whatever machine they came from: results/claims.toml."""

import pytest

from tools import claims, tables

CLAIMS = claims.load(claims.FILE.read_text(encoding="utf-8"))
RECORDS = tables.committed()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.text[:60])
def test_claim(claim):
    if claim.until != "9999" and not claims.about(claim, RECORDS):
        pytest.skip("about a recording that is no longer committed: take the claim out")
    assert claims.failures(claim, RECORDS) == []


def test_a_claim_of_old_weights_says_so():
    """Records before 2026-11-30 are of the embedded weights as shipped."""
    assert all("as shipped" in claim.text for claim in CLAIMS if claim.until != "9999")


def set_values(change):
    return [r | {"value": change(n, r["value"])} for n, r in enumerate(RECORDS)]


FAULTS = [
    set_values(lambda n, v: -v),
    set_values(lambda n, v: 1 / (v + 1e-9)),
    set_values(lambda n, v: 1000 * v + 1000),
    set_values(lambda n, v: 1.0),
    set_values(lambda n, v: (n * 7919 % 101 + 1) * v),  # each by another factor
    RECORDS[::5],  # four figures in five are lost
]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.text[:60])
def test_every_claim_can_fail(claim):
    """On figures that a fault has touched."""
    if claims.about(claim, RECORDS):
        assert any(claims.failures(claim, records) for records in FAULTS)
