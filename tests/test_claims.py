"""What the course promises of its committed figures, whatever machine they came from."""

from itertools import combinations

import pytest

from tools import tables

RECORDS = tables.committed()


def devices(notebook: str, lab: str = "pruning") -> list[str]:
    """Machines on which a notebook was measured."""
    return sorted({r["device"] for r in RECORDS if (r["lab"], r["notebook"]) == (lab, notebook)})


def figures(device: str, lab: str, notebook: str, key: str, what: str = "value") -> dict[str, float]:
    """Artifact → value, or spread, of one key."""
    wanted = (device, lab, notebook, key)
    return {r["artifact"]: r[what] for r in RECORDS if (r["device"], r["lab"], r["notebook"], r["key"]) == wanted}


STUDENTS = ("distillation", "04-Compare_and_Deploy")  # trained for some steps on a CPU, to the end on a GPU


def on_both() -> list[tuple[str, str, str, str]]:
    """(lab, notebook, CPU, GPU) for every notebook whose perplexities were recorded on both."""
    where = {(r["lab"], r["notebook"], r["device"]) for r in RECORDS if r["key"] == "perplexity"}
    pairs = [(*a[:2], a[2], b[2]) for a in where for b in where if a[:2] == b[:2]]
    return sorted(pair for pair in pairs if "CPU" in pair[2] and "NVIDIA" in pair[3] and pair[:2] != STUDENTS)


@pytest.mark.parametrize(("lab", "notebook", "cpu", "gpu"), on_both())
def test_methods_rank_the_same_on_cpu_and_gpu(lab, notebook, cpu, gpu):
    """What stands in another order on the CPU, which saw fewer windows, differs there by less than it can tell."""
    few, many = (figures(device, lab, notebook, "perplexity") for device in (cpu, gpu))
    errors = figures(cpu, lab, notebook, "perplexity", "spread")
    errors = {name: 0.03 * few[name] if error is None else error for name, error in errors.items()}
    pairs = list(combinations(sorted(few.keys() & many.keys()), 2))
    swapped = [(a, b) for a, b in pairs if (few[a] - few[b]) * (many[a] - many[b]) < 0]
    told_apart = [(a, b) for a, b in swapped if abs(many[a] - many[b]) > 0.01 * many[a]]  # OWL and uniform are not
    assert [(a, b) for a, b in told_apart if abs(few[a] - few[b]) > errors[a] + errors[b]] == []
    assert len(swapped) <= len(pairs) / 20


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
    """OWL and a uniform plan are not told apart here; one threshold for all layers is far worse."""
    perplexity = figures(device, "pruning", "02-Prune", "perplexity")
    assert perplexity["wanda-70 OWL"] < 1.01 * perplexity["wanda-70 uniform"] < perplexity["wanda-70 one threshold"]
    once = figures(device, "pruning", "04-Benchmark_and_Analysis", "perplexity")
    assert once["wanda-70 sensitivity"] < once["wanda-70 uniform"]
    assert once["sparsegpt-70"] < once["wanda-70"]


@pytest.mark.parametrize("device", devices("02-Prune"))
def test_packed_files_are_smaller(device):
    dense = figures(device, "pruning", "02-Prune", "layout-bytes")
    packed = figures(device, "pruning", "02-Prune", "bytes")
    assert packed["wanda"] < 0.7 * dense["original / pruned, stored dense"] < dense["pruned, CSR"]


# --- quantization and deployment ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", devices("03-Inference", "quantization"))
def test_quantization_is_as_good_as_the_libraries(device):
    """llm-compressor on the same tokens: 14.73 (FACTS, 4 bits, groups of 64, asymmetric)."""
    perplexity = figures(device, "quantization", "03-Inference", "perplexity")
    assert perplexity["original"] == pytest.approx(12.66, abs=0.05)
    assert perplexity["gptq"] <= 14.73


@pytest.mark.parametrize("device", devices("02-Quantize", "quantization"))
def test_the_file_has_the_size_that_the_text_explains(device):
    size = figures(device, "quantization", "02-Quantize", "bytes")
    assert size["gptq"] == 114_620_808  # the same on every machine


def test_engines_were_measured():
    assert devices("04-Deploy", "quantization")


