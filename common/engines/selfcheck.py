"""Whether the engine that `make engines` compiled works on this machine: `python -m common.engines.selfcheck`.

A tiny random Llama is exported, quantized, read (64 tokens: some kernels are used from 8 on only) and made to write;
llama.cpp does all of it in a process of its own, so that its crash is an answer here.
"""

import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.engines.llamacpp import LlamaCpp, quantize_gguf
from common.engines.processes import EngineDied
from common.formats.gguf import export_gguf

CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"
KINDS = ("Q8_0", "Q4_K_M", "Q4_0")
TOLERANCE = 0.3  # of the logits' norm; 4 bits move them by about a tenth, a broken kernel by their whole size


def main() -> int:
    """Check llama.cpp and say what was found; 0 when it works."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    try:
        with tempfile.TemporaryDirectory() as folder:
            _check(Path(folder))
    except (EngineDied, ModuleNotFoundError, RuntimeError, ValueError) as error:
        print(f"❌ llama.cpp does not work on this machine: {error}")
        return 1
    print(f"✅ llama.cpp works on this machine: F16, {', '.join(KINDS)} read 64 tokens and write")
    return 0


def _check(folder: Path) -> None:
    """Raises EngineDied where llama.cpp crashes, RuntimeError where it computes something else."""
    tiny_llama(folder / "model")
    files = {"F16": export_gguf(folder / "model", folder / "f16.gguf")}
    for kind in KINDS:
        files[kind] = quantize_gguf(files["F16"], folder / f"{kind}.gguf", kind)
    ids = torch.randint(256, (1, 64), generator=torch.Generator().manual_seed(0))
    expected = None
    for kind, file in files.items():
        with LlamaCpp(file, context=128) as engine:
            logits = engine(ids).logits
            expected = logits if expected is None else expected
            if not (logits - expected).norm() <= TOLERANCE * expected.norm():  # NaN is no match either
                raise RuntimeError(f"{kind} computes something else than F16")
            engine.generate("Hello", 8)


def tiny_llama(folder: Path) -> None:
    """A Llama of one block with rows of 256, which every quantization of llama.cpp takes, and a byte tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=320,
        bos_token_id=256,
        eos_token_id=257,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary | {"<s>": 256, "</s>": 257, "th": 258}, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, **ends).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
