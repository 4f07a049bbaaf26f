"""The benchmark of a published shape: its steps on a tiny one, its arithmetic, and what happens when a kernel fails."""

import copy
import functools
import sys

import pytest
import torch
from torch import nn

from benchmarks import decode_kernels, shape_7b
from benchmarks.decode_kernels import (
    CONFIG,
    KERNELS,
    Kernel,
    bytes_of_weights,
    bytes_per_step,
    use_kernel,
)
from benchmarks.shape_7b import Build, NotHere, Run, floor_seconds
from common.course.settings import load_settings
from common.measure import results
from common.measure.benchmarking import Decoder
from common.methods.quantization import rtn

UNITS = {
    "bandwidth": "GB/s",
    "output-error": "relative",
    "weights-memory": "MB",
    "tpot-b": "ms",
    "throughput-b": "tokens/s",
    "speedup-b": "× 16 bits",
    "floor-share-b": "share",
    "peak-memory-b": "MB",
    "prefill": "ms",
    "prefill-speed": "× dense",
    "gptq-2-seconds": "s",
    "gptq-2-peak": "GiB",
    "gptq-4-seconds": "s",
    "gptq-4-peak": "GiB",
    "wanda-4-seconds": "s",
    "wanda-4-peak": "GiB",
}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """(run, its records) of all steps at the smoke profile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_WORK", str(tmp_path_factory.mktemp("work")))
        run = shape_7b.main(["--profile", "smoke"])
        return run, results.read(run.recorder.file)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_WORK", str(tmp_path))
    run = Run(load_settings("shape", "smoke", "shape:tiny"))
    run.begin("decode")
    return run


# --- the whole benchmark ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_step_that_a_cpu_can_run_leaves_its_figures(whole_run):
    _, records = whole_run
    found = {}
    for record in records:
        found.setdefault(record["notebook"].removeprefix("shape-7b-"), set()).add((record["artifact"], record["key"]))
        assert record["unit"] == UNITS[record["key"].rstrip("0123456789") if "-b" in record["key"] else record["key"]]
        may_be_zero = "peak" in record["key"] or record["key"] == "output-error"  # a small model hides in memory kept
        assert record["value"] > 0 or (may_be_zero and record["value"] == 0)
        assert (record["lab"], record["model"]) == ("shape", "shape:tiny")
    assert {artifact for artifact, _ in found["decode"]} == {"memory", "original", "torch-int4", "bnb-nf4"}
    assert found["prefill"] == {("dense", "prefill"), ("dense", "prefill-speed")}
    assert found["gptq"] == {("common", "gptq-2-seconds"), ("common", "gptq-2-peak")}
    assert found["gptqmodel"] == {("GPTQModel", "gptq-2-seconds"), ("GPTQModel", "gptq-2-peak")}
    assert found["gptq-long"] == {("common", "gptq-4-seconds"), ("common", "gptq-4-peak")}
    assert found["wanda"] == {("common", "wanda-4-seconds"), ("common", "wanda-4-peak")}
    assert {artifact for artifact, _ in found["decode-int8"]} == {"bnb-int8"}


@pytest.mark.slow
def test_ratios_belong_to_their_times(whole_run):
    _, records = whole_run
    value = {(r["artifact"], r["key"]): r["value"] for r in records}
    for batch in load_settings("shape", "smoke").batch_sizes:
        ratio = value["original", f"tpot-b{batch}"] / value["torch-int4", f"tpot-b{batch}"]
        assert value["torch-int4", f"speedup-b{batch}"] == pytest.approx(ratio)
        assert value["original", f"speedup-b{batch}"] == 1
        rate = 1e3 * batch / value["bnb-nf4", f"tpot-b{batch}"]
        assert value["bnb-nf4", f"throughput-b{batch}"] == pytest.approx(rate)


@pytest.mark.slow
def test_what_needs_a_gpu_is_named(whole_run):
    run, _ = whole_run
    skipped = [line.split() for line in run.lines if "skipped" in line]
    assert [line[1] for line in skipped] == [
        *("triton-int4", "gptq-triton", "profile", "prefill", "sparse", "gptq-exllama_v2", "gptq-marlin")
    ]
    assert all("GPU" in line for line in skipped)
    assert not [line for line in run.lines if "failed" in line]


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("nvjet_hsh_64x8_64x16_4x1_v_bz_TNN", "products"),
        ("void at::native::tinygemm_m16n8k16_chunk_kernel<at::native::ALayout_RM", "products"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16", "products"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention", "attention"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "rest"),
    ],
)
def test_kernels_are_grouped_by_what_they_are_for(kernel, group):
    assert shape_7b.group_of(kernel) == group


@pytest.mark.slow
def test_a_step_measured_again_leaves_the_other_steps_alone(run):
    run.record("prefill", 1.0, "ms", "dense", {})
    run.begin("wanda")
    run.record("wanda-4-seconds", 2.0, "s", "common", {})
    run.begin("wanda")
    assert [r["notebook"] for r in results.read(run.recorder.file)] == ["shape-7b-decode"]


def test_an_unknown_step_is_refused(capsys):
    with pytest.raises(SystemExit):
        shape_7b.main(["--only", "decoding"])
    assert "invalid choice: 'decoding'" in capsys.readouterr().err


# --- when something fails --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_failing_kernel_is_noted_and_the_others_go_on(run, monkeypatch):
    def broken(linear):
        raise RuntimeError("no kernel for this GPU\nand a long explanation")

    class Zero(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)[..., :128]

    monkeypatch.setitem(KERNELS, "torch-int4", Kernel(broken))
    monkeypatch.setitem(KERNELS, "gptq-triton", Kernel(lambda linear: Zero()))
    shape_7b.decode(run, ["torch-int4", "gptq-triton", "bnb-nf4"])
    records = results.read(run.recorder.file)
    failed = {r["artifact"]: r["protocol"]["error"] for r in records if r["key"] == "failed"}
    assert failed == {
        "torch-int4": "RuntimeError: no kernel for this GPU",
        "gptq-triton": "AssertionError: the kernel's output is off by 1.00: it computes something else",
    }
    assert {"original", "bnb-nf4"} == {r["artifact"] for r in records if r["key"] == "tpot-b1"}


def _pretend_python(tmp_path, monkeypatch, script: str) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_a_kernel_that_does_not_compile_says_why(tmp_path, monkeypatch):
    script = "echo 'RuntimeError: Extension load failed:' >&2; echo '- marlin: no nvcc' >&2; echo 'more' >&2; exit 1"
    _pretend_python(tmp_path, monkeypatch, script)
    with pytest.raises(RuntimeError, match=r"^it does not compile: - marlin: no nvcc$"):
        Build("marlin_fp16").wait(20)


def test_a_kernel_that_takes_too_long_to_compile_is_given_up(tmp_path, monkeypatch):
    _pretend_python(tmp_path, monkeypatch, "sleep 60")
    build = Build("marlin_fp16")
    with pytest.raises(NotHere, match="not compiled after waiting 0 s"):
        build.wait(0.2)
    assert build.process.poll() is not None


def test_kernels_compile_only_when_gptq_is_not_being_timed(run, monkeypatch):
    monkeypatch.setattr(shape_7b, "Build", lambda name: name)
    run.device = torch.device("cuda")
    for remaining in (["gptq", "wanda", "decode-jit"], ["wanda", "decode-int8"]):
        shape_7b.start_builds(run, remaining)
        assert not run.builds
    shape_7b.start_builds(run, ["wanda", "decode-jit"])
    assert run.builds == {"exllamav2": "exllamav2", "marlin_fp16": "marlin_fp16"}


# --- what the kernels compute ----------------------------------------------------------------------------------------


def test_layers_of_gptqmodel_compute_with_the_dequantized_weight():
    linear = nn.Linear(256, 96, bias=False)
    x = torch.randn(2, 3, 256)
    layer = decode_kernels.gptqmodel_layer(linear, "torch", "TorchLinear")
    decode_kernels.gptqmodel_finish(nn.Sequential(layer))
    with torch.inference_mode():
        expected = x @ rtn(linear.weight, CONFIG).dequantize().T
        torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3)  # it dequantizes to float16


def test_stacking_keeps_the_outputs_side_by_side():
    layers = [nn.Linear(8, n, bias=False) for n in (4, 6)]
    x = torch.randn(3, 8)
    torch.testing.assert_close(decode_kernels.stack(*layers)(x), torch.cat([layer(x) for layer in layers], -1))


@pytest.mark.parametrize("kv_heads", [2, 4])
@torch.inference_mode()
def test_lean_layers_compute_what_the_plain_ones_do(make_llama, kv_heads):
    plain = make_llama(num_key_value_heads=kv_heads)
    lean = copy.deepcopy(plain)
    assert use_kernel(lean, KERNELS["original"]) == 0
    logits = []
    for model in (plain, lean):
        torch.manual_seed(3)  # the decoder's prompt
        logits.append(Decoder(model, batch=2, context=12)())
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["torch-int4", "bnb-nf4", "bnb-int8"])
def test_every_kernel_comes_close_to_the_layer_it_replaces(make_llama, name):
    model = make_llama(hidden_size=128, intermediate_size=256)
    error = use_kernel(model, KERNELS[name])
    assert 0.001 < error < (0.03 if name == "bnb-int8" else 0.15)


# --- what a step must read -------------------------------------------------------------------------------------------


def test_floor(make_llama):
    model = make_llama(tie_word_embeddings=False)  # hidden 64, 3 layers, 2 heads of 16 for keys and values, 256 words
    block = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64
    rotary = sum(buffer.nbytes for buffer in model.buffers())
    read = 4 * (3 * block + 64 + 256 * 64) + rotary  # float32; the output head, but not the embedding
    cache = 4 * 2 * 3 * 2 * 16  # keys and values of one token of one sequence
    assert bytes_per_step(model, batch=1, context=10) == read + 10 * cache
    assert bytes_per_step(model, batch=8, context=10) == read + 80 * cache
    assert floor_seconds(model, 1, 10, bandwidth=1e6) == pytest.approx((read + 10 * cache) / 1e6)


def test_a_tied_embedding_is_read_as_the_output_head(make_llama):
    model = make_llama()
    assert bytes_per_step(model, 1, 0) == bytes_of_weights(model)


def test_packed_weights_count_as_they_are_kept(make_llama):
    """Four bits a weight, and for each group of 128 a scale of 16 bits and an offset of 16 bits."""
    model = make_llama(hidden_size=128, intermediate_size=256, tie_word_embeddings=False).bfloat16()
    before = bytes_of_weights(model)
    weights = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    use_kernel(model, KERNELS["torch-int4"])
    assert before - bytes_of_weights(model) == weights * 2 - weights // 2 - weights // 128 * 4


def test_kernels_of_gptqmodel_are_where_we_look_for_them():
    for kernel in KERNELS.values():
        if isinstance(kernel.convert, functools.partial):
            options = kernel.convert.keywords
            module = pytest.importorskip(f"gptqmodel.nn_modules.qlinear.{options['module']}")
            found = getattr(module, options["name"])
            assert CONFIG.bits in found.SUPPORTS_BITS and CONFIG.sym in found.SUPPORTS_SYM
            assert CONFIG.group_size in found.SUPPORTS_GROUP_SIZE and kernel.dtype in found.SUPPORTS_DTYPES
            assert not kernel.extension or kernel.extension in _extensions()


def _extensions() -> tuple[str, ...]:
    from gptqmodel import extension

    return extension.available_extensions()
