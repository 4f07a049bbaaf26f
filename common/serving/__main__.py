"""Start the service.

    python -m common.serving --model embedded
    python -m common.serving --model path/to/folder --port 8080
    python -m common.serving --host 0.0.0.0 --hosts llm.example.org    from elsewhere, by that name; needs a key
    python -m common.serving --backend http://127.0.0.1:8000 --model NAME    NAME as the vLLM server there calls it

Clients send `Authorization: Bearer KEY` with the KEY of the environment variable COURSE_API_KEY, if that is set.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

import torch
import uvicorn
from transformers import AutoConfig

from common.course.assets import load_model, load_tokenizer, locate
from common.formats.gptq import load_dequantized
from common.serving import logs
from common.serving.api import Limits, create_app
from common.serving.backend import HttpEngine
from common.serving.connections import uvicorn_config
from common.serving.engine import TransformersEngine
from common.serving.guard import LOOPBACK


def load_engine(model: str, name: str, dtype: torch.dtype, limits: Limits) -> TransformersEngine:
    """The in-process engine for a model spec. A GPTQ checkpoint is unpacked: same numbers, dense kernels."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = locate(model)
    if getattr(AutoConfig.from_pretrained(source), "quantization_config", None):
        loaded = load_dequantized(Path(source), dtype).to(device)
    else:
        loaded = load_model(model, dtype, device)
    return TransformersEngine(
        loaded,
        load_tokenizer(model),
        name,
        slots=limits.slots,
        max_prompt=limits.max_prompt,
        max_output=limits.max_output,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Serve a model with OpenAI's API.")
    parser.add_argument("--model", default="embedded", help="embedded, a Hub id, a folder, or a name with --backend")
    parser.add_argument("--backend", metavar="URL", help="pass requests on to an OpenAI-compatible server")
    parser.add_argument("--name", help="the model's name in the API (default: the last part of --model)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument(
        "--hosts", nargs="+", default=LOOPBACK, metavar="NAME", help="names that clients call it by (Host), * for any"
    )
    parser.add_argument("--docs", action="store_true", help="FastAPI's pages about the service, at /docs")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the in-process engine"
    )
    for field in dataclasses.fields(Limits):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default)
    options = parser.parse_args(arguments)
    limits = Limits(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Limits)})
    api_key = os.environ.get("COURSE_API_KEY", "")
    if options.host not in LOOPBACK and not api_key:
        parser.error(f"--host {options.host} can be reached by others: set a key in COURSE_API_KEY first")

    if options.backend:
        engine = HttpEngine(options.backend, options.name or options.model, os.environ.get("BACKEND_API_KEY", ""))
    else:
        name = options.name or options.model.rstrip("/").split("/")[-1]
        try:
            engine = load_engine(options.model, name, getattr(torch, options.dtype), limits)
        except (OSError, ValueError, MemoryError) as error:  # these say what to do
            sys.exit(f"{type(error).__name__}: {error}")
    logs.configure()
    print(f"Serving {engine.name} at http://{options.host}:{options.port}/v1", flush=True)
    app = create_app(engine, limits, api_key, tuple(options.hosts), options.docs)
    uvicorn.Server(uvicorn_config(app, limits, options.host, options.port)).run()


if __name__ == "__main__":
    main()