@pytest.mark.parametrize("device", devices("04-Deploy", "quantization"))
def test_llama_cpp_computes_the_same_and_fewer_bits_cost_more(device):
    top1 = figures(device, "quantization", "04-Deploy", "engine-top1")
    assert top1["gguf-f16"] >= 0.99
    kl = figures(device, "quantization", "04-Deploy", "engine-kl")
    assert kl["gguf-f16"] < kl["gguf-Q8_0"] < kl["gguf-Q4_K_M"] < kl["gguf-Q2_K"]
    assert kl["gguf-gptq → Q4_K_M"] > kl["gguf-Q4_K_M"]  # rounded twice
    rate = figures(device, "quantization", "04-Deploy", "engine-decode")
    if "gguf-f16" in rate:  # a CPU waits for memory, not for products
        assert 1.1 * rate["gguf-f16"] < rate["gguf-Q8_0"] < rate["gguf-Q2_K"]


@pytest.mark.parametrize("device", devices("04-Deploy", "quantization"))
def test_batching_pays_and_the_service_costs_little(device):
    assert figures(device, "quantization", "04-Deploy", "batching-gain")["gptq"] >= 2.5
    assert figures(device, "quantization", "04-Deploy", "service-overhead")["gptq"] <= 0.1


@pytest.mark.parametrize("device", devices("04-Deploy", "quantization"))
def test_four_bits_do_not_pay_for_a_model_this_small(device):
    """In vLLM: slower on the CPU; on an H100 within what two runs of the same thing differ by, far from 4 times."""
    slack = 1.5 if "NVIDIA" in device else 1.0
    for key in ("engine-ttft", "engine-tpot"):
        delay = figures(device, "quantization", "04-Deploy", key)
        assert slack * delay["vLLM awq-format"] > delay["vLLM original"]
    busiest = "engine-throughput-32" if "NVIDIA" in device else "engine-throughput-8"
    rate = figures(device, "quantization", "04-Deploy", busiest)
    assert rate["vLLM awq-format"] < slack * rate["vLLM original"]


# --- distillation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", devices("03-Distill_Student", "distillation"))
def test_the_teacher_is_worth_listening_to(device):
    kl = figures(device, "distillation", "03-Distill_Student", "trained-kl")
    assert max(kl["CE + KD"], kl["KD only"]) < kl["CE only"]
    assert kl["KD only"] < kl["shuffled teacher"]


@pytest.mark.parametrize("device", [d for d in devices("03-Distill_Student", "distillation") if "NVIDIA" in d])
def test_half_the_blocks_learn_from_the_teacher_what_fine_tuning_does_not_teach(device):
    once = figures(device, "distillation", "03-Distill_Student", "trained-perplexity")
    spread = figures(device, "distillation", "03-Distill_Student", "trained-perplexity", "spread")
    assert once["CE + KD"] < 0.95 * once["CE only"]
    assert once["CE only"] - once["CE + KD"] > 30 * max(spread["CE only"], spread["CE + KD"])
    assert once["CE + KD"] < min(once["CE + KD + MiniLM"], once["CE + KD + written text"], once["KD only"])
    teacher = figures(device, "distillation", "01-Setup", "perplexity")["original"]
    long = figures(device, "distillation", "03-Distill_Student", "long-perplexity")
    assert long["CE + KD"] < 1.8 * teacher
    assert long["CE only"] > 1.1 * once["CE only"]  # learnt by heart
    assert long["CE + KD"] < 0.95 * once["CE + KD"]  # still learning
    kl = figures(device, "distillation", "03-Distill_Student", "trained-kl")
    assert kl["KD only"] == min(kl.values())
    assert kl["CE + KD + written text"] < kl["CE + KD"] < kl["CE + KD + MiniLM"]


@pytest.mark.parametrize("device", devices("03-Distill_Student", "distillation"))
def test_stored_labels_save_the_teachers_forward_pass(device):
    rate = figures(device, "distillation", "03-Distill_Student", "training-rate")
    assert rate["teacher in the loop"] * 1.3 < rate["stored soft labels"] < rate["CE only"]
    if "NVIDIA" in device:  # where nobody waits for Python, arithmetic is the limit
        assert rate["stored soft labels"] < 1.55 * rate["teacher in the loop"]


