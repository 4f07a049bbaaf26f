"""What the course promises of its committed figures, whatever machine they came from."""

import pytest

from common import tables

RECORDS = tables.committed()


def devices(notebook: str) -> list[str]:
    """Machines on which a pruning notebook was measured."""
    return sorted({r["device"] for r in RECORDS if (r["lab"], r["notebook"]) == ("pruning", notebook)})


def figures(device: str, lab: str, notebook: str, key: str) -> dict[str, float]:
    """Artifact → value of one key."""
    wanted = (device, lab, notebook, key)
    return {r["artifact"]: r["value"] for r in RECORDS if (r["device"], r["lab"], r["notebook"], r["key"]) == wanted}


@pytest.mark.parametrize("notebook", ["01-Setup", "02-Prune", "03-Inference", "04-Benchmark_and_Analysis"])
def test_pruning_was_measured_on_a_gpu_and_on_a_cpu(notebook):
    assert any("NVIDIA" in device for device in devices(notebook))
    assert any("CPU" in device for device in devices(notebook))


@pytest.mark.parametrize("device", devices("03-Inference"))
def test_pruning_is_as_good_as_the_libraries(device):
    """llm-compressor on the same calibration and test tokens: Wanda 32.08, SparseGPT 26.94 (FACTS, 50 %)."""
    perplexity = figures(device, "pruning", "03-Inference", "perplexity")
    assert perplexity["original"] == pytest.approx(12.66, abs=0.05)
    assert perplexity["wanda"] <= 32.1
    assert perplexity["sparsegpt"] <= 26.9
    assert perplexity["magnitude"] > 8 * perplexity["wanda"]
    assert perplexity["sparsegpt"] < perplexity["wanda"]
    kl = figures(device, "pruning", "03-Inference", "kl")
    assert kl["sparsegpt"] < kl["wanda"] < kl["magnitude"]


@pytest.mark.parametrize("device", devices("04-Benchmark_and_Analysis"))
def test_methods_keep_their_order(device):
    perplexity = figures(device, "pruning", "04-Benchmark_and_Analysis", "perplexity")
    for amount in ("50", "70"):
        assert max(perplexity[f"sparsegpt-{amount}"], perplexity[f"wanda-{amount}"]) < perplexity[f"magnitude-{amount}"]
    assert perplexity["sparsegpt-50"] < perplexity["wanda-50"]
    assert perplexity["sparsegpt-2-4"] < perplexity["wanda-2-4"]
    assert perplexity["GPTQ 3-bit"] < perplexity["SparseGPT → GPTQ"] < perplexity["Wanda → GPTQ"]  # at equal size


@pytest.mark.parametrize("device", [d for d in devices("02-Prune") if "NVIDIA" in d])
def test_where_the_zeros_are_matters_on_48_windows(device):
    """On a CPU, 6 windows and 16 calibration windows are too few to tell OWL from a uniform plan."""
    perplexity = figures(device, "pruning", "02-Prune", "perplexity")
    assert perplexity["wanda-70 OWL"] < perplexity["wanda-70 uniform"] < perplexity["wanda-70 one threshold"]
    once = figures(device, "pruning", "04-Benchmark_and_Analysis", "perplexity")
    assert once["wanda-70 sensitivity"] < once["wanda-70 uniform"]
    assert once["sparsegpt-70"] < once["wanda-70"]


@pytest.mark.parametrize("device", devices("02-Prune"))
def test_packed_files_are_smaller(device):
    dense = figures(device, "pruning", "02-Prune", "layout-bytes")
    packed = figures(device, "pruning", "02-Prune", "bytes")
    assert packed["wanda"] < 0.7 * dense["original / pruned, stored dense"] < dense["pruned, CSR"]
