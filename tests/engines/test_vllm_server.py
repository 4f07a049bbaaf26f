"""vLLM: the checkpoints we hand it, and (slow) the real server on the embedded model."""

import importlib.util
import json
import os

import openai
import psutil
import pytest
import torch
from safetensors.torch import load_file
from serving_tools import alive, wait_until_gone

from common.course.assets import load_model, load_tokenizer
from common.course.embedded import embedded_folder
from common.engines import vllm_server
from common.engines.processes import EngineDied
from common.engines.vllm_server import VLLM, servable, serve_vllm
from common.formats.awq import repack_as_awq, repack_linear
from common.formats.gptq import load_dequantized, pack_linear, save_dense, save_gptq
from common.formats.packing import AWQ_ORDER, pack_outputs
from common.methods.quantization import QuantizeConfig, rtn, rtn_model

needs_vllm = pytest.mark.skipif(bool(vllm_server.missing()), reason=vllm_server.missing())


def unpack_as_vllm_does(packed: torch.Tensor) -> torch.Tensor:
    """vLLM's reading of AWQ words (`auto_awq.py`, `_convert_awq_to_standard_format`): integers [n, out]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    unpacked = (packed.unsqueeze(-1) >> shifts) & 15
    return unpacked[:, :, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(len(packed), -1)


def test_packing_by_hand():
    """The lowest four bits hold output 0, the next four output 2."""
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, :8] = torch.arange(8)
    assert pack_outputs(codes)[0].tolist() == [0x75316420, 0, 0, 0]
    assert sorted(AWQ_ORDER) == list(range(8))


def test_repacking_changes_no_number():
    weight = rtn(torch.randn(64, 96, generator=torch.Generator().manual_seed(0)), QuantizeConfig(bits=4, group_size=32))
    awq = repack_linear(pack_linear(weight))
    codes, zeros = unpack_as_vllm_does(awq["qweight"]), unpack_as_vllm_does(awq["qzeros"])
    scales = awq["scales"].float().repeat_interleave(32, dim=0)
    dense = (codes - zeros.repeat_interleave(32, dim=0)) * scales
    torch.testing.assert_close(dense.T, weight.dequantize(), rtol=0, atol=0)


def test_groups_that_are_not_consecutive_are_refused():
    tensors = pack_linear(rtn(torch.randn(32, 64), QuantizeConfig(bits=4, group_size=32)))
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(ValueError, match="no g_idx"):
        repack_linear(tensors)


@pytest.fixture
def checkpoint(make_llama, tokenizer, tmp_path):
    def write(bits=4):
        model = make_llama()
        quantized = rtn_model(model, QuantizeConfig(bits=bits, group_size=32))
        return save_gptq(tmp_path / "gptq", model, tokenizer, quantized, method="rtn", parent="original")

    return write


def test_only_four_bits_fit_awqs_format(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="holds 4 bits, gptq has 8"):
        repack_as_awq(checkpoint(bits=8), tmp_path / "awq")


@pytest.mark.parametrize("kernel", [True, False])
def test_what_vllm_is_given_depends_on_the_machine(checkpoint, tmp_path, monkeypatch, kernel):
    monkeypatch.setattr(vllm_server, "has_four_bit_kernel", lambda: kernel)
    source = checkpoint()
    served = servable(source, tmp_path / "served", torch.float32)
    assert served.method == ("awq-format" if kernel else "dense")
    assert served.settings["dtype"] == ("bfloat16" if kernel else "float32")
    assert (served.folder / "tokenizer.json").exists()


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16")])
def test_before_ampere_vllm_gets_float16(checkpoint, tmp_path, monkeypatch, capability, dtype):
    """A T4 has compute capability 7.5; vLLM refuses bfloat16 there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    served = servable(checkpoint(), tmp_path / "served", torch.bfloat16)
    assert served.settings["dtype"] == dtype
    tensors = load_file(served.folder / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == getattr(torch, dtype)


@pytest.fixture
def vllm(plant_vllm, tmp_path):
    """vllm(code) → the block `with serve_vllm` around a program of this code in vLLM's place."""

    def start(code: str):
        plant_vllm(code)
        return serve_vllm("model", tmp_path / "vllm.log", tokenizer="model", dtype="float32", context=64, sequences=1)

    return start


HEALTHY = """
import http.server, os, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        {fault}
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_a_vllm_that_cannot_start_says_why_in_one_error(vllm):
    refusal = "Bfloat16 is only supported on GPUs with compute capability of at least 8.0"
    with pytest.raises(EngineDied, match=f"vLLM ended with status 1.*\n.*{refusal}"), vllm(f"sys.exit('{refusal}')"):
        raise AssertionError("the block must not run")


def ask(server: VLLM):
    question = [{"role": "user", "content": "Hello"}]
    return server.client().chat.completions.create(model="course", messages=question)


def test_a_vllm_that_dies_while_it_is_asked(vllm):
    fault = HEALTHY.format(fault="os.kill(os.getpid(), 11)")
    with pytest.raises(EngineDied, match=r"vLLM crashed in its native code \(SIGSEGV\)"), vllm(fault) as server:
        ask(server)


def test_a_vllm_that_hangs(vllm, monkeypatch):
    monkeypatch.setattr(vllm_server, "ANSWER_SECONDS", 0.5)
    fault = HEALTHY.format(fault="time.sleep(600)")
    with pytest.raises(EngineDied, match=r"vLLM did not answer within 0\.5 s"), vllm(fault) as server:
        ask(server)


def test_the_client_goes_past_a_proxy(vllm, monkeypatch):
    """It would be handed every prompt."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    answer = "self.send_response(418); self.end_headers()"
    with vllm(HEALTHY.format(fault=answer)) as server, pytest.raises(openai.APIStatusError, match="418"):
        ask(server)


def test_a_dense_copy_has_the_same_weights(checkpoint, tmp_path):
    source = checkpoint()
    dense = save_dense(source, tmp_path / "dense", torch.float32)
    before = load_dequantized(source.folder, torch.float32).state_dict()
    after = load_model(str(dense.folder), torch.float32).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_kernel_is_read_off_the_log(tmp_path):
    log = tmp_path / "log"
    log.write_text("INFO [auto_awq.py:451] Using CPUWNA16LinearKernel for AutoAWQMarlinLinearMethod\n")
    assert VLLM("", log).kernel == "CPUWNA16LinearKernel"
    log.write_text("INFO Using max model len 1024\n")
    assert VLLM("", log).kernel == ""


def test_without_vllm_the_error_says_what_to_run(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_server, "ENVIRONMENT", tmp_path / "nowhere")
    with (
        pytest.raises(FileNotFoundError, match="make serve-env"),
        serve_vllm("model", tmp_path / "log", tokenizer="model", dtype="float32", context=64, sequences=1),
    ):
        raise AssertionError("the block must not run")


@pytest.mark.engines
@pytest.mark.skipif(not os.environ.get("COURSE_ENGINES"), reason="COURSE_ENGINES=1: both engines must be there")
def test_both_engines_are_installed():
    assert importlib.util.find_spec("llama_cpp"), "make engines failed"
    assert not vllm_server.missing(), "make serve-env failed"


@pytest.mark.engines
@pytest.mark.slow
@needs_vllm
def test_the_real_server_answers_and_is_gone_when_the_cell_fails(tmp_path):
    """Our checkpoint through the real vLLM; an exception in the block leaves no process behind."""
    model, tokenizer = load_model(str(embedded_folder()), torch.float32), load_tokenizer("embedded")
    quantized = rtn_model(model, QuantizeConfig(bits=4, group_size=64))
    source = save_gptq(tmp_path / "gptq", model, tokenizer, quantized, method="rtn", parent="original")
    served = servable(source, tmp_path / "served", torch.float32)
    options = {"dtype": served.settings["dtype"], "context": 256, "sequences": 2}
    with (
        pytest.raises(ZeroDivisionError),
        serve_vllm(served.folder, tmp_path / "log", tokenizer=served.folder, **options) as server,
    ):
        client = server.client()
        question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
        answer = client.chat.completions.create(model="course", messages=question, temperature=0, max_tokens=12)
        assert "Paris" in answer.choices[0].message.content
        assert bool(server.kernel) == vllm_server.has_four_bit_kernel()
        named = str(served.folder)
        servers = [p for p in psutil.process_iter(["cmdline"]) if named in " ".join(p.info["cmdline"] or [])]
        running = {p.pid for server in servers for p in [server, *server.children(recursive=True)]}
        assert len(running) >= 4 and all(map(alive, running))  # the guard, the server, its engine and its worker
        raise ZeroDivisionError
    wait_until_gone(running)


def test_the_awq_folder_says_what_its_tensors_are(checkpoint, tmp_path):
    """Groups of 32, zero points, GEMM layout: what vLLM reads before it reads a tensor."""
    source = checkpoint()
    awq = repack_as_awq(source, tmp_path / "awq")
    content = json.loads((awq.folder / "config.json").read_text(encoding="utf-8"))
    expected = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}
    assert content["quantization_config"] == expected
    assert awq.parent == source.name
    tensors, before = (load_file(a.folder / "model.safetensors") for a in (awq, source))
    layer = "model.layers.1.mlp.down_proj"
    for key, value in repack_linear(
        {k: before[f"{layer}.{k}"] for k in ("qweight", "qzeros", "scales", "g_idx")}
    ).items():
        assert torch.equal(tensors[f"{layer}.{key}"], value)
    assert not [name for name in tensors if name.endswith("g_idx")]
    others = {tensor.dtype for name, tensor in tensors.items() if name.endswith("weight") and "qweight" not in name}
    assert others == {torch.bfloat16}