@pytest.mark.parametrize("device", [d for d in devices(STUDENTS[1], STUDENTS[0]) if "NVIDIA" in d])
def test_what_distillation_is_good_for_and_what_not(device):
    """Quantization alone is smaller and better; at half the products a student is better than pruning, and faster."""
    perplexity, size = (figures(device, *STUDENTS, key) for key in ("perplexity", "bytes"))
    assert (
        perplexity["teacher + GPTQ"] < perplexity["student"] < perplexity["student-ce"] < perplexity["teacher + Wanda"]
    )
    assert size["student + GPTQ"] < size["teacher + GPTQ"] < size["student"]
    assert perplexity["student + GPTQ"] < 1.04 * perplexity["student"]
    assert perplexity["B, pruned and 4 bits"] < 0.85 * perplexity["A, pruned and 4 bits"]


def test_distillation_of_the_gpu_profile_takes_less_than_four_minutes_and_a_small_card():
    own = {r["key"]: r["value"] for r in RECORDS if (r["notebook"], r["profile"]) == ("03-Distill_Student", "gpu")}
    assert own["notebook-seconds"] < 240
    assert own["notebook-gpu-memory"] < 15


# --- side by side with other libraries ------------------------------------------------------------------------------


def benchmark(device: str, key: str) -> dict[str, dict[str, float]]:
    """setting → library → value."""
    found: dict[str, dict[str, float]] = {}
    for artifact, value in figures(device, "benchmark", "bench", key).items():
        setting, _, library = artifact.partition("/")
        found.setdefault(setting, {})[library] = value
    return found


CALIBRATED = ("gptq-", "wanda-", "sparsegpt-", "awq-", "smoothquant-")


def compared(artifact: str) -> list[str]:
    """Machines on which the benchmark got to a row."""
    return [
        device for device in devices("bench", "benchmark") if artifact in figures(device, "benchmark", "bench", "runs")
    ]


@pytest.mark.parametrize("device", devices("bench", "benchmark"))
def test_no_library_is_better_or_faster(device):
    """The best perplexity, or within what other calibration data change (1 % where not measured); the least time."""
    perplexity, seconds = benchmark(device, "perplexity"), benchmark(device, "seconds")
    spread = benchmark(device, "perplexity-spread")
    others = {
        name: [library for library in found if not library.startswith(("ours", "RTN"))]
        for name, found in perplexity.items()
        if name.startswith(CALIBRATED)
    }
    settings = [setting for setting, libraries in others.items() if libraries]
    assert len(settings) == (9 if "NVIDIA" in device else 8)  # llm-compressor's AWQ needs a GPU
    for setting in settings:
        for library in others[setting]:
            noise = spread.get(setting, {}).get("ours", 0.01 * perplexity[setting]["ours"])
            assert perplexity[setting]["ours"] < perplexity[setting][library] + noise, (setting, library)
            assert seconds[setting]["ours"] < seconds[setting][library], (setting, library)
        if "RTN" in perplexity[setting]:
            assert perplexity[setting]["ours"] < perplexity[setting]["RTN"]


@pytest.mark.parametrize("device", compared("kd-step/ours"))
def test_distillation_steps_compute_what_trl_computes(device):
    loss = figures(device, "benchmark", "bench", "first-loss")
    assert loss["kd-step/ours"] == pytest.approx(loss["kd-step/TRL"], rel=1e-5)
    assert loss["kd-step/ours, stored labels"] < loss["kd-step/ours"]  # top-k + tail: a lower bound
    step = figures(device, "benchmark", "bench", "step-seconds")
    assert step["kd-step/ours"] < 1.1 * step["kd-step/TRL"]
    assert step["kd-step/ours, stored labels"] * (1.25 if "NVIDIA" in device else 1.5) < step["kd-step/ours"]


@pytest.mark.parametrize("device", compared("reference/lm-eval"))
def test_perplexity_is_that_of_lm_eval(device):
    ours = figures(device, "benchmark", "bench", "perplexity-ours")["reference/lm-eval"]
    theirs = figures(device, "benchmark", "bench", "perplexity-lm-eval")["reference/lm-eval"]
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_a_softmax_in_bfloat16_changes_the_perplexity():
    """lm-eval's default, on a bfloat16 model: by thousands of times more than the two protocols differ."""
    gpus = [device for device in compared("reference/lm-eval") if "NVIDIA" in device]
    assert gpus
    for device in gpus:
        own = figures(device, "benchmark", "bench", "perplexity-lm-eval-default")["reference/lm-eval"]
        wide = figures(device, "benchmark", "bench", "perplexity-lm-eval")["reference/lm-eval"]
        assert abs(own / wide - 1) > 0.002


def test_wanda_as_its_authors_do_it_is_worth_a_percent_in_bfloat16():
    """Observing a whole block before pruning it, against layer by layer; in float32 on the CPU within the spread."""
    assert len(devices("bench", "benchmark")) == 2
    for device in devices("bench", "benchmark"):
        both = {key: benchmark(device, key)["wanda-50"] for key in ("perplexity", "perplexity-spread")}
        gain = both["perplexity"]["ours, layer by layer"] - both["perplexity"]["ours"]
        spread = max(both["perplexity-spread"][name] for name in ("ours", "ours, layer by layer"))
        assert gain > 2 * spread if "NVIDIA" in device else abs(gain) < spread


# --- the 7B shape ----------------------------------------------------------------------------------------------------

SHAPE = [r for r in RECORDS if r["lab"] == "shape"]


def shape_figures(key: str) -> dict[str, float]:
    return {r["artifact"]: r["value"] for r in SHAPE if r["key"] == key}


def test_no_decoding_step_is_faster_than_reading_what_it_needs():
    """A share above 1 means work that is missing: a kernel that a CUDA graph does not hold, as happened once."""
    shares = [r["value"] for r in SHAPE if r["key"].startswith("floor-share")]
    assert len(shares) >= 15
    assert min(shares) > 0
    assert max(shares) < 1


def test_four_bits_decode_faster_with_the_right_kernel_only():
    one, many = shape_figures("speedup-b1"), shape_figures("speedup-b32")
    assert shape_figures("floor-share-b1")["original"] >= 0.7
    assert one["triton-int4"] >= 2.2  # what was aimed at
    assert 1.9 < one["torch-int4"] < 2.2 and 1.9 < one["gptq-marlin"] < 2.2
    assert one["gptq-triton"] < 0.5
    assert many["torch-int4"] < 0.5 and many["gptq-marlin"] > 1.3


def test_seven_billion_parameters_are_compressed_in_minutes_within_a_small_cards_memory():
    seconds = {key: shape_figures(f"{key}-seconds") for key in ("gptq-32", "gptq-128", "wanda-128")}
    assert seconds["gptq-32"]["common"] < seconds["gptq-32"]["GPTQModel"]
    assert seconds["gptq-128"]["common"] <= 240
    assert seconds["wanda-128"]["common"] <= 90
    peaks = [r for r in SHAPE if r["key"].endswith("-peak")]
    assert len(peaks) == 4
    assert all(r["value"] <= 15 and r["protocol"]["cap GiB"] == 15 for r in peaks)


def test_gptq_of_the_embedded_model_takes_seconds_on_a_gpu():
    timed = [r for r in RECORDS if (r["lab"], r["key"]) == ("quantization", "quantize-seconds")]
    gpu = [r["value"] for r in timed if "NVIDIA" in r["device"]]
    assert gpu
    assert max(gpu) <= 12


def test_two_in_four_helps_single_products_and_not_yet_the_whole_prefill():
    for matrix in ("q_proj", "up_proj", "down_proj"):
        assert shape_figures("sparse-speed-1")[matrix] < 0.5
        assert shape_figures("sparse-speed-4096")[matrix] > 1
    assert shape_figures("prefill-speed")["2:4"] < 0.5


@pytest.mark.parametrize("device", [d for d in devices("03-Inference") if "NVIDIA" in d])
def test_without_its_products_in_rows_two_in_four_loses_to_slow_attention(device):
    took = figures(device, "pruning", "03-Inference", "prefill")
    assert took["2:4 kernels"] > 5 * took["2:4 kernels, in rows"] > 5 * took["dense kernels"]


def test_only_products_profit_from_four_bits():
    kinds = ("products", "attention", "rest", "gaps")
    wide, narrow, ours = (
        {k: shape_figures(f"profile-{k}")[name] for k in kinds} for name in ("original", "torch-int4", "triton-int4")
    )
    assert wide["products"] > 2.3 * narrow["products"]
    assert all(other[k] > 0.9 * wide[k] for k in ("attention", "rest", "gaps") for other in (narrow, ours))
    assert sum(wide.values()) < 2.2 * sum(narrow.values())
    assert ours["products"] < 0.9 * narrow["products"]


def test_kernels_for_four_bits_compute_the_same():
    """The same codes, hence the same error, within what each kernel's rounding and another random input change."""
    error = shape_figures("output-error")
    assert error["original"] == 0
    for kernel in ("triton-int4", "torch-int4", "gptq-marlin", "gptq-triton"):
        assert error[kernel] == pytest.approx(0.112, rel=0.03)
